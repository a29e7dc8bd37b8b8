"""Products of groups of rows, each group with a matrix of its own, on NVIDIA Hopper (Pallas Mosaic GPU).

Rows lie in blocks of 64, each block the rows of one group, the blocks of a group side by side, groups in order.

    product    out[block] = activation(rows[block] @ matrix[its group]), or with the matrix transposed
    outer      out[group] = Σ over the group's blocks: a[block]ᵀ @ b[block], which is the gradient of a matrix

A tile of the result has 128 rows, 64 for each of two warpgroups, and 192 columns; a step takes 64 of the summed
dimension. What lies outside of an array arrives as zeros, and is not written. hardware/pipeline_gpu.py keeps it going.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from twotower_jax.kernels.hardware.pipeline_gpu import BLOCK, WARPGROUPS, Interpret, Pipeline, write

STEP = 64  # Places of the summed dimension.
# Columns of a tile of the result: 192 leaves 3 % of a width of 1856 unused, nothing of 2688.
_COLUMNS = 192
_STAGES = 4

Activation = Callable[[jax.Array], jax.Array]


class Groups(NamedTuple):
    """Which blocks are whose.

    Attributes:
      first, count: (groups,) int32, the blocks of each group.
    """

    first: jax.Array
    count: jax.Array


class _PairsOfBlocks(NamedTuple):
    """Pairs of blocks of one group; the last of a group may be alone.

    Attributes:
      group, first: (n,) int32, of each pair its group and its first block; blocks: (n,) int32, 1 or 2.
      used: (1,) int32, how many there are.
    """

    group: jax.Array
    first: jax.Array
    blocks: jax.Array
    used: jax.Array


def _pairs(groups: Groups, total: int) -> _PairsOfBlocks:
    count = -(-groups.count // 2)
    ends = jnp.cumsum(count)
    number = jnp.arange((total + groups.count.size + 1) // 2, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(number[:, None] >= ends, axis=1, dtype=jnp.int32), groups.count.size - 1)
    within = 2 * (number - (ends - count)[group])
    blocks = jnp.clip(groups.count[group] - within, 1, 2)
    return _PairsOfBlocks(group, jnp.clip(groups.first[group] + within, 0, total - 1), blocks, ends[-1:])


def _pipeline(interpret: Interpret) -> Pipeline:
    return Pipeline(_COLUMNS, _STAGES, 1 + WARPGROUPS, interpret, registers=True)


def _spaces(b: tuple[int, int]) -> dict:
    """Shared memory: places for both operands of a step, and for the result."""
    return {
        "a": plgpu.SMEM((_STAGES, WARPGROUPS, BLOCK, STEP), jnp.bfloat16),
        "b": plgpu.SMEM((_STAGES, *b), jnp.bfloat16),
        "result": plgpu.SMEM((WARPGROUPS, BLOCK, _COLUMNS), jnp.bfloat16),
    }


def product(
    rows: jax.Array,
    matrices: jax.Array,
    groups: Groups,
    *,
    transposed: bool = False,
    activation: Activation | None = None,
    interpret: Interpret = False,
) -> jax.Array:
    """Each block's rows times their group's matrix.

    Args:
      rows: (R, K) bfloat16, R a multiple of 64, K of 64.
      matrices: (groups, K, N), or (groups, N, K) if transposed; bfloat16.
      activation: of the rounded product, applied in float32.

    Returns:
      (R, N) bfloat16, summed in float32. Blocks of no group are not written.
    """
    total, summed = rows.shape[0] // BLOCK, rows.shape[1]
    columns = matrices.shape[1 if transposed else 2]
    across = -(-columns // _COLUMNS)
    tiles = _pairs(groups, total)
    steps, pipeline = summed // STEP, _pipeline(interpret)

    def body(rows, matrices, group, first, blocks, used, out, **scratch):
        a, b = scratch["a"], scratch["b"]

        def copy(t, k, place, barrier):
            pair, n = lax.div(t, across), lax.rem(t, across)
            along, down = pl.ds(k * STEP, STEP), pl.ds(n * _COLUMNS, _COLUMNS)
            for i in range(WARPGROUPS):
                block = jnp.minimum(first[pair] + i, total - 1)
                plgpu.copy_gmem_to_smem(rows.at[pl.ds(block * BLOCK, BLOCK), along], a.at[place, i], barrier)
            matrix = matrices.at[group[pair]]
            matrix = matrix.at[down, along] if transposed else matrix.at[along, down]
            plgpu.copy_gmem_to_smem(matrix, b.at[place], barrier)

        def multiply(accumulator, place, warpgroup):
            matrix = b.at[place]
            plgpu.wgmma(accumulator, a.at[place, warpgroup], matrix.T if transposed else matrix)

        def finish(t, sums, warpgroup):
            pair, n = lax.div(t, across), lax.rem(t, across)
            if activation is not None:
                sums = activation(sums.astype(jnp.bfloat16).astype(jnp.float32))

            @pl.when(works(t, warpgroup))
            def _():
                block = first[pair] + warpgroup
                place = out.at[pl.ds(block * BLOCK, BLOCK), pl.ds(n * _COLUMNS, _COLUMNS)]
                write(scratch["result"], warpgroup, sums, place)

        def works(t, warpgroup):
            return warpgroup < blocks[lax.div(t, across)]

        pipeline.run(used[0] * across, scratch, lambda t: jnp.int32(steps), copy, multiply, finish, works)

    scratch = _spaces((_COLUMNS, STEP) if transposed else (STEP, _COLUMNS))
    out = jax.ShapeDtypeStruct((rows.shape[0], columns), jnp.bfloat16)
    return pipeline.call("experts_product", body, out, scratch, rows, matrices, *tiles)


def outer(a: jax.Array, b: jax.Array, groups: Groups, *, interpret: Interpret = False) -> jax.Array:
    """Each group's a ᵀ @ b.

    Args:
      a: (R, M). b: (R, N). bfloat16, R a multiple of 64; rows of a block that are nobody's are zero in one of them.

    Returns:
      (groups, M, N) bfloat16, summed in float32; zeros for a group without blocks.
    """
    (_, height), columns = a.shape, b.shape[1]
    down, across = -(-height // (WARPGROUPS * BLOCK)), -(-columns // _COLUMNS)
    number, pipeline = groups.count.size, _pipeline(interpret)

    def body(a_rows, b_rows, first, count, out, **scratch):
        a, b = scratch["a"], scratch["b"]

        def where(t):
            return lax.div(t, down * across), lax.rem(lax.div(t, across), down), lax.rem(t, across)

        def copy(t, k, place, barrier):
            group, m, n = where(t)
            block = pl.ds((first[group] + k) * BLOCK, BLOCK)
            for i in range(WARPGROUPS):
                part = pl.ds((m * WARPGROUPS + i) * BLOCK, BLOCK)
                plgpu.copy_gmem_to_smem(a_rows.at[block, part], a.at[place, i], barrier)
            plgpu.copy_gmem_to_smem(b_rows.at[block, pl.ds(n * _COLUMNS, _COLUMNS)], b.at[place], barrier)

        def multiply(accumulator, place, warpgroup):
            plgpu.wgmma(accumulator, a.at[place, warpgroup].T, b.at[place])

        def finish(t, sums, warpgroup):
            group, m, n = where(t)
            part = pl.ds((m * WARPGROUPS + warpgroup) * BLOCK, BLOCK)
            write(scratch["result"], warpgroup, sums, out.at[group].at[part, pl.ds(n * _COLUMNS, _COLUMNS)])

        pipeline.run(number * down * across, scratch, lambda t: count[where(t)[0]], copy, multiply, finish)

    scratch = _spaces((STEP, _COLUMNS))
    out = jax.ShapeDtypeStruct((number, height, columns), jnp.bfloat16)
    return pipeline.call("experts_outer", body, out, scratch, a, b, groups.first, groups.count)
