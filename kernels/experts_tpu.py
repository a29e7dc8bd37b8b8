"""Expert products of few rows as one Pallas TPU kernel: each touched expert is read once, and nothing else is.

At 16 to 1,024 rows the time is that of reading the weights of the experts that some row chose. The grid goes over those
experts (a list, prefetched) and tiles of their width F. All rows lie in on-chip memory from the first step to the last:
the rows of an expert are picked from there when it begins and, multiplied by its up tile, the activation and its down
tile, added with their gates to their tokens' sums when it ends. Nothing that is F wide leaves the chip.

Quantized weights are read as they are stored and taken apart here, a tile at a time, to the dtype of the rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from twotower_jax.kernels import experts_ragged
from twotower_jax.kernels.experts import Activation, Weights
from twotower_jax.kernels.experts_touched import touched_experts, with_gradient
from twotower_jax.kernels.quantized import Quantized
from twotower_jax.kernels.tpu_layout import LANES, SUBLANES

MOST_ROWS = 1024
_ROW_TILE = 64
_TILES = (512, 256, 128)
# Of 128 MiB a core on v5p and v6e, 64 on tpu7x.
_VMEM_BYTES = 60 * 2**20
_ROW_ARRAYS = 4  # Of float32: the rows, one expert's rows, its results, and the sums.


class _Cut(NamedTuple):
    """One problem, cut: T tokens rounded up to tiles of `rows`, D, F, and tiles of `tile` along F."""

    tokens: int
    rows: int
    model: int
    width: int
    tile: int
    activation: Activation
    dtype: jnp.dtype

    @property
    def tiles(self) -> int:
        return -(-self.width // self.tile)


def _widths(part: jax.Array | Quantized, rows: int) -> list[int]:
    """Sublanes of the blocks of `rows` rows of a matrix: of its values, and of its scales."""
    if isinstance(part, Quantized):
        return [rows * part.bits // 8, rows // part.group]
    return [rows]


def _bytes(weights: Weights, model: int, tile: int) -> int:
    """On-chip memory of one tile of both matrices, twice over, and of their dequantized forms."""
    total = 0
    for part in weights.up, weights.down:
        if isinstance(part, Quantized):
            total += 2 * model * tile * part.bits // 8 + 2 * 4 * model * tile // part.group + 2 * model * tile
            total += 4 * model * tile  # What the compiler keeps while it takes them apart.
        else:
            total += 2 * model * tile * part.dtype.itemsize
    return total


def _tile(x, weights: Weights) -> int | None:
    """The widest tile of F that fits: a multiple of 128, of 8 groups of down, or all of F."""
    width, model = weights.down.shape[-2], x.shape[1]
    rows = _ROW_ARRAYS * 4 * (x.shape[0] + _ROW_TILE) * model
    unit = weights.down.group * SUBLANES if isinstance(weights.down, Quantized) else LANES
    for tile in [width] * (width < _TILES[0]) + [tile for tile in _TILES if tile < width and tile % unit == 0]:
        if rows + _bytes(weights, model, tile) <= _VMEM_BYTES:
            return tile
    return None


def unsupported(x, indices, gates, weights: Weights, *, activation: Activation) -> str | None:
    """Why the hardware cannot run these arguments, or why others are better for them; None if neither."""
    if weights.up_bias is not None or weights.down_bias is not None:
        return "the experts have biases"
    if x.shape[0] > MOST_ROWS:
        return f"{x.shape[0]} rows are more than {MOST_ROWS}"
    if x.shape[1] % LANES:
        return f"rows of {x.shape[1]} numbers are not whole multiples of {LANES}"
    for name in "up", "down":
        part = getattr(weights, name)
        if isinstance(part, Quantized) and (part.group * part.bits // 8) % 32:
            return f"groups of {part.group} rows of {part.bits} bits in {name} are no multiple of 32 bytes"
    if _tile(x, weights) is None:
        return f"{x.shape[0]} rows of {x.shape[1]} numbers and a tile of the weights exceed {_VMEM_BYTES >> 20} MiB"
    return None


def _matrix(refs, scratch, rows: int, columns: int, dtype):
    """The first rows and columns of a block of weights, in `dtype`; refs: [array], or [values, scales]."""
    if len(refs) == 1:
        return refs[0][:rows, :columns].astype(dtype)
    values_ref, scales_ref = refs
    groups = scales_ref.shape[0]
    group = scratch.shape[0] // groups
    packed = values_ref.shape[0] // groups

    def body(g, _):
        values = values_ref[pl.ds(pl.multiple_of(g * packed, packed), packed), :].astype(jnp.int32)
        scale = scales_ref[pl.ds(g, 1), :].astype(jnp.float32)
        start = pl.multiple_of(g * group, group)
        pieces = [values] if packed == group else [(values << 28) >> 28, values >> 4]
        for i, piece in enumerate(pieces):
            scaled = (piece.astype(jnp.float32) * scale).astype(dtype)
            scratch[pl.ds(pl.multiple_of(start + i * packed, packed), packed), :] = scaled

    jax.lax.fori_loop(0, rows // group, body, None)
    return scratch[:rows, :columns]


def _kernel(expert, first, count, used, token, gate, *refs, cut: _Cut, parts: tuple[int, int]):
    del expert  # For the blocks alone.
    x_hbm, refs = refs[0], refs[1:]
    up_refs, down_refs, (out_hbm, *scratch) = refs[: parts[0]], refs[parts[0] : sum(parts)], refs[sum(parts) :]
    x_ref, sums_ref, rows_ref, results_ref, *dequantized = scratch
    up_scratch = dequantized.pop(0) if parts[0] == 2 else None
    down_scratch = dequantized.pop(0) if parts[1] == 2 else None
    slot, f = pl.program_id(0), pl.program_id(1)
    start, rows = first[slot], count[slot]

    @pl.when((slot == 0) & (f == 0))
    def _():
        pltpu.sync_copy(x_hbm, x_ref)
        sums_ref[...] = jnp.zeros_like(sums_ref)

    def multiply(width):
        precision = jax.lax.Precision.HIGHEST if cut.dtype == jnp.float32 else None
        product = functools.partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)
        up = _matrix(up_refs, up_scratch, cut.model, width, cut.dtype)
        down = _matrix(down_refs, down_scratch, width, cut.model, cut.dtype)

        def body(i, _):
            here = pl.ds(pl.multiple_of(i * cut.rows, cut.rows), cut.rows)
            hidden = product(rows_ref[here, :].astype(cut.dtype), up)
            # Rounded before and after the activation, as where the products are single operations.
            hidden = cut.activation(hidden.astype(cut.dtype).astype(jnp.float32)).astype(cut.dtype)
            results_ref[here, :] += product(hidden, down)

        jax.lax.fori_loop(0, pl.cdiv(rows, cut.rows), body, None)

    @pl.when(slot < used[0])
    def _():
        @pl.when(f == 0)
        def _():
            def gather(j, _):
                rows_ref[pl.ds(j, 1), :] = x_ref[pl.ds(token[start + j], 1), :]

            jax.lax.fori_loop(0, rows, gather, None)

            def clear(i, _):
                here = pl.ds(pl.multiple_of(i * cut.rows, cut.rows), cut.rows)
                results_ref[here, :] = jnp.zeros((cut.rows, cut.model), jnp.float32)

            jax.lax.fori_loop(0, pl.cdiv(rows, cut.rows), clear, None)

        rest = cut.width - (cut.tiles - 1) * cut.tile
        if rest == cut.tile:
            multiply(cut.tile)
        else:  # Of the last tile's block only the part inside the matrix means anything.
            pl.when(f < cut.tiles - 1)(functools.partial(multiply, cut.tile))
            pl.when(f == cut.tiles - 1)(functools.partial(multiply, rest))

        @pl.when(f == cut.tiles - 1)
        def _():
            def scatter(j, _):
                here = pl.ds(token[start + j], 1)
                result = results_ref[pl.ds(j, 1), :].astype(cut.dtype).astype(jnp.float32)
                sums_ref[here, :] += gate[start + j] * result

            jax.lax.fori_loop(0, rows, scatter, None)

    @pl.when((slot == pl.num_programs(0) - 1) & (f == cut.tiles - 1))
    def _():
        pltpu.sync_copy(sums_ref, out_hbm)


def _specs(cut: _Cut, weights: Weights) -> list[pl.BlockSpec]:
    """Blocks of up, then down: the expert's and the tile's; an unused slot asks for what is there already."""

    def tile_of(slot, f, used):
        return jnp.where(slot < used[0], f, cut.tiles - 1)

    def up(slot, f, expert, first, count, used, token, gate):
        return expert[slot], 0, tile_of(slot, f, used)

    def down(slot, f, expert, first, count, used, token, gate):
        return expert[slot], tile_of(slot, f, used), 0

    specs = [pl.BlockSpec((None, rows, cut.tile), up) for rows in _widths(weights.up, cut.model)]
    return specs + [pl.BlockSpec((None, rows, cut.model), down) for rows in _widths(weights.down, cut.tile)]


def _forward(activation: Activation, interpret: bool, x, indices, gates, weights: Weights) -> jax.Array:
    tokens, model = x.shape
    touched = touched_experts(indices, weights.up.shape[0])
    choices = gates.shape[1]
    tile = _tile(x, weights)
    padded = tokens + -tokens % SUBLANES
    cut = _Cut(padded, _ROW_TILE, model, weights.down.shape[-2], tile, activation, x.dtype)
    quantized = [isinstance(part, Quantized) for part in (weights.up, weights.down)]
    # Rows of an expert are moved one at a time, which float32 allows.
    row_arrays = (padded + -padded % _ROW_TILE, model)
    scratch = [
        pltpu.VMEM((padded, model), jnp.float32),
        pltpu.VMEM((padded, model), jnp.float32),
        pltpu.VMEM(row_arrays, jnp.float32),
        pltpu.VMEM(row_arrays, jnp.float32),
    ]
    scratch += [pltpu.VMEM((model, tile), x.dtype)] * quantized[0] + [pltpu.VMEM((tile, model), x.dtype)] * quantized[1]
    arrays = [v for part in (weights.up, weights.down) for v in jax.tree.leaves(part)]
    call = pl.pallas_call(
        functools.partial(_kernel, cut=cut, parts=(1 + quantized[0], 1 + quantized[1])),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(touched.expert.size, cut.tiles),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY), *_specs(cut, weights)],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct((padded, model), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=interpret,
    )
    gate = gates.astype(jnp.float32).reshape(-1)[touched.order]
    rows = jnp.pad(x.astype(jnp.float32), [(0, padded - tokens), (0, 0)])
    out = call(
        touched.expert,
        touched.first,
        touched.count,
        touched.used.reshape(1),
        touched.order // choices,
        gate,
        rows,
        *arrays,
    )
    return out[:tokens].astype(x.dtype)


def _again(activation, interpret, x, indices, gates, weights):
    return experts_ragged.expert_mlp(x, indices, gates, weights, activation=activation)


_expert_mlp = with_gradient(_forward, _again)


def expert_mlp(
    x: jax.Array,
    indices: jax.Array,
    gates: jax.Array,
    weights: Weights,
    *,
    activation: Activation,
    interpret: bool = False,
) -> jax.Array:
    """See `experts.expert_mlp`; few rows, no biases."""
    return _expert_mlp(activation, interpret, x, indices, gates, weights)
