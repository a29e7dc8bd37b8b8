"""Levels of a noise schedule in sampling."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from twotower_jax.diffusion.schedules import SCHEDULES
from twotower_jax.diffusion.strategies.base import Draft


def levels(schedule: str, draft: Draft) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Masking probabilities before and after a step, on a grid of T even steps from time 1 to time 0."""
    steps_left = (draft.steps - draft.step).astype(jnp.float32)
    steps = jnp.asarray(draft.steps, jnp.float32)
    mask_probability = SCHEDULES[schedule].mask_probability
    return mask_probability(steps_left / steps), mask_probability((steps_left - 1.0) / steps)
