"""Sampling strategies, one file each; `base.py` says what one is, and how another one is registered.

confidence          all positions surer than γ, and enough of the surest to be done by step T: the published default
posterior           each position by a coin, as q(x_s | x_t, x_θ) has it on a noise schedule
predict_and_noise   predict all, mask the least sure again until the schedule's next level is reached
entropy_bounded     the lowest entropies, as long as their sum less the largest is bounded
remasking           as confidence, and tokens that turned doubtful are masked again
factor              as many of the surest as their number allows
"""

# Each registers itself; `confidence`, the default, first.
# isort: off
import twotower_jax.diffusion.strategies.confidence
import twotower_jax.diffusion.strategies.posterior
import twotower_jax.diffusion.strategies.predict_and_noise
import twotower_jax.diffusion.strategies.entropy_bounded
import twotower_jax.diffusion.strategies.remasking
import twotower_jax.diffusion.strategies.factor  # noqa: F401

# isort: on
from twotower_jax.diffusion.strategies.base import STRATEGIES, Draft, Strategy, knobs, make_strategy, per_row, strategy

__all__ = ["STRATEGIES", "Draft", "Strategy", "knobs", "make_strategy", "per_row", "strategy"]
