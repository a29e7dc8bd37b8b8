"""The causal convolutions as XLA compiles them, on any platform: four shifted products fuse into one pass over memory,
which a general convolution does not."""

import jax
import jax.numpy as jnp


def causal_conv(x, weight, bias, tail=None, before=None):
    """`kernels.causal_conv`, same arguments and results."""
    width, length = weight.shape[0], x.shape[1]
    if tail is None:
        padded = jnp.pad(x, [(0, 0), (width - 1, 0), (0, 0)])
    else:
        padded = jnp.concatenate([tail[:, tail.shape[1] - (width - 1) :].astype(x.dtype), x], axis=1)
    weight = weight.astype(jnp.float32)
    total = 0.0
    for k in range(width):
        product = padded[:, k : k + length].astype(jnp.float32) * weight[k]
        total += product if before is None else jnp.where((before >= width - 1 - k)[..., None], product, 0.0)
    if bias is not None:
        total += bias.astype(jnp.float32)
    # Several ops read the result, and XLA would compute it, exponentials and all, again inside each of them.
    return jax.lax.optimization_barrier(jax.nn.silu(total).astype(x.dtype))


def block_causal_conv(x, context, weight, bias, block_size, tail=None, before=None):
    """`kernels.block_causal_conv`, same arguments and results."""
    batch, length, channels = x.shape
    width, blocks = weight.shape[0], length // block_size
    if width == 1:  # Nothing before a position is read.
        return causal_conv(x, weight, bias)
    if tail is None:
        padded = jnp.pad(context, [(0, 0), (width - 1, 0), (0, 0)])
    else:
        padded = jnp.concatenate([tail[:, tail.shape[1] - (width - 1) :], context], axis=1)
    # Input e−(W−1)+k of every block's left edge e, for each of the W−1 places before it.
    tails = jnp.stack([padded[:, k : k + length : block_size] for k in range(width - 1)], axis=2)
    out = causal_conv(
        x.reshape(batch * blocks, block_size, channels),
        weight,
        bias,
        tails.reshape(batch * blocks, width - 1, channels),
        None if before is None else before.reshape(batch * blocks, block_size),
    )
    return out.reshape(x.shape)
