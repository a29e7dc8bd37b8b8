"""A model's attention layer, for kernel_compile.py."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from twotower_jax import kernels
from twotower_jax.benchmarks._shapes import LayerShape

_LENGTH, _BLOCK = 8192, 16
Shapes = list[tuple[tuple[int, ...], jnp.dtype]]


def implementation(platform: str, dtype: jnp.dtype) -> str:
    """What is made for a platform and takes the dtype."""
    if platform == "tpu":
        return "pallas_tpu"
    return "mosaic_gpu" if dtype == jnp.bfloat16 else "xla"


def cases(layer: LayerShape, dtype: jnp.dtype, name: str) -> Iterator[tuple[str, Callable, Shapes]]:
    """What is compiled, its function and its shapes, for the implementation of a name.

    Heads lie side by side, as projections leave them, but in caches.
    """

    def side_by_side(heads, batch, length):
        return (batch, length, heads * layer.query_dim), dtype

    def keys(batch, length):
        return [side_by_side(layer.kv_heads, batch, length)] * 2

    def apart(v):
        return v.reshape(*v.shape[:2], -1, layer.query_dim)

    def heads_first(*arrays):
        return tuple(jnp.swapaxes(apart(v), 1, 2) for v in arrays)

    def attention(q, sources, **own):
        return kernels.attention(apart(q), sources, **own, implementation=name).reshape(q.shape)

    def causal(q, *pair):
        return attention(q, (kernels.Keys(*heads_first(*pair), jnp.arange(1, q.shape[1] + 1)),))

    def blocks(q, key, value, *own):
        context = kernels.Keys(*heads_first(key, value), jnp.arange(q.shape[1]) // _BLOCK * _BLOCK)
        return attention(q, (context,), own_block=heads_first(*own), block_size=_BLOCK)

    def one_block(q, key, value, lengths, *own):
        cache = kernels.Keys(key, value, lengths[:, None])
        return attention(q, (cache,), own_block=heads_first(*own), block_size=q.shape[1])

    def extension(q, key, value, lengths, *own):
        cache = kernels.Keys(key, value, lengths[:, None])
        return attention(q, (cache, kernels.Keys(*heads_first(*own), jnp.arange(1, q.shape[1] + 1))))

    def after_cache(batch, length):
        cache, lengths = ((batch, layer.kv_heads, _LENGTH, layer.query_dim), dtype), ((batch,), jnp.dtype(jnp.int32))
        return [side_by_side(layer.query_heads, batch, length), cache, cache, lengths, *keys(batch, length)]

    def gradient(function):
        def loss(arrays):
            return jnp.sum(jnp.square(function(*arrays).astype(jnp.float32)))

        return lambda *arrays: jax.grad(loss)(arrays)

    queries = side_by_side(layer.query_heads, 1, _LENGTH)
    run, both = [queries, *keys(1, _LENGTH)], [queries, *2 * keys(1, _LENGTH)]
    yield f"attention, causal, {_LENGTH} tokens", causal, run
    yield f"attention, causal, {_LENGTH} tokens, gradient", gradient(causal), run
    yield f"attention, blocks of {_BLOCK}, {_LENGTH} tokens", blocks, both
    yield f"attention, blocks of {_BLOCK}, {_LENGTH} tokens, gradient", gradient(blocks), both
    for batch, length in ((1, _BLOCK), (64, _BLOCK), (1, 64)):
        yield f"attention, {batch} × {length} tokens after {_LENGTH}", one_block, after_cache(batch, length)
    for batch in (1, 64):
        yield f"attention, {batch} × 1 token after {_LENGTH}", extension, after_cache(batch, 1)
