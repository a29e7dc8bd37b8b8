"""Generation and scoring: the two-tower model and the diffusion rules brought together.

settings.py       what a caller says and gets
engine.py         a table of rows on the device, filled and emptied by the host between blocks
slots.py          that table, and how prompts are read into it
modes.py          one block of diffusion, AR and mock-AR, each a compiled function
speculative.py    one block drafted by the denoiser and decided by the context
stops.py          where a row ends
watch.py          rows filling in, on a terminal
trace.py          everything that happened, as JSON Lines
trained.py        the block size that a checkpoint was trained with
prompts.py        prompts of a file
operating_point.py  settings that a checkpoint's generation_config.json holds
tune.py           a sweep of settings against AR
score.py          log-probabilities of given tokens
quality.py        likelihoods, the denoiser's bound, repetition
"""

from twotower_jax.generation.engine import Engine, Progress, generate, positions
from twotower_jax.generation.score import DenoiserRow, score_ar, score_denoiser
from twotower_jax.generation.settings import MODES, Result, Settings, Step

__all__ = [
    "MODES",
    "DenoiserRow",
    "Engine",
    "Progress",
    "Result",
    "Settings",
    "Step",
    "generate",
    "positions",
    "score_ar",
    "score_denoiser",
]
