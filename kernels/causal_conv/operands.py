"""The operands of the convolutions as the hardware kernels take them, of either convolution."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Operands(NamedTuple):
    """See tpu.py for the notation.

    Attributes:
      weight: (K + 1, C) float32, by distance, then the bias.
      tail: (B, K−1, C).
      reach: (B, 2, L) int32, own and seen; None where neither limits anything.
    """

    weight: jax.Array
    tail: jax.Array
    reach: jax.Array | None


def operands(x, weight, bias, tail, before, block_size) -> Operands:
    """From the arguments of `causal_conv`, block_size being None, or of `block_causal_conv`."""
    batch, length, channels = x.shape
    width = weight.shape[0]
    bias = jnp.zeros(channels, jnp.float32) if bias is None else bias.astype(jnp.float32)
    rows = jnp.concatenate([weight.astype(jnp.float32)[::-1], bias[None]])
    if tail is None:
        tail = jnp.zeros((batch, width - 1, channels), x.dtype)
    tail = tail[:, tail.shape[1] - (width - 1) :].astype(x.dtype)
    if block_size is None and before is None:
        return Operands(rows, tail, None)
    own = jnp.full(length, width) if block_size is None else jnp.arange(length) % block_size
    seen = jnp.full((batch, length), width) if before is None else before
    return Operands(rows, tail, jnp.stack([jnp.broadcast_to(own, seen.shape), seen], axis=1).astype(jnp.int32))
