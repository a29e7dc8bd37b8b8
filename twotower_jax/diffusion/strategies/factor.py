"""As many of the surest as their number allows: the factor rule of Fast-dLLM (Wu et al. 2025, arXiv 2505.22618)."""

import jax.numpy as jnp
from jaxtyping import Array, Int

from twotower_jax.diffusion.strategies.base import STRATEGIES, Draft, Strategy, before, strategy


@STRATEGIES.register("factor")
@strategy
class Factor(Strategy):
    """factor  f: of the confidences in falling order the largest n with (n + 1) · (1 − c_n) < f is committed: one or
    more, and at least ceil(masked / steps left)."""

    factor: float = 1.0

    def check(self) -> None:
        self.check_between(0.0, 1e6, "factor")

    def new_block(self, draft: Draft) -> Int[Array, " S"]:
        n = jnp.sum(before(draft.confidence, draft.masked), axis=1, dtype=jnp.int32) + 1
        allowed = draft.masked & ((n + 1).astype(jnp.float32) * (1.0 - draft.confidence) < self.factor)
        largest = jnp.max(jnp.where(allowed, n, 0))
        return draft.commit(n <= jnp.maximum(largest, draft.required))
