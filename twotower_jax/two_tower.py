"""The two-tower model (arXiv 2606.26493): a causal context tower, and a denoiser that reads it layer by layer.

`Backbone` is the single tower that both start from. Modules hold declarations, not arrays: `parameters.bind` puts a
dictionary of arrays into one for a functional call, and every method is then a pure function of arrays and caches.

    model = TwoTower(config)
    params = parameters.initialize(parameters.parameter_table(model), randomness.key(0))
    logits = parameters.bind(model, params).context_logits(ids)
"""

import dataclasses
from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from twotower_jax.cache import Cache
from twotower_jax.config import ModelConfig, Variant
from twotower_jax.execution import Execution
from twotower_jax.kernels import OPS
from twotower_jax.layers import registry
from twotower_jax.layers.mixer import Routing, Run
from twotower_jax.layers.time_conditioning import TimeConditioning, modulation
from twotower_jax.layers.vocabulary import Head
from twotower_jax.parameters import Initializer, Params, Path, Scope, fresh, initialize, parameter_table, use
from twotower_jax.stack import PerLayer, walk
from twotower_jax.tower import Tower


class _Model(nnx.Module):
    """A module that equals another one made of the same: what JAX has compiled for one then serves the other, such as
    for a checkpoint that is loaded a second time."""

    def __init__(self, config: ModelConfig, execution: Execution, *others: Hashable):
        """`others`: what else the module is made of."""
        kinds = tuple(registry.kind(letter) for letter in sorted(set(config.hybrid_override_pattern)))
        # A user's file that is run again replaces what it has registered.
        own = tuple(op.registered(getattr(execution.backends, op.setting)) for op in OPS.values())
        self.made_of = (config, execution, kinds, own, *others)

    def __eq__(self, other: object) -> bool:
        return self is other or type(self) is type(other) and self.made_of == other.made_of

    def __hash__(self) -> int:
        return hash(self.made_of)


class Backbone(_Model):
    """One tower and its head: the autoregressive model that both towers of `TwoTower` start from."""

    def __init__(self, config: ModelConfig, execution: Execution = Execution()):  # noqa: B008 (frozen)
        super().__init__(config, execution)
        self.config = config
        self.tower = Tower(config, "backbone.", execution)
        self.head = Head(config, Scope(("lm_head.",)))

    def logits(self, ids: Int[Array, "B L"]) -> Float[Array, "B L V"]:
        """(B, L) int32 → (B, L, V) float32; logits at i predict token i + 1."""
        return self.head(self.tower.causal(ids))


class TrainingStates(NamedTuple):
    """What a pass over clean and noisy tokens gives.

    Attributes:
      denoiser: (B, L, D), which `denoiser_head` turns into logits, those at i for position i itself.
      context: (B, L, D), which `context_head` turns into next-token logits.
      expert_load: (layers with experts, E) float32, the tokens of each of the denoiser's experts as a multiple of the
        even share, all tokens or those measured; None without experts.
      routing: what the layers did, a `Routing` without `experts`, in each pass through a tower that trains, by its name
        among the parameters.
    """

    denoiser: jax.Array
    context: jax.Array
    expert_load: jax.Array | None
    routing: dict[str, tuple[PerLayer, ...]]


class TwoTower(_Model):
    """The context tower, the denoiser tower, their heads, and the denoiser's time conditioning."""

    def __init__(
        self,
        config: ModelConfig,
        variant: Variant = Variant(),  # noqa: B008 (frozen)
        execution: Execution = Execution(),  # noqa: B008 (frozen)
        time_table_init: Initializer | None = None,
    ):
        super().__init__(config, execution, variant, time_table_init)
        self.config = config
        self.variant = variant
        bidirectional = variant.bidirectional_mamba
        tied = variant.context == "tied"
        self.context_tower = Tower(config, "context_tower.", execution, bidirectional and tied)
        self.denoiser_tower = self.context_tower if tied else Tower(config, "denoiser_tower.", execution, bidirectional)
        self.context_head = Head(config, Scope(("context_lm_head.",)))
        self.denoiser_head = Head(config, Scope(("lm_head.",)))
        self.time = (
            TimeConditioning(config, Scope(("",), in_backbone=False), execution.dtype, time_table_init)
            if variant.time_conditioning
            else None
        )

    # The context tower alone.

    def context_logits(self, ids: Int[Array, "B L"]) -> Float[Array, "B L V"]:
        """(B, L) int32 → (B, L, V) float32; logits at i predict token i + 1."""
        return self.context_head(self.context_tower.causal(ids))

    # Generation.

    def prefill(
        self, ids: Int[Array, "B L"], lengths: Int[Array, " B"], capacity: int
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Reads prompts (B, L), padded on the right to L, of `lengths` (B,) tokens into a new cache.

        Returns:
          the context's logits after each row's last token, (B, V) float32, and the cache.
        """
        h, cache = self.context_tower.extend(ids, lengths, capacity=capacity)
        return self._last_logits(h, lengths), cache

    def extend(
        self, ids: Int[Array, "B L"], lengths: Int[Array, " B"], cache: Cache
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Reads (B, L) more tokens, of which each row has `lengths` (B,) real ones, after the cache.

        Returns:
          the context's logits after each row's last real token, (B, V) float32 (meaningless where lengths is 0), and
          the cache.
        """
        h, cache = self.extend_states(ids, lengths, cache)
        return self._last_logits(h, lengths), cache

    def extend_states(
        self, ids: Int[Array, "B L"], lengths: Int[Array, " B"], cache: Cache
    ) -> tuple[Float[Array, "B L D"], Cache]:
        """As `extend`, but the final hidden states of all tokens, which `context_head` turns into logits (B, L, V)."""
        return self.context_tower.extend(ids, lengths, cache=cache)

    def verify(self, block: Int[Array, "B S"], cache: Cache) -> tuple[Float[Array, "B S V"], PerLayer]:
        """What the context thinks of (B, S) tokens after the cache, of which `keep` takes as many as turn out right.

        Returns:
          the context's logits after each of them, (B, S, V) float32, and the layers' memories for `keep`.
        """
        h, memories = self.context_tower.read(block, cache)
        return self.context_head(h), memories

    def keep(self, cache: Cache, memories: PerLayer, lengths: Int[Array, " B"]) -> Cache:
        """The cache after the first `lengths` (B,) of the tokens given to `verify`."""
        return self.context_tower.keep(cache, memories, lengths)

    def _last_logits(self, h, lengths):
        last = jnp.take_along_axis(h, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
        return self.context_head(last)[:, 0]

    def denoise(self, block: Int[Array, "B S"], t: Float[Array, " B"] | None, cache: Cache) -> Float[Array, "B S V"]:
        """One evaluation of the denoiser on a block after the cache, which stays as it is.

        Args:
          block: (B, S) int32, the mask token where undecided.
          t: (B,) float32, each row's masked fraction; None leaves the time conditioning out.

        Returns:
          (B, S, V) float32; logits at i are for position i itself. The mask token's logit is not constrained.
        """
        return self.denoise_with_routing(block, t, cache)[0]

    def denoise_with_routing(
        self, block: Int[Array, "B S"], t: Float[Array, " B"] | None, cache: Cache
    ) -> tuple[Float[Array, "B S V"], Int[Array, "layers B S k"] | None]:
        """As `denoise`, and which experts each token went through: (layers with experts, B, S, k) int32, best first;
        None where there are none."""
        h, experts = self.denoiser_states(block, t, cache)
        return self.denoiser_head(h), experts

    def denoiser_states(
        self, block: Int[Array, "B S"], t: Float[Array, " B"] | None, cache: Cache
    ) -> tuple[Float[Array, "B S D"], Int[Array, "layers B S k"] | None]:
        """As `denoise_with_routing`, but the final hidden states, which `denoiser_head` turns into logits."""
        tower = self.denoiser_tower

        def step(layers, h, layer_cache, modulation):
            run = Run(cache_lengths=cache.lengths)
            h, routing = layers[0].blockwise(h, layer_cache, block.shape[1], run, modulation)
            return h, None if routing is None else routing.experts

        h, experts = self._walk_denoiser((tower,), tower.embed(block), step, t, cache)
        return tower.finish(h), experts.stack()

    def mock_ar_logits(self, ids: Int[Array, "B L"], cache: Cache) -> Float[Array, "B L V"]:
        """A check of the denoiser's weights: used causally, without time conditioning, as if it were the context.

        Args:
          ids: (B, L) int32, the tokens after the cache (the published check reads one, the last).

        Returns:
          (B, L, V) float32; logits at i are for token i + 1.
        """
        tower = self.denoiser_tower

        def step(layers, h, layer_cache):
            return layers[0].causal(h, layer_cache, Run(cache_lengths=cache.lengths))[0], None

        h, _ = walk((tower,), tower.embed(ids), step, cache.layers)
        return self.denoiser_head(tower.finish(h))

    # Training.

    def training_states(
        self,
        clean: Int[Array, "B L"],
        noisy: Int[Array, "B L"],
        t: Float[Array, " B *blocks"],
        block_size: int,
        document_start: Int[Array, "B L"] | None = None,
        measured: Bool[Array, "B L"] | None = None,
        balance: bool = False,
    ) -> TrainingStates:
        """One context pass over the clean tokens and one denoiser pass over all blocks of the noisy ones.

        Both towers go down the layers together: the memory of one context layer exists at a time. Block n sees the
        context's blocks 0 … n − 1.

        Args:
          clean, noisy: (B, L) int32, L a multiple of S.
          t: (B,) or (B, L/S) float32, each sequence's or each block's noise level.
          block_size: S.
          document_start: (B, L) int32, where several documents lie side by side: the first position of each one's own.
            Every document starts with a block, or nothing before the first block border in it has a loss.
          measured: (B, L) bool, the tokens that `expert_load` and `routing` are of; None for all.
          balance: whether the sums that balance routers are wanted.

        Raises:
          ValueError: if S does not divide L.
        """
        if clean.shape[1] % block_size:
            raise ValueError(f"the sequence length {clean.shape[1]} is not a multiple of the block size {block_size}")
        context, denoiser = self.context_tower, self.denoiser_tower
        trains = self.variant.context != "frozen"
        blockwise_run = Run(document_start=document_start, balance=balance, measured=measured)
        run = dataclasses.replace(blockwise_run, routing=trains) if trains else Run(document_start=document_start)

        def step(layers, carry, _, modulation):
            (context_layer, denoiser_layer), (h_context, h) = layers, carry
            h_context, memory = context_layer.causal(h_context, run=run)
            if not trains:
                h_context, memory = jax.lax.stop_gradient((h_context, memory))
            read = None
            if isinstance(memory, Routing):
                memory, read = None, memory.over(measured)
            h, routing = denoiser_layer.blockwise(h, memory, block_size, blockwise_run, modulation)
            return (h_context, h), None if routing is None else (routing.over(measured), read)

        carry = context.embed(clean), denoiser.embed(noisy)
        (h_context, h), routings = self._walk_denoiser((context, denoiser), carry, step, t, None, block_size)
        own, contexts = (routings.map(lambda pair, i=i: pair[i]) for i in range(2))
        load = own.map(lambda routing: routing.load).stack()
        if self.variant.context == "tied":
            routing = {"context_tower": (contexts, own)}
        else:
            routing = {"denoiser_tower": (own,)} | ({"context_tower": (contexts,)} if trains else {})
        return TrainingStates(denoiser.finish(h), context.finish(h_context), load, routing)

    def training_logits(
        self, clean: Int[Array, "B L"], noisy: Int[Array, "B L"], t: Float[Array, " B *blocks"], block_size: int
    ) -> tuple[Float[Array, "B L V"], Float[Array, "B L D"]]:
        """As `training_states`, the denoiser's being logits already: (B, L, V) float32."""
        states = self.training_states(clean, noisy, t, block_size)
        return self.denoiser_head(states.denoiser), states.context

    def _walk_denoiser(self, towers, carry, step, t, cache, block_size=None):
        """A `walk` whose step also gets the layer's cache and modulation: (layers, carry, cache, modulation)."""
        stretches = towers[-1].stretches
        nothing = PerLayer.nothing(stretches)
        caches = nothing if cache is None else cache.layers
        timed = self.time is not None and t is not None
        block = self.time(t) if timed else None
        tables = PerLayer.unstack(stretches, use(self.time.tables)) if timed else nothing

        def with_modulation(layers, carry, inputs):
            layer_cache, table = inputs
            return step(layers, carry, layer_cache, modulation(table, block, block_size) if timed else None)

        return walk(towers, carry, with_modulation, caches.zip(tables))


def is_trainable(variant: Variant, path: Path) -> bool:
    """Whether a `TwoTower` parameter gets a gradient under `variant` (buffers never do; see `Parameter.trainable`)."""
    if path[0] == "context_tower":
        return variant.context != "frozen"
    if path[0] == "context_head":
        return variant.context_loss
    return True


def from_backbone(model: TwoTower, backbone: Params, key: Key[Array, ""]) -> Params:
    """Parameters of `model` that start both towers from those of a `Backbone` of the same layout.

    The towers share arrays; the time conditioning is fresh, drawn from `key`, and by default changes nothing.
    """
    params = {
        "context_tower": backbone["tower"],
        "context_head": backbone["head"],
        "denoiser_head": backbone["head"],
        **initialize(fresh(parameter_table(model)), key),
    }
    return params if model.variant.context == "tied" else params | {"denoiser_tower": backbone["tower"]}
