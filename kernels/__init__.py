"""The ops that the towers are made of. They know arrays, nothing of models.

Notation, here and in every kernel:

    B batch   L length   D model   H heads   P head dim   N state   G groups   E experts   F expert width
    S block   Q chunk

A folder per op: its `__init__.py` has the public function, with shapes and maths, and the list of implementations;
reference.py the oracle, as literal as the maths allows; xla.py what runs anywhere; then one file per platform. Public
ops: `ssd`, `two_tower_ssd` (ssd/), `block_scan`, `causal_conv`, `block_causal_conv` (causal_conv/), `attention`,
`expert_mlp` (experts/). What they share of a platform lies in hardware/, of arithmetic in numerics/.

An op with several implementations takes `implementation`, a name or None, which chooses by platform and shapes
(dispatch.py); `chosen` says what it chooses; a `Backends` holds one for each op (registry.py).

As attributes of this package, `ssd`, `block_scan`, `causal_conv` and `attention` are the functions; what else their
folders have is imported from there (`from twotower_jax.kernels.ssd import reference`).
"""

from twotower_jax.kernels.attention import Keys, attention
from twotower_jax.kernels.block_scan import BlockWeights, block_scan
from twotower_jax.kernels.causal_conv import block_causal_conv, causal_conv
from twotower_jax.kernels.dispatch import Choice
from twotower_jax.kernels.experts import expert_mlp
from twotower_jax.kernels.registry import OPS, Backends, chosen, implementations, platform_of
from twotower_jax.kernels.ssd import ssd, two_tower_ssd

__all__ = [
    "OPS",
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
