"""Positions in order of increasing entropy, as long as what they may still depend on one another is bounded.

EB-Sampler (Ben-Hamu et al. 2025, arXiv 2505.24857): the joint dependence of a set of positions is at most the sum of
their entropies less the largest one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from twotower_jax.diffusion.strategies.base import STRATEGIES, Draft, Strategy, before, strategy


@STRATEGIES.register("entropy_bounded")
@strategy
class EntropyBounded(Strategy):
    """entropy_bound  nats; at 0 the count rule decides, and only certain positions go beyond it.

    The largest set of lowest entropies whose sum less their maximum is at most the bound: one or more, and at least
    ceil(masked / steps left).
    """

    entropy_bound: float = 0.1

    def check(self) -> None:
        self.check_between(0.0, 1e6, "entropy_bound")

    def new_block(self, draft: Draft) -> Int[Array, " S"]:
        log_p = jax.nn.log_softmax(draft.logits, axis=-1)
        entropy = -jnp.sum(jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0.0), axis=-1)
        lower = before(-entropy, draft.masked)
        # The largest of a set in this order is its last: the sum without it is that of those before it.
        others = jnp.sum(jnp.where(lower, entropy[None, :], 0.0), axis=1)
        return draft.commit((others <= self.entropy_bound) | (jnp.sum(lower, axis=1) < draft.required))
