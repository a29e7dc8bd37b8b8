"""The oracle of `kernels.block_scan`: the layer step by step, as literally as the maths allows. Slow."""

import jax
import jax.numpy as jnp

from twotower_jax.kernels.ssd.reference import ssd_sequential


def block_scan(z, xbc, dt, log_decay, weights, tail, state, *, groups, epsilon, next_state):
    """`kernels.block_scan` step by step, in the dtype of z."""
    batch, length, inner = z.shape
    heads, head_dim, state_size = state.shape[1:]
    width = weights.conv_weight.shape[0]
    inputs = jnp.concatenate([tail[:, tail.shape[1] - (width - 1) :], xbc], axis=1)
    windows = jnp.stack([inputs[:, i : i + width] for i in range(length)], axis=1)  # (B, S, K, C)
    total = jnp.einsum("bskc,kc->bsc", windows, weights.conv_weight, precision="highest")
    xbc = jax.nn.silu(total if weights.conv_bias is None else total + weights.conv_bias)
    x = xbc[..., :inner].reshape(batch, length, heads, head_dim)
    b, c = jnp.moveaxis(xbc[..., inner:].reshape(batch, length, 2, groups, state_size), 2, 0)
    y, last = ssd_sequential(x, dt, log_decay, b, c, state)
    gated = (y + weights.skip[:, None] * x).reshape(z.shape) * jax.nn.silu(z)
    parts = gated.reshape(batch, length, groups, -1)
    normed = parts / jnp.sqrt(jnp.mean(parts**2, axis=-1, keepdims=True) + epsilon)
    return normed.reshape(z.shape) * weights.norm, last if next_state else None
