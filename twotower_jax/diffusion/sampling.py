"""The reverse process: one denoising step of a block, by one of three strategies.

A block starts all masked. At each of up to T steps the denoiser gives logits for the block, every position gets a
prediction (SUBS: never the mask token), and the strategy chooses which masked positions to commit. Committed tokens
never change within a block. (Of MDLM's SUBS parameterization, Sahoo et al. 2024, arXiv 2406.07524, this is the half
that carries unmasked tokens over.) The block-by-block frame is BD3-LM's (Arriola et al. 2025, arXiv 2503.09573).

    confidence          all positions surer than γ, and enough of the surest to be done by step T: the published default
    posterior           each position by a coin, as q(x_s | x_t, x_θ) has it on a noise schedule
    predict_and_noise   predict all, mask the least sure again until the schedule's next level is reached (LLaDA's
                        low-confidence remasking, Nie et al. 2025, arXiv 2502.09992)

Each strategy is a function of one row; `sample_step` maps it over the batch. So a row cannot depend on its neighbors:
it has its own noise level, commits and stop, and gets what it would get alone.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from twotower_jax.diffusion.prediction import check_prediction_settings, predict
from twotower_jax.diffusion.schedules import NoiseSchedule


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample a block. Raises ValueError for values out of range and for settings the strategy would ignore.

    block_size            S, tokens in a block; larger than the one trained with, samples collapse
    steps_per_block       T, the most denoiser evaluations a block may take
    strategy              one of `STRATEGIES`
    confidence_threshold  γ of the strategy confidence; at 1 no position is ever surer, and the count rule decides alone
    schedule              one of `SCHEDULES`, for the strategies posterior and predict_and_noise
    temperature           0 is greedy
    top_k, top_p          filters of the tempered distribution; 0 and 1 turn them off
    """

    block_size: int = 16
    steps_per_block: int = 16
    strategy: str = "confidence"
    confidence_threshold: float = 0.8
    schedule: str = "linear"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.block_size < 1 or self.steps_per_block < 1:
            raise ValueError(
                f"block_size={self.block_size} and steps_per_block={self.steps_per_block} must both be at least 1"
            )
        if self.strategy not in _STRATEGIES:
            raise ValueError(f"strategy={self.strategy!r} is unknown: choose one of {', '.join(STRATEGIES)}")
        if not 0.0 <= self.confidence_threshold <= 1.0:
            raise ValueError(f"confidence_threshold={self.confidence_threshold} must be between 0 and 1")
        NoiseSchedule(self.schedule)
        check_prediction_settings(self.temperature, self.top_k, self.top_p)
        ignored = "schedule" if self.strategy == "confidence" else "confidence_threshold"
        if getattr(self, ignored) != getattr(SamplingConfig, ignored):  # on the class: the default
            raise ValueError(f"{ignored}={getattr(self, ignored)!r} changes nothing with strategy={self.strategy!r}")


class StepResult(NamedTuple):
    """What one denoising step did to a block.

    xt          (B, S) int32    the block after the step
    committed   (B, S) bool     positions that went from masked to a token in this step
    confidence  (B, S) float32  of each position's prediction in this step; says nothing where xt was not masked before
    finite      (B,)   bool     false where a masked position's logits held a NaN or an infinity: the position stayed
                                masked, even in the last step, and the caller must raise
    """

    xt: jax.Array
    committed: jax.Array
    confidence: jax.Array
    finite: jax.Array


def noise_level(xt: jax.Array, mask_token_id: int) -> jax.Array:
    """t (B,) float32 to condition the denoiser on: the masked fraction of each row of the block xt (B, S).

    The same for every strategy. The schedule's level would be the expectation of this under the posterior, but a row of
    predict_and_noise can be ahead of its schedule (one commit a step at least), and all rows would share it.
    """
    return jnp.mean(xt == mask_token_id, axis=1, dtype=jnp.float32)


def _surest(count: jax.Array, masked: jax.Array, confidence: jax.Array) -> jax.Array:
    """The `count` masked positions of highest confidence, the leftmost of equals first. (S,) bool."""
    # Where a NaN ranks does not matter: `sample_step` commits none and reports the row.
    confidence = jnp.where(masked, confidence, -1.0)
    mine, other = confidence[:, None], confidence[None, :]
    place = jnp.arange(confidence.size)
    # Counted, not sorted: blocks are short, and a sort goes through them one by one.
    rank = jnp.sum((other > mine) | ((other == mine) & (place[None, :] < place[:, None])), axis=1)
    return masked & (rank < count)


# The strategies. Each says which positions of one row to commit, (S,) bool, given a key for its own draws, the index of
# the step, () int32, the masked positions, (S,) bool, the confidence of every position's prediction, (S,) float32, and
# the threshold γ of the strategy confidence.


def _commit_confidence(
    config: SamplingConfig,
    key: jax.Array,
    step: jax.Array,
    masked: jax.Array,
    confidence: jax.Array,
    threshold: jax.Array,
) -> jax.Array:
    """All positions surer than γ, and at least ceil(masked / steps left) of the surest: one or more, at the end all."""
    num_masked = jnp.sum(masked, dtype=jnp.int32)
    steps_left = config.steps_per_block - step
    required = (num_masked + steps_left - 1) // steps_left
    num_above = jnp.sum(masked & (confidence > threshold), dtype=jnp.int32)
    return _surest(jnp.maximum(num_above, required), masked, confidence)


def _levels(config: SamplingConfig, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Masking probabilities before and after a step, on a grid of T even steps from time 1 to time 0."""
    steps_left = (config.steps_per_block - step).astype(jnp.float32)
    mask_probability = NoiseSchedule(config.schedule).mask_probability
    return (
        mask_probability(steps_left / config.steps_per_block),
        mask_probability((steps_left - 1.0) / config.steps_per_block),
    )


def _commit_posterior(
    config: SamplingConfig,
    key: jax.Array,
    step: jax.Array,
    masked: jax.Array,
    confidence: jax.Array,
    threshold: jax.Array,
) -> jax.Array:
    """Each masked position with probability (α_s − α_t) / (1 − α_t), independently: MDLM's ancestral sampling.

    q(x_s | x_t, x_θ) of a masked token keeps the mask with probability (1 − α_s) / (1 − α_t) and is x_θ otherwise, so
    the coin and the token can be drawn apart; only the token is tempered or filtered. In the last step 1 − α_s is 0.
    """
    level_t, level_s = _levels(config, step)
    return masked & (jax.random.uniform(key, masked.shape, jnp.float32) >= level_s / level_t)


def _commit_predict_and_noise(
    config: SamplingConfig,
    key: jax.Array,
    step: jax.Array,
    masked: jax.Array,
    confidence: jax.Array,
    threshold: jax.Array,
) -> jax.Array:
    """The surest: so many that floor(S · (1 − α_s)) positions stay masked, never fewer than one, in the last step all.

    Only positions that were masked before the step can be masked again. LLaDA and the published code hold committed
    tokens at infinite confidence for the same effect: their probability under the denoiser, which reads them as
    given, is not a measure of how sure it was of them.
    """
    num_masked = jnp.sum(masked, dtype=jnp.int32)
    _, level_s = _levels(config, step)
    # The margin keeps a product like 29 · (15 / 29) from rounding to just below its integer.
    num_kept = jnp.floor(config.block_size * level_s + 1e-4).astype(jnp.int32)
    return _surest(num_masked - jnp.minimum(num_kept, num_masked - 1), masked, confidence)


_STRATEGIES = {
    "confidence": _commit_confidence,
    "posterior": _commit_posterior,
    "predict_and_noise": _commit_predict_and_noise,
}
STRATEGIES = tuple(_STRATEGIES)


def sample_step(
    config: SamplingConfig,
    keys: jax.Array,
    xt: jax.Array,
    logits: jax.Array,
    *,
    block: int | jax.Array,
    step: int | jax.Array,
    mask_token_id: int,
    token_keys: jax.Array | None = None,
    threshold: jax.Array | None = None,
) -> StepResult:
    """Takes one denoising step.

    A row without masked positions goes through unchanged, so a batch may go on until its last row is done: after at
    most T steps, if all logits are finite.

    Args:
        config: known when tracing; everything else but mask_token_id may be traced.
        keys: (B,) typed keys, one a row and the same at every step. The row's draws come from its key, its block and
            its step alone.
        xt: (B, S) int32, the mask token where undecided.
        logits: (B, S, V) of any float dtype, the denoiser's for xt.
        block: index of the block in its row, a scalar or (B,).
        step: index of the step in the block, 0 ≤ step < T, a scalar or (B,).
        mask_token_id: the token that marks undecided positions; never predicted.
        token_keys: (B, S) keys from which the tokens are drawn instead, each position's the same at every step: for
            drafts that are to agree with a sample that somebody else draws from the same keys.
        threshold: () float32, γ in place of the config's, so that a sweep of it compiles once.

    Raises:
        ValueError: for shapes that do not fit each other or the config.
    """
    batch = xt.shape[0]
    if token_keys is not None and token_keys.shape != xt.shape:
        raise ValueError(f"expected token_keys {xt.shape}, one a position, got {token_keys.shape}")
    if xt.shape != (batch, config.block_size) or logits.shape[:-1] != xt.shape or keys.shape != (batch,):
        raise ValueError(
            f"expected xt (B, {config.block_size}), logits (B, {config.block_size}, V) and keys (B,), "
            f"got {xt.shape}, {logits.shape} and {keys.shape}"
        )

    threshold = jnp.float32(config.confidence_threshold) if threshold is None else threshold
    choose = functools.partial(
        predict,
        mask_token_id=mask_token_id,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
    )

    def step_row(
        key: jax.Array,
        xt: jax.Array,
        logits: jax.Array,
        block: jax.Array,
        step: jax.Array,
        token_keys: jax.Array | None,
    ) -> StepResult:
        step_key = jax.random.fold_in(jax.random.fold_in(key, block), step)
        token_key, commit_key = jax.random.split(step_key)
        prediction = choose(token_key, logits) if token_keys is None else jax.vmap(choose)(token_keys, logits)
        masked = xt == mask_token_id
        chosen = _STRATEGIES[config.strategy](config, commit_key, step, masked, prediction.confidence, threshold)
        committed = chosen & prediction.finite
        return StepResult(
            xt=jnp.where(committed, prediction.tokens.astype(xt.dtype), xt),
            committed=committed,
            confidence=prediction.confidence,
            finite=jnp.all(prediction.finite | ~masked),
        )

    block = jnp.broadcast_to(jnp.asarray(block, jnp.int32), (batch,))
    step = jnp.broadcast_to(jnp.asarray(step, jnp.int32), (batch,))
    return jax.vmap(step_row)(keys, xt, logits, block, step, token_keys)
