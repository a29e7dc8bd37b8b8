"""What a Mamba-2 layer does between its two projections to one block of tokens after a state: the inference path.

    xBC = SiLU(conv(raw xBC))      y = scan of x, B, C from the state + D x      out = norm(y ∘ SiLU(z)) ∘ weight

the norm over groups of H·P/G channels. At 1 to 64 tokens almost all of the time goes into moving arrays, above all the
states, which a fused kernel reads once and, where the next state is not wanted, never writes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from twotower_jax.kernels.dispatch import Implementation, Op

# Tokens of a block. Beyond, the products outweigh the moving of states, and a scan in chunks is the better form.
LONGEST_BLOCK = 64


class BlockWeights(NamedTuple):
    """The layer's parameters here.

    Attributes:
      conv_weight: (K, C), C = H·P + 2·G·N. conv_bias: (C,) or None.
      skip: (H,), D of the maths. norm: (H·P,).
    """

    conv_weight: jax.Array
    conv_bias: jax.Array | None
    skip: jax.Array
    norm: jax.Array


BLOCK_SCAN = Op(
    "block_scan",
    __name__,
    Implementation("xla", ".xla"),
    Implementation("pallas_tpu", ".tpu", platform="tpu", interpreted=True),
    Implementation("mosaic_gpu", ".mosaic_gpu", platform="gpu", interpreted=True),
    Implementation("reference", ".reference"),
)


def block_scan(
    z: jax.Array,
    xbc: jax.Array,
    dt: jax.Array,
    log_decay: jax.Array,
    weights: BlockWeights,
    tail: jax.Array,
    state: jax.Array,
    *,
    groups: int,
    epsilon: float,
    next_state: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """One block of each row.

    The hardware kernels have no gradient; the XLA form has.

    Args:
      z: (B, S, H·P). xbc: (B, S, C), raw inputs of the convolution.
      dt, log_decay: (B, S, H), as in `ssd`; positions with both 0 leave the state as it is.
      weights: see `BlockWeights`.
      tail: (B, ≥ K−1, C), the raw inputs before the block, newest last.
      state: (B, H, P, N) float32, before the block.
      groups: G.
      epsilon: of the norm.
      next_state: whether the state after the block is wanted.
      implementation: "xla", "pallas_tpu", "mosaic_gpu" (NVIDIA Hopper), "pallas_tpu_interpret" and
        "mosaic_gpu_interpret" (on any platform, slow), "reference", or None to choose.

    Returns:
      (B, S, H·P) in z's dtype, and the state after the block, float32, or None.

    Raises:
      ValueError: if the named implementation is unknown or cannot take these shapes.
    """
    arguments = z, xbc, dt, log_decay, weights, tail, state
    return BLOCK_SCAN.run(implementation, *arguments, groups=groups, epsilon=epsilon, next_state=next_state)


def split_channels(xbc: jax.Array, inner: int, head_dim: int, state: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(B, L, H·P + 2·G·N), H·P being `inner`, as x (B, L, H, P), B and C (B, L, G, N)."""
    leading = xbc.shape[:-1]
    x, b, c = jnp.split(xbc, [inner, (inner + xbc.shape[-1]) // 2], axis=-1)
    return x.reshape(*leading, -1, head_dim), b.reshape(*leading, -1, state), c.reshape(*leading, -1, state)


def add_skip(y: jax.Array, x: jax.Array, skip: jax.Array) -> jax.Array:
    """y + D x, float32: y and x (B, L, H, P), skip (H,)."""
    return y + skip.astype(jnp.float32)[:, None] * x.astype(jnp.float32)
