"""What is trained, and its loss.

An objective knows its model, which of its parameters are trained, what training starts from, and the loss of a batch.
Losses are sums and counts (`LossSum`), so that they add up over steps, devices and validation batches before anything
is divided.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from twotower_jax.config import ModelConfig
from twotower_jax.diffusion import (
    LossSum,
    MaskedDiffusion,
    count,
    loss_by_block_position,
    loss_by_noise_level,
    loss_by_turn,
    masked_loss_sum,
    next_tokens,
    spread,
)
from twotower_jax.kernels.numerics.quantized import Quantized
from twotower_jax.layers.mixer import Run
from twotower_jax.parameters import Parameter, Params, Path, bind, initialize, parameter_table
from twotower_jax.registry import Registry
from twotower_jax.stack import PerLayer
from twotower_jax.tower import Tower
from twotower_jax.train.terms import Balance, Distillation, evenness
from twotower_jax.two_tower import Backbone, TrainingStates, TwoTower, from_backbone, is_trainable

if TYPE_CHECKING:  # A config checks there which objectives there are.
    from twotower_jax.train.config import TrainConfig

Losses = dict[str, LossSum]

# Ends the name of a term's sums row by row.
BY_ROW = "_by_row"
# Names the tokens of the experts by which a step moves the routers' biases, in place of arrays nested dictionaries laid
# out as these: each expert's tokens, and their mean over the experts of a layer.
ROUTED = "routed"


class NoiseKey(NamedTuple):
    """All that the noise of a batch depends on.

    Attributes:
      seed: of the run.
      step: an int or a scalar, traced or not.
      index: (B,) int32, each sequence's row in the global batch.
      rows: in all, where the batch holds only some of those that share their noise levels; None for B.
    """

    seed: int
    step: jax.Array | int
    index: jax.Array
    rows: int | None = None


class Documents(NamedTuple):
    """Documents side by side in a batch, none of which is to know of another.

    Attributes:
      start: (B, L) int32, the first position of each position's document.
      counted: (B, L) bool, False for the padding between documents and, in conversations, for all that is not the
        assistant's: such tokens are never masked.
      token_weight: of conversations, (B, L) float32, how much each token counts; None for 1.
      turn: of conversations, (B, L) int32, the number of each token's answer, from 1; 0 in none.
    """

    start: jax.Array
    counted: jax.Array
    token_weight: jax.Array | None = None
    turn: jax.Array | None = None


class Examples(NamedTuple):
    """A batch ready for a model: all that a step's randomness decides is decided, once. R rows; see `Corruption`.

    Attributes:
      clean: (R, L) int32.
      counted: (R, L) bool, the positions whose token may count.
      start: (R, L) int32, the first position of each position's document, or None.
      noisy: (R, L) int32; masked: (R, L) bool, those that have a loss; t, weight: (R,) or (R, L/S) float32. None for a
        backbone.
      token_weight, turn: as in `Documents`; None for other texts.
      dropout: (R, 2) uint32, the data of a random key for each row, or None (adapting.py).
    """

    clean: jax.Array
    counted: jax.Array
    start: jax.Array | None
    noisy: jax.Array | None = None
    masked: jax.Array | None = None
    t: jax.Array | None = None
    weight: jax.Array | None = None
    token_weight: jax.Array | None = None
    turn: jax.Array | None = None
    dropout: jax.Array | None = None


class Objective:
    """What is common to objectives: the losses of a batch from its examples.

    Attributes:
      is_noisy: whether another draw of the noise gives another loss of the same tokens.
      terms: names of the losses whose means, times their weights, are added up to what is minimized.
      balance: of the routers that train.
    """

    is_noisy = False
    terms: tuple[str, ...]
    balance: Balance = Balance()

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term, 1 unless said otherwise."""
        return dict.fromkeys(self.terms, 1.0) | self.balance.weights

    @classmethod
    def make(cls, config: "TrainConfig", model: ModelConfig) -> "Objective":
        """The objective of a run with these settings."""
        raise NotImplementedError(f"{cls.__name__} does not say how it is made of a config")

    @property
    def table(self) -> Mapping[Path, Parameter]:
        """All parameters, those that train and those that do not."""
        return parameter_table(self.model)

    def frozen(self, parameter: Parameter) -> jax.ShapeDtypeStruct | Quantized:
        """How a parameter that does not train is stored: its shape and dtype."""
        return jax.ShapeDtypeStruct(parameter.shape, jnp.float32 if parameter.float32 else self.dtype)

    def model_params(self, params: Params) -> Params:
        """The parameters of `model`, of those of `table`."""
        return params

    def for_validation(self) -> "Objective":
        """The same objective on rows that are seen once, without what is for the routers' sake."""
        return self if self.balance == Balance() else dataclasses.replace(self, balance=Balance())

    def examples(
        self,
        ids: jax.Array,
        counted: jax.Array,
        noise: NoiseKey,
        block_size: int,
        documents: Documents | None = None,
    ) -> Examples:
        """(B, L) tokens, of the rows that `counted` (B,) bool says, ready for the model."""
        mask = jnp.broadcast_to(counted[:, None], ids.shape)
        if documents is None:
            return Examples(ids, mask, None)
        told = {"token_weight": documents.token_weight, "turn": documents.turn}
        return Examples(ids, mask & documents.counted, documents.start, **told)

    def losses(
        self,
        params: Params,
        ids: jax.Array,
        counted: jax.Array,
        noise: NoiseKey,
        block_size: int,
        documents: Documents | None = None,
        validating: bool = False,
    ) -> Losses:
        """`losses_of` the `examples`."""
        examples = self.examples(ids, counted, noise, block_size, documents)
        return self.losses_of(params, examples, block_size, validating)

    def measured(self, examples: Examples, validating: bool) -> jax.Array | None:
        """(R, L) bool, the tokens that count in what is said of routers; None for all."""
        padded = examples.start is not None and self.balance != Balance()
        return examples.counted if validating or padded else None

    def router_losses(self, routing: dict[str, tuple[PerLayer, ...]], examples: Examples) -> Losses:
        """What balances the routers, given what the layers did in each pass through a tower, whose names are those of
        the parameters: the losses in use, and `ROUTED`."""
        counts, losses = self.router_counts(examples), {}
        for term, part in (("router_balance_loss", "balance"), ("router_z_loss", "z")):
            if term in counts:
                sums = (
                    layers.map(lambda r, part=part: getattr(r, part)) for each in routing.values() for layers in each
                )
                losses[term] = LossSum(sum(map(jnp.sum, jax.tree.leaves([s.segments for s in sums]))), counts[term])
        if self.balance.bias_rate:
            passes = {
                name: [Tower.by_router(layers.map(lambda r: r.tokens)) for layers in each]
                for name, each in routing.items()
            }
            tokens = {name: jax.tree.map(lambda *v: sum(v), *each) for name, each in passes.items()}
            mean = jax.tree.map(lambda v: jnp.mean(v, axis=-1, keepdims=True), tokens)
            losses[ROUTED] = jax.lax.stop_gradient(LossSum(tokens, mean))
        return losses

    def router_counts(self, examples: Examples) -> dict[str, jax.Array]:
        """What the losses of `router_losses` are means over: sequences, and tokens."""
        counts = {
            "router_balance_loss": count(jnp.any(examples.counted, axis=1)),
            "router_z_loss": count(examples.counted),
        }
        return {term: counts[term] for term in self.balance.weights}


OBJECTIVES = Registry("objective", Objective)


@OBJECTIVES.register("autoregressive")
@dataclasses.dataclass(frozen=True)
class Autoregressive(Objective):
    """A backbone on next tokens."""

    model: Backbone
    balance: Balance = Balance()

    @classmethod
    def make(cls, config: "TrainConfig", model: ModelConfig) -> "Autoregressive":
        """A backbone."""
        return cls(Backbone(model, config.execution), config.balance)

    @property
    def terms(self) -> tuple[str, ...]:
        return ("next_token_loss", *self.balance.weights)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of activations and frozen parameters."""
        return self.model.tower.execution.dtype

    def is_trained(self, path: Path) -> bool:
        return True

    def losses_of(self, params: Params, examples: Examples, block_size: int, validating: bool = False) -> Losses:
        """The loss of the examples, and what the experts had to do, as of a `Denoiser`. The block size plays no part.

        With `validating` also of each row, (B,), under the name and `BY_ROW`.
        """
        model = bind(self.model, params)
        run = Run(
            document_start=examples.start,
            routing=True,
            balance=bool(self.balance.weights),
            measured=self.measured(examples, validating),
        )
        h, routing = model.tower.causal_with_routing(examples.clean, run)
        targets, counted, token_weight = _next_tokens(examples)
        log_p = model.head.log_probabilities(h, targets)
        losses = {"next_token_loss": masked_loss_sum(log_p, counted, token_weight=token_weight)}
        if examples.turn is not None:
            losses["by_turn"] = loss_by_turn(log_p, counted, jnp.roll(examples.turn, -1, axis=1), token_weight)
        if validating:
            losses["next_token_loss" + BY_ROW] = masked_loss_sum(log_p, counted, axis=1, token_weight=token_weight)
        load = routing.map(lambda layer: layer.load).stack()
        return losses | self.router_losses({"tower": (routing,)}, examples) | _load(load, examples, validating)

    def counts(self, examples: Examples) -> dict[str, jax.Array]:
        """What each term is the mean over, known before any parameter is."""
        _, counted, token_weight = _next_tokens(examples)
        return {"next_token_loss": count(counted, token_weight=token_weight)} | self.router_counts(examples)

    def start(self, checkpoint: Params | None, key: jax.Array) -> Params:
        """A two-tower checkpoint's context tower and its head, or random weights."""
        if checkpoint is None:
            return initialize(parameter_table(self.model), key)
        return {"tower": checkpoint["context_tower"], "head": checkpoint["context_head"]}


@OBJECTIVES.register("denoiser")
@dataclasses.dataclass(frozen=True)
class Denoiser(Objective):
    """A two-tower model on masked tokens (arXiv 2606.26493), under any `Variant`.

    Cross-entropy of masked positions as `diffusion` draws and weighs them; with `context_loss` plus the mean next-token
    cross-entropy of the context head; with `distillation` plus the divergence from what the context tower says of each
    masked token, but for the first of a document.
    """

    model: TwoTower
    diffusion: MaskedDiffusion = MaskedDiffusion()
    distillation: Distillation = Distillation()
    balance: Balance = Balance()
    is_noisy = True

    @classmethod
    def make(cls, config: "TrainConfig", model: ModelConfig) -> "Denoiser":
        """The objective of the variant and the diffusion that the settings name."""
        two_tower = TwoTower(model, config.variant, config.execution)
        return cls(two_tower, config.diffusion.process, config.distillation, config.balance)

    def for_validation(self) -> "Denoiser":
        """With times that are as even over the rows as can be."""
        diffusion = dataclasses.replace(self.diffusion, times=self.diffusion.times.for_validation())
        return dataclasses.replace(super().for_validation(), diffusion=diffusion)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of activations and frozen parameters."""
        return self.model.context_tower.execution.dtype

    @property
    def terms(self) -> tuple[str, ...]:
        added = {"context_loss": self.model.variant.context_loss, "distillation_loss": self.distillation.weight}
        return ("masked_loss", *(term for term, wanted in added.items() if wanted), *self.balance.weights)

    @property
    def weights(self) -> dict[str, float]:
        weights = super().weights
        return weights | {"distillation_loss": self.distillation.weight} if self.distillation.weight else weights

    def is_trained(self, path: Path) -> bool:
        return is_trainable(self.model.variant, path)

    def examples(
        self,
        ids: jax.Array,
        counted: jax.Array,
        noise: NoiseKey,
        block_size: int,
        documents: Documents | None = None,
    ) -> Examples:
        """With the noise of the step."""
        corruption = self.diffusion.corrupt(
            ids,
            seed=noise.seed,
            step=noise.step,
            example_index=noise.index,
            mask_token_id=self.model.config.mask_token_id,
            block_size=block_size,
            rows=noise.rows,
        )
        plain = super().examples(ids, counted, noise, block_size, documents)
        clean = jax.tree.map(self.diffusion.repeated, plain)
        noisy = corruption.noisy_ids
        if clean.token_weight is not None:
            noisy = jnp.where(clean.counted, noisy, clean.clean)
        return clean._replace(
            noisy=noisy,
            masked=corruption.masked & clean.counted,
            t=corruption.t,
            weight=corruption.weight,
        )

    def losses_of(self, params: Params, examples: Examples, block_size: int, validating: bool = False) -> Losses:
        """The losses of the examples in blocks of `block_size`; beside the terms, the plain cross-entropy of masked
        tokens by noise level and by block position.

        For conversations also by turn.

        And `expert_load`: of each layer with experts, the busiest one's tokens as a multiple of the even share; and
        `expert_entropy`, the entropy of their shares, 1 where all are even.

        With `validating` also the terms of each sequence, (B,), under their names and `BY_ROW`; and `expert_load` alone
        is that of every expert, (layers, E), over the tokens that may count: it can be added up over batches, and
        filler has no part in it.
        """
        model, balance = bind(self.model, params), bool(self.balance.weights)
        states = model.training_states(
            *(examples.clean, examples.noisy, examples.t, block_size, examples.start),
            *(self.measured(examples, validating), balance),
        )
        losses = self.losses_of_states(model, states, examples, block_size, validating)
        return losses | self.router_losses(states.routing, examples) | _load(states.expert_load, examples, validating)

    def losses_of_states(
        self, model: TwoTower, states: TrainingStates, examples: Examples, block_size: int, validating: bool
    ) -> Losses:
        """`losses_of`, of what the towers (bound to their parameters) made of the examples.

        An objective that adds a term to these extends this, `terms` and `counts` (configs/example_objective.py).
        """
        masked, t, token_weight = examples.masked, examples.t, examples.token_weight
        log_p = model.denoiser_head.log_probabilities(states.denoiser, examples.clean)
        weight = spread(examples.weight.reshape(len(masked), -1), masked.shape[1])
        losses = {
            "masked_loss": masked_loss_sum(log_p, masked, weight, self._counted(examples), token_weight=token_weight),
            "by_noise_level": loss_by_noise_level(log_p, masked, t, token_weight),
            "by_block_position": loss_by_block_position(log_p, masked, block_size, token_weight),
        }
        if examples.turn is not None:
            losses["by_turn"] = loss_by_turn(log_p, masked, examples.turn, token_weight)
        if validating:
            losses["masked_loss" + BY_ROW] = self._by_sequence(
                masked_loss_sum(log_p, masked, weight, self._counted(examples), 1, token_weight)
            )
        if model.variant.context_loss:
            targets, counted, next_weight = _next_tokens(examples)
            log_p = model.context_head.log_probabilities(states.context, targets)
            losses["context_loss"] = masked_loss_sum(log_p, counted, token_weight=next_weight)
            if validating:
                losses["context_loss" + BY_ROW] = self._by_sequence(
                    masked_loss_sum(log_p, counted, axis=1, token_weight=next_weight)
                )
        if self.distillation.weight:
            temperature, foreseen = self.distillation.temperature, _foreseen(examples)
            # What the context says of position i stands at i − 1.
            taught = jnp.roll(states.context, 1, axis=1)
            gain = -(temperature**2) * model.denoiser_head.divergence(
                states.denoiser, model.context_head, taught, temperature
            )
            losses["distillation_loss"] = masked_loss_sum(gain, foreseen, token_weight=token_weight)
            if validating:
                losses["distillation_loss" + BY_ROW] = self._by_sequence(
                    masked_loss_sum(gain, foreseen, axis=1, token_weight=token_weight)
                )
        return losses

    def counts(self, examples: Examples) -> dict[str, jax.Array]:
        """What each term is the mean over, known before any parameter is."""
        counts = {"masked_loss": count(self._counted(examples), token_weight=examples.token_weight)}
        if self.model.variant.context_loss:
            _, counted, token_weight = _next_tokens(examples)
            counts["context_loss"] = count(counted, token_weight=token_weight)
        if self.distillation.weight:
            counts["distillation_loss"] = count(_foreseen(examples), token_weight=examples.token_weight)
        return counts | self.router_counts(examples)

    def _by_sequence(self, of_rows: LossSum) -> LossSum:
        return jax.tree.map(lambda v: v.reshape(-1, self.diffusion.passes).sum(axis=1), of_rows)

    def _counted(self, examples: Examples) -> jax.Array:
        return self.diffusion.counted(examples.masked, examples.counted)

    def start(self, checkpoint: Params | None, key: jax.Array) -> Params:
        """The checkpoint's parameters, or both towers from one random backbone."""
        if checkpoint is not None:
            return checkpoint
        backbone = Backbone(self.model.config, self.model.context_tower.execution)
        key, time_key = jax.random.split(key)
        return from_backbone(self.model, initialize(parameter_table(backbone), key), time_key)


def _load(load: jax.Array | None, examples: Examples, validating: bool) -> Losses:
    """`expert_load` and `expert_entropy` of a load (layers, E); see `Denoiser.losses_of`."""
    if load is None:
        return {}
    if validating:
        tokens = jnp.broadcast_to(count(examples.counted), load.shape)
        return {"expert_load": LossSum(load * tokens, tokens)}
    load = jax.lax.stop_gradient(load)
    busiest = jnp.max(load, axis=1)
    one = jnp.ones(busiest.shape, jnp.float32)
    return {"expert_load": LossSum(busiest, one), "expert_entropy": LossSum(evenness(load), one)}


def _next_tokens(examples: Examples) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """`next_tokens`, no token being predicted from another document, and no padding; and what each target counts, None
    for 1."""
    targets, mask = next_tokens(examples.clean, jnp.ones(len(examples.clean), bool))
    mask &= jnp.roll(examples.counted, -1, axis=1)
    if examples.start is not None:
        mask &= jnp.roll(examples.start, -1, axis=1) == examples.start
    weight = examples.token_weight
    return targets, mask, None if weight is None else jnp.roll(weight, -1, axis=1)


def _foreseen(examples: Examples) -> jax.Array:
    """(R, L) bool, the masked positions that are not the first of their document."""
    first = 0 if examples.start is None else examples.start
    return examples.masked & (jax.lax.broadcasted_iota(jnp.int32, examples.masked.shape, 1) > first)


def make_objective(config: "TrainConfig", model: ModelConfig) -> Objective:
    """The objective that the settings name.

    Raises:
      ValueError: for one of a user's own that trains something else than both towers, which a workdir could not tell.
    """
    # Below this module, which says what an objective is.
    from twotower_jax.train.adapting import with_adapter

    objective = OBJECTIVES[config.objective].make(config, model)
    if config.two_towers and not isinstance(objective.model, TwoTower):
        raise ValueError(
            f"objective={config.objective!r}: its model is a {type(objective.model).__name__}, and must be a TwoTower"
        )
    return with_adapter(objective, config.lora) if config.lora.rank else objective
