"""Expert products of few rows on NVIDIA Hopper: the time is that of reading the weights of the touched experts, once.

Two kernels, hidden = activation(rows @ up) and out = hidden @ down; what lies between them is small. Rows lie in tiles
of 16 to 64 of one expert. A tile of the result is 128 columns of the weights by one tile of rows, transposed: to wgmma,
which takes 64 rows at once, the columns of the weights are rows, so that nothing is multiplied that is not there.
Tiles of the same weights follow each other closely, so that the second reads them from the cache of the chip.

    touched expert, tile of rows     number               of `tiles`; n: tile of the weights' columns; k: step of K
    rows, (tile, K)                  rows                 places in shared memory, a step's each
    matrix_e, (K, N)                 stored               the same, as it is stored
    whole numbers in bfloat16        numbers              two groups of 64 rows of a step
    (rows @ matrix_e)ᵀ               sums                 (64, tile), of a warpgroup's columns

Quantized weights arrive in shared memory as they are stored. There each warpgroup turns its whole numbers into
bfloat16, which holds them exactly; the product of a group of rows is multiplied with its scale in float32 when it is
added.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from twotower_jax.kernels.experts import Activation, Weights
from twotower_jax.kernels.experts import mosaic_gpu_grouped as experts_grouped_gpu
from twotower_jax.kernels.experts.tiles import Tiles, in_tiles
from twotower_jax.kernels.experts.touched import with_gradient
from twotower_jax.kernels.hardware.hopper import not_hopper
from twotower_jax.kernels.hardware.pipeline_gpu import BLOCK, WARPGROUPS, Interpret, Pipeline, write
from twotower_jax.kernels.numerics.quantized import Quantized

MOST_ROWS = 1024
_SMALLEST_TILE, _LARGEST_TILE = 16, 64
_COLUMNS = WARPGROUPS * BLOCK
# Rows that share a scale.
_GROUP = 64
# Shared memory of a multiprocessor, for its thread blocks: two, so that one reads while the other ends a tile, or one
# where two could not read far enough ahead.
_SHARED_BYTES = 216 * 2**10
_FEWEST_STAGES, _MOST_STAGES = 3, 8


def tile_size(rows: int, num_experts: int) -> int:
    """Rows per tile: about two experts' shares, since touched experts have more than the average; in powers of two."""
    share = max(1, 2 * rows // num_experts)
    return min(_LARGEST_TILE, max(_SMALLEST_TILE, 1 << (share - 1).bit_length()))


def unsupported(x, indices, gates, weights: Weights, *, activation: Activation) -> str | None:
    """Why the hardware cannot run these arguments, or why another form is better for them; None if neither."""
    if weights.up_bias is not None or weights.down_bias is not None:
        return "the experts have biases"
    if x.dtype != jnp.bfloat16:
        return f"rows are {x.dtype}, not bfloat16"
    quantized = any(isinstance(part, Quantized) for part in weights)
    if x.shape[0] > MOST_ROWS and not quantized:
        return f"{x.shape[0]} rows are more than {MOST_ROWS}"
    model, width = weights.up.shape[1:]
    if model % BLOCK or width % BLOCK:
        return f"rows of {model} numbers and experts {width} wide are not both multiples of {BLOCK}"
    for name in "up", "down":
        part = getattr(weights, name)
        if isinstance(part, Quantized) and part.group != _GROUP:
            return f"{name} has a scale for {part.group} rows, not for {_GROUP}"
    return not_hopper()


class _Stored(NamedTuple):
    """How one step's part of the weights lies in shared memory.

    Attributes:
      step: of the summed dimension. stored: rows of the weights as they are stored. dtype: theirs.
      piece: columns of the rows that are multiplied at once.
    """

    step: int
    stored: int
    dtype: jnp.dtype
    piece: int

    @classmethod
    def of(cls, matrix: jax.Array | Quantized) -> "_Stored":
        if not isinstance(matrix, Quantized):
            return cls(_GROUP, _GROUP, jnp.bfloat16, _GROUP)
        step = 2 * _GROUP
        return cls(step, step * matrix.bits // 8, jnp.int8, _GROUP * matrix.bits // 8)

    def blocks_and_stages(self, tile: int) -> tuple[int, int]:
        """Thread blocks on a multiprocessor, and steps that each has in shared memory."""
        quantized = self.dtype == jnp.int8
        one = self.stored * _COLUMNS * jnp.dtype(self.dtype).itemsize + 2 * tile * self.step + 8 * _COLUMNS * quantized
        rest = 2 * tile * _COLUMNS + 4 * _GROUP * _COLUMNS * quantized
        blocks = 2 if _SHARED_BYTES // 2 - rest >= _FEWEST_STAGES * one else 1
        return blocks, min(_MOST_STAGES, (_SHARED_BYTES // blocks - rest) // one)


def _product(rows, matrix, tiles: Tiles, tile: int, activation: Activation | None, interpret: Interpret) -> jax.Array:
    """(tiles · tile, K) and (E, K, N): (tiles · tile, N), each tile with its expert's matrix; unused ones unwritten."""
    quantized, kind = isinstance(matrix, Quantized), _Stored.of(matrix)
    summed, columns = matrix.shape[1:]
    steps, across, pieces = -(-summed // kind.step), -(-columns // _COLUMNS), kind.step // kind.piece
    blocks, stages = kind.blocks_and_stages(tile)
    copies = pieces + WARPGROUPS * (1 + quantized)
    pipeline = Pipeline(tile, stages, copies, interpret, blocks=blocks, scaled=quantized)

    def body(source_rows, expert, used, *refs, **scratch):
        *parts, out = refs
        stored, operand = scratch["stored"], scratch["rows"]

        def copy(t, k, place, barrier):
            number, n = lax.div(t, across), lax.rem(t, across)
            for i in range(pieces):
                source = source_rows.at[pl.ds(number * tile, tile), pl.ds(k * kind.step + i * kind.piece, kind.piece)]
                plgpu.copy_gmem_to_smem(source, operand.at[place, i], barrier)
            for i in range(WARPGROUPS):
                part = pl.ds((n * WARPGROUPS + i) * BLOCK, BLOCK)
                for source, space, height in zip(
                    parts, (stored, scratch.get("scales")), (kind.stored, 2), strict=False
                ):
                    source = source.at[expert[number]].at[pl.ds(k * height, height), part]
                    plgpu.copy_gmem_to_smem(source, space.at[place, i], barrier)

        def multiply(accumulator, place, warpgroup):
            plgpu.wgmma(accumulator, stored.at[place, warpgroup].T, operand.at[place, 0].T)

        def multiply_whole_numbers(sums, place, warpgroup):
            numbers, halves = scratch["numbers"].at[warpgroup], _GROUP // kind.piece
            if matrix.bits == 8:
                for i in range(2):
                    numbers[i] = stored[place, warpgroup, pl.ds(i * _GROUP, _GROUP)].astype(jnp.bfloat16)
            else:  # By bits and exact steps in bfloat16: there are no shifts of bytes here.
                packed = stored[place, warpgroup]
                numbers[0] = ((packed & 15) ^ 8).astype(jnp.bfloat16) - 8
                numbers[1] = (packed & -16).astype(jnp.bfloat16) * (1 / 16)
            scales = [scratch["scales"][place, warpgroup, group].astype(jnp.float32) for group in range(2)]
            # After all that is read from this step's place, too: what follows may overwrite it.
            plgpu.commit_smem()

            def both(*accumulators):
                for group, accumulator in enumerate(accumulators):
                    for half in range(halves):
                        where = (half, pl.ds(group * kind.piece, kind.piece)) if halves == 2 else (group,)
                        operand_piece = operand.at[place, group * halves + half].T
                        plgpu.wgmma(accumulator, numbers.at[where].T, operand_piece)
                return [accumulator[...] for accumulator in accumulators]

            products = pl.run_scoped(both, *[plgpu.ACC((BLOCK, tile), jnp.float32)] * 2)
            for product, scale in zip(products, scales, strict=True):
                sums += product * lax.broadcast_in_dim(scale, sums.shape, (0,))
            return sums

        def finish(t, sums, warpgroup):
            number, n = lax.div(t, across), lax.rem(t, across)
            if activation is not None:
                sums = activation(sums.astype(jnp.bfloat16).astype(jnp.float32))
            part = pl.ds((n * WARPGROUPS + warpgroup) * BLOCK, BLOCK)
            write(scratch["result"], warpgroup, sums, out.at[pl.ds(number * tile, tile), part], transposed=True)

        use = multiply_whole_numbers if quantized else multiply
        pipeline.run(used[0] * across, scratch, lambda t: jnp.int32(steps), copy, use, finish)

    scratch = {
        "stored": plgpu.SMEM((stages, WARPGROUPS, kind.stored, BLOCK), kind.dtype),
        "rows": plgpu.SMEM((stages, pieces, tile, kind.piece), jnp.bfloat16),
        "result": plgpu.SMEM((WARPGROUPS, tile, BLOCK), jnp.bfloat16),
    }
    if not quantized:
        arrays = [matrix.astype(rows.dtype)]
    else:
        scratch["scales"] = plgpu.SMEM((stages, WARPGROUPS, 2, BLOCK), matrix.scales.dtype)
        scratch["numbers"] = plgpu.SMEM((WARPGROUPS, 2, _GROUP, BLOCK), jnp.bfloat16)
        arrays = [matrix.values, matrix.scales]
    out = jax.ShapeDtypeStruct((rows.shape[0], columns), rows.dtype)
    return pipeline.call("experts_few_rows", body, out, scratch, rows, tiles.expert, tiles.used.reshape(1), *arrays)


def _forward(activation: Activation, interpret: Interpret, x, indices, gates, weights: Weights) -> jax.Array:
    tile = tile_size(indices.size, weights.up.shape[0])
    tiles = in_tiles(indices, weights.up.shape[0], tile)
    hidden = _product(tiles.gather(x), weights.up, tiles, tile, activation, interpret)
    out = _product(hidden, weights.down, tiles, tile, None, interpret)
    return tiles.weighted_sum(out, gates).astype(x.dtype)


def _again(activation, interpret, x, indices, gates, weights):
    return experts_grouped_gpu.expert_mlp(x, indices, gates, weights, activation=activation, interpret=interpret)


_expert_mlp = with_gradient(_forward, _again)


def expert_mlp(
    x: jax.Array,
    indices: jax.Array,
    gates: jax.Array,
    weights: Weights,
    *,
    activation: Activation,
    interpret: Interpret = False,
) -> jax.Array:
    """See `experts.expert_mlp`; few rows in bfloat16, no biases."""
    return _expert_mlp(activation, interpret, x, indices, gates, weights)
