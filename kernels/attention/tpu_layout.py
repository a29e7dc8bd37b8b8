"""How tpu.py cuts a problem: rows of several heads, tiles of keys, where each lies, and how keys are fetched.

Heads are read and written where a projection leaves them, side by side in (B, L, H·P), so that neither activations nor
the projections' matrices are turned around. A tile takes l positions of g query heads that share keys, as g·l rows, one
head's positions below another's. Only a cache has the keys of each head together, (B, K, T, P).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from twotower_jax.kernels.attention import Keys
from twotower_jax.kernels.hardware import tpu
from twotower_jax.kernels.hardware.tpu_layout import LANES, SUBLANES

# Positions of a tile, its rows forward and backward, and keys of a tile.
POSITIONS, ROWS, ROWS_BACKWARD, KEYS = 128, 1024, 512, 512
# Sublanes of a tile of bfloat16.
PACKED = 16
# Places, from behind, of a row's lse and delta in `stats`, whose first places have a start and a stop for each source.
LSE, DELTA = -2, -1
# Numbers of each tile of rows in `limits`: the least and greatest of its rows' starts and stops.
_LIMITS = 4


class Source(NamedTuple):
    """One array of keys, cut: T, keys of a tile, and whether heads lie side by side, (B, T, K·P), or (B, K, T, P)."""

    count: int
    keys: int
    side_by_side: bool

    def place(self, j):
        """Where tile j begins: the last one earlier, if it would not be whole."""
        multiple = PACKED if self.count > self.keys else LANES
        return pl.multiple_of(jnp.minimum(j * self.keys, self.count - self.keys), multiple)

    def parts(self, b, kv, head_dim: int):
        """As `Stream` asks for it: where in keys, or in values, tile j lies."""

        def at(_, j):
            keys = pl.ds(self.place(j), self.keys)
            if not self.side_by_side:
                return b, kv, keys
            return b, keys, pl.ds(pl.multiple_of(kv * head_dim, head_dim), head_dim)

        return at

    def spec(self, head_dim: int) -> pl.BlockSpec:
        """Of tile j at (b, kv, j) of a grid."""
        if not self.side_by_side:
            return pl.BlockSpec((None, None, self.keys, head_dim), lambda b, kv, j, *_: (b, kv, j, 0))
        return pl.BlockSpec((None, self.keys, head_dim), lambda b, kv, j, *_: (b, j, kv))


class Cut(NamedTuple):
    """One problem, cut.

    Attributes:
      positions: l, of a tile of rows. heads: g, of a tile. groups: R/g, tiles of the same positions and keys.
      batch: B. kv_heads: K. tiles: of positions. head_dim: P. sources: those that are streamed.
    """

    positions: int
    heads: int
    groups: int
    batch: int
    kv_heads: int
    tiles: int
    head_dim: int
    sources: tuple[Source, ...]

    @property
    def rows(self) -> int:
        return self.heads * self.positions

    @property
    def own(self) -> int:
        """Own keys of a tile: those of its positions, in whole tiles of memory."""
        return self.positions + -self.positions % PACKED

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def to_rows(self, x):
        """(l, g·P) → (g·l, P)."""
        # Of packed tiles, only whole ones can be moved.
        movable = x.astype(jnp.float32) if self.positions % PACKED else x
        heads = [tpu.head(movable, r, self.head_dim) for r in range(self.heads)]
        return jnp.concatenate(heads, axis=0).astype(x.dtype)

    def from_rows(self, x):
        """(g·l, P) float32 → (l, g·P)."""
        heads = [x[r * self.positions : (r + 1) * self.positions] for r in range(self.heads)]
        return jnp.concatenate(heads, axis=1)

    def by_tile(self, v):
        """(B, H, M) → (B, H/g, tiles, 1, g·l): a number a row, in the order of rows in tiles."""
        v = v.reshape(v.shape[0], -1, self.heads, self.tiles, self.positions)
        return jnp.swapaxes(v, 2, 3).reshape(*v.shape[:2], self.tiles, 1, -1)

    def by_head(self, v):
        """The inverse of `by_tile`."""
        v = v.reshape(*v.shape[:2], self.tiles, self.heads, self.positions)
        return jnp.swapaxes(v, 2, 3).reshape(v.shape[0], -1, self.tiles * self.positions)

    def limits(self, limits_ref, source: int, b, tile):
        """Of one tile of rows."""
        base = ((source * self.batch + b) * self.tiles + tile) * _LIMITS
        return [limits_ref[base + place] for place in range(_LIMITS)]


class Arrays(NamedTuple):
    """What kernels read beside queries.

    Attributes:
      sources: keys and values of each that is streamed. own: (B, M, K·P) keys and values of the rows' own positions, or
        none.
      stats: (B, tiles, 8, g·l) float32 (exact for positions below 2²⁴), the limits of rows.
      limits: (sources, B, tiles, 4) int32, those of tiles.
    """

    sources: tuple[tuple[jax.Array, jax.Array], ...]
    own: tuple[jax.Array, ...]
    stats: jax.Array
    limits: jax.Array


def prepare(q, sources: tuple[Keys, ...], own: Keys | None, block: int, most_rows: int) -> tuple[Cut, Arrays]:
    """Cuts the problem of q (B, L, H, P) and its sources; own keys come by blocks of positions, which are not cut."""
    (batch, length, heads, head_dim), kv_heads = q.shape, sources[0].key.shape[1]
    unit, ratio = unit_of(block), heads // kv_heads
    # Few rows are not padded to many: decoding is a matter of reading keys.
    positions = min(unit * max(1, POSITIONS // unit), 1 if length == 1 else length + -length % SUBLANES)
    together = max(g for g in range(1, ratio + 1) if ratio % g == 0 and (g == 1 or g * positions <= most_rows))
    cuts, streamed = [], []
    for source in sources:
        # A last tile of keys that is not whole begins earlier; at least one whole tile has to be there.
        key, value = (padded(v, PACKED if v.shape[2] > KEYS else LANES, 2) for v in source[:2])
        # A cache, unlike the keys of a whole sequence, has one limit for all queries.
        cut = Source(key.shape[2], min(KEYS, key.shape[2]), side_by_side=source.stop.shape[1] > 1)
        cuts.append(cut)
        streamed.append((_side_by_side(key), _side_by_side(value)) if cut.side_by_side else (key, value))
    ends = []
    for source in sources if own is None else (*sources, own):
        stop = jnp.minimum(source.stop, source.key.shape[2])
        start = jnp.zeros_like(stop) if source.start is None else jnp.maximum(source.start, 0)
        ends += [padded(jnp.broadcast_to(v, (batch, length)), positions, 1, "edge") for v in (start, stop)]
    ends = jnp.stack(ends, axis=1).reshape(batch, len(ends), -1, positions)
    least, most = (reduce(ends, axis=3)[:, : 2 * len(sources)] for reduce in (jnp.min, jnp.max))
    limits = jnp.stack([least[:, ::2], most[:, ::2], least[:, 1::2], most[:, 1::2]], axis=-1)
    # Behind the limits is place for lse and delta.
    stats = padded(jnp.pad(ends, ((0, 0), (0, 2), (0, 0), (0, 0))), SUBLANES, 1)
    cut = Cut(positions, together, ratio // together, batch, kv_heads, ends.shape[2], head_dim, tuple(cuts))
    return cut, Arrays(
        tuple(streamed),
        () if own is None else tuple(padded(_side_by_side(v), cut.own, 1) for v in own[:2]),
        jnp.tile(jnp.swapaxes(stats, 1, 2).astype(jnp.float32), together),
        jnp.swapaxes(limits, 0, 1),
    )


def unit_of(block: int) -> int:
    """Positions that are whole blocks and whole tiles of memory."""
    return math.lcm(block, PACKED)


def padded(v, multiple: int, axis: int, mode: str = "constant"):
    pad = [(0, 0)] * v.ndim
    pad[axis] = 0, -v.shape[axis] % multiple
    return jnp.pad(v, pad, mode=mode)


def _side_by_side(v):
    """(B, K, T, P) → (B, T, K·P), where a projection left it: XLA cancels this transposition with that before it."""
    v = jnp.swapaxes(v, 1, 2)
    return v.reshape(*v.shape[:2], -1)


class Stream:
    """Tiles of arrays in HBM, one after the other from `first` to `last`: the next is fetched while one is in use."""

    def __init__(self, refs, buffers, at, first, last):
        *self.buffers, self.sems = buffers
        self.refs, self.at, self.first, self.last = refs, at, first, last

        @pl.when(first < last)
        def _():
            for copy in self._copies(first, 0):
                copy.start()

    def _copies(self, j, slot):
        return [
            pltpu.make_async_copy(ref.at[self.at(a, j)], buffer.at[slot], self.sems.at[a, slot])
            for a, (ref, buffer) in enumerate(zip(self.refs, self.buffers, strict=True))
        ]

    def each(self, body):
        """`body(j, tiles)`."""

        def step(j, _):
            slot = lax.rem(j - self.first, 2)

            @pl.when(j + 1 < self.last)
            def _():
                for copy in self._copies(j + 1, 1 - slot):
                    copy.start()

            for copy in self._copies(j, slot):
                copy.wait()
            body(j, [buffer.at[slot] for buffer in self.buffers])
            return 0

        lax.fori_loop(self.first, self.last, step, 0)


class KeysOfRows:
    """The keys that a tile of rows sees, at (b, kv, tile) of a grid; the first of each source are fetched at once."""

    def __init__(self, cut: Cut, limits_ref, stats, source_refs, buffers):
        self.cut, self.columns = cut, stats.T
        self.tile = pl.program_id(2)
        b, kv = pl.program_id(0), pl.program_id(1)  # Not in a loop, where the interpreter has none.
        self.limits = [cut.limits(limits_ref, s, b, self.tile) for s in range(len(cut.sources))]
        self.streams = []
        for source, limits, refs, space in zip(cut.sources, self.limits, source_refs, buffers, strict=True):
            tiles = limits[0] // source.keys, pl.cdiv(limits[3], source.keys)
            self.streams.append(Stream(refs, space, source.parts(b, kv, cut.head_dim), *tiles))

    def _ends(self, source: int):
        return (self.columns[:, 2 * source + end : 2 * source + end + 1] for end in range(2))

    def seen_of_own(self):
        start, stop = self._ends(len(self.streams))
        position = self.tile * self.cut.own + lax.broadcasted_iota(jnp.int32, (1, self.cut.own), 1)
        return (position.astype(jnp.float32) >= start) & (position.astype(jnp.float32) < stop)

    def each(self, step):
        """`step(k, v, seen)` for the tiles of each source that some row sees, seen None where all rows see all."""
        for s, stream in enumerate(self.streams):
            stream.each(functools.partial(self._tile, step, s))

    def _tile(self, step, s, j, tiles):
        source, (_, all_from, all_to, last), (start, stop) = self.cut.sources[s], self.limits[s], self._ends(s)
        begin, place = j * source.keys, source.place(j)
        whole = (begin >= all_from) & (begin + source.keys <= all_to)

        @pl.when(whole)
        def _():
            step(*(tile[...] for tile in tiles), None)

        @pl.when(jnp.logical_not(whole))
        def _():
            across = (place + lax.broadcasted_iota(jnp.int32, (1, source.keys), 1)).astype(jnp.float32)
            down = place + lax.broadcasted_iota(jnp.int32, (source.keys, 1), 0)
            seen = (across >= jnp.maximum(start, begin.astype(jnp.float32))) & (across < stop)
            # What no row sees may be NaN, which times 0 is NaN.
            step(*(jnp.where(down < last, tile[...], jnp.zeros((), tile.dtype)) for tile in tiles), seen)
