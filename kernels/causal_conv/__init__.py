"""The causal depthwise convolution of Mamba-2, over one sequence or over blocks seeded from a context.

    out_t = SiLU(bias + Σ_k weight_k · in_{t-K+1+k})          k = 0 … K−1, width K = 4 in the release

The inputs before the first one come from `tail`. In block-wise form, position i reads its own inputs back to its
block's left edge e, and the context's, at the same positions, before it: in_{i-d} is x_{i-d} if i − d ≥ e, else
context_{i-d}.
"""

import jax

from twotower_jax.kernels.dispatch import Implementation, Op

_IMPLEMENTATIONS = (
    Implementation("xla", ".xla"),
    Implementation("pallas_tpu", ".tpu", platform="tpu", interpreted=True),
    Implementation("mosaic_gpu", ".mosaic_gpu", platform="gpu", interpreted=True),
    Implementation("reference", ".reference"),
)
CAUSAL_CONV = Op("causal_conv", __name__, *_IMPLEMENTATIONS)
BLOCK_CAUSAL_CONV = Op("block_causal_conv", __name__, *_IMPLEMENTATIONS, setting="causal_conv")


def causal_conv(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    tail: jax.Array | None = None,
    before: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Convolution and SiLU over whole sequences.

    Differentiable in x, weight, bias and tail.

    Args:
      x: (B, L, C), raw inputs.
      weight: (K, C), the newest input's weight last. bias: (C,) or None.
      tail: (B, ≥ K−1, C), the raw inputs before x, newest last; zeros if None.
      before: (B, L) int32, how many inputs before each position it may read, its document having no more; None for all.
      implementation: "xla", "pallas_tpu", "mosaic_gpu" (NVIDIA Hopper), "pallas_tpu_interpret" and
        "mosaic_gpu_interpret" (on any platform, slow), "reference", or None to choose.

    Returns:
      (B, L, C) in x's dtype; the sum runs in float32.

    Raises:
      ValueError: if the named implementation is unknown or cannot take these shapes.
    """
    return CAUSAL_CONV.run(implementation, x, weight, bias, tail, before)


def block_causal_conv(
    x: jax.Array,
    context: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    block_size: int,
    tail: jax.Array | None = None,
    before: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """`causal_conv` over blocks side by side; before each block lie the context's raw inputs, not the block's own.

    Differentiable in x, context, weight, bias and tail.

    Args:
      x: (B, L, C), raw inputs of the blocks; L is a multiple of block_size.
      context: (B, L, C), raw inputs of the context at the same positions.
      weight, bias: as in `causal_conv`.
      tail: (B, ≥ K−1, C), the context's raw inputs before the first block, newest last; zeros if None.
      before, implementation: as in `causal_conv`.

    Returns:
      (B, L, C) in x's dtype.

    Raises:
      ValueError: if block_size does not divide L, or as `causal_conv`.
    """
    if x.shape[1] % block_size:
        raise ValueError(f"block_causal_conv: block_size={block_size} does not divide the length {x.shape[1]}")
    return BLOCK_CAUSAL_CONV.run(implementation, x, context, weight, bias, block_size, tail, before)
