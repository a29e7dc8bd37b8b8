"""What the Pallas Mosaic GPU kernels are made of: tiles in shared memory, and exact products of them.

A kernel runs one warpgroup a block (128 threads), which holds its values in registers, (64, n) at a time. Hopper's
tensor core (wgmma) multiplies bfloat16 matrices that lie in shared memory and adds in float32. So a float32 operand
lies there as three bfloat16 parts (numerics/split.py), and a product of a float32 and a bfloat16 matrix takes three
passes, of two float32 ones six: the products of parts whose ranks add up to less than three.

Who waits for whom, in the one order that all kernels follow:

* A tile arrives by the copy engine (TMA) and a barrier, which every thread awaits before it is read (`Operand.wait`).
  The copy itself is issued by one thread after all of the warpgroup have come that far, and whatever read the tile's
  place before has been awaited by then: registers hold what was loaded, and `product` awaits its passes.
* A tile that is stored from registers is seen by the tensor core after `commit_smem`, which `Operand.wait` and
  `put_parts` call. The compiler keeps the warpgroup together before and after stores to and loads from shared memory
  (`unsafe_no_auto_barriers` is off), so that no warp overwrites what another still reads.
* Spaces of one scope take the place of those of the scope before, whose stores were committed and whose products were
  awaited; the first copy into them again waits for the whole warpgroup.
* Blocks never write where another reads or writes.

The interpreter's `detect_races` follows copies, loads and stores (tests/kernels/ssd/test_ssd.py), but not the tensor
core's reads.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from twotower_jax.kernels.hardware import versions
from twotower_jax.kernels.numerics.split import PARTS, parts

# Rows of a tile: what wgmma multiplies at once.
TILE = 64

# The dimensions that `product` sums over: rows with columns, rows with rows, columns with columns.
NN, NT, TN = (1, 0), (1, 1), (0, 0)


def is_bfloat16(array) -> bool:
    return array.dtype == jnp.bfloat16


def operand_space(array, rows: int, columns: int):
    """Shared memory for a tile of an array as `Operand` keeps it."""
    return plgpu.SMEM((1 if is_bfloat16(array) else PARTS, rows, columns), jnp.bfloat16)


def parts_space(rows: int, columns: int):
    """Shared memory for a float32 tile that `put_parts` writes."""
    return plgpu.SMEM((PARTS, rows, columns), jnp.bfloat16)


def load(ref) -> jax.Array:
    """A tile from global memory to registers; whole sectors, but not by the widest loads."""
    return tiled(plgpu.load(ref, optimized=False))


def tiled(value: jax.Array) -> jax.Array:
    """Says that a matrix lies in registers as wgmma leaves it. The compiler would have to search for that."""
    return plgpu.layout_cast(value, plgpu.Layout.WGMMA)


def zeros(shape: tuple[int, int]) -> jax.Array:
    return tiled(jnp.zeros(shape, jnp.float32))


def iota(shape: tuple[int, int], dimension: int) -> jax.Array:
    return tiled(lax.broadcasted_iota(jnp.int32, shape, dimension))


def load_down(ref, shape: tuple[int, int]) -> jax.Array:
    """(m,) in global or shared memory → (m, n): one number per row."""
    return _load_across(ref, shape, 0)


def load_along(ref, shape: tuple[int, int]) -> jax.Array:
    """(n,) in global or shared memory → (m, n): one number per column."""
    return _load_across(ref, shape, 1)


def _load_across(ref, shape, dimension: int) -> jax.Array:
    vector = plgpu.layout_cast(plgpu.load(ref, optimized=False), plgpu.Layout.WGMMA.reduce(1 - dimension))
    return lax.broadcast_in_dim(vector, shape, (dimension,))


def sum_rows(value: jax.Array) -> jax.Array:
    """(m, n) → (m,): the sum of each row."""
    return _column(jnp.sum(value, axis=1))


def _column(vector: jax.Array) -> jax.Array:
    """Says that a vector lies in registers as the rows of a matrix do."""
    return plgpu.layout_cast(vector, plgpu.Layout.WGMMA.reduce(1))


def clear(ref) -> None:
    """Sets a vector in shared memory to zeros."""
    ref[...] = _column(jnp.zeros(ref.shape, jnp.float32))


def add(ref, vector: jax.Array) -> None:
    """Adds the sums of a matrix's rows to a vector in shared memory."""
    ref[...] = _column(ref[...]) + vector


def move(target, ref) -> None:
    """A vector from shared to global memory."""
    store(target, _column(ref[...]))


def store(ref, value: jax.Array) -> None:
    """From registers to global memory."""
    versions.store(ref, value)


def put_parts(space, value: jax.Array) -> None:
    """Stores a float32 value as an operand of `product`."""
    for rank, part in enumerate(parts(value)):
        space[rank] = part
    plgpu.commit_smem()


class Operand:
    """A tile of an array in global memory, made ready for `product`.

    bfloat16 goes straight from global to shared memory; float32 goes through registers, which cut it into parts.
    """

    def __init__(self, ref, space, barrier):
        self.ref, self.space, self.barrier = ref, space, barrier

    def start(self, index) -> None:
        """Begins to load ref[index]; until `wait` the space must not be touched."""
        if is_bfloat16(self.ref):
            plgpu.copy_gmem_to_smem(self.ref.at[index], self.space.at[0], self.barrier)
        else:
            for rank, part in enumerate(parts(load(self.ref.at[index]))):
                self.space[rank] = part

    def wait(self):
        """The space, to be read."""
        if is_bfloat16(self.ref):
            plgpu.barrier_wait(self.barrier)
        else:
            plgpu.commit_smem()
        return self.space

    def get(self, index):
        self.start(index)
        return self.wait()


def product(a, b, contract: tuple[int, int] = NN) -> jax.Array:
    """Product of two operands in shared memory, (parts, m, k) and (parts, k, n) or transposes → (m, n) float32."""
    by_rows, by_columns = contract
    m, n = a.shape[2 - by_rows], b.shape[2 - by_columns]
    # The smallest first; what is left out is below the last bit of float32.
    ranks = [(i, s - i) for s in reversed(range(PARTS)) for i in range(a.shape[0]) if 0 <= s - i < b.shape[0]]

    def passes(accumulator):
        for i, j in ranks:
            left, right = a.at[i], b.at[j]
            plgpu.wgmma(accumulator, left if by_rows else left.T, right.T if by_columns else right)
        return accumulator[...]  # Awaits them.

    return pl.run_scoped(passes, plgpu.ACC((m, n), jnp.float32))


def call(
    kernel: Callable[..., None],
    grid: dict[str, int],
    inputs,
    outputs,
    scratch,
    interpret: plgpu.InterpretGPUParams | None,
):
    """Runs `kernel(inputs, outputs, scratch)`, trees of refs, in every block of the grid.

    The grid's last axis is the fastest: its blocks run side by side and share what they read in the second-level cache.
    """
    arrays, of_inputs = jax.tree.flatten(inputs)
    types, of_outputs = jax.tree.flatten(outputs)
    spaces, of_scratch = jax.tree.flatten(scratch)

    def body(*refs):
        a, b = len(arrays), len(arrays) + len(types)
        kernel(of_inputs.unflatten(refs[:a]), of_outputs.unflatten(refs[a:b]), of_scratch.unflatten(refs[b:]))

    body.__name__ = kernel.__name__.strip("_")
    found = plgpu.kernel(
        body,
        out_type=types,
        scratch_types=spaces,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        interpret=interpret,
    )(*arrays)
    return of_outputs.unflatten(found)
