"""Masked diffusion over tokens, as pure functions that know nothing of any model: token arrays, keys and logits only.

schedules.py    how probable a masked token is at time t
times.py        training: how times are drawn
weights.py      training: how much a masked token counts
process.py      training: clean tokens → noisy tokens and the noise level the denoiser is told; `MaskedDiffusion`
loss.py         training: logits → cross-entropy over masked positions, or over next tokens
prediction.py   sampling: logits → one token per position and its confidence
strategies/     sampling: the new block of one row, one file per strategy
sampling.py     sampling: one denoising step of a block

Letters in shapes: B batch, L length, S block, V vocab.
"""

from twotower_jax.diffusion.loss import (
    NOISE_LEVEL_BINS,
    LossSum,
    count,
    loss_by_block_position,
    loss_by_noise_level,
    loss_by_turn,
    masked_loss_sum,
    next_tokens,
    token_log_probabilities,
)
from twotower_jax.diffusion.prediction import (
    Choice,
    Prediction,
    most_probable,
    predict,
    predict_rows,
    sample_tokens,
)
from twotower_jax.diffusion.process import Corruption, MaskedDiffusion, spread
from twotower_jax.diffusion.sampling import SamplingConfig, StepResult, noise_level, sample_step
from twotower_jax.diffusion.schedules import SCHEDULES, NoiseSchedule
from twotower_jax.diffusion.strategies import STRATEGIES, Draft, Strategy, per_row, strategy
from twotower_jax.diffusion.times import TIMES, Times
from twotower_jax.diffusion.weights import WEIGHTS, Weight

__all__ = [
    "NOISE_LEVEL_BINS",
    "SCHEDULES",
    "STRATEGIES",
    "TIMES",
    "WEIGHTS",
    "Choice",
    "Corruption",
    "Draft",
    "LossSum",
    "MaskedDiffusion",
    "NoiseSchedule",
    "Prediction",
    "SamplingConfig",
    "StepResult",
    "Strategy",
    "Times",
    "Weight",
    "count",
    "loss_by_block_position",
    "loss_by_noise_level",
    "loss_by_turn",
    "masked_loss_sum",
    "most_probable",
    "next_tokens",
    "noise_level",
    "per_row",
    "predict",
    "predict_rows",
    "sample_step",
    "sample_tokens",
    "spread",
    "strategy",
    "token_log_probabilities",
]
