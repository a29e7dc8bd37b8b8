"""Generation and scoring: the two-tower model and the diffusion rules brought together.

settings.py       what a caller says and gets
engine.py         a table of rows on the device, filled and emptied by the host between blocks
slots.py          that table, and how prompts are read into it
placement.py      the devices of both towers
modes.py          one block of diffusion, AR and mock-AR: a draft of the denoiser's, a commit of the context's
speculative.py    the same where the denoiser drafts and the context decides
blocks.py         both compiled, as one function or, with towers apart, as two
stops.py          where a row ends
watch.py          rows filling in, on a terminal
trace.py          everything that happened, as JSON Lines
trained.py        the block size that a checkpoint was trained with
prompts.py        prompts of a file
conversation.py   conversations of a file, or typed
operating_point.py  settings that a checkpoint's generation_config.json holds
tune.py           a sweep of settings against AR
score.py          log-probabilities of given tokens
quality.py        likelihoods, the denoiser's bound, repetition
"""

from twotower_jax.generation.engine import Engine, Progress, generate, positions
from twotower_jax.generation.placement import TowerMeshes, tower_meshes
from twotower_jax.generation.score import DenoiserRow, score_ar, score_denoiser
from twotower_jax.generation.settings import MODES, Result, Settings, Step

__all__ = [
    "MODES",
    "DenoiserRow",
    "Engine",
    "TowerMeshes",
    "Progress",
    "Result",
    "Settings",
    "Step",
    "generate",
    "positions",
    "score_ar",
    "score_denoiser",
    "tower_meshes",
]
