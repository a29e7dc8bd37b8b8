"""Grouped-query attention without positions, over whatever lies to the left of a query.

A query sees, of each `Keys` source, the keys from its own `start` on and before its own `stop`; and, when given, all
the keys of its own block. The four uses of a tower differ only in these sources:

| use | sources | own block |
|---|---|---|
| training and prefill, causal | own keys, stop = i + 1 | |
| decoding, cache extension | cache, stop = its length; own keys, stop = i + 1 | |
| denoiser training | context keys, stop = left edge of the block | yes |
| denoising one block | cache, stop = its length | yes |

Limits are data, one a query, not a mask of (L, T) entries: kernels skip whole tiles of keys by them, whatever they come
from (blocks, documents, caches of different lengths, a device's part of a sequence). The softmax runs in float32. A
query that sees nothing gives zeros.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from twotower_jax.kernels.dispatch import Implementation, Op


class Keys(NamedTuple):
    """One source of keys and values.

    Attributes:
      key: (B, K, T, P) with K key-value heads. value: (B, K, T, P).
      stop: int32, broadcastable to (B, L): query i of row b sees the keys j < stop[b, i]. Where one column serves all
        queries, as of a cache, what lies behind may be anything, NaN too.
      start: int32, likewise, and only the keys j ≥ start[b, i]; None for all.
    """

    key: jax.Array
    value: jax.Array
    stop: jax.Array
    start: jax.Array | None = None


ATTENTION = Op(
    "attention",
    __name__,
    Implementation("xla", ".xla"),
    Implementation("pallas_tpu", ".tpu", platform="tpu", interpreted=True),
    Implementation("mosaic_gpu", ".mosaic_gpu", platform="gpu", interpreted=True),
    Implementation("reference", ".reference"),
)


def attention(
    q: jax.Array,
    sources: tuple[Keys, ...],
    *,
    own_block: tuple[jax.Array, jax.Array] | None = None,
    block_size: int | None = None,
    tile_size: int = 512,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention, scale 1/√P, of every query over what it may see.

    Differentiable in queries, keys and values.

    Args:
      q: (B, L, H, P); query head h reads key-value head h // (H / K).
      sources: what lies to the left; see `Keys`.
      own_block: (key, value) of the queries' own positions, each (B, K, L, P), seen without a mask within each block
        of `block_size` positions.
      block_size: S, a divisor of L; needed with own_block.
      tile_size: queries that the XLA form takes at a time, rounded to a multiple of S; a detail of the computation.
      implementation: a name (see `kernels.implementations`), or None to choose.

    Returns:
      (B, L, H, P) in q's dtype.

    Raises:
      ValueError: if the named implementation is unknown or cannot take these arrays.
    """
    sources = tuple(
        s._replace(stop=_two_axes(s.stop), start=None if s.start is None else _two_axes(s.start)) for s in sources
    )
    return ATTENTION.run(implementation, q, sources, own_block=own_block, block_size=block_size, tile_size=tile_size)


def _two_axes(v: jax.Array) -> jax.Array:
    return jnp.atleast_2d(jnp.asarray(v))
