"""The ops that the towers are made of. They know arrays, nothing of models.

Notation, here and in every kernel:

    B batch   L length   D model   H heads   P head dim   N state   G groups   E experts   F expert width
    S block   Q chunk

Public ops: `ssd`, `two_tower_ssd` (ssd.py), `block_scan` (block_scan.py), `causal_conv`, `block_causal_conv`
(causal_conv.py), `attention` (attention.py), `expert_mlp` (experts.py) and `double_float` (routing without float64).
Their oracles, written as literally as the maths allows, stand in reference.py.

An op with several implementations takes `implementation`, a name or None, which chooses by platform and shapes
(dispatch.py); `chosen` says what it chooses; a `Backends` (backends.py) holds one for each op. The scans have an XLA
form (ssd_xla.py) and Pallas TPU kernels (files ending in _tpu.py, on tpu.py and tpu_layout.py).
"""

from twotower_jax.kernels.attention import ATTENTION, Keys, attention
from twotower_jax.kernels.backends import Backends
from twotower_jax.kernels.block_scan import BLOCK_SCAN, BlockWeights, block_scan
from twotower_jax.kernels.causal_conv import BLOCK_CAUSAL_CONV, CAUSAL_CONV, block_causal_conv, causal_conv
from twotower_jax.kernels.dispatch import Choice
from twotower_jax.kernels.experts import EXPERT_MLP, expert_mlp
from twotower_jax.kernels.ssd import SSD, TWO_TOWER_SSD, ssd, two_tower_ssd

__all__ = [
    "Backends",
    "BlockWeights",
    "Choice",
    "Keys",
    "attention",
    "block_causal_conv",
    "block_scan",
    "causal_conv",
    "chosen",
    "expert_mlp",
    "implementations",
    "platform_of",
    "ssd",
    "two_tower_ssd",
]

OPS = {op.name: op for op in (SSD, TWO_TOWER_SSD, BLOCK_SCAN, CAUSAL_CONV, BLOCK_CAUSAL_CONV, ATTENTION, EXPERT_MLP)}


def implementations(op: str) -> tuple[str, ...]:
    """The names that `implementation` of an op takes; empty for an op that has only one form and no such argument."""
    return tuple(OPS[op].implementations) if op in OPS else ()


def platform_of(op: str, implementation: str) -> str | None:
    """The platform that an implementation is made for, on which None may choose it; None if it is for no one."""
    return OPS[op].implementations[implementation].platform


def chosen(op: str, *args, implementation: str | None = None, **kwargs) -> Choice:
    """Which implementation a call of an op runs, and why.

    Args:
      op: its name, "ssd", "two_tower_ssd", "block_scan", "expert_mlp" or "attention".
      args, kwargs: of the call; arrays or `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: as the call would: no such implementation, or one that cannot take these shapes.
    """
    return OPS[op].choose(*args, implementation=implementation, **kwargs)
