"""The state-space dual (SSD) scan of Mamba-2 in matrix-multiply form, for one tower and for two.

One tower (Dao & Gu 2024, arXiv 2405.21060, section 6): with one scalar decay a head,

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ            y_t = h_t C_t

Two towers: a denoiser reads blocks of S positions side by side; block n starts from the state that the *context* tower
reached at the block's left edge e = nS. No such state is ever stored: unrolled, position i of that block is

    y_i = Σ_{j<e} exp(a_i + A^c_{e-1} − A^c_j) (C_i·B^c_j) dt^c_j x^c_j  +  Σ_{e≤j≤i} exp(a_i − a_j) (C_i·B_j) dt_j x_j

which is the first sum in chunks of the context, one state a chunk, plus S-long scans from zero. a_i is the inclusive
sum of dt·A from the block's left edge to i, A^c the context's from its start.

Everything is computed in float32, or exactly as well: states reach 1e3 and more, and bfloat16 turns to NaN on long
contexts. How sums of log-decays keep what their differences need stands in numerics/log_decay.py.
"""

import jax

from twotower_jax.kernels.dispatch import Implementation, Op

SSD = Op(
    "ssd",
    __name__,
    Implementation("xla", ".xla"),
    Implementation("pallas_tpu", ".tpu", platform="tpu", interpreted=True),
    Implementation("mosaic_gpu", ".mosaic_gpu", platform="gpu", interpreted=True),
    Implementation("triton", ".triton", platform="gpu", interpreted=True),
    Implementation("reference", ".reference"),
)
TWO_TOWER_SSD = Op(
    "two_tower_ssd",
    __name__,
    Implementation("xla", ".xla"),
    Implementation("pallas_tpu", ".two_tower_tpu", platform="tpu", interpreted=True),
    Implementation("mosaic_gpu", ".mosaic_gpu", platform="gpu", interpreted=True),
    Implementation("triton", ".triton", platform="gpu", interpreted=True),
    Implementation("reference", ".reference"),
    Implementation("stored_states", ".stored_states"),
)


def ssd(
    x: jax.Array,
    dt: jax.Array,
    log_decay: jax.Array,
    b: jax.Array,
    c: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    chunk_size: int = 128,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The scan of one tower (arXiv 2405.21060, section 6 and listing 1).

    Differentiable in every array.

    Args:
      x: (B, L, H, P), any float dtype.
      dt: (B, L, H), step sizes after softplus. A position with dt = 0 and log_decay = 0 leaves the state as it is.
      log_decay: (B, L, H), dt·A.
      b: (B, L, G, N). c: (B, L, G, N). G divides H.
      initial_state: (B, H, P, N), zeros if None.
      chunk_size: Q; a detail of the computation, any positive value gives the same result for any L.
      implementation: "xla", "pallas_tpu", "mosaic_gpu" (NVIDIA Hopper), "triton" (NVIDIA GPUs from Ampere on),
        the same with "_interpret" (on any platform, slow), "reference", or None to choose.

    Returns:
      y (B, L, H, P) float32, without the skip term D·x, and the state after the last position (B, H, P, N) float32.

    Raises:
      ValueError: if the named implementation is unknown or cannot take these shapes.
    """
    return SSD.run(implementation, x, dt, log_decay, b, c, initial_state=initial_state, chunk_size=chunk_size)


def two_tower_ssd(
    x: jax.Array,
    dt: jax.Array,
    log_decay: jax.Array,
    b: jax.Array,
    c: jax.Array,
    context_x: jax.Array,
    context_dt: jax.Array,
    context_log_decay: jax.Array,
    context_b: jax.Array,
    *,
    block_size: int,
    chunk_size: int = 128,
    implementation: str | None = None,
) -> jax.Array:
    """The scans of all blocks at once, block n seeded with the context's state after its first n·S positions.

    The dual form above. Memory depends on the chunk, not on the number of blocks. Differentiable in every array of
    both towers.

    Args:
      x, dt, log_decay, b, c: the denoiser's, shaped as in `ssd`; L is a multiple of S.
      context_x, context_dt, context_log_decay, context_b: the context's, of the same shapes.
      block_size: S.
      chunk_size: rounded to a multiple of S, so that a block lies in one chunk; any positive value gives the same.
      implementation: as in `ssd`, or "stored_states", which keeps a state for every block.

    Returns:
      y (B, L, H, P) float32, without the skip term.

    Raises:
      ValueError: if S does not divide L, or as `ssd`.
    """
    if x.shape[1] % block_size:
        raise ValueError(f"two_tower_ssd: block_size={block_size} does not divide the length {x.shape[1]}")
    context = context_x, context_dt, context_log_decay, context_b
    return TWO_TOWER_SSD.run(
        implementation, x, dt, log_decay, b, c, *context, block_size=block_size, chunk_size=chunk_size
    )
