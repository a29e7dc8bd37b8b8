"""`kernels.attention` as Pallas TPU kernels: flash attention whose queries carry their own limits.

A grid step takes a tile of rows (tpu_layout.py) and goes through the tiles of keys that some row of it sees,
of one source after the other, fetching the next while it works on one; in the gradient of keys, the other way round.
Only tiles that not all rows see whole are masked. What no row of a tile sees is neither read nor computed: the right
half of a causal matrix, other documents, a cache behind its length. Keys of the rows' own positions (their block; the
tokens just read) come along with the rows as one more tile.

All sources pass through one softmax. Nothing of the forward pass is kept but its output o and lse, the logarithm of the
weights' sum (Dao et al. 2022, arXiv 2205.14135):

    p = exp(s − lse)    δ = Σ do ∘ o    dv = pᵀ do    ds = p ∘ (do vᵀ − δ)    dq = ds k / √P    dk = dsᵀ q / √P
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from twotower_jax.kernels.attention import Keys, flash
from twotower_jax.kernels.attention import tpu_layout as layout
from twotower_jax.kernels.attention.tpu_layout import DELTA, LSE, Cut, KeysOfRows, Stream
from twotower_jax.kernels.attention.xla import MASKED, reachable
from twotower_jax.kernels.hardware import tpu
from twotower_jax.kernels.hardware.tpu_layout import LANES, SUBLANES, VMEM_BYTES

_IN_PLACE = pl.BlockSpec(memory_space=pl.ANY)
# Positions, at most, that a block of own keys may need in one tile.
_LONGEST = 1024


class _Static(NamedTuple):
    """What does not vary: S, or 1 without own blocks, and how kernels run."""

    block: int
    interpret: bool


def _row(column):
    """(g·l, 1) → (1, g·l)."""
    return jnp.broadcast_to(column, (column.shape[0], SUBLANES)).T[:1]


def _forward_kernel(
    limits_ref, q_ref, stats_ref, own_refs, source_refs, out_ref, lse_ref, buffers, top_ref, sum_ref, acc_ref, *, cut
):
    keys = KeysOfRows(cut, limits_ref, stats_ref[...], source_refs, buffers)
    q, scale = cut.to_rows(q_ref[...]), cut.head_dim**-0.5
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

    if own_refs:
        step(*(ref[...] for ref in own_refs), keys.seen_of_own())
    keys.each(step)
    total = sum_ref[...]
    some = jnp.where(total > 0, total, 1.0)
    out_ref[...] = cut.from_rows(acc_ref[...] / some).astype(out_ref.dtype)
    lse_ref[...] = _row(jnp.where(total > 0, top_ref[...] + jnp.log(some), MASKED))


def _gradient_of_q_kernel(
    limits_ref, q_ref, do_ref, out_ref, stats_ref, lse_ref, own_refs, source_refs, dq_ref, whole_stats_ref, down_refs,
    buffers, acc_ref, sums, *, cut,
):  # fmt: skip
    q, do, out = (cut.to_rows(ref[...]) for ref in (q_ref, do_ref, out_ref))
    scale = cut.head_dim**-0.5
    delta = jnp.sum(do.astype(jnp.float32) * out.astype(jnp.float32), axis=1, keepdims=True)
    # The gradient of keys needs them too.
    places = whole_stats_ref.shape[0]
    whole_stats_ref[...] = stats_ref[...]
    whole_stats_ref[places + LSE : places + LSE + 1] = lse_ref[...]
    whole_stats_ref[places + DELTA : places + DELTA + 1] = _row(delta)
    keys = KeysOfRows(cut, limits_ref, whole_stats_ref[...], source_refs, buffers)
    lse = keys.columns[:, places + LSE : places + LSE + 1]
    acc_ref[...] = jnp.zeros_like(acc_ref)

    def step(k, v, seen):
        p = jnp.exp(tpu.dot(q, k, tpu.NT) * scale - lse)
        if seen is not None:
            p = jnp.where(seen, p, 0.0)
        ds = (p * (tpu.dot(do, v, tpu.NT) - delta)).astype(k.dtype)
        acc_ref[...] += tpu.dot(ds, k)
        return p.astype(do.dtype), ds

    if own_refs:
        group = pl.program_id(3)

        @pl.when(group == 0)
        def _():
            for ref in sums:
                ref[...] = jnp.zeros_like(ref)

        p, ds = step(*(ref[...] for ref in own_refs), keys.seen_of_own())
        dk_sum, dv_sum = sums
        dk_sum[...] += tpu.dot(ds, q, tpu.TN)
        dv_sum[...] += tpu.dot(p, do, tpu.TN)

        @pl.when(group == cut.groups - 1)
        def _():
            dk_ref, dv_ref = down_refs
            dk_ref[...] = (dk_sum[...] * scale).astype(dk_ref.dtype)
            dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)

    keys.each(step)
    dq_ref[...] = (cut.from_rows(acc_ref[...]) * scale).astype(dq_ref.dtype)


def _gradient_of_keys_kernel(
    limits_ref, spans_ref, k_ref, v_ref, q_ref, do_ref, stats_ref, dk_ref, dv_ref, buffers, dk_sum, dv_sum,
    *, cut, source,
):  # fmt: skip
    k, v, scale = k_ref[...], v_ref[...], cut.head_dim**-0.5
    b, kv, j = (pl.program_id(axis) for axis in range(3))
    dk_sum[...] = jnp.zeros_like(dk_sum)
    dv_sum[...] = jnp.zeros_like(dv_sum)
    count, begin = cut.sources[source].keys, j * cut.sources[source].keys
    position = (begin + lax.broadcasted_iota(jnp.int32, (count, 1), 0)).astype(jnp.float32)

    def step(q, do, stats, masked):
        q, do = cut.to_rows(q), cut.to_rows(do)
        places = 2 * source, 2 * source + 1, len(stats) + LSE, len(stats) + DELTA
        start, stop, lse, delta = (stats[place : place + 1] for place in places)
        p = jnp.exp(tpu.dot(k, q, tpu.NT) * scale - lse)
        ds = p * (tpu.dot(v, do, tpu.NT) - delta)
        if masked:
            seen = (position >= start) & (position < stop)
            p, ds = jnp.where(seen, p, 0.0), jnp.where(seen, ds, 0.0)
        dv_sum[...] += tpu.dot(p.astype(do.dtype), do)
        dk_sum[...] += tpu.dot(ds.astype(q.dtype), q)

    def body(index, tiles):
        _, all_from, all_to, _ = cut.limits(limits_ref, source, b, lax.div(index, cut.groups))
        whole = (begin >= all_from) & (begin + count <= all_to)

        @pl.when(whole)
        def _():
            step(*(tile[...] for tile in tiles), False)

        @pl.when(jnp.logical_not(whole))
        def _():
            step(*(tile[...] for tile in tiles), True)

    def at(a, index):
        tile, group = lax.div(index, cut.groups), kv * cut.groups + lax.rem(index, cut.groups)
        if a == 2:
            return b, group, tile
        lanes = pl.ds(pl.multiple_of(group * cut.width, cut.width), cut.width)
        return b, pl.ds(pl.multiple_of(tile * cut.positions, cut.positions), cut.positions), lanes

    base = (b * pl.num_programs(2) + j) * 2
    first, last = spans_ref[base] * cut.groups, spans_ref[base + 1] * cut.groups
    Stream((q_ref, do_ref, stats_ref), buffers, at, first, last).each(body)
    dk_ref[...] = (dk_sum[...] * scale).astype(dk_ref.dtype)
    dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)


class _Specs:
    """Of arrays for a grid of (B, K, tiles, groups)."""

    def __init__(self, cut: Cut, arrays: layout.Arrays):
        positions, rows, groups, places = cut.positions, cut.rows, cut.groups, arrays.stats.shape[2]

        def of_tile(count):
            shape = (None, None, None, count, rows)
            return pl.BlockSpec(shape, lambda b, kv, i, g, *_: (b, kv * groups + g, i, 0, 0))

        self.grid = cut.batch, cut.kv_heads, cut.tiles, groups
        self.queries = pl.BlockSpec((None, positions, cut.width), lambda b, kv, i, g, *_: (b, i, kv * groups + g))
        self.stats = pl.BlockSpec((None, None, places, rows), lambda b, kv, i, g, *_: (b, i, 0, 0))
        self.number, self.whole_stats = of_tile(1), of_tile(places)
        own = pl.BlockSpec((None, cut.own, cut.head_dim), lambda b, kv, i, g, *_: (b, i, kv))
        self.own = tuple(own for _ in arrays.own)
        self.sources = tuple((_IN_PLACE, _IN_PLACE) for _ in cut.sources)
        dtype = arrays.sources[0][0].dtype
        self.buffers = tuple(_buffers([((source.keys, cut.head_dim), dtype)] * 2) for source in cut.sources)


def _buffers(tiles):
    """For a `Stream` of tiles of these shapes and dtypes."""
    spaces = (pltpu.VMEM((2, *shape), dtype) for shape, dtype in tiles)
    return (*spaces, pltpu.SemaphoreType.DMA((len(tiles), 2)))


def _call(kernel, static: _Static, grid, prefetched, inputs, outputs, scratch):
    """Runs a kernel on (spec, array) inputs, to (spec, array like it) outputs; each may be a tree of them."""
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=grid,
            in_specs=[spec for spec, _ in inputs],
            out_specs=[spec for spec, _ in outputs],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), like) for _, like in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(*["parallel"] * (len(grid) - 1), "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=static.interpret,
    )(*prefetched, *(array for _, array in inputs))


def _flat(v, cut: Cut):
    """(B, L, H, P) → (B, M, H·P)."""
    return layout.padded(v.reshape(*v.shape[:2], -1), cut.positions, 1)


def _numbers(cut: Cut, count: int):
    """`count` of each row, as tiles have them."""
    shape = (cut.batch, cut.kv_heads * cut.groups, cut.tiles, count, cut.rows)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _forward(static: _Static, q, sources, own):
    """The output, and lse (B, H, M)."""
    cut, arrays = layout.prepare(q, sources, own, static.block, layout.ROWS)
    specs, flat = _Specs(cut, arrays), _flat(q, cut)
    column = pltpu.VMEM((cut.rows, 1), jnp.float32)
    out, lse = _call(
        functools.partial(_forward_kernel, cut=cut),
        static,
        specs.grid,
        [arrays.limits.reshape(-1)],
        [(specs.queries, flat), (specs.stats, arrays.stats), (specs.own, arrays.own), (specs.sources, arrays.sources)],
        [(specs.queries, flat), (specs.number, _numbers(cut, 1))],
        [specs.buffers, column, column, pltpu.VMEM((cut.rows, cut.head_dim), jnp.float32)],
    )
    return out[:, : q.shape[1]].reshape(q.shape), cut.by_head(lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, q, sources, own):
    return _forward(static, q, sources, own)[0]


def _forward_rule(static, q, sources, own):
    out, lse = _forward(static, q, sources, own)
    return out, (q, sources, own, out, lse)


def _backward_rule(static, residuals, do):
    q, sources, own, out, lse = residuals
    cut, arrays = layout.prepare(q, sources, own, static.block, layout.ROWS_BACKWARD)
    specs, limits, places = _Specs(cut, arrays), arrays.limits.reshape(-1), arrays.stats.shape[2]
    flat_q, flat_do, flat_out = (_flat(v, cut) for v in (q, do, out))
    sums = [pltpu.VMEM((cut.own, cut.head_dim), jnp.float32) for _ in arrays.own]
    dq, stats, down = _call(
        functools.partial(_gradient_of_q_kernel, cut=cut),
        static,
        specs.grid,
        [limits],
        [
            *((specs.queries, v) for v in (flat_q, flat_do, flat_out)),
            (specs.stats, arrays.stats),
            (specs.number, cut.by_tile(lse)),
            (specs.own, arrays.own),
            (specs.sources, arrays.sources),
        ],
        [(specs.queries, flat_q), (specs.whole_stats, _numbers(cut, places)), (specs.own, arrays.own)],
        [specs.buffers, pltpu.VMEM((cut.rows, cut.head_dim), jnp.float32), sums],
    )
    rows = ((cut.positions, cut.width), q.dtype)
    gradients = []
    for s, (source, pair) in enumerate(zip(cut.sources, arrays.sources, strict=True)):
        tiles, spec = pl.cdiv(source.count, source.keys), source.spec(cut.head_dim)
        found = _call(
            functools.partial(_gradient_of_keys_kernel, cut=cut, source=s),
            static,
            (cut.batch, cut.kv_heads, tiles),
            [limits, flash.spans(arrays.limits[s], source.keys, tiles).reshape(-1)],
            [*((spec, v) for v in pair), *((_IN_PLACE, v) for v in (flat_q, flat_do, stats))],
            [(spec, v) for v in pair],
            [
                _buffers([rows, rows, ((places, cut.rows), jnp.float32)]),
                *[pltpu.VMEM((source.keys, cut.head_dim), jnp.float32)] * 2,
            ],
        )
        gradients.append(_as_it_came(sources[s], found, source.side_by_side))
    dq = dq[:, : q.shape[1]].reshape(q.shape)
    return dq, tuple(gradients), None if own is None else _as_it_came(own, down, True)


def _as_it_came(source: Keys, found, side_by_side: bool) -> Keys:
    """The gradients of a source's arrays, (B, K, T, P)."""
    kv_heads, count = source.key.shape[1:3]
    if side_by_side:
        found = (jnp.swapaxes(v.reshape(*v.shape[:2], kv_heads, -1), 1, 2) for v in found)
    return Keys(*(v[:, :, :count] for v in found), stop=None)


_attend.defvjp(_forward_rule, _backward_rule, optimize_remat=True)


def unsupported(q, sources, *, own_block=None, block_size=None, tile_size=None) -> str | None:
    """Why the hardware cannot run `attention` on these arrays, or None."""
    if own_block and min(q.shape[1], unit := layout.unit_of(block_size)) > _LONGEST:
        return f"blocks of {block_size} make tiles of {unit} positions, more than {_LONGEST}"
    return flash.unsupported(q, sources, own_block, LANES)


def attention(q, sources, *, own_block=None, block_size=None, tile_size=None, interpret=False):
    """`kernels.attention`, same arguments and results. `interpret` runs it on any backend, with any head dim."""
    length, own = q.shape[1], None
    if own_block is not None:
        edge = (jnp.arange(length) // block_size * block_size)[None]
        own = Keys(*own_block, edge + block_size, edge)
    elif len(sources) > 1 and sources[-1].key.shape[2] == length <= layout.POSITIONS:
        *sources, last = sources
        own = last._replace(key=reachable(last.key, last.stop), value=reachable(last.value, last.stop))
    return _attend(_Static(block_size if own_block else 1, interpret), q, tuple(sources), own)
