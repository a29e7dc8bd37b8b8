"""A noise schedule and a loss weight of one's own, on top of the demonstration.

    python launch/train.py --config=configs/example_schedule.py --workdir=runs/example --config.init_from=runs/backbone

Copy it anywhere and change it: a run's config.json names this file with a hash of it, and the run is resumed only with
the same one.
"""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from twotower_jax.diffusion import SCHEDULES, WEIGHTS, NoiseSchedule, Weight
from twotower_jax.train.config import shipped


@dataclasses.dataclass(frozen=True)
class Power(NoiseSchedule):
    """m(t) = t^exponent: above 1, more of the time at low noise."""

    exponent: float = 2.0

    def formula(self, t: jax.Array) -> jax.Array:
        return t**self.exponent


@dataclasses.dataclass(frozen=True)
class RootWeight(Weight):
    """1 / √m: between the flat weight and that of the bound."""

    def __call__(self, rate: jax.Array, level: jax.Array) -> jax.Array:
        return jnp.where(level > 0, jax.lax.rsqrt(jnp.where(level > 0, level, 1.0)), 0.0)


SCHEDULES.register("power", Power())
WEIGHTS.register("root", RootWeight())


def get_config() -> ConfigDict:
    config = shipped("tiny")
    config.objective = "denoiser"
    config.diffusion.schedule = "power"
    config.diffusion.weight = "root"
    return config
