"""Every implementation of kernels/causal_conv/ against a sum over a window, in float64."""

import functools
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from twotower_jax import kernels

pytestmark = pytest.mark.usefixtures("strict_dtypes")

TOLERANCE = 3e-6


@pytest.fixture(params=["xla", "pallas_tpu_interpret"])
def implementation(request):
    return request.param


@pytest.fixture
def causal_conv(implementation):
    return jax.jit(functools.partial(kernels.causal_conv, implementation=implementation))


@pytest.fixture
def block_causal_conv(implementation):
    return jax.jit(functools.partial(kernels.block_causal_conv, implementation=implementation), static_argnums=4)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(np.float64)


def silu(x):
    return x / (1 + np.exp(-x))


def window_sums(x, weight, bias, tail):
    """Raw sums before the activation; `tail` holds the inputs before x, newest last."""
    width = len(weight)
    inputs = np.concatenate([tail, x], axis=1)[:, -(x.shape[1] + width - 1) :]
    out = np.zeros_like(x)
    for t in range(x.shape[1]):
        for k in range(width):
            out[:, t] += weight[k] * inputs[:, t + k]
    return out if bias is None else out + bias


def literal(x, weight, bias, tail):
    return silu(window_sums(x, weight, bias, tail))


def gradients(function, *arrays):
    """The gradients of a sum with a weight for each entry, in every array."""

    def loss(*arrays):
        y = function(*arrays)
        return jnp.sum(y * draw(99, *y.shape).astype(np.float32))

    compiled = jax.jit(jax.grad(loss, argnums=tuple(range(len(arrays)))))
    return compiled(*(jax.device_put(np.asarray(v, np.float32)) for v in arrays))


def literal_gradients(x, weight, bias, tail):
    sums, width = window_sums(x, weight, bias, tail), len(weight)
    sigmoid = 1 / (1 + np.exp(-sums))
    dsums = draw(99, *x.shape) * sigmoid * (1 + sums * (1 - sigmoid))
    inputs = np.concatenate([tail, x], axis=1)
    dinputs, dweight, first = np.zeros_like(inputs), np.zeros_like(weight), tail.shape[1] - width + 1
    for t in range(x.shape[1]):
        for k in range(width):
            dinputs[:, first + t + k] += weight[k] * dsums[:, t]
            dweight[k] += np.sum(inputs[:, first + t + k] * dsums[:, t], axis=0)
    return dinputs[:, tail.shape[1] :], dweight, dsums.sum((0, 1)), dinputs[:, : tail.shape[1]]


def assert_close(found, expected):
    found = np.asarray(found, np.float64)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE * np.max(np.abs(expected), initial=1e-3))


# Length, width, length of the tail: shorter than the window, as long, longer; a tail longer than needed.
@pytest.mark.whole(but=["-1-4-3", "11-4-6", "3-1-2"])
@pytest.mark.parametrize("length, width, before", [(1, 4, 3), (2, 4, 4), (4, 4, 3), (11, 4, 6), (5, 2, 1), (3, 1, 2)])
def test_causal_conv_after_a_tail(causal_conv, length, width, before):
    arrays = draw(0, 2, length, 3), draw(1, width, 3), draw(2, 3), draw(3, 2, before, 3)
    found = causal_conv(*(jax.device_put(np.asarray(v, np.float32)) for v in arrays))
    assert_close(found, literal(*arrays))
    for one, other in zip(gradients(causal_conv, *arrays), literal_gradients(*arrays), strict=True):
        assert_close(one, other)


def test_without_a_tail_or_a_bias(causal_conv):
    x, weight = draw(0, 2, 7, 3), draw(1, 4, 3)
    zeros = np.zeros((2, 3, 3))
    assert_close(causal_conv(np.float32(x), np.float32(weight), None), literal(x, weight, None, zeros))


def test_a_tail_continues_a_sequence(causal_conv):
    x, weight, bias = (np.float32(v) for v in (draw(0, 2, 9, 3), draw(1, 4, 3), draw(2, 3)))
    whole = causal_conv(x, weight, bias)
    for cut in (1, 2, 3, 8):
        # All of the past, zeros included, is a valid tail.
        tail = np.concatenate([np.zeros((2, 3, 3), np.float32), x[:, :cut]], axis=1)
        np.testing.assert_allclose(causal_conv(x[:, cut:], weight, bias, tail), whole[:, cut:], rtol=1e-6, atol=1e-6)


def test_bfloat16_is_summed_in_float32(causal_conv):
    x, weight, bias, tail = (jnp.bfloat16(v) for v in (draw(0, 2, 9, 3), draw(1, 4, 3), draw(2, 3), draw(3, 2, 3, 3)))
    found = causal_conv(x, weight, bias, tail)
    assert found.dtype == jnp.bfloat16
    expected = literal(*(np.asarray(v, np.float64) for v in (x, weight, bias, tail)))
    # One rounding, at the end.
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8 * 1.01, atol=1e-6)


@pytest.mark.whole(but=["-7-3", "-1-6"])
@pytest.mark.parametrize("block, blocks", [(1, 6), (2, 4), (3, 3), (4, 2), (7, 3), (8, 1)])
def test_block_causal_conv_block_by_block(block_causal_conv, block, blocks):
    """Blocks shorter than the window reach over several blocks of the context."""
    length = block * blocks
    x, context, weight, bias = draw(0, 2, length, 3), draw(1, 2, length, 3), draw(2, 4, 3), draw(3, 3)
    found = block_causal_conv(*(np.float32(v) for v in (x, context, weight, bias)), block)
    padded = np.concatenate([np.zeros((2, 3, 3)), context], axis=1)
    expected = [literal(x[:, e : e + block], weight, bias, padded[:, : 3 + e]) for e in range(0, length, block)]
    assert_close(found, np.concatenate(expected, axis=1))

    # Each gradient along a random direction, against a difference quotient in float64.
    dx, dcontext, dweight, dbias = gradients(lambda *a: block_causal_conv(*a, block), x, context, weight, bias)
    weights = draw(99, *x.shape)
    step = 1e-5
    rng = np.random.default_rng(7)
    directions = [rng.standard_normal(v.shape) for v in (x, context, weight, bias)]

    def loss(x, context, weight, bias):
        padded = np.concatenate([np.zeros((2, 3, 3)), context], axis=1)
        edges = range(0, length, block)
        out = [literal(x[:, e : e + block], weight, bias, padded[:, : 3 + e]) for e in edges]
        return np.sum(np.concatenate(out, axis=1) * weights)

    arrays = (x, context, weight, bias)
    for i, gradient in enumerate((dx, dcontext, dweight, dbias)):
        moved = [[v + sign * step * (j == i) * directions[j] for j, v in enumerate(arrays)] for sign in (1, -1)]
        slope = (loss(*moved[0]) - loss(*moved[1])) / (2 * step)
        assert np.sum(np.asarray(gradient, np.float64) * directions[i]) == pytest.approx(slope, rel=1e-4, abs=1e-4)
    # The context's last block is seen by nobody.
    assert not np.any(dcontext[:, length - block :])


def random_case(seed, blocks, longest, channels):
    """Arguments of `block_causal_conv`, or without blocks of `causal_conv`, over several steps of a kernel's grid."""
    rng = np.random.default_rng(seed)
    block = int(rng.choice([1, 3, 5, 16])) if blocks else 1
    length = block * int(rng.integers(1, 1 + min(8, longest // block))) if blocks else int(rng.integers(1, longest))
    width, rows = int(rng.integers(1, 6)), int(rng.integers(1, 3))
    start = np.maximum.accumulate(np.where(rng.random((rows, length)) < 0.1, np.arange(length), 0), axis=1)
    before = np.arange(length) - start // block * block if rng.random() < 0.5 else None
    arrays = [draw(seed + i, rows, length, channels) for i in range(2 if blocks else 1)]
    arrays += [draw(seed + 2, width, channels), draw(seed + 3, channels)]
    arrays += [draw(seed + 4, rows, width - 1 + int(rng.integers(0, 2)), channels)]
    return block, before, arrays


def check_against_the_reference(seed, blocks, implementation, longest=70, channels=3, **tiles):
    """Outputs and every gradient, the reference's by differentiating it in float64; `tiles`, sizes of them."""
    block, before, arrays = random_case(seed, blocks, longest, channels)

    def run(name, *arrays, **tiles):
        op = "block_causal_conv" if blocks else "causal_conv"
        convolution = functools.partial(getattr(kernels, op), implementation=name)
        if tiles:  # Arguments of an implementation, not of the op.
            convolution = functools.partial(kernels.OPS[op].run, name, **tiles)

        def function(*arrays):
            *rest, tail = arrays
            limits = None if before is None else jnp.asarray(before)
            return convolution(*rest, *([block] if blocks else []), tail, limits)

        return jax.jit(functools.partial(with_gradients, function))(*arrays)

    def with_gradients(function, *arrays):
        y, back = jax.vjp(function, *arrays)
        return y, *back(jnp.asarray(draw(99, *y.shape), y.dtype))

    found = run(implementation, *map(np.float32, arrays), **tiles)
    with jax.enable_x64(True):
        expected = run("reference", *(jnp.asarray(v, jnp.float64) for v in arrays))
    for one, other in zip(found, expected, strict=True):
        if one.size:
            assert_close(one, np.asarray(other))


@pytest.mark.whole
@hypothesis.given(
    seed=st.integers(0, 2**16),
    blocks=st.booleans(),
    tiles=st.sampled_from([("xla", {}), ("pallas_tpu_interpret", {"positions": 32})]),
)
@hypothesis.settings(max_examples=4)
def test_random_shapes_documents_and_blocks(seed, blocks, tiles):
    """In the kernel by steps of 32 positions, so that short sequences take several of them."""
    implementation, sizes = tiles
    check_against_the_reference(seed, blocks, implementation, **sizes)


@pytest.mark.whole(but=["16-True"])
@pytest.mark.parametrize(("seed", "blocks"), [(28, False), (16, True), (31, True)])
def test_the_gpu_kernels(seed, blocks):
    """Which take multiples of 128 channels, and are interpreted slowly: programs of 8 positions."""
    check_against_the_reference(seed, blocks, "mosaic_gpu_interpret", longest=20, channels=128, positions=8)


def test_a_frozen_context_costs_no_gradient_of_it():
    """The kernel's backward pass has no output for it, nor for the tail: those of x and of the parameters are left."""
    arrays = [jnp.float32(v) for v in (draw(0, 1, 32, 3), draw(1, 1, 32, 3), draw(2, 4, 3), draw(3, 3))]

    def results(argnums):
        def loss(*arrays):
            return jnp.sum(kernels.block_causal_conv(*arrays, 4, implementation="pallas_tpu_interpret"))

        gradient = str(jax.make_jaxpr(jax.grad(loss, argnums=argnums))(*arrays))
        return [len(found.split()) for found in re.findall(r"\n +((?:\w+:\S+ )+)= pallas_call", gradient)]

    assert results((0, 2)) == [1, 2]
    assert results((0, 1, 2)) == [1, 4]


def test_a_convolution_of_width_one_reads_no_context(block_causal_conv):
    x, context, weight, bias = draw(0, 2, 6, 3), draw(1, 2, 6, 3), draw(2, 1, 3), draw(3, 3)
    found = block_causal_conv(*(np.float32(v) for v in (x, context, weight, bias)), 2)
    assert_close(found, silu(weight[0] * x + bias))


def test_blocks_divide_the_length():
    x, weight = jnp.zeros((1, 10, 3)), jnp.zeros((4, 3))
    with pytest.raises(ValueError, match="block_causal_conv: block_size=4 does not divide the length 10"):
        kernels.block_causal_conv(x, x, weight, None, 4)
