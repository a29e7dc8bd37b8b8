"""Terms that objectives may add to their own losses, and their weights."""

import dataclasses


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
