"""Generation and scoring: the two-tower model and the diffusion rules brought together.

settings.py       what a caller says and gets
request.py        what one row is asked to be
engine.py         a table of rows on the device, filled and emptied by the host between calls
prefix_cache.py   what the context kept of prompts that begin alike
rows.py           a row as the host knows it
automaton.py      languages of token sequences
guide.py          a row that has to be a sentence of one
quorum.py         how many rows a call waits for
scheduling.py     what the host says with each call
slots.py          that table, and how prompts are read into it
processes.py      one engine in several processes
placement.py      the devices of both towers
modes.py          one block of diffusion, AR and mock-AR: a draft of the denoiser's, a commit of the context's
speculative.py    the same where the denoiser drafts and the context decides
blocks.py         both compiled, as one function or, with towers apart, as two
rehearsal.py      what that will need of memory, by compiling it for shapes
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

from twotower_jax.generation.engine import Engine, generate, positions
from twotower_jax.generation.placement import TowerMeshes, tower_meshes
from twotower_jax.generation.prefix_cache import PrefixCache
from twotower_jax.generation.request import Request
from twotower_jax.generation.rows import Progress
from twotower_jax.generation.score import DenoiserRow, score_ar, score_denoiser
from twotower_jax.generation.settings import MODES, Result, Settings, Step, TokenLogprob

__all__ = [
    "MODES",
    "DenoiserRow",
    "Engine",
    "TowerMeshes",
    "PrefixCache",
    "Progress",
    "Request",
    "Result",
    "Settings",
    "Step",
    "TokenLogprob",
    "generate",
    "positions",
    "score_ar",
    "score_denoiser",
    "tower_meshes",
]
