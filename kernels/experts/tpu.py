"""Expert products of few rows as one Pallas TPU kernel: each touched expert is read once, and nothing else is.

At 16 to 1,024 rows the time is that of reading the weights of the experts that some row chose. The grid goes over those
experts (a list, prefetched) and tiles of their width F. All rows lie in on-chip memory from the first step to the last:
the rows of an expert are picked from there when it begins and, multiplied by its up tile, the activation and its down
tile, added with their gates to their tokens' sums when it ends. Nothing that is F wide leaves the chip.

    touched expert e, tile of F      slot, f              the step of the grid
    x_t                              x_ref                (T, D), of all tokens
    x_t with e(t,k) = e              rows_ref             (rows, D), gathered; `token` says whose
    up_e, down_e                     up, down             `_Block`: (D, tile) and (tile, D) of the expert
    act(up_eᵀ x_t)                   hidden               (64, tile), of 64 rows
    down_eᵀ hidden, over tiles       results_ref          (rows, D)
    Σ_k gate_tk · results            sums_ref             (T, D), scattered

Quantized weights are read as they are stored and taken apart here, a tile at a time, to the dtype of the rows. They are
to be stored as `stored` makes them: TPUs lay other shapes out in ways that no kernel can read.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from twotower_jax.kernels.experts import Activation, Weights
from twotower_jax.kernels.experts import ragged_dot as experts_ragged
from twotower_jax.kernels.experts.touched import touched_experts, with_gradient
from twotower_jax.kernels.hardware.tpu import NN, NT
from twotower_jax.kernels.hardware.tpu_layout import LANES, SUBLANES
from twotower_jax.kernels.numerics.quantized import Quantized, padded

MOST_ROWS = 1024
_ROW_TILE = 64
_WIDEST_TILE = 512
# Of 128 MiB a core on v5p and v6e, 64 on tpu7x.
_VMEM_BYTES, _RESERVE = 60 * 2**20, 8 * 2**20  # Reserved for what is multiplied at once.
_ROW_ARRAYS = 4  # Of float32: the rows, one expert's rows, its results, and the sums.


# Rows of a tile of bfloat16 in memory, of float32 half as many: what the rows of scales are a multiple of.
_SCALE_ROWS = 2 * SUBLANES


def stored(matrix: Quantized, width_axis: int) -> Quantized:
    """A matrix of quantized experts as the kernel reads it without a copy: wider, the rest being zeros.

    act(0) · 0 is 0: nothing changes in the result.

    Args:
      matrix: stands for (…, D, F) or (…, F, D).
      width_axis: that of F, −1 or −2.

    Returns:
      with F a multiple of 128 and as many rows of scales as whole tiles of memory hold; the matrix as it is where
      its groups do not allow that.
    """
    more = -matrix.shape[width_axis] % LANES
    if width_axis == -1:
        return padded(matrix, columns=more, scale_rows=_SCALE_ROWS)
    return matrix if more % matrix.group else padded(matrix, rows=more, scale_rows=_SCALE_ROWS)


class _Cut(NamedTuple):
    """One problem, cut.

    Attributes:
      tokens: T, rounded up. rows: that are multiplied at once. model: D. width: F. tile: of F.
      flipped: up comes as (E, F, D).
    """

    tokens: int
    rows: int
    model: int
    width: int
    tile: int
    activation: Activation
    dtype: jnp.dtype
    flipped: bool

    @property
    def tiles(self) -> int:
        return -(-self.width // self.tile)


def _bytes(weights: Weights, model: int, tile: int) -> int:
    """On-chip memory of one tile of both matrices, twice over, and of their dequantized forms."""
    total = 0
    for part in weights.up, weights.down:
        if isinstance(part, Quantized):
            columns = tile if part is weights.up else model
            scales = part.scales.shape[1] * columns
            total += 2 * model * tile * part.bits // 8 + (2 * part.scales.dtype.itemsize + 4) * scales
            total += 2 * model * tile + 4 * columns * part.group
        else:
            total += 2 * model * tile * part.dtype.itemsize
    return total


def _is_flipped(up: jax.Array | Quantized) -> bool:
    """Whether up is read as (E, F, D): so it lies in memory if F is no multiple of 128, to which TPUs would pad it."""
    return not isinstance(up, Quantized) and up.shape[2] % LANES != 0


def _tile(x, weights: Weights) -> int | None:
    """The tile of F: one that divides it, if not much smaller than the widest that fits."""
    width, model = weights.down.shape[1:]
    rows = _ROW_ARRAYS * 4 * (x.shape[0] + _ROW_TILE) * model
    unit = 2 * SUBLANES if _is_flipped(weights.up) else LANES
    if isinstance(weights.down, Quantized):
        unit = math.lcm(unit, weights.down.group)
    tiles = [tile for tile in range(unit, _WIDEST_TILE + 1, unit) if tile < width] + [width] * (width <= _WIDEST_TILE)
    even = [tile for tile in tiles if width % tile == 0 and 2 * tile >= _WIDEST_TILE]
    for tile in [*reversed(even), *reversed(tiles)]:
        if rows + _bytes(weights, model, tile) <= _VMEM_BYTES - _RESERVE:
            return tile
    return None


def unsupported(x, indices, gates, weights: Weights, *, activation: Activation) -> str | None:
    """Why the hardware cannot run these arguments, or why others are better for them; None if neither."""
    if weights.up_bias is not None or weights.down_bias is not None:
        return "the experts have biases"
    if x.shape[0] > MOST_ROWS:
        return f"{x.shape[0]} rows are more than {MOST_ROWS}"
    if isinstance(weights.up, Quantized) and weights.up.shape[2] % LANES:
        return (
            f"quantized experts {weights.up.shape[2]} wide, no multiple of {LANES}, would be copied in each call: "
            "store them as experts.tpu.stored makes them"
        )
    if x.shape[1] % LANES:
        return f"rows of {x.shape[1]} numbers are not whole multiples of {LANES}"
    for name in "up", "down":
        part = getattr(weights, name)
        if isinstance(part, Quantized) and (part.group * part.bits // 8) % 32:
            return f"groups of {part.group} rows of {part.bits} bits in {name} are no multiple of 32 bytes"
    if _tile(x, weights) is None:
        return f"{x.shape[0]} rows of {x.shape[1]} numbers and a tile of the weights exceed {_VMEM_BYTES >> 20} MiB"
    return None


class _Block(NamedTuple):
    """A block of one expert's weights in on-chip memory.

    Attributes:
      refs: (array,) or, quantized, (values, scales).
      scratch: for the block once dequantized. scales: for its scales in float32. group: rows that share a scale.
    """

    refs: tuple
    scratch: jax.Array | None
    scales: jax.Array | None
    group: int

    def matrix(self, rows: int, columns: int, dtype, first_group=0) -> jax.Array:
        """The first rows and columns in `dtype`; the scales of the first rows are number `first_group`."""
        if self.scratch is None:
            return self.refs[0][:rows, :columns].astype(dtype)
        values_ref, scales_ref = self.refs
        # A row is picked by its number, which float32 allows.
        self.scales[...] = scales_ref[...].astype(jnp.float32)
        packed = self.group * values_ref.shape[0] // self.scratch.shape[0]

        def body(g, _):
            values = values_ref[pl.ds(pl.multiple_of(g * packed, packed), packed), :].astype(jnp.int32)
            scale = self.scales[pl.ds(first_group + g, 1), :]
            pieces = [values] if packed == self.group else [(values << 28) >> 28, values >> 4]
            for i, piece in enumerate(pieces):
                start = pl.multiple_of(g * self.group + i * packed, packed)
                self.scratch[pl.ds(start, packed), :] = (piece.astype(jnp.float32) * scale).astype(dtype)

        jax.lax.fori_loop(0, rows // self.group, body, None)
        return self.scratch[:rows, :columns]


def _kernel(expert, first, count, used, token, gate, x_hbm, *refs, cut: _Cut, groups: tuple[int, int]):
    del expert  # For the blocks alone.
    refs = list(refs)
    of_up, of_down = (tuple(refs.pop(0) for _ in range(2 if group else 1)) for group in groups)
    out_hbm, x_ref, sums_ref, rows_ref, results_ref, *scratch = refs
    up, down = (
        _Block(refs, *(scratch.pop(0) if group else None for _ in range(2)), group)
        for refs, group in zip((of_up, of_down), groups, strict=True)
    )
    slot, f = pl.program_id(0), pl.program_id(1)
    start, rows = first[slot], count[slot]
    first_tile, last_tile = f == 0, f == cut.tiles - 1

    @pl.when((slot == 0) & first_tile)
    def read_all_rows():
        pltpu.sync_copy(x_hbm, x_ref)
        sums_ref[...] = jnp.zeros_like(sums_ref)

    def gather_rows():
        """The expert's rows side by side, and zeros for their results."""

        def gather(j, _):
            rows_ref[pl.ds(j, 1), :] = x_ref[pl.ds(token[start + j], 1), :]

        jax.lax.fori_loop(0, rows, gather, None)

        def clear(i, _):
            here = pl.ds(pl.multiple_of(i * cut.rows, cut.rows), cut.rows)
            results_ref[here, :] = jnp.zeros((cut.rows, cut.model), jnp.float32)

        jax.lax.fori_loop(0, pl.cdiv(rows, cut.rows), clear, None)

    def multiply(width):
        """Adds to the results what the first columns of this tile of the width contribute."""
        precision = jax.lax.Precision.HIGHEST if cut.dtype == jnp.float32 else None

        def product(a, b, contract=NN):
            return jax.lax.dot_general(
                a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
            )

        up_matrix = up.matrix(*((width, cut.model) if cut.flipped else (cut.model, width)), cut.dtype)
        first_group = f * (cut.tile // down.group) if down.group else 0
        down_matrix = down.matrix(width, cut.model, cut.dtype, first_group)

        def body(i, _):
            here = pl.ds(pl.multiple_of(i * cut.rows, cut.rows), cut.rows)
            hidden = product(rows_ref[here, :].astype(cut.dtype), up_matrix, NT if cut.flipped else NN)
            # Rounded before and after the activation, as where the products are single operations.
            hidden = cut.activation(hidden.astype(cut.dtype).astype(jnp.float32)).astype(cut.dtype)
            results_ref[here, :] += product(hidden, down_matrix)

        jax.lax.fori_loop(0, pl.cdiv(rows, cut.rows), body, None)

    def scatter_results():
        """Adds the results, each with its gate, to the sums of their tokens."""

        def scatter(j, _):
            here = pl.ds(token[start + j], 1)
            result = results_ref[pl.ds(j, 1), :].astype(cut.dtype).astype(jnp.float32)
            sums_ref[here, :] += gate[start + j] * result

        jax.lax.fori_loop(0, rows, scatter, None)

    @pl.when(slot < used[0])
    def run_expert():
        pl.when(first_tile)(gather_rows)
        rest = cut.width - (cut.tiles - 1) * cut.tile
        if rest == cut.tile:
            multiply(cut.tile)
        else:  # Only the part of the last tile's block that is inside the matrix means anything.
            pl.when(f < cut.tiles - 1)(functools.partial(multiply, cut.tile))
            pl.when(last_tile)(functools.partial(multiply, rest))
        pl.when(last_tile)(scatter_results)

    @pl.when((slot == pl.num_programs(0) - 1) & last_tile)
    def write_sums():
        pltpu.sync_copy(sums_ref, out_hbm)


def _specs(cut: _Cut, weights: Weights) -> list[pl.BlockSpec]:
    """Blocks of up, then down: the expert's and the tile's; an unused slot asks for what is there already."""

    def tile_of(slot, f, used):
        return jnp.where(slot < used[0], f, cut.tiles - 1)

    def up(slot, f, expert, first, count, used, token, gate):
        return expert[slot], 0, tile_of(slot, f, used)

    def down(slot, f, expert, first, count, used, token, gate):
        return expert[slot], tile_of(slot, f, used), 0

    def whole(slot, f, expert, first, count, used, token, gate):
        return expert[slot], 0, 0

    if cut.flipped:
        specs = [pl.BlockSpec((None, cut.tile, cut.model), down)]
    else:
        specs = [pl.BlockSpec((None, v.shape[1], cut.tile), up) for v in jax.tree.leaves(weights.up)]
    if not isinstance(weights.down, Quantized):
        return [*specs, pl.BlockSpec((None, cut.tile, cut.model), down)]
    specs.append(pl.BlockSpec((None, cut.tile * weights.down.bits // 8, cut.model), down))
    return [*specs, pl.BlockSpec((None, *weights.down.scales.shape[1:]), whole)]


def _forward(activation: Activation, interpret: bool, x, indices, gates, weights: Weights) -> jax.Array:
    tokens, model = x.shape
    touched = touched_experts(indices, weights.up.shape[0])
    choices = gates.shape[1]
    tile = _tile(x, weights)
    padded = tokens + -tokens % SUBLANES
    cut = _Cut(padded, _ROW_TILE, model, weights.down.shape[-2], tile, activation, x.dtype, _is_flipped(weights.up))
    groups = tuple(part.group if isinstance(part, Quantized) else 0 for part in (weights.up, weights.down))
    # Rows of an expert are moved one at a time, which float32 allows.
    row_arrays = (padded + -padded % _ROW_TILE, model)
    scratch = [
        pltpu.VMEM((padded, model), jnp.float32),
        pltpu.VMEM((padded, model), jnp.float32),
        pltpu.VMEM(row_arrays, jnp.float32),
        pltpu.VMEM(row_arrays, jnp.float32),
    ]
    for part, shape in (weights.up, (model, tile)), (weights.down, (tile, model)):
        if isinstance(part, Quantized):
            scratch += [pltpu.VMEM(shape, x.dtype), pltpu.VMEM((part.scales.shape[1], shape[1]), jnp.float32)]
    up = weights.up.swapaxes(1, 2) if cut.flipped else weights.up
    call = pl.pallas_call(
        functools.partial(_kernel, cut=cut, groups=groups),
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
        *jax.tree.leaves((up, weights.down)),
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
