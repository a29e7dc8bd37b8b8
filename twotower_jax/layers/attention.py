"""Grouped-query attention without position encoding (Ainslie et al. 2023, arXiv 2305.13245), in both towers."""

import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from twotower_jax import kernels, sharding
from twotower_jax.config import ModelConfig
from twotower_jax.layers.common import Linear
from twotower_jax.layers.mixer import Mixer, Run, require_divides, require_positive
from twotower_jax.parameters import Scope, normal


@flax.struct.dataclass
class AttentionCache:
    """Keys and values of the tokens so far: key and value (B, K, T, P), of which each row uses its first `lengths`.

    Heads come before positions, so that a head's keys are one matrix, as the products want them.
    """

    key: jax.Array
    value: jax.Array

    def append(self, new: "AttentionMemory", lengths: Int[Array, " B"]) -> "AttentionCache":
        """Writes the keys and values of new tokens after the first `lengths` (B,) of each row.

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


class Attention(Mixer):
    cache_axes = AttentionCache(key=("batch", None, None, None), value=("batch", None, None, None))

    def __init__(
        self,
        config: ModelConfig,
        scope: Scope,
        backends: kernels.Backends = kernels.Backends(),  # noqa: B008 (frozen)
        bidirectional: bool = False,
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
        x: Float[Array, "B L D"],
        cache: AttentionCache | None = None,
        run: Run = Run(),  # noqa: B008 (frozen)
    ) -> tuple[Float[Array, "B L D"], AttentionMemory]:
        """One run of tokens, each seeing the cache and the tokens up to itself.

        Padding on the right of a row is seen by no real token.

        Args:
          x: (B, L, D).
          cache: of the tokens before, with `run.cache_lengths`; None for the start of a text.

        Returns:
          (B, L, D) and the keys and values of these tokens.
        """
        q, key, value = self._project(x)
        stop = jnp.arange(1, x.shape[1] + 1)[None]
        sources = (kernels.Keys(key, value, stop, run.document_start),)
        if cache is not None:
            sources = (kernels.Keys(cache.key, cache.value, run.cache_lengths[:, None]), *sources)
        key, value = (_heads_first(v, self.config.head_dim) for v in (key, value))
        return self._attend(q, sources), AttentionMemory(key=key, value=value)

    def blockwise(
        self,
        x: Float[Array, "B L D"],
        memory: AttentionMemory | AttentionCache,
        block_size: int,
        run: Run = Run(),  # noqa: B008 (frozen)
    ) -> tuple[Float[Array, "B L D"], None]:
        """Blocks of S tokens side by side, each seeing the context before its left edge and all of itself.

        Args:
          x: (B, L, D); with a cache for memory, L is S.
          memory: of the context's layer at the same depth; a cache comes with `run.cache_lengths`.

        Returns:
          (B, L, D)
        """
        q, key, value = self._project(x)
        if isinstance(memory, AttentionCache):
            source = kernels.Keys(memory.key, memory.value, run.cache_lengths[:, None], run.document_start)
        else:
            stop = (jnp.arange(x.shape[1]) // block_size * block_size)[None]
            source = kernels.Keys(_side_by_side(memory.key), _side_by_side(memory.value), stop, run.document_start)
        return self._attend(q, (source,), (key, value), block_size), None

    @classmethod
    def cache_shapes(cls, config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> AttentionCache:
        shape = jax.ShapeDtypeStruct((batch, config.num_key_value_heads, capacity, config.head_dim), dtype)
        return AttentionCache(key=shape, value=shape)

    def first_cache(self, memory: AttentionMemory, capacity: int) -> AttentionCache:
        def grow(v):
            if v.shape[2] > capacity:
                raise ValueError(f"a cache of {capacity} positions cannot take {v.shape[2]} tokens")
            return jnp.pad(v, [(0, 0), (0, 0), (0, capacity - v.shape[2]), (0, 0)])

        return AttentionCache(key=grow(memory.key), value=grow(memory.value))

    def news(self, memory: AttentionMemory) -> AttentionMemory:
        return memory

    def append(self, cache: AttentionCache, news: AttentionMemory, before: Int[Array, " B"]) -> AttentionCache:
        return cache.append(news, before)

    def newest(self, cache: AttentionCache, before: Int[Array, " B"], width: int) -> AttentionMemory:
        def cut(v):  # (B, K, T, P)
            return jax.vmap(jax.lax.dynamic_slice_in_dim, in_axes=(0, 0, None, None))(v, before, width, 1)

        return AttentionMemory(key=cut(cache.key), value=cut(cache.value))

    def keep(
        self, cache: AttentionCache, memory: AttentionMemory, before: Int[Array, " B"], lengths: Int[Array, " B"]
    ) -> AttentionCache:
        # Keys after the kept ones do not count, and are written over.
        return cache.append(memory, before)

    def published_cache(self, cache: AttentionCache) -> dict[str, jax.Array]:
        """(B, K, length, P)."""
        return {"key": cache.key, "value": cache.value}

    @classmethod
    def check_config(cls, config: ModelConfig) -> None:
        require_positive(config, "num_attention_heads", "num_key_value_heads", "head_dim")
        require_divides(config, "num_key_value_heads", "num_attention_heads")

    @classmethod
    def check_mesh(cls, config: ModelConfig, shape: sharding.MeshShape, sequence_length: int) -> None:
        tensor = shape.tensor
        sharding.check_divides(sharding.TENSOR, tensor, config.num_attention_heads, "num_attention_heads")
        ratio, heads = config.num_attention_heads // config.num_key_value_heads, config.num_attention_heads // tensor
        if heads % ratio and ratio % heads:
            raise ValueError(f"mesh: tensor={tensor} gives a device {heads} heads, which do not read whole key heads")

    @classmethod
    def flops(cls, config: ModelConfig, keys: float, scans: int) -> float:
        heads = config.num_attention_heads
        projections = 2 * config.hidden_size * config.head_dim * 2 * (heads + config.num_key_value_heads)
        return projections + cls.kernel_flops(config, keys, scans)

    @classmethod
    def kernel_flops(cls, config: ModelConfig, keys: float, scans: int) -> float:
        return 4 * config.num_attention_heads * config.head_dim * keys

    @classmethod
    def infer(cls, shapes: Mapping[str, list[int]]) -> dict[str, Any] | None:
        if "q_proj.weight" not in shapes:
            return None
        q, k = shapes["q_proj.weight"][0], shapes["k_proj.weight"][0]
        head = math.gcd(q, k)
        return {
            "num_attention_heads": q // head,
            "num_key_value_heads": k // head,
            "head_dim": head,
            "attention_bias": "q_proj.bias" in shapes,
        }

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
    """Those of (B, K, T, P) keys or values that this device's `heads` query heads read; `ratio` of them share one."""
    if sharding.shards(sharding.TENSOR) == 1:
        return v
    first = jax.lax.axis_index(sharding.TENSOR) * heads // ratio
    return jax.lax.dynamic_slice_in_dim(v, first, max(1, heads // ratio), axis=1)
