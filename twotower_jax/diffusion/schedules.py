"""Noise schedules of masked diffusion: the probability m(t) = 1 − α(t) that a token is masked at time t.

Time runs from 0 (clean) to 1 (all masked), as in MDLM (Sahoo et al. 2024, arXiv 2406.07524, section 3). The three
forms are those of the published training code, each exactly 0 at t = 0 and exactly 1 at t = 1:

    linear        m = t                                    MDLM's log-linear schedule, the one trained with
    cosine        m = 1 − cos(π t / 2)                     MDLM's cosine schedule
    exponential   m = (1 − e^(−3t)) / (1 − e^(−3))         constant rate 3, stretched to reach 1

Another one is a subclass of `NoiseSchedule` with its formula, registered by name:

    SCHEDULES.register("quadratic", Quadratic())
"""

import abc
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from twotower_jax.registry import Registry


@dataclass(frozen=True)
class NoiseSchedule(abc.ABC):
    """A noise schedule: its formula, and what follows from it."""

    @abc.abstractmethod
    def formula(self, t: Float[Array, "*times"]) -> Float[Array, "*times"]:
        """m(t) for float32 t in [0, 1]: elementwise, differentiable, increasing from 0 to 1."""

    def mask_probability(self, t: Float[Array, "*times"]) -> Float[Array, "*times"]:
        """m(t), float32 of t's shape, non-decreasing, for float32 times t in [0, 1]."""
        # Rounding may leave a formula just short of 1 at t = 1, where not one token may stay unmasked.
        return jnp.where(t >= 1.0, 1.0, self.formula(t))

    def rate(self, t: Float[Array, "*times"]) -> Float[Array, "*times"]:
        """m′(t), float32 of t's shape: the formula differentiated."""
        return jax.jvp(self.formula, (t,), (jnp.ones_like(t),))[1]


SCHEDULES = Registry("schedule", NoiseSchedule)


@dataclass(frozen=True)
class Linear(NoiseSchedule):
    """m = t."""

    def formula(self, t: Float[Array, "*times"]) -> Float[Array, "*times"]:
        return t


@dataclass(frozen=True)
class Cosine(NoiseSchedule):
    """m = 1 − cos(π t / 2)."""

    def formula(self, t: Float[Array, "*times"]) -> Float[Array, "*times"]:
        # 1 − cos(2a) = 2 sin²(a), without the cancellation at small t.
        return 2.0 * jnp.square(jnp.sin(t * (math.pi / 4.0)))


@dataclass(frozen=True)
class Exponential(NoiseSchedule):
    """m = (1 − e^(−3t)) / (1 − e^(−3))."""

    def formula(self, t: Float[Array, "*times"]) -> Float[Array, "*times"]:
        return jnp.expm1(-3.0 * t) / math.expm1(-3.0)


SCHEDULES.register("linear", Linear())
SCHEDULES.register("cosine", Cosine())
SCHEDULES.register("exponential", Exponential())
