"""`kernels.attention` as Pallas Mosaic GPU kernels for Hopper: flash attention whose queries carry their own limits.

The plan of tpu.py in blocks of the GPU. One warpgroup fetches tiles, two others compute, each for its own 64
rows (or, in the gradient of keys, its own 64 keys) with the tiles that both need. Where there are few rows, as after a
cache, the keys they see are divided over blocks of the grid, whose results are combined like any parts (flash.py).

bfloat16 alone: the tensor core adds float32, but does not multiply it exactly.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from twotower_jax.kernels.attention import flash
from twotower_jax.kernels.attention.xla import MASKED
from twotower_jax.kernels.hardware import versions
from twotower_jax.kernels.hardware.hopper import interpreter, not_hopper

_LOG2E = math.log2(math.e)
# Rows, or keys, of a warpgroup; keys of a tile, forward and backward; blocks that keep a chip busy.
_TILE, _KEYS, _KEYS_BACKWARD, _BLOCKS = 64, 128, 64, 132
# Tiles under way at once; what the copy engine can cut; the greatest P.
_STAGES, _EIGHT, _WIDEST = 2, 8, 128
_ROW, _COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


class Sizes(NamedTuple):
    """What a warpgroup takes, how many blocks keep the chip busy, how few keys are XLA's; smaller in tests."""

    rows: int = _TILE
    keys: int = _KEYS
    keys_backward: int = _KEYS_BACKWARD
    blocks: int = _BLOCKS
    few: int = flash.FEW
    interpret: plgpu.InterpretGPUParams | None = None


class _WarpgroupTiles(NamedTuple):
    """One problem, cut.

    Attributes:
      rows: of a warpgroup. keys: of a tile. groups: warpgroups that compute, in a block of the grid.
      splits: blocks among which the tiles that one reads are divided.
      kv_heads: K. tiles: of groups · rows rows.
    """

    rows: int
    keys: int
    groups: int
    splits: int
    kv_heads: int
    tiles: int
    interpret: plgpu.InterpretGPUParams | None


def _padded(v, multiple, axis, mode="constant"):
    pad = [(0, 0)] * v.ndim
    pad[axis] = 0, -v.shape[axis] % multiple
    return jnp.pad(v, pad, mode=mode)


def _prepare(q, k, v, ranges: flash.Ranges, rows: int):
    """Padded arrays, the limits of rows (B, M), and of tiles of rows (B, tiles, 4)."""
    k, v = (_padded(x, _EIGHT, 1) for x in (k, v))
    q = _padded(q, rows, 1)
    start, stop = (_padded(x, rows, 1, "edge") for x in ranges)
    in_tiles = [x.reshape(x.shape[0], -1, rows) for x in (start, stop)]
    limits = jnp.stack([reduce(x, axis=-1) for x in in_tiles for reduce in (jnp.min, jnp.max)], axis=-1)
    return q, k, v, start, stop, limits


def _load(ref, layout):
    return plgpu.load(ref, layout=layout, optimized=False)


def _down(column, shape):
    return lax.broadcast_in_dim(column, shape, (0,))


def _along(row, shape):
    return lax.broadcast_in_dim(row, shape, (1,))


def _product(a, b):
    """(m, k) times (k, n), both in shared memory, float32."""

    def multiply(accumulator):
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _add_product(accumulator, a, b, space):
    """Adds (m, k) in registers times (k, n) in shared memory; `space` as of `_for_registers`."""
    if space is not None:
        space[...] = a
        plgpu.commit_smem()
        a = space
    plgpu.wgmma(accumulator, a, b)


def _product_of_registers(a, b, space):
    def multiply(accumulator):
        _add_product(accumulator, a, b, space)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _for_registers(cut: _WarpgroupTiles, rows: int, columns: int, dtype):
    """Shared memory for the interpreter, which multiplies no registers; None where the hardware does."""
    return None if cut.interpret is None else plgpu.SMEM((cut.groups, rows, columns), dtype)


def _part(first, last, splits: int):
    """The tiles from `first` to `last` of this block of the grid's."""
    size = lax.div(last - first + (splits - 1), jnp.int32(splits))
    begin = jnp.minimum(first + lax.axis_index("split") * size, last)
    return begin, jnp.minimum(begin + size, last)


def _call(kernel, cut: _WarpgroupTiles, grid, inputs, outputs, scratch):
    body = functools.partial(kernel, cut=cut)
    body.__name__ = f"attention{kernel.__name__.removesuffix('_kernel')}"
    return plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=cut.groups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=cut.interpret,
    )(*inputs)


def _pipeline(body, cut: _WarpgroupTiles, steps, specs, compute):
    return plgpu.emit_pipeline_warp_specialized(
        body,
        grid=(steps,),
        in_specs=specs,
        max_concurrent_steps=_STAGES,
        num_compute_wgs=cut.groups,
        memory_registers=40,
        wg_axis="wg",
        compute_context=compute,
    )


class _Rows:
    """The rows of this warpgroup, and which tiles of keys its block of the grid reads."""

    def __init__(self, cut: _WarpgroupTiles, limits_ref, start_ref, stop_ref):
        self.cut = cut
        self.head = lax.axis_index("head")
        self.batch = lax.div(self.head, jnp.int32(cut.kv_heads))
        # The rows that see most come first, where most of them are later in a sequence.
        tile = cut.tiles - 1 - lax.axis_index("tile")
        first, self.all_from, self.all_to, self.last = (limits_ref[self.batch, tile, place] for place in range(4))
        end = lax.div(self.last + (cut.keys - 1), jnp.int32(cut.keys))
        self.begin, self.end = _part(jnp.minimum(lax.div(first, jnp.int32(cut.keys)), end), end, cut.splits)
        self.here = pl.ds((tile * cut.groups + lax.axis_index("wg")) * cut.rows, cut.rows)
        self.start_ref, self.stop_ref = start_ref, stop_ref

    def place(self, step):
        """Where the tile of a step begins."""
        return (self.begin + step) * self.cut.keys

    def masked(self, s, step):
        """Scores (rows, keys) with −∞ where a row does not see the key."""
        place = self.place(step)

        def mask():
            position = place + lax.broadcasted_iota(jnp.int32, s.shape, 1)
            start = _load(self.start_ref.at[self.batch, self.here], _ROW)
            stop = _load(self.stop_ref.at[self.batch, self.here], _ROW)
            seen = (position >= _down(start, s.shape)) & (position < _down(stop, s.shape))
            return jnp.where(seen, s, -jnp.inf)

        whole = (place >= self.all_from) & (place + self.cut.keys <= self.all_to)
        return lax.cond(whole, lambda: s, mask)

    def specs(self, head_dim):
        """The specs of keys and of values. What a last tile has beyond the array arrives as zeros."""
        return [plgpu.BlockSpec((self.cut.keys, head_dim), lambda i: (self.begin + i, 0))] * 2


def _forward_kernel(
    q_ref,
    start_ref,
    stop_ref,
    limits_ref,
    k_ref,
    v_ref,
    out_ref,
    lse_ref,
    q_space,
    arrived,
    p_space,
    *,
    cut: _WarpgroupTiles,
):
    rows = _Rows(cut, limits_ref, start_ref, stop_ref)
    split, wg = lax.axis_index("split"), lax.axis_index("wg")
    p_space = None if p_space is None else p_space.at[wg]
    head_dim = q_ref.shape[2]
    scale = _LOG2E * head_dim**-0.5

    def compute(run):
        plgpu.copy_gmem_to_smem(q_ref.at[rows.head, rows.here], q_space.at[wg], arrived.at[wg])
        plgpu.barrier_wait(arrived.at[wg])
        top = plgpu.layout_cast(jnp.full((cut.rows,), MASKED, jnp.float32), _ROW)
        total = plgpu.layout_cast(jnp.zeros((cut.rows,), jnp.float32), _ROW)
        acc = plgpu.layout_cast(jnp.zeros((cut.rows, head_dim), jnp.float32), plgpu.Layout.WGMMA)
        top, total, acc = run((top, total, acc))
        some = jnp.where(total > 0, total, 1.0)
        out = acc / _down(some, acc.shape)
        lse = jnp.where(total > 0, (top + jnp.log2(some)) / _LOG2E, MASKED)
        versions.store(out_ref.at[rows.head, split, rows.here], out.astype(out_ref.dtype))
        versions.store(lse_ref.at[rows.head, split, rows.here], lse)

    def body(index, k, v, carry):
        (step,) = index
        top, total, acc = carry
        s = rows.masked(_product(q_space.at[wg], k.T) * scale, step)
        place = rows.place(step)

        # What no row sees may be NaN, which times 0 is NaN. Both warpgroups write, and the same.
        @pl.when(place + cut.keys > rows.last)
        def _():
            position = place + lax.broadcasted_iota(jnp.int32, v.shape, 0)
            v[...] = jnp.where(position < rows.last, v[...], jnp.zeros((), v.dtype))
            plgpu.commit_smem()

        new = jnp.maximum(top, jnp.max(s, axis=1))
        p = jnp.exp2(s - _down(new, s.shape))
        keep = jnp.exp2(top - new)
        acc = acc * _down(keep, acc.shape) + _product_of_registers(p.astype(v.dtype), v, p_space)
        return new, total * keep + jnp.sum(p, axis=1), acc

    pipeline = _pipeline(body, cut, rows.end - rows.begin, rows.specs(head_dim), compute)
    pipeline(k_ref.at[rows.head], v_ref.at[rows.head])


def _forward(q, k, v, ranges, dtype, *, sizes: Sizes):
    heads, count, head_dim = q.shape
    groups = 2 if count > sizes.rows else 1
    key_count = k.shape[1]
    q, k, v, start, stop, limits = _prepare(q, k, v, ranges, sizes.rows * groups)
    tiles = limits.shape[1]
    splits = max(1, min(sizes.blocks // (heads * tiles), -(-key_count // sizes.keys)))
    cut = _WarpgroupTiles(sizes.rows, sizes.keys, groups, splits, heads // start.shape[0], tiles, sizes.interpret)
    dtype = dtype if splits == 1 else jnp.float32
    out, lse = _call(
        _forward_kernel,
        cut,
        {"tile": tiles, "head": heads, "split": splits},
        (q, start, stop, limits, k, v),
        [
            jax.ShapeDtypeStruct((heads, splits, *q.shape[1:]), dtype),
            jax.ShapeDtypeStruct((heads, splits, q.shape[1]), jnp.float32),
        ],
        [
            plgpu.SMEM((groups, cut.rows, head_dim), q.dtype),
            plgpu.Barrier(num_barriers=groups),
            _for_registers(cut, cut.rows, cut.keys, q.dtype),
        ],
    )
    return flash.combine_stacked(out[:, :, :count], lse[:, :, :count])


def _gradient_of_q_kernel(
    q_ref, do_ref, lse_ref, delta_ref, start_ref, stop_ref, limits_ref, k_ref, v_ref, dq_ref,
    q_space, do_space, arrived, ds_space, *, cut: _WarpgroupTiles,
):  # fmt: skip
    rows = _Rows(cut, limits_ref, start_ref, stop_ref)
    wg = lax.axis_index("wg")
    ds_space = None if ds_space is None else ds_space.at[wg]
    head_dim = q_ref.shape[2]
    scale = head_dim**-0.5

    def compute(run):
        plgpu.copy_gmem_to_smem(q_ref.at[rows.head, rows.here], q_space.at[wg], arrived.at[wg])
        plgpu.copy_gmem_to_smem(do_ref.at[rows.head, rows.here], do_space.at[wg], arrived.at[wg])
        lse, delta = (_load(ref.at[rows.head, rows.here], _ROW) for ref in (lse_ref, delta_ref))
        plgpu.barrier_wait(arrived.at[wg])
        dq = plgpu.layout_cast(jnp.zeros((cut.rows, head_dim), jnp.float32), plgpu.Layout.WGMMA)
        _, _, dq = run((lse * _LOG2E, delta, dq))
        versions.store(dq_ref.at[rows.head, rows.here], dq * scale)

    def body(index, k, v, carry):
        lse, delta, dq = carry
        s = rows.masked(_product(q_space.at[wg], k.T) * (scale * _LOG2E), index[0])
        p = jnp.exp2(s - _down(lse, s.shape))
        ds = p * (_product(do_space.at[wg], v.T) - _down(delta, s.shape))
        return lse, delta, dq + _product_of_registers(ds.astype(k.dtype), k, ds_space)

    pipeline = _pipeline(body, cut, rows.end - rows.begin, rows.specs(head_dim), compute)
    pipeline(k_ref.at[rows.head], v_ref.at[rows.head])


def _gradient_of_keys_kernel(
    k_ref, v_ref, spans_ref, limits_ref, start_ref, stop_ref, q_ref, do_ref, lse_ref, delta_ref, dk_ref, dv_ref,
    k_space, v_space, arrived, p_space, *, cut: _WarpgroupTiles,
):  # fmt: skip
    head, split, wg, tile = (lax.axis_index(name) for name in ("head", "split", "wg", "tile"))
    batch = lax.div(head, jnp.int32(cut.kv_heads))
    begin, end = _part(spans_ref[batch, tile, 0], spans_ref[batch, tile, 1], cut.splits)
    p_space = None if p_space is None else p_space.at[wg]
    place = (tile * cut.groups + wg) * cut.keys
    here = pl.ds(place, cut.keys)
    head_dim = q_ref.shape[2]
    scale = head_dim**-0.5

    def compute(run):
        plgpu.copy_gmem_to_smem(k_ref.at[head, here], k_space.at[wg], arrived.at[wg])
        plgpu.copy_gmem_to_smem(v_ref.at[head, here], v_space.at[wg], arrived.at[wg])
        plgpu.barrier_wait(arrived.at[wg])

        def sums(dk_sum, dv_sum):
            # The references pass through the loop: what a tile adds stays in the tensor core's registers.
            run((dk_sum, dv_sum))
            return dk_sum[...], dv_sum[...]

        space = plgpu.ACC((cut.keys, head_dim), jnp.float32)
        dk, dv = pl.run_scoped(sums, space, space)
        versions.store(dk_ref.at[head, split, here], dk * scale)
        versions.store(dv_ref.at[head, split, here], dv)

    def body(index, q, do, lse, delta, carry):
        dk_sum, dv_sum = carry
        row = (begin + index[0]) * cut.rows
        s = _product(k_space.at[wg], q.T) * (scale * _LOG2E)

        def mask():
            rows = pl.ds(row, cut.rows)
            start, stop = (_along(_load(ref.at[batch, rows], _COLUMN), s.shape) for ref in (start_ref, stop_ref))
            position = place + lax.broadcasted_iota(jnp.int32, s.shape, 0)
            return jnp.where((position >= start) & (position < stop), s, -jnp.inf)

        all_from, all_to = (limits_ref[batch, begin + index[0], i] for i in (1, 2))
        s = lax.cond((place >= all_from) & (place + cut.keys <= all_to), lambda: s, mask)
        p = jnp.exp2(s - _along(plgpu.load(lse, layout=_COLUMN) * _LOG2E, s.shape))
        ds = p * (_product(v_space.at[wg], do.T) - _along(plgpu.load(delta, layout=_COLUMN), s.shape))
        _add_product(dv_sum, p.astype(q.dtype), do, p_space)
        _add_product(dk_sum, ds.astype(q.dtype), q, p_space)
        plgpu.wgmma_wait(0)
        return carry

    wide = plgpu.BlockSpec((cut.rows, head_dim), lambda i: (begin + i, 0))
    number = plgpu.BlockSpec((cut.rows,), lambda i: (begin + i,))
    pipeline = _pipeline(body, cut, end - begin, [wide, wide, number, number], compute)
    pipeline(*(ref.at[head] for ref in (q_ref, do_ref, lse_ref, delta_ref)))


def _backward(q, k, v, ranges, do, lse, delta, *, sizes: Sizes):
    heads, count, head_dim = q.shape
    key_count, groups, rows, keys = k.shape[1], 2, sizes.rows, sizes.keys_backward
    k, v = (_padded(x, groups * keys, 1) for x in (k, v))
    q, k, v, start, stop, limits = _prepare(q, k, v, ranges, rows * groups)
    do, lse, delta = (_padded(x, rows * groups, 1) for x in (do, lse, delta))
    cut = _WarpgroupTiles(rows, keys, groups, 1, heads // start.shape[0], limits.shape[1], sizes.interpret)
    (dq,) = _call(
        _gradient_of_q_kernel,
        cut,
        {"tile": cut.tiles, "head": heads, "split": 1},
        (q, do, lse, delta, start, stop, limits, k, v),
        [jax.ShapeDtypeStruct(q.shape, jnp.float32)],
        [
            *[plgpu.SMEM((groups, rows, head_dim), q.dtype)] * 2,
            plgpu.Barrier(num_arrivals=2, num_barriers=groups),
            _for_registers(cut, rows, keys, q.dtype),
        ],
    )
    # One warpgroup's rows at a time from here on.
    *_, limits = _prepare(q, k, v, flash.Ranges(start, stop), rows)
    tiles = k.shape[1] // (groups * keys)
    # Tiles differ in how many rows see them: several blocks per multiprocessor even that out.
    splits = max(1, min(8 * sizes.blocks // (heads * tiles), limits.shape[1] // 2))
    cut = cut._replace(splits=splits, tiles=tiles)
    dk, dv = _call(
        _gradient_of_keys_kernel,
        cut,
        {"tile": tiles, "split": splits, "head": heads},
        (k, v, flash.spans(limits, groups * keys, tiles), limits, start, stop, q, do, lse, delta),
        [jax.ShapeDtypeStruct((heads, splits, *k.shape[1:]), jnp.float32)] * 2,
        [
            *[plgpu.SMEM((groups, keys, head_dim), k.dtype)] * 2,
            plgpu.Barrier(num_arrivals=2, num_barriers=groups),
            _for_registers(cut, keys, rows, q.dtype),
        ],
    )
    return dq[:, :count], *(jnp.sum(x, axis=1)[:, :key_count] for x in (dk, dv))


@functools.cache
def _kernels(sizes: Sizes) -> flash.Kernels:
    forward, backward = (functools.partial(function, sizes=sizes) for function in (_forward, _backward))
    return flash.Kernels(forward, backward, sizes.few, sizes.interpret is not None)


def unsupported(q, sources, *, own_block=None, block_size=None, tile_size=None) -> str | None:
    """Why the hardware cannot run `attention` on these arrays, or None."""
    if problem := not_hopper():
        return problem
    if q.dtype != jnp.bfloat16:
        return f"queries are {q.dtype}: the tensor core multiplies bfloat16"
    if q.shape[3] > _WIDEST:
        return f"the head dim {q.shape[3]} is more than {_WIDEST}: its tiles do not fit into shared memory"
    return flash.unsupported(q, sources, own_block, 64)


def attention(q, sources, *, own_block=None, block_size=None, tile_size=None, sizes=None, interpret=False):
    """`kernels.attention`, same arguments and results. `interpret` runs it on any backend, with any head dim."""
    sizes = sizes or Sizes()
    if interpret:
        sizes = sizes._replace(interpret=interpreter(interpret))
    return flash.attention(_kernels(sizes), q, sources, own_block=own_block, block_size=block_size)
