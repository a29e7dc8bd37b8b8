"""How much a masked token counts in the loss, by the noise level at which it was masked.

flat           1, the mean over masked tokens: the published recipe
elbo           m′(t) / m(t), the mean over all tokens: the bound of MDLM (Sahoo et al. 2024, arXiv 2406.07524,
               equation 10), 1/t for the linear schedule
bounded_elbo   the same, at most 10: less variance from nearly clean sequences, and no longer the bound
"""

import abc
import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from twotower_jax.registry import Registry


@dataclass(frozen=True)
class Weight(abc.ABC):
    """A weight. `over_all_tokens` says what the weighted sum is divided by: the number of all tokens that may be
    masked, or of those that were."""

    over_all_tokens: bool = False

    @abc.abstractmethod
    def __call__(self, rate: Float[Array, "*times"], level: Float[Array, "*times"]) -> Float[Array, "*times"]:
        """The weight of a token, float32 of the arguments' shape.

        Args:
          rate: |dm/dt| at the time drawn, float32: 1 / rate is the density with which this noise level is drawn.
          level: m, the probability with which the token was masked; 0 where nothing can be.
        """


WEIGHTS = Registry("weight", Weight)


@dataclass(frozen=True)
class Flat(Weight):
    """1."""

    def __call__(self, rate: Float[Array, "*times"], level: Float[Array, "*times"]) -> Float[Array, "*times"]:
        return jnp.ones_like(level)


@dataclass(frozen=True)
class Elbo(Weight):
    """rate / level, at most `most`.

    Raises ValueError for a `most` that is not positive.
    """

    over_all_tokens: bool = True
    most: float = math.inf

    def __post_init__(self):
        if not self.most > 0:
            raise ValueError(f"most={self.most} must be positive")

    def __call__(self, rate: Float[Array, "*times"], level: Float[Array, "*times"]) -> Float[Array, "*times"]:
        # At level 0 no token is masked; an infinite weight would make 0 · ∞ of it.
        possible = level > 0
        return jnp.where(possible, jnp.minimum(rate / jnp.where(possible, level, 1.0), self.most), 0.0)


WEIGHTS.register("flat", Flat())
WEIGHTS.register("elbo", Elbo())
WEIGHTS.register("bounded_elbo", Elbo(most=10.0))
