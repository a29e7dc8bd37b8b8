"""Sums of log-decays along chunks, so that a difference of two sums keeps what each holds.

The difference a_i − a_j of two float32 sums would lose what a strong decay before both has rounded away; see `Sum`.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sum(NamedTuple):
    """Sums of log-decays, coarse + fine, both (B, c, Q, …).

    The coarse parts are small multiples of one power of two, so that sums and differences of them are exact; the fine
    parts are close to 0. So a head may forget everything at one position and nothing at the next.
    """

    coarse: jax.Array
    fine: jax.Array

    @property
    def total(self) -> jax.Array:
        return self.coarse + self.fine

    def __sub__(self, other: "Sum") -> jax.Array:
        return (self.coarse - other.coarse) + (self.fine - other.fine)

    def map(self, function) -> "Sum":
        return Sum(function(self.coarse), function(self.fine))


_FORGOTTEN = -128.0  # Its exponential is below the smallest number of float32.


def in_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """(B, L, …) to (B, ⌈L/Q⌉, Q, …), padded with zeros: dt = 0 neither decays a state nor adds to it."""
    padding = -x.shape[1] % chunk
    if padding:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, chunk, *x.shape[2:])


def two_parts(log_decay: jax.Array, chunk: int) -> Sum:
    """Log-decays, none below what is forgotten anyway, in two parts, the sums of which are a `Sum`."""
    # As fine a grid as leaves the sum of two chunks of decays below 2²⁴ steps of it.
    grid = 2.0 ** (math.ceil(math.log2(-_FORGOTTEN * 2 * chunk)) - 24)
    log_decay = jnp.maximum(log_decay, _FORGOTTEN)
    coarse = jax.lax.stop_gradient(jnp.round(log_decay / grid) * grid)
    return Sum(coarse, log_decay - coarse)


def cumulative(log_decay: jax.Array, chunk: int) -> Sum:
    """Inclusive sums along axis 2 of (B, c, L, H), L ≤ Q, as products with a triangle of ones."""
    length = log_decay.shape[2]
    triangle = jnp.tril(jnp.ones((length, length), jnp.float32))

    def sums(v):
        precision = jax.lax.Precision.HIGHEST
        return jnp.einsum("ij,bcjh->bcih", triangle, v, precision=precision, preferred_element_type=jnp.float32)

    return two_parts(log_decay, chunk).map(sums)


def query_sums(log_decay: jax.Array, context: Sum, block_size: int) -> tuple[Sum, Sum]:
    """The two parts of the decay from the start of a chunk of the context to a position in a block of the denoiser.

    Args:
      log_decay: (B, c, Q, H), the denoiser's.
      context: (B, c, Q, H), the context's sums from the start of each chunk.
      block_size: S; every chunk begins with a block.

    Returns:
      the denoiser's sums from each block's left edge, and the context's up to that edge, 0 in a chunk's first block;
      both (B, c, Q, H).
    """
    batch, chunks, chunk, heads = log_decay.shape
    blocks = in_chunks(log_decay.reshape(batch * chunks, chunk, heads), block_size)
    inside = cumulative(blocks, chunk).map(
        lambda v: v.reshape(batch, chunks, -1, heads)[:, :, :chunk]  # The last block may reach beyond its chunk.
    )

    def at_left_edge(v):
        edges = jnp.pad(v[:, :, block_size - 1 : -1 : block_size], [(0, 0), (0, 0), (1, 0), (0, 0)])
        return jnp.repeat(edges, block_size, axis=2)[:, :, :chunk]

    return inside, context.map(at_left_edge)
