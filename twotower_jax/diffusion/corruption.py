"""The forward process of masked diffusion: clean tokens to noisy ones (MDLM, Sahoo et al. 2024, arXiv 2406.07524)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from twotower_jax import randomness
from twotower_jax.diffusion.schedules import NoiseSchedule


class Corruption(NamedTuple):
    """Noisy tokens, and all that the loss and the denoiser must know about the noise.

    noisy_ids  (B, L) int32    the mask token where `masked`, the clean token elsewhere
    masked     (B, L) bool     which positions were masked: the loss counts these and no others. A clean token that
                               happens to be the mask token is not among them unless it was masked as well
    t          (B,)   float32  noise level: the probability with which this sequence's tokens were masked. The denoiser
                               is conditioned on it, in training on this, in sampling on a block's masked fraction
    """

    noisy_ids: jax.Array
    masked: jax.Array
    t: jax.Array


def corrupt(
    ids: jax.Array,
    *,
    seed: int | jax.Array,
    step: int | jax.Array,
    example_index: jax.Array,
    mask_token_id: int,
    schedule: NoiseSchedule,
    t_min: float = 1e-3,
) -> Corruption:
    """Draws a time from U[t_min, 1] for each sequence and masks each of its tokens with `mask_probability(time)`.

    The noise of a sequence is a function of (seed, step, its example index) and of nothing else: neither its place in
    the batch, nor the batch's size, nor the mesh or process that holds it. By chance a short sequence may have no
    masked position; the losses in loss.py give 0 for it.

    Args:
        ids: (B, L) int32 clean tokens.
        seed: of the whole run, in [0, 2³²); a Python int, or a scalar in jit.
        step: of training, so that an example seen again gets other noise; an int or a scalar, traced or not.
        example_index: (B,) int32, each sequence's index in the data set.
        mask_token_id: what a masked token becomes.
        schedule: turns time into the probability of being masked.
        t_min: the least time. At time 0 nothing is masked and a sequence teaches nothing.

    Raises:
        ValueError: for shapes that do not fit, a seed or a t_min out of range.
    """
    if ids.ndim != 2 or example_index.shape != ids.shape[:1]:
        raise ValueError(f"ids must be (B, L) and example_index (B,), got {ids.shape} and {example_index.shape}")
    if not 0.0 <= t_min < 1.0:
        raise ValueError(f"t_min={t_min} must be at least 0 and less than 1")
    if isinstance(seed, int) and not 0 <= seed < 2**32:
        # jax.random.key would drop the upper bits without a word: 2³² is seed 0 again.
        raise ValueError(f"seed={seed} must be at least 0 and less than {2**32}")

    step_key = jax.random.fold_in(randomness.key(seed), step)

    def corrupt_row(row: jax.Array, index: jax.Array) -> Corruption:
        time_key, mask_key = jax.random.split(jax.random.fold_in(step_key, index))
        time = jax.random.uniform(time_key, (), jnp.float32, minval=t_min, maxval=1.0)
        t = schedule.mask_probability(time)
        masked = jax.random.uniform(mask_key, row.shape, jnp.float32) < t
        return Corruption(jnp.where(masked, jnp.asarray(mask_token_id, row.dtype), row), masked, t)

    return jax.vmap(corrupt_row)(ids, example_index)
