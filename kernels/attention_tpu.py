"""`kernels.attention` as Pallas TPU kernels: flash attention whose queries carry their own limits.

A grid step takes a tile of rows (flash.py) and goes through the tiles of keys that some row of it sees, fetching the
next while it works on one; in the gradient of keys, the other way round. Only tiles that not all rows see whole are
masked. What no row of a tile sees is neither read nor computed: the right half of a causal matrix, other documents, a
cache behind its length.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from twotower_jax.kernels import flash, tpu
from twotower_jax.kernels.attention_xla import MASKED
from twotower_jax.kernels.tpu_layout import LANES, VMEM_BYTES

# Rows and keys of a tile, forward and backward.
_ROWS, _ROWS_BACKWARD, _KEYS = 1024, 512, 512
# Sublanes of a tile of bfloat16.
_PACKED = 16
# Places of a row's numbers in `stats`, float32 (exact for positions below 2²⁴); eight of them, a tile's sublanes.
_START, _STOP, _LSE, _DELTA, _STATS = 0, 1, 2, 3, 8
# Numbers of each tile of rows in `limits`: the least and greatest of its rows' starts and stops.
_LIMITS = 4


class _Cut(NamedTuple):
    """One problem, cut: `rows` and `keys` of a tile, K, T, the number of tiles of rows, and what runs it."""

    rows: int
    keys: int
    kv_heads: int
    count: int
    tiles: int
    interpret: bool


def _padded(v, multiple, axis, mode="constant"):
    pad = [(0, 0)] * v.ndim
    pad[axis] = 0, -v.shape[axis] % multiple
    return jnp.pad(v, pad, mode=mode)


def _prepare(q, k, v, ranges: flash.Ranges, most_rows: int, unit: int, interpret: bool):
    """The cut, padded arrays, and the limits of rows (B, 2, M) and of tiles (B · tiles · 4,)."""
    rows = min(most_rows, q.shape[1] + -q.shape[1] % unit)
    # A last tile of keys that is not whole begins earlier; at least one whole tile has to be there.
    k, v = (_padded(x, _PACKED if x.shape[1] > _KEYS else LANES, 1) for x in (k, v))
    q = _padded(q, rows, 1)
    ends = [_padded(x, rows, 1, "edge") for x in ranges]
    start, stop = (x.reshape(x.shape[0], -1, rows) for x in ends)
    limits = jnp.stack([start.min(-1), start.max(-1), stop.min(-1), stop.max(-1)], axis=-1)
    cut = _Cut(rows, min(_KEYS, k.shape[1]), k.shape[0] // start.shape[0], k.shape[1], q.shape[1] // rows, interpret)
    return cut, q, k, v, jnp.stack(ends, axis=1).astype(jnp.float32), limits


def _stats(cut: _Cut, ends, *numbers):
    """(N, 8, M) float32: start, stop, and (N, M) numbers."""
    ends = jnp.repeat(ends, cut.kv_heads, axis=0)
    numbers = [_padded(v, cut.rows, 1)[:, None] for v in numbers]
    stats = jnp.concatenate([ends, *numbers], axis=1)
    return _padded(stats, _STATS, 1)


def _at(limits_ref, cut: _Cut, head, tile):
    """The limits of one tile of rows."""
    base = ((head // cut.kv_heads) * cut.tiles + tile) * _LIMITS
    return [limits_ref[base + place] for place in range(_LIMITS)]


class _Stream:
    """Tiles of arrays in HBM, one after the other: the next is fetched while one is in use."""

    def __init__(self, refs, buffers, sems, at):
        self.refs, self.buffers, self.sems, self.at = refs, buffers, sems, at

    def _copies(self, j, slot):
        return [
            pltpu.make_async_copy(ref.at[self.at(a, j)], buffer.at[slot], self.sems.at[a, slot])
            for a, (ref, buffer) in enumerate(zip(self.refs, self.buffers, strict=True))
        ]

    def loop(self, first, last, body):
        """`body(j, arrays)` for first ≤ j < last."""

        @pl.when(first < last)
        def _():
            for copy in self._copies(first, 0):
                copy.start()

        def step(j, _):
            slot = lax.rem(j - first, 2)

            @pl.when(j + 1 < last)
            def _():
                for copy in self._copies(j + 1, 1 - slot):
                    copy.start()

            for copy in self._copies(j, slot):
                copy.wait()
            body(j, [buffer.at[slot] for buffer in self.buffers])
            return 0

        lax.fori_loop(first, last, step, 0)


def _place(cut: _Cut, j):
    """Where tile j of keys begins: the last one earlier, if it would not be whole."""
    return pl.multiple_of(jnp.minimum(j * cut.keys, cut.count - cut.keys), _PACKED if cut.count > cut.keys else LANES)


def _each_tile(cut: _Cut, limits, columns, refs, buffers, sems, step):
    """`step(k, v, seen)` for the tiles of keys that this tile of rows sees, seen None where it sees all of it."""
    first, all_from, all_to, last = limits
    head = pl.program_id(0)  # Not in the loop, where the interpreter has none.
    stream = _Stream(refs, buffers, sems, lambda a, j: (head, pl.ds(_place(cut, j), cut.keys)))
    start, stop = columns[:, _START : _START + 1], columns[:, _STOP : _STOP + 1]

    def body(j, tiles):
        begin, place = j * cut.keys, _place(cut, j)
        whole = (begin >= all_from) & (begin + cut.keys <= all_to)

        @pl.when(whole)
        def _():
            step(*(tile[...] for tile in tiles), None)

        @pl.when(jnp.logical_not(whole))
        def _():
            across = (place + lax.broadcasted_iota(jnp.int32, (1, cut.keys), 1)).astype(jnp.float32)
            down = place + lax.broadcasted_iota(jnp.int32, (cut.keys, 1), 0)
            seen = (across >= jnp.maximum(start, begin.astype(jnp.float32))) & (across < stop)
            # What no row sees may be NaN, which times 0 is NaN.
            k, v = (jnp.where(down < last, tile[...], jnp.zeros((), tile.dtype)) for tile in tiles)
            step(k, v, seen)

    stream.loop(first // cut.keys, pl.cdiv(last, cut.keys), body)


def _forward_kernel(
    limits_ref, q_ref, stats_ref, k_ref, v_ref, out_ref, lse_ref,
    k_buffer, v_buffer, sems, top_ref, sum_ref, acc_ref, *, cut: _Cut,
):  # fmt: skip
    q, scale = q_ref[...], q_ref.shape[1] ** -0.5
    top_ref[...] = jnp.full_like(top_ref, MASKED)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)

    def step(k, v, seen):
        s = tpu.dot(q, k, tpu.NT) * scale
        if seen is not None:
            s = jnp.where(seen, s, MASKED)
        before = top_ref[...]
        top = jnp.maximum(before, jnp.max(s, axis=1, keepdims=True))
        p = jnp.exp(s - top)
        if seen is not None:
            p = jnp.where(seen, p, 0.0)
        keep = jnp.exp(before - top)
        top_ref[...] = top
        sum_ref[...] = sum_ref[...] * keep + jnp.sum(p, axis=1, keepdims=True)
        acc_ref[...] = acc_ref[...] * keep + tpu.dot(p.astype(v.dtype), v)

    limits, columns = _at(limits_ref, cut, pl.program_id(0), pl.program_id(1)), stats_ref[...].T
    _each_tile(cut, limits, columns, (k_ref, v_ref), (k_buffer, v_buffer), sems, step)
    total = sum_ref[...]
    some = jnp.where(total > 0, total, 1.0)
    out_ref[...] = (acc_ref[...] / some).astype(out_ref.dtype)
    lse = jnp.where(total > 0, top_ref[...] + jnp.log(some), MASKED)
    lse_ref[...] = jnp.broadcast_to(lse, (cut.rows, _STATS)).T[:1]


def _specs(cut: _Cut, head_dim: int, per_row):
    """Of rows (N, M, P), of `stats`, and of arrays that stay in HBM."""
    rows = pl.BlockSpec((None, cut.rows, head_dim), lambda n, i, *_: (n, i, 0))
    stats = pl.BlockSpec((None, _STATS, cut.rows), lambda n, i, *_: (per_row(n), 0, i))
    return rows, stats, pl.BlockSpec(memory_space=pl.ANY)


def _call(kernel, cut: _Cut, grid, prefetched, inputs, outputs, scratch):
    """Runs a kernel on (spec, array) inputs, to (spec, shape, dtype) outputs."""
    return pl.pallas_call(
        functools.partial(kernel, cut=cut),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=grid,
            in_specs=[spec for spec, _ in inputs],
            out_specs=[spec for spec, *_ in outputs],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(*shape) for _, *shape in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=cut.interpret,
    )(*prefetched, *(array for _, array in inputs))


def _forward(q, k, v, ranges, dtype, *, interpret):
    heads, count, head_dim = q.shape
    # Few rows are not padded to many: decoding is a matter of reading keys.
    cut, q, k, v, ends, limits = _prepare(q, k, v, ranges, _ROWS, _PACKED, interpret)
    kv_heads = cut.kv_heads
    rows, stats, whole = _specs(cut, head_dim, lambda n: n // kv_heads)
    tile = pltpu.VMEM((2, cut.keys, head_dim), k.dtype)
    column = pltpu.VMEM((cut.rows, 1), jnp.float32)
    out, lse = _call(
        _forward_kernel,
        cut,
        (heads, cut.tiles),
        [limits.reshape(-1)],
        [(rows, q), (stats, _padded(ends, _STATS, 1)), (whole, k), (whole, v)],
        [
            (rows, q.shape, dtype),
            (pl.BlockSpec((None, 1, cut.rows), lambda n, i, *_: (n, 0, i)), (heads, 1, q.shape[1]), jnp.float32),
        ],
        [tile, tile, pltpu.SemaphoreType.DMA((2, 2)), column, column, pltpu.VMEM((cut.rows, head_dim), jnp.float32)],
    )
    return out[:, :count], lse[:, 0, :count]


def _gradient_of_q_kernel(
    limits_ref, q_ref, do_ref, stats_ref, k_ref, v_ref, dq_ref, k_buffer, v_buffer, sems, *, cut: _Cut
):
    q, do, scale = q_ref[...], do_ref[...], q_ref.shape[1] ** -0.5
    dq_ref[...] = jnp.zeros_like(dq_ref)
    columns = stats_ref[...].T
    lse, delta = columns[:, _LSE : _LSE + 1], columns[:, _DELTA : _DELTA + 1]

    def step(k, v, seen):
        p = jnp.exp(tpu.dot(q, k, tpu.NT) * scale - lse)
        if seen is not None:
            p = jnp.where(seen, p, 0.0)
        ds = p * (tpu.dot(do, v, tpu.NT) - delta)
        dq_ref[...] += tpu.dot(ds.astype(k.dtype), k)

    limits = _at(limits_ref, cut, pl.program_id(0), pl.program_id(1))
    _each_tile(cut, limits, columns, (k_ref, v_ref), (k_buffer, v_buffer), sems, step)
    dq_ref[...] *= scale


def _gradient_of_keys_kernel(
    limits_ref, spans_ref, k_ref, v_ref, q_ref, do_ref, stats_ref, dk_ref, dv_ref,
    q_buffer, do_buffer, stats_buffer, sems, *, cut: _Cut,
):  # fmt: skip
    k, v, scale = k_ref[...], v_ref[...], k_ref.shape[1] ** -0.5
    head, j = pl.program_id(0), pl.program_id(1)
    dk_ref[...] = jnp.zeros_like(dk_ref)
    dv_ref[...] = jnp.zeros_like(dv_ref)
    begin = j * cut.keys
    position = (begin + lax.broadcasted_iota(jnp.int32, (cut.keys, 1), 0)).astype(jnp.float32)

    def step(q, do, stats, masked):
        start, stop, lse, delta = (stats[place : place + 1] for place in (_START, _STOP, _LSE, _DELTA))
        p = jnp.exp(tpu.dot(k, q, tpu.NT) * scale - lse)
        dp = tpu.dot(v, do, tpu.NT) - delta
        ds = p * dp
        if masked:
            seen = (position >= start) & (position < stop)
            p, ds = jnp.where(seen, p, 0.0), jnp.where(seen, ds, 0.0)
        dv_ref[...] += tpu.dot(p.astype(do.dtype), do)
        dk_ref[...] += tpu.dot(ds.astype(q.dtype), q)

    def body(i, tiles):
        _, all_from, all_to, _ = _at(limits_ref, cut, head, i)
        whole = (begin >= all_from) & (begin + cut.keys <= all_to)

        @pl.when(whole)
        def _():
            step(*(tile[...] for tile in tiles), False)

        @pl.when(jnp.logical_not(whole))
        def _():
            step(*(tile[...] for tile in tiles), True)

    def at(a, i):
        part = pl.ds(pl.multiple_of(i * cut.rows, LANES), cut.rows)
        return (head, slice(None), part) if a == 2 else (head, part)

    base = ((head // cut.kv_heads) * pl.num_programs(1) + j) * 2
    stream = _Stream((q_ref, do_ref, stats_ref), (q_buffer, do_buffer, stats_buffer), sems, at)
    stream.loop(spans_ref[base], spans_ref[base + 1], body)
    dk_ref[...] *= scale


def _backward(q, k, v, ranges, do, lse, delta, *, interpret):
    heads, count, head_dim = q.shape
    key_count = k.shape[1]
    cut, q, k, v, ends, limits = _prepare(q, k, v, ranges, _ROWS_BACKWARD, LANES, interpret)
    do, stats = _padded(do, cut.rows, 1), _stats(cut, ends, lse, delta)
    rows, stats_spec, whole = _specs(cut, head_dim, lambda n: n)
    tile = pltpu.VMEM((2, cut.keys, head_dim), k.dtype)
    (dq,) = _call(
        _gradient_of_q_kernel,
        cut,
        (heads, cut.tiles),
        [limits.reshape(-1)],
        [(rows, q), (rows, do), (stats_spec, stats), (whole, k), (whole, v)],
        [(rows, q.shape, jnp.float32)],
        [tile, tile, pltpu.SemaphoreType.DMA((2, 2))],
    )
    tiles = pl.cdiv(k.shape[1], cut.keys)
    keys = pl.BlockSpec((None, cut.keys, head_dim), lambda n, j, *_: (n, j, 0))
    tile = pltpu.VMEM((2, cut.rows, head_dim), q.dtype)
    dk, dv = _call(
        _gradient_of_keys_kernel,
        cut,
        (heads, tiles),
        [limits.reshape(-1), flash.spans(limits, cut.keys, tiles).reshape(-1)],
        [(keys, k), (keys, v), (whole, q), (whole, do), (whole, stats)],
        [(keys, k.shape, jnp.float32)] * 2,
        [tile, tile, pltpu.VMEM((2, _STATS, cut.rows), jnp.float32), pltpu.SemaphoreType.DMA((3, 2))],
    )
    return dq[:, :count], dk[:, :key_count], dv[:, :key_count]


@functools.cache
def _kernels(interpret: bool) -> flash.Kernels:
    return flash.Kernels(
        functools.partial(_forward, interpret=interpret), functools.partial(_backward, interpret=interpret)
    )


def unsupported(q, sources, *, own_block=None, block_size=None, tile_size=None) -> str | None:
    """Why the hardware cannot run `attention` on these arrays, or None."""
    return flash.unsupported(q, sources, own_block, LANES)


def attention(q, sources, *, own_block=None, block_size=None, tile_size=None, interpret=False):
    """`kernels.attention`, same arguments and results. `interpret` runs it on any backend, with any head dim."""
    return flash.attention(_kernels(interpret), q, sources, own_block=own_block, block_size=block_size)
