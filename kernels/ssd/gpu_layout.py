"""What the scans on GPUs (gpu.py, two_tower_gpu.py) and the kernels of every compiler that they run by agree on.

How a scan is cut (`Cut`): chunks of positions, tiles of them, and where heads and groups stand. Arrays keep the layout
of the model, heads and groups side by side in the last dimension; only the small per-head numbers are transposed.

Which three kernels (`Programs`) scans and their gradients are composed of. A GPU has some hundred multiprocessors, and
one sequence 64 heads: a kernel that went through the chunks of a head one after the other would leave most of the chip
idle. So only the state goes in that order, in a kernel that does nothing else (`states`); what a chunk's positions make
of it runs for all tiles of positions side by side (`outputs`, and `group_gradients`, where the heads of a group are
summed).

In a chunk, readers i see writers j through exp(q_i − k_j), with q and k sums of log-decays from the chunk's start.
`Pairs` says which see which. With rows of readers and columns of writers the kernels compute y and dC; the other way
round, from the same formulas, dx and dB, since the gradient of a scan is a scan that runs backward.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from twotower_jax.kernels.numerics.log_decay import Sum, in_chunks
from twotower_jax.kernels.numerics.split import for_products

_LONGEST_CHUNK = 256
# Positions that chunks are multiples of, and columns of a state that are worked on at a time.
_UNIT = 64
# Under the interpreter small problems are cut as finely, so that tests see several tiles in a chunk.
_INTERPRETED_TILE = 8


class Programs(NamedTuple):
    """The kernels of one compiler.

    All take a `Cut` first, and the arrays of the model as (B, L, H·P) and (B, L, G·N). With `through`, (scales
    (B, H, L), edges (B, H, L/Q, P, N)), the state at each chunk's edge counts too; `pairs` has a `Pairs` for each of
    `sources`, a tuple of `Source`; `readers_in_rows` says whether rows a are readers and columns b writers, or the
    other way round. Results are float32.

    Attributes:
      states: (cut, values, keys, weights, kept, initial, *, backward=False), the recurrence from chunk to chunk

          h' = kept · h + Σ over the chunk of (weight · value) keyᵀ

        of values (B, L, H·P), keys (B, L, G·N), weights (B, H, L), kept (B, H, L/Q) and initial (B, H, P, N), backward
        from the last chunk to the first. Returns the state before each chunk (B, H, L/Q, P, N), and the one after all
        (B, H, P, N).
      outputs: (cut, queries, pairs, sources, through, *, readers_in_rows=True), of queries (B, L, G·N)

          Σ over sources and columns b of (query_a · key_b) decay dt value_b + scale_a · edge query_a

        (B, L, H·P).
      group_gradients: (cut, queries, upstream, pairs, sources, through, *, readers_in_rows), the gradient of what a
        group shares, from the rows' part of what is differentiated, queries (B, L, G·N), and upstream (B, L, H·P):

          Σ over heads, sources and columns b of (upstream_a · value_b) decay dt key_b + Σ over heads of scale_a ·
          upstream_a edge

        Returns it (B, L, G·N), `RowSums` of each source, and with `through` upstream_a edge query_a (B, H, L).
      tile: positions that a block of the grid takes.
    """

    states: Callable
    outputs: Callable
    group_gradients: Callable
    tile: int


class Cut(NamedTuple):
    """One problem, cut.

    Attributes:
      batch, length, heads, head_dim, groups, state: B, L (padded to whole chunks), H, P, G, N.
      chunk: Q. tile: positions that a block of the grid takes, which divide Q.
      interpret: None, or how to run the kernels on any backend.
      programs: what computes it.
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
    programs: Programs

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
        return _UNIT if self.state % _UNIT == 0 else self.state

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


def cut_scan(x_shape, b_shape, chunk_size: int, programs: Programs, interpret, block_size: int = 1) -> Cut:
    """Cuts x (B, L, H, P) and b (B, L, G, N); a chunk begins with a block of block_size positions.

    `interpret` is None or False, or how to run the kernels on any backend.
    """
    batch, length, heads, head_dim = x_shape
    chunk = _chunk_length(length, chunk_size, interpret, block_size)
    tile = math.gcd(chunk, programs.tile) if chunk > _UNIT or not interpret else _INTERPRETED_TILE
    padded = length + -length % chunk
    return Cut(batch, padded, heads, head_dim, *b_shape[2:], chunk, tile, interpret or None, programs)


def _chunk_length(length: int, chunk_size: int, interpret, block_size: int) -> int:
    """Q: near chunk_size, a multiple of the block and of a tile, or one chunk that holds everything."""
    tile = _INTERPRETED_TILE if interpret else _UNIT
    unit = math.lcm(block_size, tile)
    return min(unit * max(1, min(chunk_size, _LONGEST_CHUNK) // unit), length + -length % tile)


def too_long(length: int, chunk_size: int, block_size: int) -> str | None:
    """Why blocks of this size cannot be cut into chunks, or None."""
    chunk = _chunk_length(length, chunk_size, False, block_size)
    return f"a chunk of {chunk} positions is longer than {_LONGEST_CHUNK}" if chunk > _LONGEST_CHUNK else None


class Pairs(NamedTuple):
    """Which readers see which writers of their chunk: those that are not after them, or some of these.

    Attributes:
      block: S, or None. A chunk begins with a block.
      own: with S, whether a reader sees the writers of its own block, not after it, or all those of earlier blocks.
    """

    block: int | None = None
    own: bool = True

    def tiles(self, cut: Cut, row, readers_in_rows: bool):
        """From and up to which tile of columns, in a chunk, some pair may be seen by a tile of rows."""
        start, size = row * cut.tile, cut.tile
        last = start + size - 1
        if self.block is None:
            bounds = (0, row + 1) if readers_in_rows else (row, cut.tiles)
        elif readers_in_rows and self.own:
            bounds = lax.div(self._block_start(start), size), row + 1
        elif readers_in_rows:
            bounds = 0, lax.div(self._block_start(last) + (size - 1), size)
        elif self.own:
            end = lax.div(self._block_start(last) + (self.block + size - 1), size)
            bounds = row, jnp.minimum(end, cut.tiles)
        else:
            bounds = lax.div(self._block_start(start) + self.block, size), cut.tiles
        return tuple(jnp.asarray(bound, jnp.int32) for bound in bounds)

    def _block_start(self, position):
        return lax.div(position, jnp.int32(self.block)) * self.block

    def seen(self, readers: jax.Array, writers: jax.Array) -> jax.Array:
        """At positions in the chunk, int32 of the same shape."""
        if self.block is None:
            return writers <= readers
        start = self._block_start(readers)
        return (writers >= start) & (writers <= readers) if self.own else writers < start


class Decays(NamedTuple):
    """Of a tower's pairs: sums of log-decays of readers and of writers, and dt of writers, each (B, H, L)."""

    readers: Sum
    writers: Sum
    dt: jax.Array


class Source(NamedTuple):
    """What the columns of a triangle hold: keys (B, L, G·N), values (B, L, H·P), and the decays of their pairs."""

    keys: jax.Array
    values: jax.Array
    decays: Decays


class RowSums(NamedTuple):
    """Sums over columns, of the rows' positions, (B, H, L), for the gradients of dt and of sums of log-decays.

    Attributes:
      by_decay: of every term of the loss, except for pairs of a position with itself, which do not decay.
      by_step: the same without dt, and with these pairs; where rows are writers.
    """

    by_decay: jax.Array
    by_step: jax.Array | None
