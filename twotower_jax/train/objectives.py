"""What is trained, and its loss.

An objective knows its model, which of its parameters are trained, what training starts from, and the loss of a batch.
Losses are sums and counts (`LossSum`), so that they add up over steps, devices and validation batches before anything
is divided.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from twotower_jax.config import ModelConfig
from twotower_jax.diffusion import (
    Corruption,
    LossSum,
    NoiseSchedule,
    corrupt,
    loss_by_block_position,
    loss_by_noise_level,
    masked_loss_sum,
    next_tokens,
)
from twotower_jax.parameters import Params, Path, bind, initialize, parameter_table
from twotower_jax.train.config import TrainConfig
from twotower_jax.two_tower import Backbone, TwoTower, from_backbone, is_trainable

Losses = dict[str, LossSum]


class NoiseKey(NamedTuple):
    """All that the noise of a batch depends on.

    Attributes:
      seed: of the run.
      step: an int or a scalar, traced or not.
      index: (B,) int32, each sequence's row in the global batch.
    """

    seed: int
    step: jax.Array | int
    index: jax.Array


class Documents(NamedTuple):
    """Documents side by side in a batch, none of which is to know of another.

    Attributes:
      start: (B, L) int32, the first position of each position's document.
      counted: (B, L) bool, False for the padding between documents.
    """

    start: jax.Array
    counted: jax.Array


@dataclasses.dataclass(frozen=True)
class Autoregressive:
    """A backbone on next tokens.

    Attributes:
      terms: names of the losses whose means are added up to what is minimized.
    """

    model: Backbone
    terms = ("next_token_loss",)

    @property
    def dtype(self) -> jnp.dtype:
        """Of activations and frozen parameters."""
        return self.model.tower.execution.dtype

    def is_trained(self, path: Path) -> bool:
        return True

    def losses(
        self,
        params: Params,
        ids: jax.Array,
        counted: jax.Array,
        noise: NoiseKey,
        block_size: int,
        documents: Documents | None = None,
    ) -> Losses:
        """The loss of (B, L) tokens, of the rows that `counted` (B,) bool says. Noise and block size play no part."""
        model = bind(self.model, params)
        h = model.tower.causal(ids, documents and documents.start)
        targets, counted = _next_tokens(ids, counted, documents)
        return {"next_token_loss": masked_loss_sum(model.head.log_probabilities(h, targets), counted)}

    def counts(self, ids: jax.Array, noise: NoiseKey, documents: Documents | None = None) -> dict[str, jax.Array]:
        """How many tokens each term is the mean of, known before any parameter is."""
        return {"next_token_loss": _count(_next_tokens(ids, jnp.ones(len(ids), bool), documents)[1])}

    def start(self, checkpoint: Params | None, key: jax.Array) -> Params:
        """A two-tower checkpoint's context tower and its head, or random weights."""
        if checkpoint is None:
            return initialize(parameter_table(self.model), key)
        return {"tower": checkpoint["context_tower"], "head": checkpoint["context_head"]}


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A two-tower model on masked tokens (arXiv 2606.26493), under any `Variant`.

    Mean cross-entropy over masked positions, t ~ U[1e-3, 1] and the linear schedule; with `context_loss` plus the mean
    next-token cross-entropy of the context head.

    Attributes:
      terms: names of the losses whose means are added up to what is minimized.
    """

    model: TwoTower

    @property
    def dtype(self) -> jnp.dtype:
        """Of activations and frozen parameters."""
        return self.model.context_tower.execution.dtype

    @property
    def terms(self) -> tuple[str, ...]:
        return ("masked_loss", "context_loss") if self.model.variant.context_loss else ("masked_loss",)

    def is_trained(self, path: Path) -> bool:
        return is_trainable(self.model.variant, path)

    def losses(
        self,
        params: Params,
        ids: jax.Array,
        counted: jax.Array,
        noise: NoiseKey,
        block_size: int,
        documents: Documents | None = None,
    ) -> Losses:
        """The losses of (B, L) tokens in blocks of `block_size`, and the masked one by noise level and block position.

        Beside them `expert_load`: of each layer with experts, the busiest one's tokens as a multiple of the even share.
        `counted` (B,) bool says which rows count.
        """
        model = bind(self.model, params)
        noisy, masked, t = self._corrupt(ids, noise)
        states = model.training_states(ids, noisy, t, block_size, documents and documents.start)
        log_p = model.denoiser_head.log_probabilities(states.denoiser, ids)
        masked &= counted[:, None]
        if documents is not None:
            masked &= documents.counted
        losses = {
            "masked_loss": masked_loss_sum(log_p, masked),
            "by_noise_level": loss_by_noise_level(log_p, masked, t),
            "by_block_position": loss_by_block_position(log_p, masked, block_size),
        }
        if model.variant.context_loss:
            targets, counted = _next_tokens(ids, counted, documents)
            log_p = model.context_head.log_probabilities(states.context, targets)
            losses["context_loss"] = masked_loss_sum(log_p, counted)
        if states.expert_load is not None:
            busiest = jax.lax.stop_gradient(jnp.max(states.expert_load, axis=1))
            losses["expert_load"] = LossSum(busiest, jnp.ones(busiest.shape, jnp.int32))
        return losses

    def counts(self, ids: jax.Array, noise: NoiseKey, documents: Documents | None = None) -> dict[str, jax.Array]:
        """How many tokens each term is the mean of, known before any parameter is."""
        masked = self._corrupt(ids, noise).masked
        counts = {"masked_loss": _count(masked if documents is None else masked & documents.counted)}
        if self.model.variant.context_loss:
            counts["context_loss"] = _count(_next_tokens(ids, jnp.ones(len(ids), bool), documents)[1])
        return counts

    def _corrupt(self, ids: jax.Array, noise: NoiseKey) -> Corruption:
        return corrupt(
            ids,
            seed=noise.seed,
            step=noise.step,
            example_index=noise.index,
            mask_token_id=self.model.config.mask_token_id,
            schedule=NoiseSchedule("linear"),
        )

    def start(self, checkpoint: Params | None, key: jax.Array) -> Params:
        """The checkpoint's parameters, or both towers from one random backbone."""
        if checkpoint is not None:
            return checkpoint
        backbone = Backbone(self.model.config, self.model.context_tower.execution)
        key, time_key = jax.random.split(key)
        return from_backbone(self.model, initialize(parameter_table(backbone), key), time_key)


def _count(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, dtype=jnp.int32)


def _next_tokens(ids: jax.Array, counted: jax.Array, documents: Documents | None) -> tuple[jax.Array, jax.Array]:
    """`next_tokens`, no token being predicted from another document, and no padding."""
    targets, mask = next_tokens(ids, counted)
    if documents is not None:
        same = jnp.roll(documents.start, -1, axis=1) == documents.start
        mask &= same & jnp.roll(documents.counted, -1, axis=1)
    return targets, mask


Objective = Autoregressive | Denoiser


def make_objective(config: TrainConfig, model: ModelConfig) -> Objective:
    """The objective that the settings name."""
    if config.objective == "autoregressive":
        return Autoregressive(Backbone(model, config.execution))
    return Denoiser(TwoTower(model, config.variant, config.execution))
