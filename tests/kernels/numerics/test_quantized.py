"""kernels/numerics/quantized.py: bounds, exact cases, and the layout of halves of bytes, written out."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from twotower_jax.kernels.numerics.quantized import Quantized, dequantize, group_size, quantize

pytestmark = pytest.mark.usefixtures("strict_dtypes")

SHAPES = [((16, 3), 8), ((2, 12, 5), 4), ((3, 2, 6, 1), 6), ((128, 7), 64), ((4, 2), 2)]


def literal(q: Quantized) -> np.ndarray:
    """Element by element, in float64, from the description of the layout."""
    values, scales = np.asarray(q.values), np.asarray(q.scales, np.float64)
    out = np.zeros(q.shape)
    group = q.shape[-2] // scales.shape[-2]
    for *leading, k, n in np.ndindex(*q.shape):
        index = tuple(leading)
        number, place = divmod(k, group)
        if q.bits == 8:
            value = int(values[(*index, k, n)])
        else:
            half = group // 2
            byte = int(values[(*index, number * half + place % half, n)]) & 0xFF
            value = byte & 0xF if place < half else byte >> 4
            value -= 16 if value > 7 else 0
        out[(*index, k, n)] = value * scales[(*index, number, n)]
    return out


@pytest.mark.parametrize("scale_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape, group", SHAPES)
def test_layout_and_bound(shape, group, bits, scale_dtype):
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    q = quantize(w, bits, group, scale_dtype=scale_dtype)
    assert q.shape == shape and q.group == group and q.ndim == len(shape)
    assert q.values.dtype == jnp.int8 and q.scales.dtype == scale_dtype
    assert q.values.shape == (*shape[:-2], shape[-2] * bits // 8, shape[-1])
    expected = literal(q)
    np.testing.assert_allclose(dequantize(q, jnp.float32), expected, rtol=2e-7, atol=0)
    scale = np.repeat(np.asarray(q.scales, np.float64), group, axis=-2)
    assert np.all(np.abs(w - expected) <= scale * (0.5 + 1e-5))
    largest = np.max(np.abs(np.asarray(dequantize(quantize(w, bits, group), jnp.float32))), axis=-2)
    np.testing.assert_allclose(largest, np.max(np.abs(w), axis=-2), rtol=1e-6)


@functools.partial(jax.jit, static_argnums=(1, 2))
def both(w, bits, group):
    q = quantize(w, bits, group)
    return q, dequantize(q, jnp.float32)


@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([8, 4]),
    half=st.sampled_from([1, 3]),
    groups=st.just(2),
    exponent=st.integers(-30, 30),
)
def test_quantized_again_it_stays(seed, bits, half, groups, exponent):
    """What `dequantize` gives is a fixed point, at any magnitude; the sign flips with it."""
    w = np.random.default_rng(seed).standard_normal((2 * half * groups, 2)).astype(np.float32)
    w *= np.float32(2.0**exponent)
    q, once = both(w, bits, 2 * half)
    again, _ = both(once, bits, 2 * half)
    np.testing.assert_array_equal(again.values, q.values)
    np.testing.assert_allclose(again.scales, q.scales, rtol=3e-7)
    np.testing.assert_array_equal(both(-w, bits, 2 * half)[1], -once)


@pytest.mark.parametrize("bits", [8, 4])
def test_whole_numbers_are_exact_and_zeros_stay(bits):
    largest = 127 if bits == 8 else 7
    w = np.arange(-largest, largest + 1, dtype=np.float32)
    w = np.concatenate([w, [largest]])[:, None] * np.float32(0.25)
    w = np.concatenate([w, np.zeros_like(w)], axis=1)
    q = quantize(w, bits, w.shape[0])
    np.testing.assert_array_equal(dequantize(q, jnp.float32), w)
    np.testing.assert_array_equal(q.scales[0], [0.25, 0])
    assert np.all(np.isfinite(dequantize(quantize(np.full((4, 1), 1e-44, np.float32), bits, 4), jnp.float32)))


def test_halves_round_to_even():
    w = np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5], np.float32)[:, None]
    np.testing.assert_array_equal(quantize(w, 8, 6).values[:, 0], [127, 0, 2, 2, 0, -2])


@pytest.mark.parametrize("bits", [8, 4])
def test_a_pytree_that_indexes_and_jits(bits):
    w = np.random.default_rng(0).standard_normal((3, 8, 2)).astype(np.float32)
    q = quantize(w, bits, 4)
    whole = dequantize(q, jnp.bfloat16)
    assert whole.dtype == jnp.bfloat16
    np.testing.assert_array_equal(jax.jit(lambda q, i: dequantize(q[i], jnp.bfloat16))(q, 1), whole[1])
    np.testing.assert_array_equal(jax.vmap(lambda q: dequantize(q, jnp.bfloat16))(q), whole)
    assert [leaf.dtype for leaf in jax.tree.leaves(q)] == [jnp.int8, jnp.float32]


def test_group_sizes():
    assert {group_size(k, b) for k in (1856, 2688, 64, 4096) for b in (8, 4)} == {64}
    assert group_size(50, 8) == group_size(50, 4) == 50
    assert group_size(75, 8) == 25
    assert group_size(150, 4) == 50 and group_size(150, 8) == 50
    assert group_size(67, 8) == 1 and group_size(134, 4) == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda: group_size(67, 4),
        lambda: group_size(64, 3),
        lambda: quantize(np.zeros((6, 1), np.float32), 8, 4),
        lambda: quantize(np.zeros((6, 1), np.float32), 4, 3),
        lambda: quantize(np.zeros((6, 1), np.float32), 2, 3),
        lambda: quantize(np.zeros((6, 1), np.float32), 8, 0),
    ],
)
def test_what_cannot_be_cut_is_refused(call):
    with pytest.raises(ValueError, match="rows|bits"):
        call()
