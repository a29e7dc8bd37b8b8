"""An objective of one's own: the denoiser on masked tokens, and on what the context tower thinks of them.

    python launch/train.py --config=configs/example_objective.py --workdir=runs/example --config.init_from=runs/backbone

Copy it anywhere and change it: a run's config.json names this file with a hash of it, and the run is resumed only with
the same one.
"""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from twotower_jax.diffusion import count, masked_loss_sum
from twotower_jax.train.config import shipped
from twotower_jax.train.objectives import BY_ROW, OBJECTIVES, Denoiser


@OBJECTIVES.register("distilled")
@dataclasses.dataclass(frozen=True)
class Distilled(Denoiser):
    """Adds the cross-entropy of the denoiser to the context tower's distribution of each masked token."""

    @property
    def terms(self):
        return (*super().terms, "distillation")

    def losses_of_states(self, model, states, examples, block_size, validating):
        losses = super().losses_of_states(model, states, examples, block_size, validating)
        # What the context says of position i stands at i − 1.
        teacher = jnp.roll(jax.nn.softmax(jax.lax.stop_gradient(model.context_head(states.context))), 1, axis=1)
        likelihood = jnp.sum(teacher * jax.nn.log_softmax(model.denoiser_head(states.denoiser)), axis=-1)  # (R, L)
        foreseen = self._foreseen(examples)
        losses["distillation"] = masked_loss_sum(likelihood, foreseen)
        if validating:
            losses["distillation" + BY_ROW] = self._by_sequence(masked_loss_sum(likelihood, foreseen, axis=1))
        return losses

    def counts(self, examples):
        return super().counts(examples) | {"distillation": count(self._foreseen(examples))}

    @staticmethod
    def _foreseen(examples):
        """(R, L) bool, the masked positions that are not the first of their document."""
        first = 0 if examples.start is None else examples.start
        return examples.masked & (jnp.arange(examples.masked.shape[1]) > first)


def get_config() -> ConfigDict:
    config = shipped("tiny")
    config.objective = "distilled"
    return config
