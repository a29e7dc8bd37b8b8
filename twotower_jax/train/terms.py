"""Terms that objectives may add to their own losses, and their weights."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Draws the denoiser towards the context tower: T² KL(p ‖ q) at masked positions.

    p is the context tower's distribution of the token, which it gives having read all clean tokens before it, and q the
    denoiser's, both at temperature T; the factor keeps the size of gradients that of T = 1 (Hinton et al. 2015, arXiv
    1503.02531, section 2). No gradient reaches the context tower.

    Attributes:
      weight: of the mean over positions in what is minimized; 0 leaves the term out.
      temperature: T.

    Raises:
      ValueError: at construction, for a negative weight, or a temperature that is not positive.
    """

    weight: float = 0.0
    temperature: float = 1.0

    def __post_init__(self):
        if not self.weight >= 0:
            raise ValueError(f"distillation: weight={self.weight} must not be negative")
        if not self.temperature > 0:
            raise ValueError(f"distillation: temperature={self.temperature} must be positive")


@dataclasses.dataclass(frozen=True)
class Balance:
    """Keeps the experts of the routers that train evenly busy.

    A router chooses by its scores plus a bias. After each step the bias rises by a rate for experts that had fewer of
    the step's tokens than the mean, and falls by it for those that had more (DeepSeek-V3, arXiv 2412.19437, section
    2.1.2): no gradient pays for that. Two small losses even out the scores themselves; see `Router.sums`. All count
    the tokens of all devices and of all parts of a batch, without padding.

    Attributes:
      bias_rate: by which the bias moves; 0 leaves it as it is.
      balance_loss: weight of the mean over sequences of E Σ f P, summed over layers; 0 leaves it out.
      z_loss: weight of the mean over tokens of (log Σ exp(logits))², summed over layers; 0 leaves it out.

    Raises:
      ValueError: at construction, for a negative one.
    """

    bias_rate: float = 0.0
    balance_loss: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value >= 0:
                raise ValueError(f"config: router_{field.name}={value} must not be negative")

    @property
    def weights(self) -> dict[str, float]:
        """Those of the losses that are in use."""
        given = {"router_balance_loss": self.balance_loss, "router_z_loss": self.z_loss}
        return {term: weight for term, weight in given.items() if weight}


def evenness(load: jax.Array) -> jax.Array:
    """The entropy of the experts' shares of the load (…, E) as a part of the largest, log E: 1 where all are even."""
    shares = load / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1e-20)
    entropy = -jnp.sum(jnp.where(shares > 0, shares * jnp.log(jnp.maximum(shares, 1e-20)), 0), axis=-1)
    return entropy / jnp.log(max(load.shape[-1], 2))
