"""An objective of one's own: the denoiser on masked tokens, and sure of those that it gets right.

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


@OBJECTIVES.register("certain")
@dataclasses.dataclass(frozen=True)
class Certain(Denoiser):
    """Adds the entropy of the denoiser's distribution where its most probable token is the right one, as dParallel does
    (arXiv 2509.26488), so that more tokens of a block pass a confidence threshold at once."""

    @property
    def terms(self):
        return (*super().terms, "entropy")

    @property
    def weights(self):
        return super().weights | {"entropy": 0.5}

    def losses_of_states(self, model, states, examples, block_size, validating):
        losses = super().losses_of_states(model, states, examples, block_size, validating)
        log_q = jax.nn.log_softmax(model.denoiser_head(states.denoiser))  # (R, L, V)
        negentropy = jnp.sum(jnp.exp(log_q) * log_q, axis=-1)
        right = examples.masked & (jnp.argmax(log_q, axis=-1) == examples.clean)
        losses["entropy"] = masked_loss_sum(negentropy, right, counted=examples.masked)
        if validating:
            by_row = masked_loss_sum(negentropy, right, counted=examples.masked, axis=1)
            losses["entropy" + BY_ROW] = self._by_sequence(by_row)
        return losses

    def counts(self, examples):
        return super().counts(examples) | {"entropy": count(examples.masked)}


def get_config() -> ConfigDict:
    config = shipped("tiny")
    config.objective = "certain"
    return config
