"""kernels/attention/ against softmax attention under an explicit mask, in float64: the four uses of a tower."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from twotower_jax.kernels import Keys, attention
from twotower_jax.kernels.attention import reference

pytestmark = pytest.mark.usefixtures("strict_dtypes")

TOLERANCE = 3e-6
B, H, K, P = 2, 6, 2, 4


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def oracle(q, key, value, visible, weights):
    """Output (B, L, H, P), and the gradients of its weighted sum; visible (B, L, T)."""

    def loss(*arrays):
        y = reference.attention_masked(*arrays, visible)
        return jnp.sum(y * weights), y

    gradients, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, key, value)
    return y, gradients


_oracle = jax.jit(oracle)


def masked(q, key, value, visible, weights=None):
    """`oracle` in float64."""
    weights = np.zeros_like(q) if weights is None else weights
    with jax.enable_x64(True):
        q, key, value, weights = (jnp.asarray(v, jnp.float64) for v in (q, key, value, weights))
        return jax.tree.map(np.asarray, _oracle(q, key, value, visible, weights))


def assert_close(found, expected, tolerance=TOLERANCE):
    assert found.shape == expected.shape
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance * np.max(np.abs(expected)))


def own_block_mask(length, block):
    """(L, L): position i sees all of its own block."""
    i = np.arange(length)
    return i[:, None] // block == i[None, :] // block


class Causal:
    """Training and prefill."""

    @staticmethod
    def arrays(length):
        return draw(0, B, length, H, P), draw(1, B, K, length, P), draw(2, B, K, length, P)

    @staticmethod
    def run(q, key, value, tile):
        return attention(q, (Keys(key, value, jnp.arange(1, q.shape[1] + 1)),), tile_size=tile)

    @staticmethod
    def visible(length):
        return np.broadcast_to(np.tri(length, dtype=bool), (B, length, length))


class AfterCache:
    """Decoding and cache extension; rows with caches of different lengths, one of them empty."""

    lengths = np.array([0, 5], np.int32)
    capacity = 9

    @classmethod
    def arrays(cls, length):
        total = cls.capacity + length
        return draw(0, B, length, H, P), draw(1, B, K, total, P), draw(2, B, K, total, P)

    @classmethod
    def run(cls, q, key, value, tile):
        split = cls.capacity
        cache = Keys(key[:, :, :split], value[:, :, :split], jnp.asarray(cls.lengths)[:, None])
        own = Keys(key[:, :, split:], value[:, :, split:], jnp.arange(1, q.shape[1] + 1))
        return attention(q, (cache, own), tile_size=tile)

    @classmethod
    def visible(cls, length):
        cache = np.arange(cls.capacity) < cls.lengths[:, None, None]
        own = np.broadcast_to(np.tri(length, dtype=bool), (B, length, length))
        return np.concatenate([np.broadcast_to(cache, (B, length, cls.capacity)), own], axis=-1)


class DenoiserTraining:
    """All blocks side by side, after the context's keys."""

    block = 4

    @classmethod
    def arrays(cls, length):
        return draw(0, B, length, H, P), draw(1, B, K, 2 * length, P), draw(2, B, K, 2 * length, P)

    @classmethod
    def run(cls, q, key, value, tile):
        length = q.shape[1]
        stop = jnp.arange(length) // cls.block * cls.block
        context = Keys(key[:, :, :length], value[:, :, :length], stop)
        own = key[:, :, length:], value[:, :, length:]
        return attention(q, (context,), own_block=own, block_size=cls.block, tile_size=tile)

    @classmethod
    def visible(cls, length):
        i = np.arange(length)
        context = i[None, :] < i[:, None] // cls.block * cls.block
        both = np.concatenate([context, own_block_mask(length, cls.block)], axis=-1)
        return np.broadcast_to(both, (B, *both.shape))


class Denoising:
    """One block after caches of different lengths."""

    lengths = np.array([7, 0], np.int32)
    capacity = 8

    @classmethod
    def arrays(cls, length):
        total = cls.capacity + length
        return draw(0, B, length, H, P), draw(1, B, K, total, P), draw(2, B, K, total, P)

    @classmethod
    def run(cls, q, key, value, tile):
        split = cls.capacity
        cache = Keys(key[:, :, :split], value[:, :, :split], jnp.asarray(cls.lengths)[:, None])
        own = key[:, :, split:], value[:, :, split:]
        return attention(q, (cache,), own_block=own, block_size=q.shape[1], tile_size=tile)

    @classmethod
    def visible(cls, length):
        cache = np.arange(cls.capacity) < cls.lengths[:, None, None]
        both = [np.broadcast_to(cache, (B, length, cls.capacity)), np.ones((B, length, length), bool)]
        return np.concatenate(both, axis=-1)


# One tile, tiles that divide the length, tiles that do not, tiles smaller than the block.
@pytest.mark.whole(but=["AfterCache-11-4", "DenoiserTraining-24-8", "Causal-20-512", "Denoising-6"])
@pytest.mark.parametrize(
    "use, length, tile",
    [
        (Causal, 1, 512),
        (Causal, 20, 512),
        (Causal, 20, 7),
        (AfterCache, 1, 512),
        (AfterCache, 6, 512),
        (AfterCache, 11, 4),
        (DenoiserTraining, 4, 512),
        (DenoiserTraining, 20, 512),
        (DenoiserTraining, 24, 8),
        (DenoiserTraining, 20, 9),
        (Denoising, 1, 512),
        (Denoising, 6, 512),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_attention_under_a_mask(use, length, tile):
    arrays = use.arrays(length)
    weights = draw(3, B, length, H, P)

    def loss(*arrays):
        y = use.run(*arrays, tile)
        return jnp.sum(y * weights), y

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    gradients, y = run(*arrays)
    y_expected, gradients_expected = masked(*arrays, use.visible(length), weights)
    assert_close(y, y_expected)
    for one, other in zip(gradients, gradients_expected, strict=True):
        assert_close(one, other)


_stops = jax.jit(lambda q, key, value, stop: attention(q, (Keys(key, value, stop),)))


@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    stops=st.lists(st.lists(st.integers(1, 7), min_size=5, max_size=5), min_size=B, max_size=B),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_any_stop_of_any_query(seed, stops, scale):
    """Also with scores so large that the softmax is all but a choice."""
    q, key, value = scale * draw(seed, B, 5, H, P), draw(seed + 1, B, K, 7, P), draw(seed + 2, B, K, 7, P)
    stops = np.array(stops, np.int32)
    found = _stops(q, key, value, stops)
    # Scores of 30 have errors of 30 · 2⁻²⁴, and so have the weights' logarithms.
    assert_close(found, masked(q, key, value, np.arange(7) < stops[..., None])[0], TOLERANCE * max(scale, 1))


def test_what_lies_beyond_the_stop_is_never_read():
    """The cache beyond a row's length holds anything."""
    q, key, value = draw(0, B, 5, H, P), draw(1, B, K, 9, P), draw(2, B, K, 9, P)
    stop = jnp.array([[3], [6]])
    expected = _stops(q, key, value, stop)
    for other in (1e30, -1e30, np.inf, np.nan):
        key[0, :, 3:] = key[1, :, 6:] = value[0, :, 3:] = value[1, :, 6:] = other
        np.testing.assert_array_equal(_stops(q, key, value, stop), expected)


def test_a_query_with_nothing_to_see_gives_zeros():
    """Padding may be such a query; its gradient must not poison the others'."""
    q, key, value = draw(0, B, 3, H, P), draw(1, B, K, 4, P), draw(2, B, K, 4, P)
    stop = jnp.array([[0], [4]])

    def loss(q, key, value):
        y = attention(q, (Keys(key, value, stop),))
        return jnp.sum(jnp.square(y[1])), y

    gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, key, value)
    assert not np.any(y[0])
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))
        assert not np.any(gradient[0])
        assert np.any(gradient[1])


def test_bfloat16_has_a_softmax_in_float32():
    length = 16
    q, key, value = (jnp.bfloat16(v) for v in Causal.arrays(length))
    y = Causal.run(q, key, value, 512)
    assert y.dtype == jnp.bfloat16
    expected = masked(*(np.asarray(v, np.float64) for v in (q, key, value)), Causal.visible(length))[0]
    assert_close(y, expected, 2**-7)


@pytest.mark.whole(but=["[1]", "[3]"])
@pytest.mark.parametrize("kv_heads", [1, 3, 6])
def test_query_heads_share_their_groups_key(kv_heads):
    q, key, value = draw(0, B, 5, H, P), draw(1, B, kv_heads, 5, P), draw(2, B, kv_heads, 5, P)
    y = attention(jnp.asarray(q), (Keys(jnp.asarray(key), jnp.asarray(value), jnp.arange(1, 6)),))
    assert_close(y, masked(q, key, value, Causal.visible(5))[0])


def test_tiles_bound_the_scores():
    """The scores of all queries would take 4096² floats a head; those of a tile are a sixteenth."""
    length, heads = 4096, 2

    def temporaries(tile):
        def run(q, key, value):
            return jnp.sum(attention(q, (Keys(key, value, jnp.arange(1, length + 1)),), tile_size=tile))

        shapes = [(1, length, heads, 2), (1, heads, length, 2), (1, heads, length, 2)]
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        lowered = jax.jit(jax.grad(run, argnums=(0, 1, 2))).lower(*shapes)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(256) < 0.1 * temporaries(length)
