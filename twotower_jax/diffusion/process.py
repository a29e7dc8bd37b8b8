"""The forward process of masked diffusion: clean tokens to noisy ones (MDLM, Sahoo et al. 2024, arXiv 2406.07524)."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped

from twotower_jax import randomness
from twotower_jax.diffusion.schedules import Linear, NoiseSchedule
from twotower_jax.diffusion.times import Times, Uniform
from twotower_jax.diffusion.weights import Flat, Weight


class Corruption(NamedTuple):
    """Noisy tokens, and all that the loss and the denoiser must know about the noise. R rows: B or, with complementary
    masks, 2·B, each sequence's second row after its first.

    noisy_ids  (R, L) int32             the mask token where `masked`, the clean token elsewhere
    masked     (R, L) bool              which positions were masked: the loss counts these and no others. A clean token
                                        that happens to be the mask token is not among them unless it was masked as well
    t          (R,) or (R, L/S) float32 noise level: the probability with which this sequence's (or block's) tokens were
                                        masked. The denoiser is conditioned on it, in training on this, in sampling on a
                                        block's masked fraction
    weight     of t's shape, float32    how much each masked token counts in the loss
    """

    noisy_ids: jax.Array
    masked: jax.Array
    t: jax.Array
    weight: jax.Array

    @property
    def token_weight(self) -> jax.Array:
        """`weight` for each token, (R, L)."""
        rows, length = self.masked.shape
        return spread(self.weight.reshape(rows, -1), length)


def spread(values: Float[Array, "R blocks"], length: int) -> Float[Array, "R {length}"]:
    """Values (R, n), one per sequence or per block, at each of the sequence's positions: (R, L)."""
    return jnp.repeat(values, length // values.shape[1], axis=1)


@dataclass(frozen=True)
class MaskedDiffusion:
    """How a denoiser is trained. The defaults are the published recipe.

    schedule       turns time into the probability of being masked
    times          how times are drawn
    weight         how much a masked token counts
    complementary  each sequence is seen once more with the complement of its mask, so that every token is masked
                   exactly once (Fast-dLLM v2, Wu et al. 2025, arXiv 2509.26328): twice the work of a step. The second
                   row's noise level is 1 − m, and so are the denoiser's t and the level of the weight

    Raises TypeError at construction for a part of another kind.
    """

    schedule: NoiseSchedule = Linear()
    times: Times = Uniform()
    weight: Weight = Flat()
    complementary: bool = False

    def __post_init__(self):
        for name, kind in (("schedule", NoiseSchedule), ("times", Times), ("weight", Weight), ("complementary", bool)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name}={getattr(self, name)!r} is no {kind.__name__}")

    @property
    def passes(self) -> int:
        """How many rows a sequence becomes."""
        return 2 if self.complementary else 1

    def repeated(self, rows: Shaped[Array, "B ..."]) -> Shaped[Array, "R ..."]:
        """What belongs to B sequences, (B, …), for each of their R rows."""
        return jnp.repeat(rows, 2, axis=0) if self.complementary else rows

    def corrupt(
        self,
        ids: Int[Array, "B L"],
        *,
        seed: int | Integer[Array, ""],
        step: int | Integer[Array, ""],
        example_index: Integer[Array, " B"],
        mask_token_id: int,
        block_size: int | None = None,
        rows: int | None = None,
    ) -> Corruption:
        """Draws times and masks each token with the schedule's probability at its time.

        The noise of a sequence is a function of (seed, step, its example index) and of nothing else: neither of its
        place in the batch, nor of the mesh or process that holds it, nor, for times drawn row by row, of the batch's
        size. By chance a short sequence may have no masked position; the losses in loss.py give 0 for it.

        Args:
          ids: (B, L) int32 clean tokens.
          seed: of the whole run, in [0, 2³²); a Python int, or a scalar in jit.
          step: of training, so that an example seen again gets other noise; an int or a scalar, traced or not.
          example_index: (B,) int32, each sequence's number in the batch or data set.
          mask_token_id: what a masked token becomes.
          block_size: S, which divides L; None for one block.
          rows: how many rows share their times, the batch being some of them; None for B.

        Raises:
          ValueError: for shapes that do not fit, or a seed out of range.
        """
        if ids.ndim != 2 or example_index.shape != ids.shape[:1]:
            raise ValueError(f"ids must be (B, L) and example_index (B,), got {ids.shape} and {example_index.shape}")
        if isinstance(seed, int) and not 0 <= seed < 2**32:
            # jax.random.key would drop the upper bits without a word: 2³² is seed 0 again.
            raise ValueError(f"seed={seed} must be at least 0 and less than {2**32}")
        (batch, length), size = ids.shape, block_size or ids.shape[1]
        if length % size:
            raise ValueError(f"length={length} is not a multiple of block_size={size}")
        mask_token = jnp.asarray(mask_token_id, ids.dtype)
        step_key = jax.random.fold_in(randomness.key(seed), step)

        def corrupt_row(row: jax.Array, index: jax.Array) -> Corruption:
            time_key, mask_key = jax.random.split(jax.random.fold_in(step_key, index))
            time = self.times.draw(step_key, time_key, index, rows=rows or batch, blocks=length // size)
            t, rate = self.schedule.mask_probability(time), self.schedule.rate(time)
            at_tokens = t if t.ndim == 0 else jnp.repeat(t, size)
            masked = jax.random.uniform(mask_key, row.shape, jnp.float32) < at_tokens
            one = Corruption(jnp.where(masked, mask_token, row), masked, t, self.weight(rate, t))
            if not self.complementary:
                return one
            other = Corruption(jnp.where(masked, row, mask_token), ~masked, 1.0 - t, self.weight(rate, 1.0 - t))
            return jax.tree.map(lambda a, b: jnp.stack([a, b]), one, other)

        corruption = jax.vmap(corrupt_row)(ids, example_index)
        if self.complementary:
            corruption = jax.tree.map(lambda v: v.reshape(2 * batch, *v.shape[2:]), corruption)
        return corruption

    def counted(self, masked: Bool[Array, "R L"], countable: Bool[Array, "R L"]) -> Bool[Array, "R L"]:
        """Which tokens the weighted sum of losses is divided by the number of: (R, L) bool, as both arguments.

        `masked` says which tokens have a loss, `countable` which ones may have one at all (not padding).
        """
        return countable if self.weight.over_all_tokens else masked
