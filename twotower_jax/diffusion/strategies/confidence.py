"""All positions surer than γ, and enough of the surest to be done in time: the published default."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from twotower_jax.diffusion.strategies.base import STRATEGIES, Draft, Strategy, strategy, surest


def sure(draft: Draft, threshold: float | Float[Array, ""]) -> Bool[Array, " S"]:
    """(S,) bool: the positions surer than the threshold, at least ceil(masked / steps left) of the surest."""
    above = jnp.sum(draft.masked & (draft.confidence > threshold), dtype=jnp.int32)
    return surest(jnp.maximum(above, draft.required), draft.masked, draft.confidence)


@STRATEGIES.register("confidence")
@strategy
class Confidence(Strategy):
    """confidence_threshold  γ; at 1 no position is ever surer, and the count rule decides alone."""

    confidence_threshold: float = 0.8

    def check(self) -> None:
        self.check_between(0.0, 1.0, "confidence_threshold")

    def new_block(self, draft: Draft) -> Int[Array, " S"]:
        return draft.commit(sure(draft, self.confidence_threshold))
