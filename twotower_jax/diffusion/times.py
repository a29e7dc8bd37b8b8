"""How the times of a batch are drawn in training: a function of the run's seed, the step and a row's number alone.

uniform      one time per sequence, U[t_min, 1]: the published recipe
stratified   one time per sequence, evenly spaced over the batch from a common random start, so that a batch holds
             every noise level (Kingma et al. 2021, arXiv 2107.00630, appendix I.1)
per_block    one time per block, U[t_min, 1], as block diffusion draws them (Arriola et al. 2025, arXiv 2503.09573)
"""

import abc
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Key

from twotower_jax.registry import Registry


@dataclass(frozen=True)
class Times(abc.ABC):
    """A way to draw times.

    t_min  the least time. At time 0 nothing is masked and a sequence teaches nothing

    Raises ValueError for a t_min out of range.
    """

    t_min: float = 1e-3

    def __post_init__(self):
        if not 0.0 <= self.t_min < 1.0:
            raise ValueError(f"t_min={self.t_min} must be at least 0 and less than 1")

    @abc.abstractmethod
    def draw(
        self, step_key: Key[Array, ""], row_key: Key[Array, ""], index: Integer[Array, ""], *, rows: int, blocks: int
    ) -> Float[Array, "*blocks"]:
        """The times of one row: () or (blocks,) float32 in [t_min, 1].

        Args:
          step_key: the same for all rows of the step.
          row_key: the row's own.
          index: () int32, the row's number, 0 … rows − 1 in a batch of training.
          rows: of the global batch.
          blocks: in a row.
        """

    def for_validation(self) -> "Times":
        """Times of the same distribution for rows that are seen once: as even as can be, if there is such a way."""
        return self


TIMES = Registry("times", Times)


@dataclass(frozen=True)
class Uniform(Times):
    """One time per sequence."""

    def draw(self, step_key, row_key, index, *, rows, blocks):
        return jax.random.uniform(row_key, (), jnp.float32, minval=self.t_min, maxval=1.0)

    def for_validation(self):
        return Strata(self.t_min)


@dataclass(frozen=True)
class Stratified(Times):
    """One time per sequence, each row of a batch in a stratum [k / rows, (k + 1) / rows) of its own.

    Every row's own time is uniform; the rows share the random start, so that they are not independent.
    """

    def draw(self, step_key, row_key, index, *, rows, blocks):
        # No row has this number, so that these draws are nobody's own.
        shift_key, place_key = jax.random.split(jax.random.fold_in(step_key, 2**32 - 1))
        # The start as a whole number of strata and a place inside one: no rounding moves a row to another's stratum.
        shift = jax.random.randint(shift_key, (), 0, rows, jnp.int32)
        place = jax.random.uniform(place_key, (), jnp.float32)
        stratum = ((index.astype(jnp.int32) % rows + shift) % rows).astype(jnp.float32)
        return self.t_min + (1.0 - self.t_min) * ((stratum + place) / rows)

    def for_validation(self):
        return Strata(self.t_min)


@dataclass(frozen=True)
class Strata(Times):
    """One time per sequence: row i of n in stratum [i / n, (i + 1) / n), at a place of its own. For validation.

    Not among the names to train with: a row of the same number would always see the same noise level.
    """

    def draw(self, step_key, row_key, index, *, rows, blocks):
        place = jax.random.uniform(row_key, (), jnp.float32)
        return self.t_min + (1.0 - self.t_min) * ((index.astype(jnp.float32) % rows + place) / rows)


@dataclass(frozen=True)
class PerBlock(Times):
    """One time per block."""

    def draw(self, step_key, row_key, index, *, rows, blocks):
        return jax.random.uniform(row_key, (blocks,), jnp.float32, minval=self.t_min, maxval=1.0)


TIMES.register("uniform", Uniform())
TIMES.register("stratified", Stratified())
TIMES.register("per_block", PerBlock())
