"""How a model is computed, apart from what it computes."""

import dataclasses

import jax.numpy as jnp

from twotower_jax.kernels import Backends

REMAT = ("none", "layer", "unit")


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model is computed, which does not change what is computed.

    Attributes:
      dtype: of activations; routing, norms, states and softmax run in float32 or better regardless.
      scan_layers: stack and scan repeated segments; False lays parameters out layer by layer.
      unroll: compute what is stacked layer by layer all the same: on processors faster, and compiled sooner as long as
        the layers are few.
      remat: what the backward pass recomputes instead of keeping it: "none"; "layer", which keeps what enters each
        layer; "unit", which keeps what enters each unit of a repeated segment.
      backends: the implementation of each kernel.
    """

    dtype: jnp.dtype = jnp.float32
    scan_layers: bool = True
    unroll: bool = False
    remat: str = "none"
    backends: Backends = Backends()
