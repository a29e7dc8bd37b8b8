"""How the GPU kernels cut a scan: chunks of positions, tiles of them, and where heads and groups stand.

Arrays keep the layout of the model, heads and groups side by side in the last dimension; only the small per-head
numbers are transposed.
"""

import importlib
import math
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from twotower_jax.kernels.hardware import gpu
from twotower_jax.kernels.hardware.hopper import interpreter, not_hopper
from twotower_jax.kernels.numerics.log_decay import in_chunks
from twotower_jax.kernels.numerics.split import for_products

_LONGEST_CHUNK = 256
# P and N whose tiles fit into shared memory in every kernel, as float32 too.
_HEAD_DIMS, _STATES = (64,), (64, 128)
# Positions that a block of the grid takes. Of 64, Triton's kernels would keep more than the registers hold.
_TILES = {"mosaic_gpu": gpu.TILE, "triton": 32}
# Under the interpreter small problems are cut as finely, so that tests see several tiles in a chunk.
_INTERPRETED_TILE = 8


class Cut(NamedTuple):
    """One problem, cut.

    Attributes:
      batch, length, heads, head_dim, groups, state: B, L (padded to whole chunks), H, P, G, N.
      chunk: Q. tile: positions that a block of the grid takes, which divide Q.
      interpret: None, or how to run the kernels on any backend.
      module: the kernels', "mosaic_gpu" (Pallas Mosaic GPU) or "triton".
    """

    batch: int
    length: int
    heads: int
    head_dim: int
    groups: int
    state: int
    chunk: int
    tile: int
    interpret: Any
    module: str = "mosaic_gpu"

    @property
    def kernels(self) -> types.ModuleType:
        """The module that has `states`, `outputs` and `group_gradients`."""
        return importlib.import_module(f"twotower_jax.kernels.ssd.{self.module}")

    @property
    def tiles(self) -> int:
        """In a chunk."""
        return self.chunk // self.tile

    @property
    def per_group(self) -> int:
        return self.heads // self.groups

    @property
    def slice_width(self) -> int:
        """Columns of a state that are worked on at a time."""
        return gpu.TILE if self.state % gpu.TILE == 0 else self.state

    def of_tile(self, chunk, tile):
        """The positions of a chunk's tile."""
        return pl.ds(chunk * self.chunk + tile * self.tile, self.tile)

    def of_head(self, head):
        """Its columns of (B, L, H·P)."""
        return pl.ds(head * self.head_dim, self.head_dim)

    def of_group(self, group):
        """Its columns of (B, L, G·N)."""
        return pl.ds(group * self.state, self.state)

    def at_edges(self, sums: jax.Array) -> jax.Array:
        """(B, H, L) → (B, H, L/Q), each chunk's last."""
        return sums[:, :, self.chunk - 1 :: self.chunk]

    def per_position(self, edges: jax.Array) -> jax.Array:
        """(B, H, L/Q) → (B, H, L): each chunk's number at all of its positions."""
        return jnp.repeat(edges, self.chunk, axis=2)

    def sum_chunks(self, v: jax.Array) -> jax.Array:
        """(B, H, L) → (B, H, L/Q)."""
        return jnp.sum(v.reshape(*v.shape[:2], -1, self.chunk), axis=3)

    def put_at_edges(self, edges: jax.Array) -> jax.Array:
        """(B, H, L/Q) → (B, H, L): each chunk's number at its last position, zeros before it."""
        padded = jnp.pad(edges[..., None], [(0, 0)] * 3 + [(self.chunk - 1, 0)])
        return padded.reshape(*edges.shape[:2], -1)

    def flat(self, v: jax.Array) -> jax.Array:
        """(B, L, heads, …) → (B, L, heads·…), padded to whole chunks, of a type that the kernels multiply."""
        return in_chunks(for_products(v), self.chunk).reshape(v.shape[0], -1, v.shape[2] * v.shape[3])

    def per_head(self, v: jax.Array) -> jax.Array:
        """(B, c, Q, H) → (B, H, L)."""
        return jnp.moveaxis(v.reshape(v.shape[0], -1, v.shape[3]), 1, 2)


def cut_scan(x_shape, b_shape, chunk_size: int, interpret, block_size: int = 1, module: str = "mosaic_gpu") -> Cut:
    """Cuts x (B, L, H, P) and b (B, L, G, N); a chunk begins with a block of block_size positions.

    `interpret` is False, True, or the parameters of Mosaic GPU's interpreter.
    """
    batch, length, heads, head_dim = x_shape
    chunk = _chunk_length(length, chunk_size, interpret, block_size)
    tile = math.gcd(chunk, _TILES[module]) if chunk > gpu.TILE or not interpret else _INTERPRETED_TILE
    padded = length + -length % chunk
    how = interpreter(True) if interpret is True and module == "mosaic_gpu" else interpret or None
    return Cut(batch, padded, heads, head_dim, *b_shape[2:], chunk, tile, how, module)


def _chunk_length(length: int, chunk_size: int, interpret, block_size: int) -> int:
    """Q: near chunk_size, a multiple of the block and of a tile, or one chunk that holds everything."""
    tile = _INTERPRETED_TILE if interpret else gpu.TILE
    unit = math.lcm(block_size, tile)
    return min(unit * max(1, min(chunk_size, _LONGEST_CHUNK) // unit), length + -length % tile)


def unsupported(x_shape, b_shape, chunk_size: int, block_size: int = 1) -> str | None:
    """Why the hardware cannot run a scan of these shapes, or None."""
    if problem := not_hopper():
        return problem
    head_dim, state = x_shape[3], b_shape[3]
    if head_dim not in _HEAD_DIMS or state not in _STATES:
        return f"heads of {head_dim} with a state of {state} (made for heads of {_HEAD_DIMS}, states of {_STATES})"
    return too_long(x_shape[1], chunk_size, block_size)


def too_long(length: int, chunk_size: int, block_size: int) -> str | None:
    """Why blocks of this size cannot be cut into chunks, or None."""
    chunk = _chunk_length(length, chunk_size, False, block_size)
    return f"a chunk of {chunk} positions is longer than {_LONGEST_CHUNK}" if chunk > _LONGEST_CHUNK else None
