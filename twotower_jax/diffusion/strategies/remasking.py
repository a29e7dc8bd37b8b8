"""Commits as `confidence` does, and masks again what has turned doubtful.

After ReMDM (Wang et al. 2025, arXiv 2503.00307), which masks decoded tokens again with a probability that rises as
their confidence falls; here without a draw. Its confidence is that at the time of decoding; ours is the denoiser's
present one, which reads the token as given and was not trained there, so that only a low one means much.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from twotower_jax.diffusion.strategies.base import STRATEGIES, Draft, Strategy, strategy, surest
from twotower_jax.diffusion.strategies.confidence import sure


@STRATEGIES.register("remasking")
@strategy
class Remasking(Strategy):
    """confidence_threshold  γ, as of `confidence`.
    doubt_threshold       a committed token whose probability has fallen below it is masked again

    The most doubtful first, and fewer than the step commits, so that every step leaves fewer masks; none in the last
    step.
    """

    confidence_threshold: float = 0.8
    doubt_threshold: float = 0.05

    def check(self) -> None:
        self.check_between(0.0, 1.0, "confidence_threshold", "doubt_threshold")

    def new_block(self, draft: Draft) -> Int[Array, " S"]:
        chosen = sure(draft, self.confidence_threshold)
        log_p = jax.nn.log_softmax(draft.logits, axis=-1)
        present = jnp.exp(jnp.take_along_axis(log_p, draft.xt[:, None], axis=1)[:, 0])
        doubtful = ~draft.masked & (present < self.doubt_threshold)
        most = jnp.where(draft.step < draft.steps - 1, jnp.sum(chosen, dtype=jnp.int32) - 1, 0)
        again = surest(most, doubtful, -present)
        return jnp.where(again, jnp.asarray(draft.mask_token_id, draft.xt.dtype), draft.commit(chosen))
