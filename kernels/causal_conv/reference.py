"""The oracles of `kernels.causal_conv` and `kernels.block_causal_conv`: a sum over each position's window. Slow."""

import jax
import jax.numpy as jnp

from twotower_jax.kernels.numerics.precision import float32_or_more


def causal_conv(x, weight, bias, tail=None, before=None):
    """`kernels.causal_conv` as a sum over the window of each position, in float32, or in float64 if given that."""
    width, length = weight.shape[0], x.shape[1]
    if tail is None:
        tail = jnp.zeros((x.shape[0], width - 1, x.shape[2]), x.dtype)
    weight = float32_or_more(weight)
    inputs = float32_or_more(jnp.concatenate([tail[:, tail.shape[1] - (width - 1) :].astype(x.dtype), x], axis=1))
    windows = inputs[:, jnp.arange(length)[:, None] + jnp.arange(width)]  # (B, L, K, C)
    if before is not None:
        distance = jnp.arange(width)[::-1]
        windows = jnp.where((before[..., None] >= distance)[..., None], windows, 0)
    total = jnp.einsum("blkc,kc->blc", windows, weight.astype(windows.dtype), precision="highest")
    if bias is not None:
        total += bias.astype(total.dtype)
    return jax.nn.silu(total).astype(x.dtype)


def block_causal_conv(x, context, weight, bias, block_size, tail=None, before=None):
    """`kernels.block_causal_conv`, one block after the other, each after all of the context before it."""
    if tail is None:
        tail = jnp.zeros((x.shape[0], weight.shape[0] - 1, x.shape[2]), x.dtype)
    context = jnp.concatenate([tail.astype(context.dtype), context], axis=1)
    out = []
    for e in range(0, x.shape[1], block_size):
        seen = None if before is None else before[:, e : e + block_size]
        out.append(causal_conv(x[:, e : e + block_size], weight, bias, context[:, : tail.shape[1] + e], seen))
    return jnp.concatenate(out, axis=1)
