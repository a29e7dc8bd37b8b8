"""A tower: embedding, a stack of layers of any pattern, final norm. One implementation serves both towers."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from twotower_jax.cache import Cache
from twotower_jax.config import ModelConfig
from twotower_jax.execution import Execution
from twotower_jax.layers import registry
from twotower_jax.layers.common import RMSNorm
from twotower_jax.layers.mixer import Mixer, Routing, Run
from twotower_jax.layers.vocabulary import lookup
from twotower_jax.parameters import ROWS, Params, Scope, normal, unflatten, use
from twotower_jax.stack import PerLayer, Segment, segments, walk


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

    def embed(self, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """(B, L) int32 → (B, L, D). Ids are in range: they are checked on the host, where that can be an error."""
        residual = jnp.float32 if self.config.residual_in_fp32 else self.execution.dtype
        rows = lookup(use(self.embeddings, self.execution.dtype), ids)
        return rows.astype(self.execution.dtype).astype(residual)

    def finish(self, h: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """The final norm."""
        return self.norm_f(h.astype(self.execution.dtype))

    def causal(self, ids: Int[Array, "B L"], document_start: Int[Array, "B L"] | None = None) -> Float[Array, "B L D"]:
        """Tokens (B, L) from the start of a text to the final hidden states (B, L, D).

        `document_start` (B, L) int32 is the first position that each one may know of; None for the start of the text.
        """
        return self.causal_with_routing(ids, Run(document_start=document_start))[0]

    def causal_with_routing(self, ids: Int[Array, "B L"], run: Run) -> tuple[Float[Array, "B L D"], PerLayer]:
        """As `causal`, and what each layer that routes tokens did, a `Routing` without `experts`, if the run asks."""

        def step(layers, h, _):
            h, memory = layers[0].causal(h, run=run)
            return h, memory.over(run.measured) if isinstance(memory, Routing) else None

        h, routing = walk((self,), self.embed(ids), step)
        return self.finish(h), routing

    @staticmethod
    def by_router(things: PerLayer) -> Params:
        """One thing of each layer that routes tokens, laid out as the biases of the routers in a tower's parameters."""
        return unflatten(
            {
                (f"segment_{i}", f"layer_{j}", "mixer", "router", "bias"): thing
                for i, segment in enumerate(things.segments)
                for j, thing in enumerate(segment)
                if thing is not None
            }
        )

    def layer_outputs(self, ids: Int[Array, "B L"]) -> list[Float[Array, "B L D"]]:
        """The embedding of (B, L) tokens and the output of each layer but the last, whose place the final norm's takes:
        what the published code calls hidden states, num_hidden_layers + 1 of (B, L, D)."""

        def step(layers, h, _):
            h, _ = layers[0].causal(h)
            return h, h

        first = self.embed(ids)
        last, outputs = walk((self,), first, step)
        return [first, *outputs.by_layer()[:-1], self.finish(last)]

    # The cache: what is particular to a layer's kind, its mixer does.

    def extend(
        self,
        ids: Int[Array, "B L"],
        lengths: Int[Array, " B"],
        *,
        cache: Cache | None = None,
        capacity: int | None = None,
    ) -> tuple[Float[Array, "B L D"], Cache]:
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
            h, memory = layers[0].causal(h, layer_cache, Run(cache_lengths=start, lengths=lengths))
            mixer = layers[0].mixer
            return h, mixer.first_cache(memory, capacity) if cache is None else mixer.news(memory)

        h, layers = walk((self,), self.embed(ids), step, None if cache is None else cache.layers)
        if cache is not None:
            # After the walk, where the keys of all layers are written in place into a cache that is given away. The
            # barrier puts the writing after the last reading: in a loop the old keys would be copied otherwise.
            h, layers = jax.lax.optimization_barrier((h, layers))
            layers = self._append(cache.layers, layers, start)
        return self.finish(h), Cache(layers=layers, lengths=start + lengths)

    def read(self, ids: Int[Array, "B L"], cache: Cache) -> tuple[Float[Array, "B L D"], PerLayer]:
        """Reads tokens after `cache` without adding them to it; `keep` adds as many of them as turn out to be wanted.

        Args:
          ids: (B, L) int32.

        Returns:
          the final hidden states (B, L, D), and each layer's memory of the tokens.
        """

        def step(layers, h, layer_cache):
            # The state after all of the tokens is not the one that will be kept.
            return layers[0].causal(h, layer_cache, Run(cache_lengths=cache.lengths, end=False))

        h, memories = walk((self,), self.embed(ids), step, cache.layers)
        return self.finish(h), memories

    def keep(self, cache: Cache, memories: PerLayer, lengths: Int[Array, " B"]) -> Cache:
        """The cache after the first `lengths` (B,) of the tokens that `read` read: what `extend` gives for these.

        Nothing is projected, attended to or sent to experts a second time.
        """

        def keep(mixer, layer_cache, memory):
            return mixer.keep(layer_cache, memory, cache.lengths, lengths)

        layers = cache.layers.map(keep, memories, given=self._mixers())
        return Cache(layers=layers, lengths=cache.lengths + lengths)

    def newest(self, cache: Cache, before: Int[Array, " B"], width: int) -> Cache:
        """What a copy of the cache, of when its lengths were `before` (B,), lacks: for `absorb`.

        Args:
          width: the most tokens by which a row has grown since.
        """

        def newest(mixer, layer_cache):
            return mixer.newest(layer_cache, before, width)

        return cache.replace(layers=cache.layers.map(newest, given=self._mixers()))

    def absorb(self, cache: Cache, news: Cache) -> Cache:
        """A copy of a cache after what `newest` tells of it."""
        return news.replace(layers=self._append(cache.layers, news.layers, cache.lengths))

    def published_cache(self, cache: Cache) -> PerLayer:
        """The arrays of each layer's cache by name, as the published code has them."""
        return cache.layers.map(lambda mixer, layer_cache: mixer.published_cache(layer_cache), given=self._mixers())

    def _append(self, layers: PerLayer, news: PerLayer, before: jax.Array) -> PerLayer:
        def append(mixer, layer_cache, news):
            return mixer.append(layer_cache, news, before)

        return layers.map(append, news, given=self._mixers())

    def _mixers(self) -> list[list[Mixer]]:
        return [[layer.mixer for layer in segment.layers] for segment in self.segments]

    def empty_cache(self, batch: int, capacity: int) -> Cache:
        """The cache of B texts that have not begun, with room for `capacity` positions each."""

        def shapes(letter):
            return registry.kind(letter).cache_shapes(self.config, batch, capacity, self.execution.dtype)

        return Cache(layers=PerLayer.zeros(self.stretches, shapes), lengths=jnp.zeros(batch, jnp.int32))

    def cache_axes(self) -> Cache:
        """The logical axes of every array of a cache, a tuple in place of each."""
        layers = PerLayer.axes(self.stretches, lambda letter: registry.kind(letter).cache_axes)
        return Cache(layers=layers, lengths=("batch",))
