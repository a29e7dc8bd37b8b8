"""Predict all, mask the least sure again until the schedule's next level is reached.

LLaDA's low-confidence remasking (Nie et al. 2025, arXiv 2502.09992).
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

from twotower_jax.diffusion.schedules import SCHEDULES
from twotower_jax.diffusion.strategies.base import STRATEGIES, Draft, Strategy, strategy, surest
from twotower_jax.diffusion.strategies.scheduled import levels


@STRATEGIES.register("predict_and_noise")
@strategy
class PredictAndNoise(Strategy):
    """The surest: so many that floor(S · (1 − α_s)) positions stay masked, never fewer than one, in the last step all.

    Only positions that were masked before the step can be masked again. LLaDA and the published code hold committed
    tokens at infinite confidence for the same effect: their probability under the denoiser, which reads them as
    given, is not a measure of how sure it was of them.
    """

    schedule: str = "linear"

    def check(self) -> None:
        SCHEDULES[self.schedule]

    def new_block(self, draft: Draft) -> Int[Array, " S"]:
        _, level_s = levels(self.schedule, draft)
        # The margin keeps a product like 29 · (15 / 29) from rounding to just below its integer.
        num_kept = jnp.floor(draft.xt.size * level_s + 1e-4).astype(jnp.int32)
        count = draft.num_masked - jnp.minimum(num_kept, draft.num_masked - 1)
        return draft.commit(surest(count, draft.masked, draft.confidence))
