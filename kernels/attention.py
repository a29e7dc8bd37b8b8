"""Grouped-query attention without positions, over whatever lies to the left of a query.

A query sees, of each `Keys` source, the keys from its own `start` on and before its own `stop`; and, when given, all
the keys of its own block. The four uses of a tower differ only in these sources:

| use | sources | own block |
|---|---|---|
| training and prefill, causal | own keys, stop = i + 1 | |
| decoding, cache extension | cache, stop = its length; own keys, stop = i + 1 | |
| denoiser training | context keys, stop = left edge of the block | yes |
| denoising one block | cache, stop = its length | yes |

Long sequences are taken in tiles of queries, so that the scores of all queries never exist together. The softmax runs
in float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_MASKED = -1e30  # Finite: a row with nothing to see (padding) stays free of NaN.


class Keys(NamedTuple):
    """One source of keys and values.

    Attributes:
      key: (B, T, K, P) with K key-value heads. value: (B, T, K, P).
      stop: int32, broadcastable to (B, L): query i of row b sees the keys j < stop[b, i].
      start: int32, likewise, and only the keys j ≥ start[b, i]; None for all.
    """

    key: jax.Array
    value: jax.Array
    stop: jax.Array
    start: jax.Array | None = None


def _precision(dtype) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _scores(q: jax.Array, key: jax.Array) -> jax.Array:
    """(B, l, K, R, P) × (B, T, K, P) → (B, l, K, R, T) float32, scaled by 1/√P."""
    dots = jnp.einsum("blkrp,btkp->blkrt", q, key, precision=_precision(q.dtype), preferred_element_type=jnp.float32)
    return dots / q.shape[-1] ** 0.5


def _values(weights: jax.Array, value: jax.Array) -> jax.Array:
    """(B, l, K, R, T) × (B, T, K, P) → (B, l, K, R, P) float32."""
    return jnp.einsum(
        "blkrt,btkp->blkrp",
        weights.astype(value.dtype),
        value,
        precision=_precision(value.dtype),
        preferred_element_type=jnp.float32,
    )


def _attend(q, sources, own, block_size):
    """Attention of one tile of queries (B, l, K, R, P); `own` holds the tile's own keys and values (B, l, K, P)."""
    batch, length, kv_heads, ratio, head_dim = q.shape
    scores = []
    for key, _, stop, start in sources:
        position = jnp.arange(key.shape[1])
        visible = position < stop[..., None]  # (B or 1, l, T)
        if start is not None:
            visible &= position >= start[..., None]
        scores.append(jnp.where(visible[:, :, None, None], _scores(q, key), _MASKED))
    if own is not None:
        # Each block is a row of a larger batch.
        in_blocks = [v.reshape(-1, block_size, *v.shape[2:]) for v in (q, *own)]
        scores.append(_scores(in_blocks[0], in_blocks[1]).reshape(batch, length, kv_heads, ratio, block_size))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
    out, place = jnp.zeros(q.shape, jnp.float32), 0
    for key, value, *_ in sources:
        out += _values(weights[..., place : place + key.shape[1]], value)
        place += key.shape[1]
    if own is not None:
        own_weights = weights[..., place:].reshape(-1, block_size, kv_heads, ratio, block_size)
        out += _values(own_weights, in_blocks[2]).reshape(q.shape)
    return out.astype(q.dtype)


def attention(
    q: jax.Array,
    sources: tuple[Keys, ...],
    *,
    own_block: tuple[jax.Array, jax.Array] | None = None,
    block_size: int | None = None,
    tile_size: int = 512,
) -> jax.Array:
    """Softmax attention, scale 1/√P, of every query over what it may see.

    Args:
      q: (B, L, H, P).
      sources: what lies to the left; see `Keys`.
      own_block: (key, value) of the queries' own positions, each (B, L, K, P), seen without a mask within each block
        of `block_size` positions.
      block_size: S, a divisor of L; needed with own_block.
      tile_size: queries taken at a time, rounded to a multiple of S; a detail of the computation.

    Returns:
      (B, L, H, P) in q's dtype.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = (own_block[0] if own_block else sources[0].key).shape[2]
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    ends = jax.tree.map(
        lambda v: jnp.broadcast_to(jnp.atleast_2d(v), (batch, length)), tuple((s.stop, s.start) for s in sources)
    )
    unit = block_size or 1
    tile = unit * max(1, tile_size // unit)

    def attend(q, ends, own):
        tiled = tuple(Keys(s.key, s.value, *both) for s, both in zip(sources, ends, strict=True))
        return _attend(q, tiled, own, block_size)

    if length <= tile:
        return attend(q, ends, own_block).reshape(batch, length, heads, head_dim)

    def in_tiles(v):  # (B, L, …) → (tiles, B, tile, …); padding queries are computed and dropped.
        v = jnp.pad(v, [(0, 0), (0, -length % tile)] + [(0, 0)] * (v.ndim - 2))
        return jnp.moveaxis(v.reshape(batch, -1, tile, *v.shape[2:]), 1, 0)

    tiles = jax.tree.map(in_tiles, (q, ends, own_block))
    # Recomputed in the backward pass: the scores of one tile are live at a time there too.
    out = jax.lax.map(jax.checkpoint(lambda tile_inputs: attend(*tile_inputs)), tiles)
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, head_dim)[:, :length]
