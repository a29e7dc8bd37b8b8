"""The causal depthwise convolution of Mamba-2, over one sequence or over blocks seeded from a context.

    out_t = SiLU(bias + Σ_k weight_k · in_{t-K+1+k})          k = 0 … K−1, width K = 4 in the release

The inputs before the first one come from `tail`. Four shifted products fuse into one pass over memory, which a general
convolution does not.
"""

import jax
import jax.numpy as jnp


def causal_conv(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    tail: jax.Array | None = None,
    before: jax.Array | None = None,
) -> jax.Array:
    """Convolution and SiLU over whole sequences.

    Args:
      x: (B, L, C), raw inputs.
      weight: (K, C), the newest input's weight last. bias: (C,) or None.
      tail: (B, ≥ K−1, C), the raw inputs before x, newest last; zeros if None.
      before: (B, L) int32, how many inputs before each position it may read, its document having no more; None for all.

    Returns:
      (B, L, C) in x's dtype; the sum runs in float32.
    """
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
    return jax.nn.silu(total).astype(x.dtype)


def block_causal_conv(
    x: jax.Array,
    context: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    block_size: int,
    tail: jax.Array | None = None,
    before: jax.Array | None = None,
) -> jax.Array:
    """`causal_conv` over blocks side by side; before each block lie the context's raw inputs, not the block's own.

    Args:
      x: (B, L, C), raw inputs of the blocks; L is a multiple of block_size.
      context: (B, L, C), raw inputs of the context at the same positions.
      weight, bias: as in `causal_conv`.
      tail: (B, ≥ K−1, C), the context's raw inputs before the first block, newest last; zeros if None.
      before: as in `causal_conv`.

    Returns:
      (B, L, C) in x's dtype.
    """
    batch, length, channels = x.shape
    width, blocks = weight.shape[0], length // block_size
    if tail is None:
        padded = jnp.pad(context, [(0, 0), (width - 1, 0), (0, 0)])
    else:
        padded = jnp.concatenate([tail[:, tail.shape[1] - (width - 1) :], context], axis=1)
    # Input e−(K−1)+k of every block's left edge e, for each of the K−1 places before it.
    tails = jnp.stack([padded[:, k : k + length : block_size] for k in range(width - 1)], axis=2)
    out = causal_conv(
        x.reshape(batch * blocks, block_size, channels),
        weight,
        bias,
        tails.reshape(batch * blocks, width - 1, channels),
        None if before is None else before.reshape(batch * blocks, block_size),
    )
    return out.reshape(x.shape)
