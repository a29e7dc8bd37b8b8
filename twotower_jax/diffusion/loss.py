"""Losses: cross-entropy over masked positions (denoiser) and over next tokens (autoregressive).

The denoiser's objective is that of MDLM (Sahoo et al. 2024, arXiv 2406.07524) and LLaDA (Nie et al. 2025, arXiv
2502.09992), by default with the linear schedule and without their weight 1/t, which the published recipe leaves out on
purpose: every masked token of the batch counts the same, whatever the noise level of its sequence. Of MDLM's SUBS
parameterization training uses neither half: the logit of the mask token is not set to −∞ (it is no target, so the
model learns that by itself), and tokens that are not masked are simply left out of the loss.

Every mean is built on a `LossSum`, which can be added up over devices or accumulation steps before it is divided. The
mean of per-device means would be another number, since each device masks another number of tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

NOISE_LEVEL_BINS = 10

# Answers of a conversation whose losses are told apart; the last stands for all later ones.
TURNS = 8


class LossSum(NamedTuple):
    """Summed loss and what its mean is over, the number of tokens or the sum of their weights: float32 of the same
    shape, scalars or one per bin. Numbers of tokens are exact below 2²⁴."""

    total: jax.Array
    count: jax.Array

    @property
    def mean(self) -> jax.Array:
        """total / count, and 0 where the count is 0: an empty batch or bin must not make a NaN."""
        count = jnp.asarray(self.count, jnp.float32)
        return self.total / jnp.where(count > 0, count, 1.0)


def token_log_probabilities(logits: Float[Array, "*rows V"], ids: Int[Array, "*rows"]) -> Float[Array, "*rows"]:
    """log softmax(logits)[ids], computed in float32 whatever the logits' dtype.

    Args:
        logits: (..., V) of any float dtype.
        ids: (...) int32, each in [0, V): JAX cannot check that, the data pipeline does.

    Returns:
        (...) float32.
    """
    if logits.shape[:-1] != ids.shape:
        raise ValueError(f"logits {logits.shape} do not fit ids {ids.shape}: all axes but the last must agree")
    logits = logits.astype(jnp.float32)
    # Chosen by comparison rather than by gather: the gradient is then elementwise, not a scatter into a (..., V) array
    # of zeros, and nothing has to be moved when V is sharded.
    is_target = jax.lax.broadcasted_iota(ids.dtype, logits.shape, logits.ndim - 1) == ids[..., None]
    return jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)


def _token_losses(log_probabilities: jax.Array, masked: jax.Array) -> jax.Array:
    # A choice and not a product: 0 · ∞ would be NaN.
    return jnp.where(masked, -log_probabilities, 0.0)


def masked_loss_sum(
    log_probabilities: Float[Array, "*tokens"],
    masked: Bool[Array, "*tokens"],
    weight: Float[Array, "*tokens"] | None = None,
    counted: Bool[Array, "*tokens"] | None = None,
    axis: int | None = None,
    token_weight: Float[Array, "*tokens"] | None = None,
) -> LossSum:
    """Sum of −log p over masked positions, as scalars; over an axis alone, 1 for sums of each row, (B,).

    Args:
        log_probabilities: (B, L) float32, or of any shape that the others have.
        masked: (B, L) bool.
        weight: (B, L) float32, of each position; None for 1.
        counted: (B, L) bool, the positions that the mean is over; None for the masked ones.
        token_weight: (B, L) float32, how much each position's token is worth, in the sum and in the count; None for 1.
    """
    losses = _token_losses(log_probabilities, masked)
    if weight is not None:
        losses = jnp.where(masked, weight * losses, 0.0)
    if token_weight is not None:
        losses = jnp.where(masked, token_weight * losses, 0.0)
    return LossSum(jnp.sum(losses, axis=axis), count(masked if counted is None else counted, axis, token_weight))


def count(
    mask: Bool[Array, "..."], axis: int | None = None, token_weight: Float[Array, "..."] | None = None
) -> Float[Array, "..."]:
    """How many are true, or the sum of their weights: () float32, or along an axis."""
    if token_weight is not None:
        return jnp.sum(jnp.where(mask, token_weight, 0.0), axis=axis)
    return jnp.sum(mask, axis=axis, dtype=jnp.float32)


def next_tokens(ids: Int[Array, "B L"], counted: Bool[Array, " B"]) -> tuple[Int[Array, "B L"], Bool[Array, "B L"]]:
    """Each position's next token (B, L) int32 and whether it counts (B, L) bool.

    `counted` (B,) bool says which rows count (not the padding of a last, partial batch). The first token of a row is no
    target and its last position has none: L − 1 tokens per row count.
    """
    # The targets move and not the logits: a slice of length L − 1 would not divide over a mesh.
    is_last = jax.lax.broadcasted_iota(jnp.int32, ids.shape, 1) == ids.shape[1] - 1
    return jnp.roll(ids, -1, axis=1), counted[:, None] & ~is_last


def loss_by_noise_level(
    log_probabilities: Float[Array, "B L"],
    masked: Bool[Array, "B L"],
    t: Float[Array, " B *blocks"],
    token_weight: Float[Array, "B L"] | None = None,
) -> LossSum:
    """The masked loss in equal bins of the noise level: bin k holds k / 10 ≤ t < (k + 1) / 10, the last one 1 as well.

    Args:
        log_probabilities: (B, L) float32, of the clean tokens.
        masked: (B, L) bool.
        t: (B,) or (B, L/S) float32 noise levels in [0, 1], one per sequence or per block.
        token_weight: as in `masked_loss_sum`.

    Returns:
        Sums and counts (10,).
    """
    level = jnp.minimum((t.reshape(-1) * NOISE_LEVEL_BINS).astype(jnp.int32), NOISE_LEVEL_BINS - 1)
    in_bin = level[:, None] == jnp.arange(NOISE_LEVEL_BINS)[None, :]
    parts = level.shape[0]
    losses, counts = _weighed(log_probabilities, masked, token_weight)
    row_total = jnp.sum(losses.reshape(parts, -1), axis=1)
    row_count = jnp.sum(counts.reshape(parts, -1), axis=1, dtype=jnp.float32)
    return LossSum(
        jnp.sum(jnp.where(in_bin, row_total[:, None], 0.0), axis=0),
        jnp.sum(jnp.where(in_bin, row_count[:, None], 0.0), axis=0),
    )


def loss_by_block_position(
    log_probabilities: Float[Array, "B L"],
    masked: Bool[Array, "B L"],
    block_size: int,
    token_weight: Float[Array, "B L"] | None = None,
) -> LossSum:
    """The masked loss at each position of a block, over all blocks of the batch: sums and counts (S,).

    Arguments as in `loss_by_noise_level`. Raises ValueError where L is not a multiple of block_size.
    """
    length = masked.shape[1]
    if length % block_size:
        raise ValueError(f"length={length} is not a multiple of block_size={block_size}")
    losses, counts = (v.reshape(-1, block_size) for v in _weighed(log_probabilities, masked, token_weight))
    return LossSum(jnp.sum(losses, axis=0), jnp.sum(counts, axis=0, dtype=jnp.float32))


def loss_by_turn(
    log_probabilities: Float[Array, "B L"],
    masked: Bool[Array, "B L"],
    turn: Int[Array, "B L"],
    token_weight: Float[Array, "B L"],
) -> LossSum:
    """The masked loss of a conversation's first answer, its second, …, and of all from `TURNS` on: sums and counts
    (TURNS,).

    `turn` (B, L) int32 is the number of each token's answer, from 1; 0 for what is in none. Other arguments as in
    `loss_by_noise_level`.
    """
    losses, counts = _weighed(log_probabilities, masked, token_weight)
    in_bin = jnp.minimum(turn, TURNS)[..., None] == jnp.arange(1, TURNS + 1)
    both = (jnp.sum(jnp.where(in_bin, v[..., None], 0.0), axis=(0, 1)) for v in (losses, counts))
    return LossSum(*both)


def _weighed(
    log_probabilities: jax.Array, masked: jax.Array, token_weight: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Each token's loss, and what it counts."""
    losses = _token_losses(log_probabilities, masked)
    if token_weight is None:
        return losses, masked
    return jnp.where(masked, token_weight * losses, 0.0), jnp.where(masked, token_weight, 0.0)
