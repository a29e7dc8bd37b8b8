"""Documents that a checkpoint's context tower writes: prompts, continued token by token."""

from collections.abc import Iterator, Sequence

import numpy as np

from twotower_jax.generation.engine import generate
from twotower_jax.generation.settings import Settings
from twotower_jax.parameters import Params
from twotower_jax.two_tower import TwoTower


def continued(
    model: TwoTower, params: Params, prompts: Sequence[Sequence[int]], settings: Settings
) -> Iterator[np.ndarray]:
    """Each prompt with what follows it, int32, in order; one whose text ends does so with its end token.

    What becomes of a prompt depends on it, its place among the prompts, and the settings alone.

    Args:
      prompts: token ids, at least one each.
      settings: of mode "ar".

    Raises:
      ValueError: for settings of another mode; and as `generate`. FloatingPointError: if logits are not finite.
    """
    if settings.mode != "ar":
        raise ValueError(f"mode={settings.mode!r}: what the context tower writes is that of mode 'ar'")
    for prompt, result in zip(prompts, generate(model, params, prompts, settings), strict=True):
        yield np.asarray([*prompt, *result.tokens], np.int32)
