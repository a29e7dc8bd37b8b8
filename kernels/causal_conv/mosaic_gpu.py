"""The causal convolutions as Pallas Mosaic GPU kernels (Hopper), forward and backward: every input is read once.

A program takes some channels and walks over its positions, with the last W − 1 inputs in registers; several positions
are loaded before the first of them is needed. The notation is that of tpu.py. Backward, the program walks
W − 1 positions further, and keeps the sums for the gradients of the last W inputs in registers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from twotower_jax.kernels.causal_conv.operands import operands, with_gradients
from twotower_jax.kernels.hardware.hopper import interpreter, not_hopper

_LANES = 128  # Threads of a program.
_POSITIONS = 64  # A program's.
_AT_ONCE = 4  # Positions loaded together.
_WIDEST = 7


class ProgramTiles(NamedTuple):
    """One problem, cut.

    Attributes:
      width: W. channels: of a program. positions: of a program.
      blocks: whether there is a context; the tail then belongs to it.
      limited: whether own and seen are given.
      interpret: run the kernel's operations on any backend.
    """

    width: int
    channels: int
    positions: int
    blocks: bool
    limited: bool
    interpret: bool | plgpu.InterpretGPUParams

    @property
    def sources(self) -> int:
        return 2 if self.blocks else 1

    def load(self, ref) -> jax.Array:
        """A row of the program's channels, as float32."""
        layout = plgpu.Layout.WG_STRIDED((self.channels,), vec_size=self.channels // _LANES)
        return plgpu.load(ref, layout=layout).astype(jnp.float32)


class _Program:
    """What both directions share: the parameters, and the inputs of one position after the other."""

    def __init__(self, cut: ProgramTiles, source_refs, tail_ref, weight_ref, reach_ref):
        self.cut, self.refs, self.tail_ref, self.reach_ref = cut, source_refs, tail_ref, reach_ref
        self.row, self.step = lax.axis_index("row"), lax.axis_index("step")
        self.columns = pl.ds(lax.axis_index("channels") * cut.channels, cut.channels)
        self.length, self.first = source_refs[0].shape[1], self.step * cut.positions
        self.weight = [cut.load(weight_ref.at[d, self.columns]) for d in range(cut.width)]
        self.bias = cut.load(weight_ref.at[cut.width, self.columns])

    def rows(self, ref, position):
        return self.cut.load(ref.at[self.row, jnp.minimum(position, self.length - 1), self.columns])

    def windows(self):
        """The inputs of each source 1 … W − 1 positions before the program's first."""
        found = [
            [self.rows(ref, jnp.maximum(self.first - d, 0)) for d in range(1, self.cut.width)] for ref in self.refs
        ]
        for d in range(1, self.cut.width):
            tail = self.cut.load(self.tail_ref.at[self.row, self.cut.width - 1 - d, self.columns])
            found[-1][d - 1] = _where(self.first == 0, tail, found[-1][d - 1])
        return found

    def reach(self, position):
        """own and seen of a position; None for no limits."""
        if not self.cut.limited:
            return None
        position = jnp.minimum(position, self.length - 1)
        return self.reach_ref[self.row, 0, position], self.reach_ref[self.row, 1, position]

    def inputs(self, windows, reach):
        """in_i,d for each d; windows: of each source, the inputs 0 … W − 1 positions before i."""
        found = [windows[0][0]]
        for d in range(1, self.cut.width):
            x = windows[0][d]
            if reach is not None:
                own, seen = reach
                if self.cut.blocks:
                    x = _where(d <= own, x, windows[1][d])
                x = _where(d <= seen, x, 0.0)
            found.append(x)
        return found

    def sums(self, inputs):
        return sum((w * x for w, x in zip(self.weight, inputs, strict=True)), self.bias)

    def walk(self, count: int, extra_refs, carry, visit):
        """`visit(carry, position, windows, rows of extra_refs) → carry` at `count` positions from the first on."""

        def several(step, carry):
            windows, carry = carry
            start = self.first + step * _AT_ONCE
            new = [[self.rows(ref, start + u) for ref in (*self.refs, *extra_refs)] for u in range(_AT_ONCE)]
            for u, rows in enumerate(new):
                full = [[row, *window] for row, window in zip(rows, windows, strict=False)]
                carry = visit(carry, start + u, full, rows[len(self.refs) :])
                windows = [window[: self.cut.width - 1] for window in full]
            return windows, carry

        return lax.fori_loop(0, -(-count // _AT_ONCE), several, (self.windows(), carry))[1]


def _where(condition, x, y):
    """x or y, rows or numbers, by one number: selections are of arrays of one shape."""
    shape = jnp.broadcast_shapes(jnp.shape(x), jnp.shape(y))
    condition = jnp.broadcast_to(jnp.asarray(condition).astype(jnp.int32), shape) > 0
    return jnp.where(condition, x, y)


def _sigmoid(x):
    return 1 / (1 + jnp.exp(-x))


def _forward_kernel(*refs, cut: ProgramTiles):
    source_refs, (tail_ref, weight_ref, reach_ref, out_ref) = refs[: cut.sources], refs[cut.sources :]
    program = _Program(cut, source_refs, tail_ref, weight_ref, reach_ref)

    def visit(carry, position, windows, _):
        total = program.sums(program.inputs(windows, program.reach(position)))

        @pl.when(position < program.length)
        def _():
            out_ref[program.row, position, program.columns] = (total * _sigmoid(total)).astype(out_ref.dtype)

        return carry

    program.walk(cut.positions, (), 0, visit)


def _backward_kernel(*refs, cut: ProgramTiles):
    source_refs, (tail_ref, weight_ref, reach_ref, dy_ref, dx_ref, dweight_ref, *before_refs) = (
        refs[: cut.sources],
        refs[cut.sources :],
    )
    program = _Program(cut, source_refs, tail_ref, weight_ref, reach_ref)
    end = jnp.minimum(program.first + cut.positions, program.length)
    gradient_refs = [dx_ref, *before_refs[1:]]
    zeros = jnp.zeros_like(program.bias)

    def taken(gradient, reach, d, own):
        if reach is None or d == 0:
            return gradient if own else jnp.zeros_like(gradient)
        gradient = _where(d <= reach[1], gradient, 0.0)
        if cut.blocks:
            gradient = _where((d <= reach[0]) == own, gradient, 0.0)
        return gradient

    def visit(carry, position, windows, rows):
        pulled, by_weight = carry
        reach = program.reach(position)
        inputs = program.inputs(windows, reach)
        total = program.sums(inputs)
        sigmoid = _sigmoid(total)
        gradient = rows[0] * sigmoid * (1 + total * (1 - sigmoid))
        gradient = _where(position < program.length, gradient, 0.0)
        here = _where(position < end, gradient, 0.0)
        by_weight = [v + here * x for v, x in zip(by_weight, [*inputs, jnp.ones_like(here)], strict=True)]
        # pulled[k][d]: the sum so far for the input d positions back.
        pulled = [
            [
                (zeros if d == 0 else sums[d - 1]) + program.weight[d] * taken(gradient, reach, d, k == 0)
                for d in range(cut.width)
            ]
            for k, sums in enumerate(pulled)
        ]
        done = position - (cut.width - 1)
        for ref, sums in zip(gradient_refs, pulled, strict=True):

            @pl.when((done >= program.first) & (done < end))
            def _(ref=ref, sums=sums):
                ref[program.row, done, program.columns] = sums[-1].astype(ref.dtype)

        if before_refs and cut.width > 1:

            @pl.when(done < 0)
            def _():
                before_refs[0][program.row, position, program.columns] = pulled[-1][-1]

        return pulled, by_weight

    pulled = [[zeros] * cut.width for _ in gradient_refs]
    _, by_weight = program.walk(cut.positions + cut.width - 1, (dy_ref,), (pulled, [zeros] * (cut.width + 1)), visit)
    for d, row in enumerate(by_weight):
        dweight_ref[program.row, program.step, d, program.columns] = row


def _call(cut: ProgramTiles, kernel, x, inputs, outputs):
    batch, length, channels = x.shape
    kernel.__name__ = f"convolution{kernel.func.__name__.removesuffix('_kernel')}"
    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs],
        grid=(batch, channels // cut.channels, pl.cdiv(length, cut.positions)),
        grid_names=("row", "channels", "step"),
        interpret=interpreter(cut.interpret),
    )(*inputs)


def _forward(cut: ProgramTiles, x, before, weight, reach):
    """(B, L, C) of x (B, L, C); before: the context if there are blocks, and the tail (B, ≥ 1, C).

    weight: (W + 1, C) float32, by distance, then the bias. reach: (B, 2, L) int32, own and seen.
    """
    *context, tail = before
    kernel = functools.partial(_forward_kernel, cut=cut)
    (out,) = _call(cut, kernel, x, (x, *context, tail, weight, reach), [(x.shape, x.dtype)])
    return out


def _backward(cut, x, before, weight, reach, dy, wanted):
    *context, tail = before
    steps = pl.cdiv(x.shape[1], cut.positions)
    outputs = [(x.shape, x.dtype), ((x.shape[0], steps, *weight.shape), jnp.float32)]
    if wanted:
        outputs += [(tail.shape, jnp.float32), *((v.shape, v.dtype) for v in context)]
    kernel = functools.partial(_backward_kernel, cut=cut)
    return _call(cut, kernel, x, (x, *context, tail, weight, reach, dy), outputs)


_conv = with_gradients(_forward, _backward)


def _run(x, context, weight, bias, block_size, tail, before, positions, interpret):
    width, channels = weight.shape
    in_program = next(n for n in (4 * _LANES, 2 * _LANES, _LANES) if channels % n == 0)
    given = operands(x, weight, bias, tail, before, block_size)
    limited = given.reach is not None
    cut = ProgramTiles(width, in_program, positions, context is not None, limited, interpret)
    # A kernel's arrays are not empty.
    tail = given.tail if width > 1 else jnp.zeros((x.shape[0], 1, channels), x.dtype)
    reach = given.reach if limited else jnp.zeros((1, 2, 1), jnp.int32)
    before = (tail,) if context is None else (context.astype(x.dtype), tail)
    return _conv(cut, x, before, given.weight, reach)


def unsupported(x, *arguments) -> str | None:
    """Why the kernels cannot run these shapes of either convolution, or None."""
    # The context comes before the weight in one, the block's size after the bias.
    width, channels = next(v.shape for v in arguments if len(v.shape) == 2)
    if channels % _LANES:
        return f"{channels} channels are not a multiple of {_LANES}"
    if width > _WIDEST:
        return f"a width of {width} is more than {_WIDEST}"
    return not_hopper()


def causal_conv(x, weight, bias, tail=None, before=None, *, positions=_POSITIONS, interpret=False):
    """`kernels.causal_conv`, same arguments and results. `interpret` runs it on any backend.

    positions: that a program takes.
    """
    return _run(x, None, weight, bias, None, tail, before, positions, interpret)


def block_causal_conv(
    x, context, weight, bias, block_size, tail=None, before=None, *, positions=_POSITIONS, interpret=False
):
    """`kernels.block_causal_conv`, same arguments and results."""
    return _run(x, context, weight, bias, block_size, tail, before, positions, interpret)
