"""Grouped-query attention without position encoding (Ainslie et al. 2023, arXiv 2305.13245), in both towers."""

import math

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from twotower_jax import kernels, sharding
from twotower_jax.config import ModelConfig
from twotower_jax.layers.common import Linear
from twotower_jax.parameters import Scope, normal


@flax.struct.dataclass
class AttentionCache:
    """Keys and values of the tokens so far: key and value (B, K, T, P), of which each row uses its first `lengths`.

    Heads come before positions, so that a head's keys are one matrix, as the products want them.
    """

    key: jax.Array
    value: jax.Array

    def append(self, new: "AttentionMemory", lengths: jax.Array) -> "AttentionCache":
        """Writes the keys and values of new tokens behind the first `lengths` (B,) of each row.

        The caller sees to it that they fit: a write that does not is moved to the left, over older keys.
        """

        def write(old, update):
            return jax.vmap(jax.lax.dynamic_update_slice_in_dim, in_axes=(0, 0, 0, None))(
                old, update.astype(old.dtype), lengths, 1
            )

        return AttentionCache(key=write(self.key, new.key), value=write(self.value, new.value))


@flax.struct.dataclass
class AttentionMemory:
    """Keys and values of a whole sequence, (B, K, L, P) each."""

    key: jax.Array
    value: jax.Array


class Attention(nnx.Module):
    def __init__(
        self,
        config: ModelConfig,
        scope: Scope,
        backends: kernels.Backends = kernels.Backends(),  # noqa: B008 (frozen)
    ):
        self.config = config
        self.backends = backends
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        std, bias = config.initializer_range, config.attention_bias
        out_std = std / math.sqrt(config.num_hidden_layers) if config.rescale_prenorm_residual else std
        into = (config.hidden_size, width), ("embed", "heads"), normal(std), bias
        into_kv = (config.hidden_size, kv_width), ("embed", "kv_heads"), normal(std), bias
        self.q_proj = Linear(scope.child("q_proj"), *into)
        self.k_proj = Linear(scope.child("k_proj"), *into_kv)
        self.v_proj = Linear(scope.child("v_proj"), *into_kv)
        self.o_proj = Linear(
            scope.child("o_proj"), (width, config.hidden_size), ("heads", "embed"), normal(out_std), bias
        )

    def causal(
        self,
        x: jax.Array,
        cache: AttentionCache | None = None,
        cache_lengths: jax.Array | None = None,
        document_start: jax.Array | None = None,
    ) -> tuple[jax.Array, AttentionMemory]:
        """One run of tokens, each seeing the cache and the tokens up to itself.

        Padding on the right of a row is seen by no real token.

        Args:
          x: (B, L, D).
          cache: of the tokens before, with (B,) `cache_lengths`; None for the start of a text.
          document_start: (B, L) int32, the first position that each one may see; None for all.

        Returns:
          (B, L, D) and the keys and values of these tokens.
        """
        q, key, value = self._project(x)
        stop = jnp.arange(1, x.shape[1] + 1)[None]
        sources = (kernels.Keys(key, value, stop, document_start),)
        if cache is not None:
            sources = (kernels.Keys(cache.key, cache.value, cache_lengths[:, None]), *sources)
        key, value = (_heads_first(v, self.config.head_dim) for v in (key, value))
        return self._attend(q, sources), AttentionMemory(key=key, value=value)

    def blockwise(
        self,
        x: jax.Array,
        memory: AttentionMemory | AttentionCache,
        block_size: int,
        cache_lengths: jax.Array | None = None,
        document_start: jax.Array | None = None,
    ) -> jax.Array:
        """Blocks of S tokens side by side, each seeing the context before its left edge and all of itself.

        Args:
          x: (B, L, D); with a cache for memory, L is S.
          memory: of the context's layer at the same depth; a cache comes with (B,) `cache_lengths`.
          document_start: as in `causal`; every document starts with a block.

        Returns:
          (B, L, D)
        """
        q, key, value = self._project(x)
        if isinstance(memory, AttentionCache):
            source = kernels.Keys(memory.key, memory.value, cache_lengths[:, None], document_start)
        else:
            stop = (jnp.arange(x.shape[1]) // block_size * block_size)[None]
            source = kernels.Keys(_side_by_side(memory.key), _side_by_side(memory.value), stop, document_start)
        return self._attend(q, (source,), (key, value), block_size)

    def _project(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def _attend(self, q, sources, own_block=None, block_size=None):
        options = {"block_size": block_size, "implementation": self.backends.attention}
        return self.o_proj(_attend(self.config.head_dim, q, sources, own_block, **options))


def _attend(
    head_dim: int,
    q: jax.Array,
    sources: tuple[kernels.Keys, ...],
    own_block: tuple[jax.Array, jax.Array] | None = None,
    block_size: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """`kernels.attention`, every device taking its rows, its heads and its positions as queries.

    Arrays go to the devices as projections leave them, heads side by side, but for caches: XLA would keep heads apart
    all the way from the projection, and turn its matrix around.

    Keys are few (two heads in the release): each device has all positions of them, and picks the heads that its
    queries read.

    Args:
      q: (B, L, H·P).
      sources: with keys and values (B, T, K·P), or (B, K, T, P) of a cache.
      own_block: (B, L, K·P) each.

    Returns:
      (B, L, H·P)
    """

    def attend(q, sources, own_block):
        queries = q.reshape(*q.shape[:2], -1, head_dim)

        def heads(v):
            v = v if v.ndim == 4 else _heads_first(v, head_dim)
            return _heads_read(v, queries.shape[2], ratio)

        sources = tuple(s._replace(key=heads(s.key), value=heads(s.value)) for s in sources)
        own_block = None if own_block is None else tuple(map(heads, own_block))
        y = kernels.attention(
            queries, sources, own_block=own_block, block_size=block_size, implementation=implementation
        )
        return y.reshape(q.shape)

    def end_axes(end):
        return None if end is None else (("batch", None)[end.shape[0] == 1], ("length", None)[end.shape[1] == 1])

    def source_axes(s):
        whole = ("batch", *[None] * (s.key.ndim - 1))
        return kernels.Keys(whole, whole, end_axes(s.stop), end_axes(s.start))

    key = sources[0].key
    ratio = q.shape[2] // (key.shape[2] if key.ndim == 3 else key.shape[1] * head_dim)
    queries, own = ("batch", "length", "heads"), ("batch", "length", None)
    axes = queries, tuple(map(source_axes, sources)), None if own_block is None else (own, own)
    return sharding.local(attend, axes, queries)(q, sources, own_block)


def _heads_first(v: jax.Array, head_dim: int) -> jax.Array:
    """(B, L, K·P) → (B, K, L, P)."""
    return jnp.swapaxes(v.reshape(*v.shape[:2], -1, head_dim), 1, 2)


def _side_by_side(v: jax.Array) -> jax.Array:
    """The inverse of `_heads_first`."""
    v = jnp.swapaxes(v, 1, 2)
    return v.reshape(*v.shape[:2], -1)


def _heads_read(v: jax.Array, heads: int, ratio: int) -> jax.Array:
    """Of (B, K, T, P) keys or values, those that this device's `heads` query heads read, `ratio` of them each."""
    if sharding.shards("tensor") == 1:
        return v
    first = jax.lax.axis_index("tensor") * heads // ratio
    return jax.lax.dynamic_slice_in_dim(v, first, max(1, heads // ratio), axis=1)
