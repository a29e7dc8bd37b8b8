"""The attention kernels of kernels/attention/tpu.py and mosaic_gpu.py, interpreted, against the mask in float64.

Tiles are small here, so that few positions have whole ones, masked ones, ones that are cut, and ones that are left out.
"""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from twotower_jax.kernels import Keys
from twotower_jax.kernels.attention import mosaic_gpu as attention_gpu
from twotower_jax.kernels.attention import reference
from twotower_jax.kernels.attention import tpu as attention_tpu
from twotower_jax.kernels.attention.tpu_layout import TileSizes
from twotower_jax.layers import attention as layer
from twotower_jax.sharding import MeshShape, make_mesh

pytestmark = pytest.mark.usefixtures("strict_dtypes")

# Largest difference over the largest entry. In float32; in bfloat16, of which the weights are rounded for the product,
# and outputs and gradients to 8 bits.
TOLERANCE = {"tpu": 3e-6, "gpu": 2**-6}
DTYPE = {"tpu": jnp.float32, "gpu": jnp.bfloat16}
PLATFORMS = ("tpu", "gpu")
B, H, K, P = 2, 4, 2, 16


SIZES = {
    "tpu": TileSizes(positions=16, rows=32, rows_backward=16, keys=32),
    "gpu": attention_gpu.Sizes(rows=32, keys=32, keys_backward=32, blocks=8, few=8),
}
MODULES = {"tpu": attention_tpu, "gpu": attention_gpu}


def run(platform):
    return functools.partial(MODULES[platform].attention, sizes=SIZES[platform], interpret=True)


def draw(platform, seed, *shapes):
    """Arrays of the platform's dtype, as it rounds them, in float64."""
    rng = np.random.default_rng(seed)
    return [np.asarray(np.asarray(rng.standard_normal(s), DTYPE[platform]), np.float64) for s in shapes]


def to(platform, arrays):
    return [jax.device_put(np.asarray(v, DTYPE[platform])) for v in arrays]


def check(found, expected, platform, scale=1.0):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        error = np.max(np.abs(np.asarray(one, np.float64) - other), initial=0.0)
        assert error <= scale * TOLERANCE[platform] * np.max(np.abs(other), initial=1e-3)


def ends(*numbers):
    return jnp.atleast_2d(jnp.asarray(numbers[0] if len(numbers) == 1 else numbers, jnp.int32))


def denoiser(length, block, start=None):
    """Shapes, and sources and own block of the arrays after the queries."""

    def sources(key, value, *own):
        return (Keys(key, value, ends(np.arange(length) // block * block), start),), own, block

    return [(B, K, length, P)] * 4, sources


def causal(length, start=None):
    def sources(key, value):
        return (Keys(key, value, ends(np.arange(1, length + 1)), start),), None, None

    return [(B, K, length, P)] * 2, sources


def after_cache(length, capacity, lengths, own):
    """A block that is seen whole, or tokens that are seen causally."""
    cache, new = (B, K, capacity, P), (B, K, length, P)

    def sources(key, value, own_key, own_value):
        source = Keys(key, value, jnp.asarray(lengths, jnp.int32)[:, None])
        if own:
            return (source,), (own_key, own_value), length
        return (source, Keys(own_key, own_value, ends(np.arange(1, length + 1)))), None, None

    return [cache, cache, new, new], sources


def compare(platform, length, use, *, heads=(H, K, P), gradient=True, seed=0, scale=1.0):
    """Output and, of a weighted sum of it, all gradients; `heads` are H, K and P."""
    shapes, sources = use
    queries, kv_heads, head_dim = (B, length, heads[0], heads[2]), *heads[1:]
    arrays = draw(platform, seed, queries, *[(B, kv_heads, count, head_dim) for _, _, count, _ in shapes])
    (weights,) = draw(platform, seed + 1, queries)
    arrays[0] *= scale

    def outputs(function, arrays, weights):
        def loss(q, *rest):
            found, own, block = sources(*rest)
            y = function(q, found, own_block=own or None, block_size=block)
            return jnp.sum((y * weights).astype(jnp.float64 if y.dtype == jnp.float64 else jnp.float32)), y

        if not gradient:
            return loss(*arrays)[1]
        found, y = jax.grad(loss, argnums=tuple(range(len(arrays))), has_aux=True)(*arrays)
        return y, found

    found = jax.jit(functools.partial(outputs, run(platform)))(to(platform, arrays), *to(platform, [weights]))
    with jax.enable_x64(True):
        expected = jax.jit(functools.partial(outputs, reference.attention))([*map(jnp.asarray, arrays)], weights)
        expected = jax.tree.map(np.asarray, expected)
    for one, like in zip(jax.tree.leaves(found), [arrays[0], *arrays] if gradient else [arrays[0]], strict=True):
        assert one.shape == like.shape and one.dtype == DTYPE[platform]
    check(found, expected, platform, max(scale, 1.0))


@pytest.mark.whole(but=["gpu-48-8"])
@pytest.mark.parametrize(("platform", "length", "block"), [("tpu", 72, 8), ("tpu", 30, 5), ("gpu", 48, 8)])
def test_denoiser_training_and_all_its_gradients(platform, length, block):
    compare(platform, length, denoiser(length, block))


@pytest.mark.whole
@pytest.mark.parametrize(("heads", "block"), [((3, 3, 24), 8), ((6, 2, 5), 12), ((5, 1, 16), 20)], ids=str)
def test_any_heads_and_blocks(heads, block):
    """As many keys as queries, three and five that share a key; blocks of which 16 positions are not made."""
    compare("tpu", 120, denoiser(120, block), heads=heads)


@pytest.mark.whole
@pytest.mark.parametrize("length", [1, 5, 20])
def test_gradients_of_several_sources(length):
    """A cache, whose heads lie apart, and the tokens just read, in one tile with the queries or in several."""
    compare("tpu", length, after_cache(length, 40, (33, 0), False))


@pytest.mark.whole(but=["tpu"])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_documents_side_by_side(platform):
    """Each row its own; a document's first block sees no context at all."""
    length = {"tpu": 72, "gpu": 48}[platform]
    start = np.zeros((B, length), np.int32)
    start[0, 24:], start[0, length - 8 :], start[1, 8:] = 24, length - 8, 8
    compare(platform, length, denoiser(length, 8, start))
    compare(platform, length, causal(length, start), gradient=False)


@pytest.mark.whole(but=["tpu-65"])
@pytest.mark.parametrize(("platform", "length"), [("tpu", 64), ("tpu", 65), ("gpu", 41)])
def test_causal_and_all_its_gradients(platform, length):
    compare(platform, length, causal(length))


@pytest.mark.whole(but=["5-80-(32, 33)", "16-72-(31, 1)-True-tpu"])
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("length", "capacity", "lengths", "own"),
    [(1, 96, (0, 96), False), (5, 80, (32, 33), False), (16, 72, (31, 1), True), (3, 40, (0, 0), True)],
    ids=lambda v: str(v),
)
def test_after_a_cache(platform, length, capacity, lengths, own):
    compare(platform, length, after_cache(length, capacity, lengths, own), gradient=False)


_uses = st.one_of(
    st.tuples(st.just(denoiser), st.integers(1, 6), st.sampled_from([1, 3, 8, 16])),
    st.tuples(st.just(after_cache), st.integers(1, 20), st.integers(9, 90)),
)


@pytest.mark.whole
@pytest.mark.parametrize("platform", PLATFORMS)
@hypothesis.settings(max_examples=4, phases=[hypothesis.Phase.generate])  # Minutes to shrink.
@hypothesis.given(use=_uses, seed=st.integers(0, 2**31), scale=st.sampled_from([0.0, 1.0, 20.0]), data=st.data())
def test_random_shapes_blocks_and_lengths(platform, use, seed, scale, data):
    kind, first, second = use
    if kind is denoiser:
        compare(platform, first * second, denoiser(first * second, second), gradient=False, seed=seed, scale=scale)
    else:
        lengths = data.draw(st.tuples(*[st.integers(0, second)] * B))
        cache = after_cache(first, second, lengths, data.draw(st.booleans()))
        compare(platform, first, cache, gradient=False, seed=seed, scale=scale)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_what_lies_beyond_a_caches_length_is_not_read(platform):
    """NaN and huge numbers there leave no trace, within the last tile that is read and beyond it."""
    q, key, value = to(platform, draw(platform, 0, (B, 3, H, P), (B, K, 96, P), (B, K, 96, P)))
    lengths = jnp.array([[5], [40]])
    found = jax.jit(lambda *kv: run(platform)(q, (Keys(*kv, lengths),)))
    expected = found(key, value)
    after = jnp.arange(96)[:, None] >= lengths[:, :, None, None]
    for other in (np.nan, 1e30):
        spoiled = (jnp.where(after, jnp.asarray(other, v.dtype), v) for v in (key, value))
        np.testing.assert_array_equal(found(*spoiled), expected)


@pytest.mark.whole(but=["gpu"])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_rows_that_see_nothing_give_zeros_and_no_gradient(platform):
    arrays = to(platform, draw(platform, 0, (B, 40, H, P), (B, K, 40, P), (B, K, 40, P)))
    stop = jnp.stack([jnp.arange(40) // 8 * 8, jnp.zeros(40, jnp.int32)])

    def loss(*arrays):
        y = run(platform)(arrays[0], (Keys(*arrays[1:], stop),))
        return jnp.sum(jnp.square(y.astype(jnp.float32))), y

    gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    for v in (y, *gradients):
        assert np.all(np.isfinite(np.asarray(v, np.float32)))
        assert not np.any(v[1])
    assert not np.any(y[0, :8])
    assert np.all(np.any(y[0, 8:] != 0, axis=-1))


@pytest.mark.whole
def test_each_device_takes_its_positions_and_heads():
    """A sequence and its heads divided over devices: limits go along with the queries, document starts too."""
    length, block = 32, 8
    start = jnp.asarray(np.repeat([[0, 16]], 16, axis=1).reshape(1, length) * np.ones((B, 1), int), jnp.int32)
    arrays = draw("tpu", 0, (B, length, H, P), *[(B, K, length, P)] * 4)

    def run(function, *arrays):
        def loss(q, key, value, *own):
            source = Keys(key, value, ends(np.arange(length) // block * block), start)
            y = function(q, (source,), own, block)
            return jnp.sum(jnp.square(y)), y

        return jax.grad(loss, argnums=tuple(range(5)), has_aux=True)(*arrays)

    def divided(q, sources, own, block):
        sources = tuple(s._replace(key=layer._side_by_side(s.key), value=layer._side_by_side(s.value)) for s in sources)
        own, flat = tuple(map(layer._side_by_side, own)), q.reshape(*q.shape[:2], -1)
        return layer._attend(P, flat, sources, own, block, "pallas_tpu_interpret").reshape(q.shape)

    def whole(q, sources, own, block):
        return reference.attention(q, sources, own_block=own, block_size=block)

    with jax.set_mesh(make_mesh(MeshShape(sequence=2, tensor=2), jax.devices()[:4])):
        found = jax.jit(functools.partial(run, divided))(*to("tpu", arrays))
        found = jax.tree.map(np.asarray, found)
    with jax.enable_x64(True):
        expected = jax.tree.map(np.asarray, jax.jit(functools.partial(run, whole))(*arrays))
    check(found, expected, "tpu")
