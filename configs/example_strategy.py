"""A sampling strategy of one's own: commit where the best token leads the second best clearly.

    python launch/generate.py --checkpoint=DIR --prompt="The list object" \\
        --register=configs/example_strategy.py --strategy=margin --strategy_options=least_margin=0.3

It is no run, so there is no get_config. Fields that are numbers are knobs, which compiled functions take as arguments.
"""

import jax
import jax.numpy as jnp

from twotower_jax.diffusion import STRATEGIES, Draft, Strategy, strategy


@STRATEGIES.register("margin")
@strategy
class Margin(Strategy):
    """least_margin  of the probabilities of the best and the second best token; where none leads by it, the surest."""

    least_margin: float = 0.5

    def check(self) -> None:
        self.check_between(0.0, 1.0, "least_margin")

    def new_block(self, draft: Draft) -> jax.Array:
        best = jax.lax.top_k(jax.nn.softmax(draft.logits, axis=-1), 2)[0]
        margin = jnp.where(draft.masked, best[:, 0] - best[:, 1], -1.0)
        return draft.commit((margin >= self.least_margin) | (margin == jnp.max(margin)))
