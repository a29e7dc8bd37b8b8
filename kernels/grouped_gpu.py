"""Products of groups of rows, each group with a matrix of its own, on NVIDIA Hopper (Pallas Mosaic GPU).

Rows lie in blocks of 64, each block the rows of one group, the blocks of a group side by side, groups in order.

    product    out[block] = activation(rows[block] @ matrix[its group]), or with the matrix transposed
    outer      out[group] = Σ over the group's blocks: a[block]ᵀ @ b[block], which is the gradient of a matrix

One thread block a multiprocessor works through its share of the tiles of the result. A warpgroup of its own does
nothing but start copies from global to shared memory (TMA), some steps ahead and across the edges of tiles. Two others
wait for a step's copies, multiply (wgmma), 64 rows of the result each, and say when a place in shared memory is free
again. A step takes 64 of the summed dimension. What lies outside of an array arrives as zeros, and is not written.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Rows of a block: what wgmma multiplies at once. STEP: of the summed dimension.
BLOCK = STEP = 64
# Columns of a tile of the result: 192 leaves 3 % of a width of 1856 unused, nothing of 2688.
_COLUMNS = 192
_STAGES = 4
_PROCESSORS = 132  # Of an H100 or H200.
_WARPGROUPS = 2

Activation = Callable[[jax.Array], jax.Array]


class Groups(NamedTuple):
    """Which blocks are whose.

    Attributes:
      first, count: (groups,) int32, the blocks of each group.
    """

    first: jax.Array
    count: jax.Array


class _Tiles(NamedTuple):
    """Pairs of blocks of one group; the last of a group may be alone.

    Attributes:
      group, first: (n,) int32, of each pair its group and its first block; blocks: (n,) int32, 1 or 2.
      used: (1,) int32, how many there are.
    """

    group: jax.Array
    first: jax.Array
    blocks: jax.Array
    used: jax.Array


def _pairs(groups: Groups, total: int) -> _Tiles:
    count = -(-groups.count // 2)
    ends = jnp.cumsum(count)
    number = jnp.arange((total + groups.count.size + 1) // 2, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(number[:, None] >= ends, axis=1, dtype=jnp.int32), groups.count.size - 1)
    within = 2 * (number - (ends - count)[group])
    blocks = jnp.clip(groups.count[group] - within, 1, 2)
    return _Tiles(group, jnp.clip(groups.first[group] + within, 0, total - 1), blocks, ends[-1:])


def _places(total: int) -> dict:
    """Shared memory of the kernels: `_STAGES` places for both operands, the result, and barriers."""
    del total
    return {
        "a": plgpu.SMEM((_STAGES, _WARPGROUPS, BLOCK, STEP), jnp.bfloat16),
        "filled": plgpu.Barrier(num_arrivals=1 + _WARPGROUPS, num_barriers=_STAGES),
        "freed": plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=_STAGES),
        "result": plgpu.SMEM((_WARPGROUPS, BLOCK, _COLUMNS), jnp.bfloat16),
    }


def _work(tiles, scratch: dict, steps: Callable, copy: Callable, multiply: Callable, finish: Callable) -> None:
    """What a thread block does, as one of its three warpgroups.

    Args:
      tiles: of all thread blocks, which take them in turn.
      steps: of tile t.
      copy: (t, k, place, barrier), starts the copies of the operands of step k.
      multiply: (accumulator, place, warpgroup), adds a step's product.
      finish: (t, sums, warpgroup), writes the result.
    """
    here, warpgroup = lax.axis_index("processor"), lax.axis_index("warpgroup")
    filled, freed = scratch["filled"], scratch["freed"]
    mine = lax.div(tiles - here + (_PROCESSORS - 1), jnp.int32(_PROCESSORS))

    @pl.when(warpgroup == _WARPGROUPS)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        def tile(i, step):
            t = here + i * _PROCESSORS

            def one(k, step):
                place = lax.rem(step, _STAGES)

                @pl.when(step >= _STAGES)
                def _():
                    plgpu.barrier_wait(freed.at[place])

                copy(t, k, place, filled.at[place])
                return step + 1

            return lax.fori_loop(0, steps(t), one, step)

        lax.fori_loop(0, mine, tile, jnp.int32(0))

    @pl.when(warpgroup < _WARPGROUPS)
    def _():
        plgpu.set_max_registers(232, action="increase")

        def tile(i, step):
            t = here + i * _PROCESSORS
            count = steps(t)

            def sums(accumulator):
                def one(k, step):
                    place = lax.rem(step, _STAGES)
                    plgpu.barrier_wait(filled.at[place])
                    multiply(accumulator, place, warpgroup)
                    # One product stays in flight; the one before it is done.
                    plgpu.wgmma_wait(1)

                    @pl.when(k > 0)
                    def _():
                        plgpu.barrier_arrive(freed.at[lax.rem(step - 1, _STAGES)])

                    return step + 1

                lax.fori_loop(0, count, one, step)
                return accumulator[...]

            total = pl.run_scoped(sums, plgpu.ACC((BLOCK, _COLUMNS), jnp.float32))

            @pl.when(count > 0)
            def _():
                plgpu.barrier_arrive(freed.at[lax.rem(step + count - 1, _STAGES)])

            finish(t, total, warpgroup)
            return step + count

        lax.fori_loop(0, mine, tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def _write(space, warpgroup, value: jax.Array, out) -> None:
    """Stores a warpgroup's (64, columns) by way of its place in shared memory."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    space[warpgroup] = value.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(space.at[warpgroup], out)


def _call(body: Callable, out_type, scratch: dict, interpret, *arrays):
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=(_PROCESSORS,),
        grid_names=("processor",),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        interpret=interpret,
    )(*arrays)


def product(
    rows: jax.Array,
    matrices: jax.Array,
    groups: Groups,
    *,
    transposed: bool = False,
    activation: Activation | None = None,
    interpret=None,
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
    steps = summed // STEP

    def body(rows, matrices, group, first, blocks, used, out, **scratch):
        a, b = scratch["a"], scratch["b"]

        def copy(t, k, place, barrier):
            pair, n = lax.div(t, across), lax.rem(t, across)
            along, down = pl.ds(k * STEP, STEP), pl.ds(n * _COLUMNS, _COLUMNS)
            for i in range(_WARPGROUPS):
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

            @pl.when(warpgroup < blocks[pair])
            def _():
                block = first[pair] + warpgroup
                place = out.at[pl.ds(block * BLOCK, BLOCK), pl.ds(n * _COLUMNS, _COLUMNS)]
                _write(scratch["result"], warpgroup, sums, place)

        _work(used[0] * across, scratch, lambda t: jnp.int32(steps), copy, multiply, finish)

    b = (_STAGES, _COLUMNS, STEP) if transposed else (_STAGES, STEP, _COLUMNS)
    scratch = _places(total) | {"b": plgpu.SMEM(b, jnp.bfloat16)}
    out = jax.ShapeDtypeStruct((rows.shape[0], columns), jnp.bfloat16)
    return _call(body, out, scratch, interpret, rows, matrices, *tiles)


def outer(a: jax.Array, b: jax.Array, groups: Groups, *, interpret=None) -> jax.Array:
    """Each group's a ᵀ @ b.

    Args:
      a: (R, M). b: (R, N). bfloat16, R a multiple of 64; rows of a block that are nobody's are zero in one of them.

    Returns:
      (groups, M, N) bfloat16, summed in float32; zeros for a group without blocks.
    """
    (_, height), columns = a.shape, b.shape[1]
    down, across = -(-height // (_WARPGROUPS * BLOCK)), -(-columns // _COLUMNS)
    number = groups.count.size

    def body(a_rows, b_rows, first, count, out, **scratch):
        a, b = scratch["a"], scratch["b"]

        def where(t):
            return lax.div(t, down * across), lax.rem(lax.div(t, across), down), lax.rem(t, across)

        def copy(t, k, place, barrier):
            group, m, n = where(t)
            block = pl.ds((first[group] + k) * BLOCK, BLOCK)
            for i in range(_WARPGROUPS):
                part = pl.ds((m * _WARPGROUPS + i) * BLOCK, BLOCK)
                plgpu.copy_gmem_to_smem(a_rows.at[block, part], a.at[place, i], barrier)
            plgpu.copy_gmem_to_smem(b_rows.at[block, pl.ds(n * _COLUMNS, _COLUMNS)], b.at[place], barrier)

        def multiply(accumulator, place, warpgroup):
            plgpu.wgmma(accumulator, a.at[place, warpgroup].T, b.at[place])

        def finish(t, sums, warpgroup):
            group, m, n = where(t)
            part = pl.ds((m * _WARPGROUPS + warpgroup) * BLOCK, BLOCK)
            _write(scratch["result"], warpgroup, sums, out.at[group].at[part, pl.ds(n * _COLUMNS, _COLUMNS)])

        _work(number * down * across, scratch, lambda t: count[where(t)[0]], copy, multiply, finish)

    scratch = _places(0) | {"b": plgpu.SMEM((_STAGES, STEP, _COLUMNS), jnp.bfloat16)}
    out = jax.ShapeDtypeStruct((number, height, columns), jnp.bfloat16)
    return _call(body, out, scratch, interpret, a, b, groups.first, groups.count)
