"""A tower: embedding, a stack of layers of any pattern, final norm. One implementation serves both towers.

Repeated stretches of the pattern are stacked and scanned (`segments`), so that tracing and compiling cost what the
distinct layers cost, not what the depth does. Every pass over layers, of one tower or of two side by side, is a `walk`
with a step that says what happens to one layer.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from twotower_jax import sharding
from twotower_jax.config import ModelConfig
from twotower_jax.kernels import Backends
from twotower_jax.kernels.experts import ROUTING
from twotower_jax.layers.attention import Attention, AttentionCache, AttentionMemory
from twotower_jax.layers.common import RMSNorm
from twotower_jax.layers.experts import MLP, Experts, Routing
from twotower_jax.layers.mamba import Mamba, MambaCache, MambaMemory
from twotower_jax.layers.time_conditioning import Modulation
from twotower_jax.layers.vocabulary import lookup
from twotower_jax.parameters import ROWS, Scope, normal, use

REMAT = ("none", "layer", "unit")

LayerCache = MambaCache | AttentionCache | None
LayerMemory = MambaMemory | AttentionMemory | None
# What belongs to each layer: for each segment a tuple over the layers of its unit, each with a leading axis over the
# repeats where the segment is stacked.
PerLayer = list[tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model is computed, which does not change what is computed.

    Attributes:
      dtype: of activations; routing, norms, states and softmax run in float32 or better regardless.
      scan_layers: stack and scan repeated segments; False lays parameters out layer by layer.
      remat: what the backward pass recomputes instead of keeping it: "none"; "layer", which keeps what enters each
        layer; "unit", which keeps what enters each unit of a repeated segment.
      backends: the implementation of each kernel.
    """

    dtype: jnp.dtype = jnp.float32
    scan_layers: bool = True
    remat: str = "none"
    backends: Backends = Backends()


@dataclasses.dataclass(frozen=True)
class Stretch:
    """`repeats` times the layers `unit`, from layer `start` on."""

    unit: str
    repeats: int
    start: int


def segments(pattern: str, scan_layers: bool = True) -> tuple[Stretch, ...]:
    """Splits a layer pattern into repeated units with as few distinct layers as possible, then as few units.

    >>> [(s.unit, s.repeats) for s in segments("MEMEM*EMEMEM*EME")]
    [('ME', 1), ('MEM*EME', 2)]
    """
    if not scan_layers:
        return tuple(Stretch(kind, 1, i) for i, kind in enumerate(pattern))

    @functools.cache
    def best(start: int) -> tuple[int, int, tuple[Stretch, ...]]:
        if start == len(pattern):
            return 0, 0, ()
        options = []
        for width in range(1, len(pattern) - start + 1):
            unit = pattern[start : start + width]
            repeats = 1
            while True:
                bodies, units, rest = best(start + width * repeats)
                options.append((bodies + width, units + 1, (Stretch(unit, repeats, start), *rest)))
                if not pattern.startswith(unit, start + width * repeats):
                    break
                repeats += 1
        return min(options, key=lambda option: option[:2])

    # Filled from the right, so that a deep pattern does not recurse deeply.
    for start in reversed(range(len(pattern))):
        best(start)
    return best(0)[2]


class Layer(nnx.Module):
    """h + mixer(norm(h)), or its time-conditioned form in the denoiser."""

    def __init__(self, config: ModelConfig, kind: str, scope: Scope, execution: Execution, bidirectional: bool):
        self.kind = kind
        self.dtype = execution.dtype
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon, scope.child("norm"))
        scope = scope.child("mixer")
        if kind == "M":
            self.mixer = Mamba(config, scope, execution.backends, bidirectional)
        elif kind == "*":
            self.mixer = Attention(config, scope, execution.backends)
        elif kind == "E":
            self.mixer = Experts(config, scope, execution.backends)
        else:
            self.mixer = MLP(config, config.intermediate_size, scope)

    def causal(
        self,
        h: jax.Array,
        *,
        cache: LayerCache = None,
        cache_lengths: jax.Array | None = None,
        lengths: jax.Array | None = None,
        document_start: jax.Array | None = None,
        end: bool = True,
    ) -> tuple[jax.Array, LayerMemory]:
        """One run of tokens h (B, L, D) after `cache`; returns the new h and the layer's memory of the run.

        `lengths` (B,) counts the real tokens of each row, the rest being padding on the right. `document_start` (B, L)
        is the first position that each one may know of. Without `end` a Mamba layer's memory has none.
        """
        x = self._enter(h, None)
        if self.kind == "M":
            y, memory = self.mixer.causal(x, cache, lengths, document_start, end)
        elif self.kind == "*":
            y, memory = self.mixer.causal(x, cache, cache_lengths, document_start)
        else:
            y, memory = self.mixer(x), None
        return self._leave(h, y, None), memory

    def blockwise(
        self,
        h: jax.Array,
        memory: LayerMemory | LayerCache,
        block_size: int,
        *,
        cache_lengths: jax.Array | None = None,
        modulation: Modulation | None = None,
        document_start: jax.Array | None = None,
    ) -> tuple[jax.Array, Routing | None]:
        """Blocks h (B, L, D) side by side, reading the context layer's memory (or cache) before each left edge.

        Returns:
          the new h, and of experts which ones it went through.
        """
        x, routing = self._enter(h, modulation), None
        if self.kind == "M":
            y = self.mixer.blockwise(x, memory, block_size, document_start)
        elif self.kind == "*":
            y = self.mixer.blockwise(x, memory, block_size, cache_lengths, document_start)
        elif self.kind == "E":
            y, routing = self.mixer.with_routing(x)
        else:
            y = self.mixer(x)
        return self._leave(h, y, modulation), routing

    def _enter(self, h, modulation):
        x = h.astype(self.dtype)
        if modulation is None:
            return self.norm(x)
        # The published training code fuses some norms into the projection, which fixes the order by layer kind.
        if self.kind in "M*":
            return self.norm(modulation.modulate(x))
        return modulation.modulate(self.norm(x))

    def _leave(self, h, y, modulation):
        h = h + (y if modulation is None else modulation.gate * y).astype(h.dtype)
        return sharding.constrain(h, ("batch", "length", None))


class Segment(nnx.Module):
    """The layers of one `Stretch`, their parameters stacked over the repeats."""

    def __init__(self, config: ModelConfig, stretch: Stretch, prefix: str, execution: Execution, bidirectional: bool):
        self.stretch = stretch
        width, repeats = len(stretch.unit), stretch.repeats
        for j, kind in enumerate(stretch.unit):
            prefixes = tuple(f"{prefix}layers.{stretch.start + r * width + j}." for r in range(repeats))
            layer = Layer(config, kind, Scope(prefixes, stacked=repeats > 1), execution, bidirectional)
            setattr(self, f"layer_{j}", layer)

    @property
    def layers(self) -> list[Layer]:
        return [getattr(self, f"layer_{j}") for j in range(len(self.stretch.unit))]


@flax.struct.dataclass
class Cache:
    """What a context tower keeps of the tokens so far.

    Attributes:
      layers: a `MambaCache`, an `AttentionCache` or None for each layer.
      lengths: (B,) int32, tokens so far in each row.
    """

    layers: PerLayer
    lengths: jax.Array


class Tower(nnx.Module):
    """Embedding (V, D), layers, final norm."""

    def __init__(self, config: ModelConfig, prefix: str, execution: Execution, bidirectional: bool = False):
        self.config = config
        self.execution = execution
        self.embeddings = Scope((prefix,)).declare(
            "embeddings.weight",
            (config.vocab_size, config.hidden_size),
            ("vocab", "embed"),
            normal(config.initializer_range),
            scales=ROWS,
        )
        self.stretches = segments(config.hybrid_override_pattern, execution.scan_layers)
        for i, stretch in enumerate(self.stretches):
            setattr(self, f"segment_{i}", Segment(config, stretch, prefix, execution, bidirectional))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon, Scope((f"{prefix}norm_f.",)))

    @property
    def segments(self) -> list[Segment]:
        return [getattr(self, f"segment_{i}") for i in range(len(self.stretches))]

    def embed(self, ids: jax.Array) -> jax.Array:
        """(B, L) int32 → (B, L, D). Ids are in range: they are checked on the host, where that can be an error."""
        residual = jnp.float32 if self.config.residual_in_fp32 else self.execution.dtype
        rows = lookup(use(self.embeddings, self.execution.dtype), ids)
        return rows.astype(self.execution.dtype).astype(residual)

    def finish(self, h: jax.Array) -> jax.Array:
        """The final norm."""
        return self.norm_f(h.astype(self.execution.dtype))

    def causal(self, ids: jax.Array, document_start: jax.Array | None = None) -> jax.Array:
        """Tokens (B, L) from the start of a text to the final hidden states (B, L, D).

        `document_start` (B, L) int32 is the first position that each one may know of; None for the start of the text.
        """

        def step(layers, h, _):
            return layers[0].causal(h, document_start=document_start)[0], None

        h, _ = walk((self,), self.embed(ids), step)
        return self.finish(h)

    def layer_outputs(self, ids: jax.Array) -> list[jax.Array]:
        """The embedding of (B, L) tokens and the output of each layer but the last, whose place the final norm's takes:
        what the published code calls hidden states, num_hidden_layers + 1 of (B, L, D)."""

        def step(layers, h, _):
            h, _ = layers[0].causal(h)
            return h, h

        first = self.embed(ids)
        last, outputs = walk((self,), first, step)
        return [first, *self.by_layer(outputs)[:-1], self.finish(last)]

    def extend(
        self, ids: jax.Array, lengths: jax.Array, *, cache: Cache | None = None, capacity: int | None = None
    ) -> tuple[jax.Array, Cache]:
        """Reads tokens after `cache`, or from the start of a text into a new cache of `capacity` positions.

        Args:
          ids: (B, L) int32, padded on the right.
          lengths: (B,) int32, the real tokens of each row, 0 … L.
          cache: of the tokens before, with room for L more.
          capacity: of the new cache, at least L; needed without a cache.

        Returns:
          the final hidden states (B, L, D), meaningless at padding, and the cache after the real tokens.
        """
        start = jnp.zeros_like(lengths) if cache is None else cache.lengths

        def step(layers, h, layer_cache):
            h, memory = layers[0].causal(h, cache=layer_cache, cache_lengths=start, lengths=lengths)
            if isinstance(memory, MambaMemory):
                return h, memory.end
            if isinstance(memory, AttentionMemory) and layer_cache is None:
                return h, _allocate(memory, capacity)
            return h, memory

        def append(old, new):
            return old.append(new, start) if isinstance(new, AttentionMemory) else new

        h, layers = walk((self,), self.embed(ids), step, None if cache is None else cache.layers)
        if cache is not None:
            # Behind the walk, where the keys of all layers are written in place into a cache that is given away. The
            # barrier puts the writing behind the last reading: in a loop the old keys would be copied otherwise.
            h, layers = jax.lax.optimization_barrier((h, layers))
            layers = self._each_layer(append, cache.layers, layers)
        return self.finish(h), Cache(layers=layers, lengths=start + lengths)

    def read(self, ids: jax.Array, cache: Cache) -> tuple[jax.Array, PerLayer]:
        """Reads tokens after `cache` without adding them to it; `keep` adds as many of them as turn out to be wanted.

        Args:
          ids: (B, L) int32.

        Returns:
          the final hidden states (B, L, D), and each layer's memory of the tokens.
        """

        def step(layers, h, layer_cache):
            # The state behind all of the tokens is not the one that will be kept.
            return layers[0].causal(h, cache=layer_cache, cache_lengths=cache.lengths, end=False)

        h, memories = walk((self,), self.embed(ids), step, cache.layers)
        return self.finish(h), memories

    def keep(self, cache: Cache, memories: PerLayer, lengths: jax.Array) -> Cache:
        """The cache after the first `lengths` (B,) of the tokens that `read` read: what `extend` gives for these.

        Keys are written and counted. States are advanced again from what each layer projected, with step size 0 behind
        the kept tokens; no projection, attention or expert is computed a second time.
        """

        def advance(old, new):
            if isinstance(new, MambaMemory):
                return old.advance(new, lengths, self.config.chunk_size, self.execution.backends)
            return old.append(new, cache.lengths)

        return Cache(layers=self._each_layer(advance, cache.layers, memories), lengths=cache.lengths + lengths)

    def empty_cache(self, batch: int, capacity: int) -> Cache:
        """The cache of B texts that have not begun, with room for `capacity` positions each."""
        c, dtype = self.config, self.execution.dtype

        def of_layer(kind, leading):
            if kind == "M":
                conv = jnp.zeros((*leading, c.conv_kernel, c.conv_channels), dtype)
                state = (*leading, c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size)
                return MambaCache(conv=conv, state=jnp.zeros(state, jnp.float32))
            if kind == "*":
                shape = (*leading, c.num_key_value_heads, capacity, c.head_dim)
                return AttentionCache(key=jnp.zeros(shape, dtype), value=jnp.zeros(shape, dtype))
            return None

        layers = []
        for s in self.stretches:
            leading = (s.repeats, batch) if s.repeats > 1 else (batch,)
            layers.append(tuple(of_layer(kind, leading) for kind in s.unit))
        return Cache(layers=layers, lengths=jnp.zeros(batch, jnp.int32))

    def cache_axes(self) -> Cache:
        """The logical axes of every array of a cache, a tuple in place of each."""

        def of_layer(kind, leading):
            if kind == "M":
                channels, heads = "mamba_inner", "mamba_heads"
                return MambaCache(
                    conv=(*leading, "batch", None, channels), state=(*leading, "batch", heads, None, None)
                )
            if kind == "*":
                axes = (*leading, "batch", None, None, None)
                return AttentionCache(key=axes, value=axes)
            return None

        layers = [
            tuple(of_layer(kind, ("layers",) if s.repeats > 1 else ()) for kind in s.unit) for s in self.stretches
        ]
        return Cache(layers=layers, lengths=("batch",))

    def take_rows(self, cache: Cache, rows: jax.Array) -> Cache:
        """The rows (R,) int32 of a cache as a cache of their own; an index out of range gives the last row."""

        def take(axis, v):
            return jnp.take(v, rows, axis=axis, mode="clip")

        return self._by_rows(take, cache)

    def put_rows(self, cache: Cache, rows: jax.Array, part: Cache) -> Cache:
        """The cache with the rows (R,) int32, all different, replaced by those of `part`; none for one out of range."""

        def put(axis, v, new):
            return v.at[(slice(None),) * axis + (rows,)].set(new, mode="drop", unique_indices=True)

        return self._by_rows(put, cache, part)

    def clear_rows(self, cache: Cache, cleared: jax.Array) -> Cache:
        """The cache with the rows of `cleared` (B,) bool as those of texts that have not begun."""

        def clear(axis, v):
            shape = (1,) * axis + (-1,) + (1,) * (v.ndim - axis - 1)
            return jnp.where(cleared.reshape(shape), jnp.zeros_like(v), v)

        return self._by_rows(clear, cache)

    def _by_rows(self, function, cache: Cache, *others: Cache) -> Cache:
        """`function(axis of the rows, array, …)` of each array."""
        layers = [
            jax.tree.map(functools.partial(function, 1 if s.repeats > 1 else 0), *segments)
            for s, *segments in zip(self.stretches, cache.layers, *(other.layers for other in others), strict=True)
        ]
        return Cache(layers=layers, lengths=function(0, cache.lengths, *(other.lengths for other in others)))

    def _each_layer(self, function: Callable[[Any, Any], Any], first: PerLayer, second: PerLayer) -> PerLayer:
        """`function` of two entries of each layer, over the repeats where a segment is stacked."""
        out = []
        for s, pairs in zip(self.stretches, zip_layers(first, second), strict=True):
            mapped = jax.vmap(function) if s.repeats > 1 else function
            out.append(tuple(None if pair[0] is None else mapped(*pair) for pair in pairs))
        return out

    def per_layer(self, stacked: jax.Array) -> PerLayer:
        """An array with a leading axis over all layers, as one entry a layer for `walk`."""
        out = []
        for s in self.stretches:
            width = len(s.unit)
            part = stacked[s.start : s.start + width * s.repeats]
            part = part.reshape(s.repeats, width, *stacked.shape[1:])
            out.append(tuple(part[:, j] if s.repeats > 1 else part[0, j] for j in range(width)))
        return out

    def stacked(self, entries: PerLayer) -> jax.Array | None:
        """The arrays, all of one shape, that some layers gave in a `walk`, as one array in the layers' order: (layers
        that gave one, …). None for none."""
        rows = []
        for stretch, segment in zip(self.stretches, entries, strict=True):
            arrays = [array for array in segment if array is not None]
            if arrays:
                stacked = stretch.repeats > 1
                shape = arrays[0].shape[1:] if stacked else arrays[0].shape
                rows.append(jnp.stack(arrays, axis=int(stacked)).reshape(-1, *shape))
        return jnp.concatenate(rows) if rows else None

    def by_layer(self, entries: PerLayer) -> list[Any]:
        """The outputs of a `walk` as a list with one entry a layer, in order."""
        out = []
        for s, entry in zip(self.stretches, entries, strict=True):
            for r in range(s.repeats):
                for layer in entry:
                    out.append(jax.tree.map(lambda v, r=r: v[r], layer) if s.repeats > 1 else layer)
        return out


def walk[Carry](
    towers: Sequence[Tower],
    carry: Carry,
    step: Callable[[tuple[Layer, ...], Carry, Any], tuple[Carry, Any]],
    inputs: PerLayer | None = None,
) -> tuple[Carry, PerLayer]:
    """Goes down the layers of one tower, or of several side by side.

    Args:
      towers: of the same pattern.
      carry: what passes from layer to layer.
      step: `(layers, carry, input) → (carry, output)`, with one layer of each tower at the same depth.
      inputs: one for each layer, or None.

    Returns:
      the last carry and the output of each layer.
    """
    remat = towers[0].execution.remat
    outputs = []
    for i, stretch in enumerate(towers[0].stretches):
        graphdefs, states = zip(*(nnx.split(tower.segments[i]) for tower in towers), strict=True)

        def unit(carry, unit_inputs, graphdefs=graphdefs, stretch=stretch):
            states, layer_inputs = unit_inputs
            merged = [nnx.merge(*pair).layers for pair in zip(graphdefs, states, strict=True)]
            unit_outputs = []
            for j, layers in enumerate(zip(*merged, strict=True)):
                one_layer = functools.partial(step, layers)
                if remat == "layer":
                    one_layer = _recomputed(one_layer, stretch)
                carry, output = one_layer(carry, layer_inputs[j])
                unit_outputs.append(output)
            return carry, tuple(unit_outputs)

        if remat == "unit":
            unit = _recomputed(unit, stretch)
        unit_inputs = (states, (None,) * len(stretch.unit) if inputs is None else inputs[i])
        if stretch.repeats == 1:
            carry, output = unit(carry, unit_inputs)
        else:
            carry, output = jax.lax.scan(unit, carry, unit_inputs)
        outputs.append(output)
    return carry, outputs


def _recomputed(function, stretch):
    policy = jax.checkpoint_policies.save_only_these_names(ROUTING)
    # In a loop nothing can be merged with the forward pass anyway.
    return jax.checkpoint(function, policy=policy, prevent_cse=stretch.repeats == 1)


def zip_layers(*entries: PerLayer) -> PerLayer:
    """Several entries a layer as one tuple a layer."""
    return [tuple(zip(*segment, strict=True)) for segment in zip(*entries, strict=True)]


def _allocate(memory: AttentionMemory, capacity: int) -> AttentionCache:
    def grow(v):
        if v.shape[2] > capacity:
            raise ValueError(f"a cache of {capacity} positions cannot take {v.shape[2]} tokens")
        return jnp.pad(v, [(0, 0), (0, 0), (0, capacity - v.shape[2]), (0, 0)])

    return AttentionCache(key=grow(memory.key), value=grow(memory.value))
