"""`kernels.attention` for XLA, on any platform.

Queries are taken in tiles, so that the scores of all queries never exist together. The R query heads of a key-value
head are rows of one matrix beside their positions: (B, K, L·R, P) times (B, K, T, P), whose order needs no copy of the
keys.
"""

import functools

import jax
import jax.numpy as jnp

MASKED = -1e30  # Finite: a row with nothing to see (padding) stays free of NaN.


def precision(dtype) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def scores(q: jax.Array, key: jax.Array) -> jax.Array:
    """(…, M, P) × (…, T, P) → (…, M, T) float32, scaled by 1/√P."""
    dots = jnp.einsum("...mp,...tp->...mt", q, key, precision=precision(q.dtype), preferred_element_type=jnp.float32)
    return dots / q.shape[-1] ** 0.5


def weighted(weights: jax.Array, value: jax.Array) -> jax.Array:
    """(…, M, T) × (…, T, P) → (…, M, P) float32; weights are rounded to the dtype of the values."""
    return jnp.einsum(
        "...mt,...tp->...mp",
        weights.astype(value.dtype),
        value,
        precision=precision(value.dtype),
        preferred_element_type=jnp.float32,
    )


def to_rows(v: jax.Array, kv_heads: int) -> jax.Array:
    """(B, L, H, P) → (B, K, L·R, P): the queries of each key-value head, R of one position side by side."""
    batch, length, _, head_dim = v.shape
    v = v.reshape(batch, length, kv_heads, -1, head_dim)
    return jnp.moveaxis(v, 1, 2).reshape(batch, kv_heads, -1, head_dim)


def from_rows(v: jax.Array, length: int) -> jax.Array:
    """The inverse of `to_rows`."""
    batch, kv_heads, _, head_dim = v.shape
    v = v.reshape(batch, kv_heads, length, -1, head_dim)
    return jnp.moveaxis(v, 2, 1).reshape(batch, length, -1, head_dim)


def in_blocks(v: jax.Array, blocks: int) -> jax.Array:
    """(B, K, M, P) → (B, K, blocks, M / blocks, P)."""
    return v.reshape(*v.shape[:2], blocks, -1, v.shape[-1])


def visible(source) -> jax.Array:
    """(B or 1, l or 1, T): which keys each query sees."""
    position = jnp.arange(source.key.shape[2])
    seen = position < source.stop[..., None]
    return seen if source.start is None else seen & (position >= source.start[..., None])


def masked(seen: jax.Array, v: jax.Array, length: int) -> jax.Array:
    """Scores (B, K, L·R, T) with `MASKED` where the position of a row does not see the key."""
    by_position = v.reshape(*v.shape[:2], length, -1, v.shape[-1])
    return jnp.where(seen[:, None, :, None], by_position, MASKED).reshape(v.shape)


def reachable(v: jax.Array, stop: jax.Array) -> jax.Array:
    """Keys or values (B, K, T, P), zeros where no query sees them: there may be NaN, and 0 · NaN is NaN."""
    if stop.shape[1] > 1:  # Not a cache.
        return v
    return jnp.where((jnp.arange(v.shape[2]) < stop)[:, None, :, None], v, jnp.zeros((), v.dtype))


def _attend(q, sources, own, blocks):
    """Attention of one tile of queries (B, l, H, P); `own` holds the tile's own keys and values (B, K, l, P)."""
    length = q.shape[1]
    kv_heads = (own[0] if own else sources[0].key).shape[1]
    rows = to_rows(q, kv_heads)
    found, seen = [], []
    for source in sources:
        seen.append(visible(source))
        found.append(masked(seen[-1], scores(rows, source.key), length))
    if own is not None:
        found.append(scores(in_blocks(rows, blocks), in_blocks(own[0], blocks)).reshape(*rows.shape[:3], -1))
    weights = jax.nn.softmax(jnp.concatenate(found, axis=-1), axis=-1)
    out, place = jnp.zeros(rows.shape, jnp.float32), 0
    for source in sources:
        part = weights[..., place : place + source.key.shape[2]]
        out += weighted(part, reachable(source.value, source.stop))
        place += source.key.shape[2]
    if own is not None:
        part = weighted(in_blocks(weights[..., place:], blocks), in_blocks(own[1], blocks))
        out += part.reshape(rows.shape)
    out = from_rows(out.astype(q.dtype), length)
    if own is None:  # Where a position sees nothing at all, the masked keys share the weight.
        some = functools.reduce(jnp.logical_or, (jnp.any(v, axis=-1) for v in seen))
        out = jnp.where(some[..., None, None], out, jnp.zeros((), out.dtype))
    return out


def attention(q, sources, *, own_block=None, block_size=None, tile_size=512):
    """`kernels.attention`, same arguments and results."""
    batch, length = q.shape[:2]
    unit = block_size or 1
    tile = unit * max(1, tile_size // unit)
    if length <= tile:
        return _attend(q, sources, own_block, length // unit)
    ends = tuple((s.stop, s.start) for s in sources)
    ends = jax.tree.map(lambda v: jnp.broadcast_to(v, (batch, length)), ends)

    def in_tiles(v, axis):  # The tiles in front; padding queries are computed and dropped.
        pad = [(0, 0)] * v.ndim
        pad[axis] = 0, -length % tile
        v = jnp.pad(v, pad)
        return jnp.moveaxis(v.reshape(*v.shape[:axis], -1, tile, *v.shape[axis + 1 :]), axis, 0)

    def attend(inputs):
        q, ends, own = inputs
        tiled = tuple(s._replace(stop=stop, start=start) for s, (stop, start) in zip(sources, ends, strict=True))
        return _attend(q, tiled, own, tile // unit)

    own = None if own_block is None else tuple(in_tiles(v, 2) for v in own_block)
    inputs = in_tiles(q, 1), jax.tree.map(lambda v: in_tiles(v, 1), ends), own
    # Recomputed in the backward pass: the scores of one tile are live at a time there too.
    out = jax.lax.map(jax.checkpoint(attend), inputs)
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, *q.shape[2:])[:, :length]
