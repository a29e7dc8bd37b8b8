"""How the Pallas TPU kernels cut a scan: blocks of heads, chunks of positions, and which block of an array each sees.

Arrays keep the layout of the model, heads and groups side by side in the last dimension, so that nothing is transposed
but the small per-head numbers.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# A block of an array is a multiple of these along its last two dimensions, or all of it.
SUBLANES, LANES = 8, 128
# Of x, in one block, and of positions in a chunk: all blocks of a step fit into the memory of a core twice.
_HEAD_LANES, _LONGEST_CHUNK = 512, 256
_PADDED_LANES = 1024
VMEM_BYTES = 48 * 2**20  # Of 128 MiB a core on v5p and v6e, 64 on tpu7x; the default of 16 is too small for float32.

Order = Callable[[int], int]  # From the grid's last index to a chunk.


class Layout(NamedTuple):
    """One problem, cut.

    Attributes:
      heads: R, in one block. head_dim: P. state: N. chunk: Q.
      lanes: W, of one block of heads: R·P, or more where a group's heads do not fill whole lanes.
      groups: G. blocks: H/R, blocks of heads, of which blocks/G belong to one group.
      interpret: run the kernel's operations on any backend; True or `pltpu.InterpretParams`.
    """

    heads: int
    head_dim: int
    state: int
    chunk: int
    groups: int
    blocks: int
    lanes: int
    interpret: bool | pltpu.InterpretParams

    @property
    def of_heads(self) -> tuple[slice, slice]:
        """The places in a block (Q, W) that heads have, (Q, R·P); whatever lies beyond is nobody's."""
        return slice(None), slice(0, self.heads * self.head_dim)

    def inner(self, order: Order) -> pl.BlockSpec:
        """Of (B, L, H/R·W): (Q, W)."""
        return pl.BlockSpec((None, self.chunk, self.lanes), lambda i, h, c: (i, order(c), h))

    def rows(self, order: Order) -> pl.BlockSpec:
        """Of (B, H/R, R, L): (R, Q)."""
        return pl.BlockSpec((None, None, self.heads, self.chunk), lambda i, h, c: (i, h, 0, order(c)))

    def group(self, order: Order) -> pl.BlockSpec:
        """Of (B, L, G·N): (Q, N)."""
        ratio = self.blocks // self.groups
        return pl.BlockSpec((None, self.chunk, self.state), lambda i, h, c: (i, order(c), h // ratio))

    def group_parts(self, order: Order) -> pl.BlockSpec:
        """Of (B, L, H/R·N): (Q, N), what one block of heads contributes to its group."""
        return pl.BlockSpec((None, self.chunk, self.state), lambda i, h, c: (i, order(c), h))

    def one_state(self) -> pl.BlockSpec:
        """Of (B, H/R, R·P, N): (R·P, N)."""
        return pl.BlockSpec((None, None, self.heads * self.head_dim, self.state), lambda i, h, c: (i, h, 0, 0))

    def chunk_state(self, order: Order) -> pl.BlockSpec:
        """Of (B, H/R, L/Q, R·P, N): (R·P, N)."""
        shape = (None, None, None, self.heads * self.head_dim, self.state)
        return pl.BlockSpec(shape, lambda i, h, c: (i, h, order(c), 0, 0))

    def states_shape(self, batch: int) -> tuple[int, ...]:
        return batch, self.blocks, self.heads * self.head_dim, self.state

    def flat(self, x: jax.Array) -> jax.Array:
        """(B, L, H, P) → (B, L, H/R·W)."""
        x = x.reshape(*x.shape[:2], self.blocks, -1)
        if x.shape[3] < self.lanes:
            x = jnp.pad(x, [(0, 0)] * 3 + [(0, self.lanes - x.shape[3])])
        return x.reshape(*x.shape[:2], -1)

    def heads_of(self, x: jax.Array) -> jax.Array:
        """(B, L, H/R·W) → (B, L, H, P)."""
        x = x.reshape(*x.shape[:2], self.blocks, -1)[..., : self.heads * self.head_dim]
        return x.reshape(*x.shape[:2], -1, self.head_dim)

    def to_rows(self, v: jax.Array) -> jax.Array:
        """(B, L, H) → (B, H/R, R, L)."""
        return jnp.moveaxis(v, 1, 2).reshape(v.shape[0], self.blocks, self.heads, v.shape[1])

    def sum_parts(self, v: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """(B, L, H/R·N), see `group_parts`, → (B, L, G·N)."""
        if self.blocks > self.groups:
            v = jnp.sum(v.reshape(*v.shape[:2], self.groups, -1, self.state), axis=3).reshape(*v.shape[:2], -1)
        return v.astype(dtype)

    def call(
        self,
        kernel: Callable[..., None],
        batch: int,
        length: int,
        inputs: list[tuple[pl.BlockSpec, jax.Array]],
        outputs: list[tuple[pl.BlockSpec, tuple[int, ...], jnp.dtype]],
    ) -> list[jax.Array]:
        """Runs `kernel(*input_refs, *output_refs, state_ref)` over batch, blocks of heads and chunks.

        The chunks come in order, one after the other: state_ref (R·P, N) float32 keeps what one left for the next.
        """
        return pl.pallas_call(
            kernel,
            grid=(batch, self.blocks, length // self.chunk),
            in_specs=[spec for spec, _ in inputs],
            out_specs=[spec for spec, _, _ in outputs],
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outputs],
            scratch_shapes=[pltpu.VMEM((self.heads * self.head_dim, self.state), jnp.float32)],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
            ),
            interpret=self.interpret,
        )(*(array for _, array in inputs))


def layout(x_shape: tuple[int, ...], b_shape: tuple[int, ...], chunk: int, interpret) -> Layout:
    """Cuts x (B, L, H, P) and b (B, L, G, N) into chunks of Q; what the hardware cannot, for the interpreter only."""
    heads, head_dim, (groups, state) = *x_shape[2:], b_shape[2:]
    per_group = heads // groups
    in_block, lanes = _heads_in_block(heads, groups, head_dim, state) or (per_group, per_group * head_dim)
    return Layout(in_block, head_dim, state, chunk, groups, heads // in_block, lanes, interpret)


def _heads_in_block(heads: int, groups: int, head_dim: int, state: int) -> tuple[int, int] | None:
    """R and W: as many heads of one group as a block holds; None if the hardware cannot cut these shapes into blocks.

    Where no number of heads fills lanes, a block is padded to whole ones, if that adds no more than a fourth.
    """

    def fits(r):
        inner = r * head_dim % LANES == 0 or r == heads
        return inner and (state % LANES == 0 or r == heads) and r * head_dim <= _HEAD_LANES

    def padded(r):
        return -(-r * head_dim // LANES) * LANES

    per_group = heads // groups
    divisors = [r for r in range(1, per_group + 1) if per_group % r == 0]
    if whole := max(filter(fits, divisors), default=None):
        return whole, whole * head_dim
    wide = [r for r in divisors if padded(r) <= min(_PADDED_LANES, 1.25 * r * head_dim)]
    return (max(wide), padded(max(wide))) if wide and state % LANES == 0 else None


def chunk_length(length: int, chunk_size: int, interpret, block_size: int = 1) -> int:
    """Q: near chunk_size, a multiple of the block and of the hardware's lanes, or one chunk that holds everything."""
    unit = math.lcm(block_size, SUBLANES if interpret else LANES)
    wanted = min(chunk_size, _LONGEST_CHUNK)
    return min(unit * max(1, wanted // unit), length + -length % SUBLANES)


def unsupported(x_shape: tuple[int, ...], b_shape: tuple[int, ...], chunk: int) -> str | None:
    """Why the hardware cannot run a scan of these shapes, or None."""
    heads, head_dim, (groups, state) = *x_shape[2:], b_shape[2:]
    if _heads_in_block(heads, groups, head_dim, state) is None:
        return (
            f"{heads} heads of {head_dim} in {groups} groups with a state of {state} cannot be cut into blocks of "
            f"{LANES} lanes (the state, and some of a group's heads together, must be multiples of {LANES})"
        )
    if chunk > _LONGEST_CHUNK:
        return f"a chunk of {chunk} positions is longer than {_LONGEST_CHUNK}"
    return None
