"""What the hardware kernels of either convolution share: their operands, and which gradients they compute."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero


class Operands(NamedTuple):
    """See tpu.py for the notation.

    Attributes:
      weight: (W + 1, C) float32, by distance, then the bias.
      tail: (B, W−1, C).
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


def with_gradients(forward: Callable[..., jax.Array], backward: Callable[..., Any]) -> Callable[..., jax.Array]:
    """`conv(cut, x, before, weight, reach)`, whose gradients of `before` are computed only if someone wants them.

    Args:
      forward: (cut, x, before, weight, reach) → (B, L, C). before: the context if there are blocks, and the tail.
      backward: (cut, x, before, weight, reach, dy, wanted) → the gradient of x; those of each part of the weights,
        (B, parts, …) float32; and, if wanted, the tail's in float32 and the context's if there are blocks.
    """

    def pulled_back(cut, residuals, dy):
        (x, before, weight, reach), before_too = residuals
        if isinstance(dy, SymbolicZero):
            dy = jnp.zeros(dy.aval.shape, dy.aval.dtype)
        wanted = before_too is not None
        dx, dweight, *dbefore = backward(cut, x, before, weight, reach, dy, wanted)
        if wanted:
            dtail, *dcontext = dbefore
            dbefore = (*dcontext, dtail.astype(before[-1].dtype))
        else:
            dbefore = jax.tree.map(jnp.zeros_like, before)
        return dx, dbefore, jnp.sum(dweight, axis=(0, 1)), jax.tree.map(_no_gradient, reach)

    conv = jax.custom_vjp(forward, nondiff_argnums=(0,))

    def remembered(cut, x, before, weight, reach):
        values = jax.tree.map(lambda v: v.value, (x, before, weight, reach), is_leaf=lambda v: hasattr(v, "perturbed"))
        # Whether these gradients are wanted is a fact of the trace, which only a structure can carry.
        before_too = () if any(v.perturbed for v in before) else None
        return conv(cut, *values), (values, before_too)

    conv.defvjp(remembered, pulled_back, symbolic_zeros=True)
    return conv


def _no_gradient(v: jax.Array) -> Any:
    integers = jnp.issubdtype(v.dtype, jnp.integer)
    return np.zeros(v.shape, jax.dtypes.float0) if integers else jnp.zeros_like(v)
