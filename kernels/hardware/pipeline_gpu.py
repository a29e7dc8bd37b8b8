"""How the expert kernels keep an NVIDIA Hopper busy: copies that run ahead of products, over all tiles of a result.

A grid of as many thread blocks as fit on the chip at once takes the tiles in turn. One warpgroup of each does nothing
but start copies from global to shared memory (TMA), `stages` steps ahead and across the edges of tiles. The others wait
for a step's copies, multiply (wgmma), and say when a place in shared memory is free again.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from twotower_jax.kernels.hardware.hopper import interpreter

# Rows of what a warpgroup's wgmma adds to.
BLOCK = 64
PROCESSORS = 132  # An H100 or H200 has so many.
WARPGROUPS = 2  # That multiply.

Interpret = bool | plgpu.InterpretGPUParams


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A kernel's shape.

    Attributes:
      columns: of a warpgroup's sums, (64, columns).
      stages: steps in shared memory at once.
      copies: that a step consists of.
      blocks: thread blocks on one multiprocessor.
      registers: whether the copying warpgroup gives its registers to the others.
      interpret: run the kernel's operations on any platform, slowly, with two thread blocks.
      scaled: each step's product is added to the sums in registers, not in the accumulator of the tensor core.
    """

    columns: int
    stages: int
    copies: int
    interpret: Interpret
    blocks: int = 1
    registers: bool = False
    scaled: bool = False

    @property
    def thread_blocks(self) -> int:
        return 2 if self.interpret else PROCESSORS * self.blocks

    def barriers(self) -> dict:
        """`filled`: a place's copies have arrived; `freed`: all are done with it."""
        return {
            "filled": plgpu.Barrier(num_arrivals=self.copies, num_barriers=self.stages),
            "freed": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=self.stages),
        }

    def run(
        self,
        tiles: jax.Array,
        scratch: dict,
        steps: Callable[[jax.Array], jax.Array],
        copy: Callable,
        multiply: Callable,
        finish: Callable,
        works: Callable = lambda t, warpgroup: True,
    ) -> None:
        """What a thread block does, as one of its three warpgroups.

        Args:
          tiles: () int32, of all thread blocks.
          scratch: with `barriers`.
          steps: of tile t.
          copy: (t, k, place, barrier), starts the copies of step k of tile t.
          multiply: (accumulator, place, warpgroup), adds a step's product; if `scaled`, (sums, place, warpgroup) →
            sums, float32.
          finish: (t, sums, warpgroup), writes the result.
          works: (t, warpgroup), whether a warpgroup has anything to do there; the other may have the tensor core then.
        """
        warpgroup, number = lax.axis_index("warpgroup"), self.thread_blocks
        here = lax.axis_index("block")
        mine = lax.div(tiles - here + (number - 1), jnp.int32(number))
        filled, freed = scratch["filled"], scratch["freed"]

        @pl.when(warpgroup == WARPGROUPS)
        def _():
            if self.registers:
                plgpu.set_max_registers(40, action="decrease")

            def tile(i, step):
                t = here + i * number

                def one(k, step):
                    place = lax.rem(step, self.stages)

                    @pl.when(step >= self.stages)
                    def _():
                        plgpu.barrier_wait(freed.at[place])

                    copy(t, k, place, filled.at[place])
                    return step + 1

                return lax.fori_loop(0, steps(t), one, step)

            done = lax.fori_loop(0, mine, tile, jnp.int32(0))

            def drain(k, _):
                plgpu.barrier_wait(freed.at[lax.rem(done - 1 - k, self.stages)])

            # So that every barrier is at rest when the thread block ends, as the interpreter of JAX 0.11 insists.
            lax.fori_loop(0, jnp.minimum(done, self.stages), drain, None)

        @pl.when(warpgroup < WARPGROUPS)
        def _():
            if self.registers:
                plgpu.set_max_registers(232, action="increase")

            def tile(i, step):
                t = here + i * number
                count = steps(t)
                taken = jnp.where(works(t, warpgroup), count, 0)
                finish(t, self._sums(taken, step, filled, freed, multiply, warpgroup), warpgroup)

                def let_go(k, _):
                    place = lax.rem(step + k, self.stages)
                    plgpu.barrier_wait(filled.at[place])
                    plgpu.barrier_arrive(freed.at[place])

                lax.fori_loop(taken, count, let_go, None)
                return step + count

            lax.fori_loop(0, mine, tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    def _sums(self, count, start, filled, freed, multiply, warpgroup):
        """(64, columns) of one tile, whose first step is number `start` of this thread block."""
        shape = BLOCK, self.columns
        if self.scaled:

            def scaled(k, sums):
                place = lax.rem(start + k, self.stages)
                plgpu.barrier_wait(filled.at[place])
                sums = multiply(sums, place, warpgroup)
                plgpu.barrier_arrive(freed.at[place])
                return sums

            zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
            return lax.fori_loop(0, count, scaled, zeros)

        def in_accumulator(accumulator):
            def one(k, _):
                place = lax.rem(start + k, self.stages)
                plgpu.barrier_wait(filled.at[place])
                multiply(accumulator, place, warpgroup)
                # This step's product stays in flight; the one before it is done.
                plgpu.wgmma_wait(1)

                @pl.when(k > 0)
                def _():
                    plgpu.barrier_arrive(freed.at[lax.rem(start + k - 1, self.stages)])

            lax.fori_loop(0, count, one, None)
            return accumulator[...]

        sums = pl.run_scoped(in_accumulator, plgpu.ACC(shape, jnp.float32))

        @pl.when(count > 0)
        def _():
            plgpu.barrier_arrive(freed.at[lax.rem(start + count - 1, self.stages)])

        return sums

    def call(self, name: str, body: Callable, out_type, scratch: dict, *arrays):
        """Runs `body(*arrays, out, **scratch)`, refs, in every thread block, under a name for profilers."""
        body.__name__ = name
        return plgpu.kernel(
            body,
            out_type=out_type,
            scratch_types=scratch | self.barriers(),
            grid=(self.thread_blocks,),
            grid_names=("block",),
            num_threads=WARPGROUPS + 1,
            thread_name="warpgroup",
            interpret=interpreter(self.interpret),
        )(*arrays)


def write(space, warpgroup, value: jax.Array, out, transposed: bool = False) -> None:
    """Stores a warpgroup's result, or its transpose, by way of its place in shared memory."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    place = space.at[warpgroup]
    place = place.T if transposed else place
    place[...] = value.astype(space.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(space.at[warpgroup], out)
