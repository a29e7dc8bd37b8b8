"""Each position by a coin, as q(x_s | x_t, x_θ) has it on a noise schedule (MDLM's ancestral sampling)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from twotower_jax.diffusion.schedules import SCHEDULES
from twotower_jax.diffusion.strategies.base import STRATEGIES, Draft, Strategy, strategy
from twotower_jax.diffusion.strategies.scheduled import levels


@STRATEGIES.register("posterior")
@strategy
class Posterior(Strategy):
    """Each masked position with probability (α_s − α_t) / (1 − α_t), independently.

    q(x_s | x_t, x_θ) of a masked token keeps the mask with probability (1 − α_s) / (1 − α_t) and is x_θ otherwise, so
    the coin and the token can be drawn apart; only the token is tempered or filtered. In the last step 1 − α_s is 0.
    """

    schedule: str = "linear"

    def check(self) -> None:
        SCHEDULES[self.schedule]

    def new_block(self, draft: Draft) -> Int[Array, " S"]:
        level_t, level_s = levels(self.schedule, draft)
        return draft.commit(jax.random.uniform(draft.key, draft.masked.shape, jnp.float32) >= level_s / level_t)
