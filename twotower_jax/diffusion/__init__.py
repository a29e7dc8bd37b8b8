"""Masked diffusion over tokens, as pure functions that know nothing of any model: token arrays, keys and logits only.

schedules.py    how probable a masked token is at time t
corruption.py   training: clean tokens → noisy tokens and the noise level the denoiser is told
loss.py         training: logits → cross-entropy over masked positions, or over next tokens
prediction.py   sampling: logits → one token a position and its confidence
sampling.py     sampling: one denoising step of a block, by one of three strategies

Letters in shapes: B batch, L length, S block, V vocab.
"""

from twotower_jax.diffusion.corruption import Corruption, corrupt
from twotower_jax.diffusion.loss import (
    NOISE_LEVEL_BINS,
    LossSum,
    loss_by_block_position,
    loss_by_noise_level,
    masked_cross_entropy,
    masked_loss_sum,
    next_token_cross_entropy,
    next_tokens,
    token_log_probabilities,
)
from twotower_jax.diffusion.prediction import Prediction, predict, sample_tokens
from twotower_jax.diffusion.sampling import STRATEGIES, SamplingConfig, StepResult, noise_level, sample_step
from twotower_jax.diffusion.schedules import SCHEDULES, NoiseSchedule

__all__ = [
    "NOISE_LEVEL_BINS",
    "SCHEDULES",
    "STRATEGIES",
    "Corruption",
    "LossSum",
    "NoiseSchedule",
    "Prediction",
    "SamplingConfig",
    "StepResult",
    "corrupt",
    "loss_by_block_position",
    "loss_by_noise_level",
    "masked_cross_entropy",
    "masked_loss_sum",
    "next_token_cross_entropy",
    "next_tokens",
    "noise_level",
    "predict",
    "sample_step",
    "sample_tokens",
    "token_log_probabilities",
]
