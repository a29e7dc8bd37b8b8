"""The causal convolutions as Pallas TPU kernels, forward and backward: every input is read once.

A grid step takes Q positions of some channels, and of their neighbors as many rows as one tile of the hardware has, so
that the steps are independent of one another. With d the distance of an input, w_d its weight, own_i and seen_i how
many inputs before position i are the block's own, and may be read at all:

    in_i,d = x_{i-d} if d ≤ own_i else context_{i-d}, or 0 if d > seen_i          u_i = bias + Σ_d w_d in_i,d
    g_i    = dy_i · SiLU'(u_i)          dx_s = Σ_d w_d g_{s+d} over the d that are at most own_{s+d} and seen_{s+d}

and the gradient of the context the same over the d with own_{s+d} < d ≤ seen_{s+d}. u is computed again, also at the
positions after a step's own, which its gradients need.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from twotower_jax.kernels.causal_conv.operands import operands, with_gradients
from twotower_jax.kernels.hardware import tpu
from twotower_jax.kernels.hardware.tpu_layout import LANES, VMEM_BYTES

_CHANNELS, _POSITIONS = 512, 512  # The most that one grid step takes.
_HALO = 16  # Rows of a neighbor: one tile of bfloat16.
_WIDEST = 7  # So that the gradients of a channel's weights and bias are eight rows.


class StepTiles(NamedTuple):
    """One problem, cut.

    Attributes:
      width: W. channels: of a step. positions: Q. steps: L/Q.
      blocks: whether there is a context; the tail then belongs to it.
      limited: whether own and seen are given.
      interpret: run the kernel's operations on any backend.
    """

    width: int
    channels: int
    positions: int
    steps: int
    blocks: bool
    limited: bool
    interpret: bool | pltpu.InterpretParams

    def main(self) -> pl.BlockSpec:
        """A step's part of (B, L, C): (Q, channels)."""
        return pl.BlockSpec((None, self.positions, self.channels), lambda i, c, k: (i, k, c))

    def left(self) -> pl.BlockSpec:
        """The rows of (B, L, C) before a step's."""
        ratio = self.positions // _HALO
        return pl.BlockSpec((None, _HALO, self.channels), lambda i, c, k: (i, jnp.maximum(k * ratio - 1, 0), c))

    def right(self) -> pl.BlockSpec:
        """The rows of (B, L, C) after a step's."""
        ratio, last = self.positions // _HALO, self.steps * self.positions // _HALO - 1
        return pl.BlockSpec((None, _HALO, self.channels), lambda i, c, k: (i, jnp.minimum((k + 1) * ratio, last), c))

    def first(self) -> pl.BlockSpec:
        """A step's part of (B, halo, C)."""
        return pl.BlockSpec((None, _HALO, self.channels), lambda i, c, k: (i, 0, c))

    def weights(self) -> pl.BlockSpec:
        """A step's part of (8, C): the weights by distance, then the bias."""
        return pl.BlockSpec((8, self.channels), lambda i, c, k: (0, c))

    def reach(self) -> pl.BlockSpec:
        """A step's part of (B, 2, L)."""
        return pl.BlockSpec((None, 2, self.positions), lambda i, c, k: (i, 0, k))

    def reach_right(self) -> pl.BlockSpec:
        lanes = min(LANES, self.positions)
        ratio, last = self.positions // lanes, self.steps * self.positions // lanes - 1
        return pl.BlockSpec((None, 2, lanes), lambda i, c, k: (i, 0, jnp.minimum((k + 1) * ratio, last)))

    def per_step(self) -> pl.BlockSpec:
        """A step's part of (B, L/Q, 8, C)."""
        return pl.BlockSpec((None, None, 8, self.channels), lambda i, c, k: (i, k, 0, c))


class _Window:
    """What the positions of a step, and some after them, read."""

    def __init__(self, cut: StepTiles, count: int, left_ref, parts, reach):
        """left_ref: the rows before. parts: of x, and of the context if there are blocks, the rows from 0 on.

        reach: (rows, 2), own and seen, or None.
        """
        self.cut, self.count, self.reach = cut, count, reach
        self.rows = [jnp.concatenate([left_ref[i], *part], axis=0) for i, part in enumerate(parts)]

    def own(self, d: int) -> jax.Array:
        return self.reach[:, :1] >= d

    def seen(self, d: int) -> jax.Array:
        return self.reach[:, 1:] >= d

    def inputs(self, d: int) -> jax.Array:
        """in_i,d at every position."""
        x, *context = [rows[_HALO - d : _HALO - d + self.count] for rows in self.rows]
        if self.reach is None or d == 0:
            return x
        if context:
            x = jnp.where(self.own(d), x, context[0])
        return jnp.where(self.seen(d), x, 0.0)

    def sums(self, weight) -> jax.Array:
        """u."""
        total = weight[self.cut.width :][:1]
        for d in range(self.cut.width):
            total = total + self.inputs(d) * weight[d : d + 1]
        return total

    def taken(self, gradient, d: int, own: bool) -> jax.Array:
        """The gradient where in_i,d was the block's own, or the context's."""
        if self.reach is None or d == 0:
            return gradient if own else jnp.zeros_like(gradient)
        taken = self.seen(d)
        if self.cut.blocks:
            taken = taken & (self.own(d) if own else ~self.own(d))
        return jnp.where(taken, gradient, 0.0)


def _float(ref):
    return ref[...].astype(jnp.float32)


def _lefts(cut: StepTiles, left_refs, tail_ref):
    """The rows before, of x and of the context: of these, those before the first step are the tail."""
    at_start = pl.program_id(2) == 0
    lefts = [_float(ref) for ref in left_refs]
    lefts[-1] = jnp.where(at_start, _float(tail_ref), lefts[-1])
    return lefts


def _forward_kernel(*refs, cut: StepTiles):
    sources = 2 if cut.blocks else 1
    mains, lefts, (tail_ref, weight_ref), (*reach_ref, out_ref) = (
        refs[:sources],
        refs[sources : 2 * sources],
        refs[2 * sources : 2 * sources + 2],
        refs[2 * sources + 2 :],
    )
    (reach,) = tpu.columns(reach_ref[0][...]) if reach_ref else (None,)
    window = _Window(cut, cut.positions, _lefts(cut, lefts, tail_ref), [[_float(ref)] for ref in mains], reach)
    total = window.sums(weight_ref[...])
    out_ref[...] = (total * jax.nn.sigmoid(total)).astype(out_ref.dtype)


def _backward_kernel(*refs, cut: StepTiles, with_context: bool):
    sources = 2 if cut.blocks else 1
    mains, lefts, rights, refs = *(refs[i * sources : (i + 1) * sources] for i in range(3)), refs[3 * sources :]
    tail_ref, weight_ref, dy_ref, dy_right_ref, *refs = refs
    reach_refs, (dx_ref, dweight_ref, *context_refs) = (refs[:2], refs[2:]) if cut.limited else ([], refs)
    step, count, weight = pl.program_id(2), cut.positions + _HALO, weight_ref[...]
    reach = None
    if reach_refs:
        ((main,), (right,)) = (tpu.columns(ref[...]) for ref in reach_refs)
        reach = jnp.concatenate([main, right[:_HALO]], axis=0)
    parts = [[_float(main), _float(right)] for main, right in zip(mains, rights, strict=True)]
    window = _Window(cut, count, _lefts(cut, lefts, tail_ref), parts, reach)
    # After the last step there is nothing.
    dy_right = jnp.where(step == cut.steps - 1, 0.0, _float(dy_right_ref))
    total = window.sums(weight)
    sigmoid = jax.nn.sigmoid(total)
    gradient = jnp.concatenate([_float(dy_ref), dy_right], axis=0) * sigmoid * (1 + total * (1 - sigmoid))

    here = gradient[: cut.positions]
    by_weight = [jnp.sum(here * window.inputs(d)[: cut.positions], axis=0, keepdims=True) for d in range(cut.width)]
    by_weight += [jnp.sum(here, axis=0, keepdims=True)]
    by_weight += [jnp.zeros_like(here[:1])] * (8 - len(by_weight))
    dweight_ref[...] = jnp.concatenate(by_weight, axis=0)

    def pulled(own):
        """The gradient of the inputs at this step's positions, and at the rows of the tail."""
        at, before = 0.0, 0.0
        for d in range(cut.width):
            taken = window.taken(gradient, d, own)
            at += weight[d : d + 1] * taken[d : d + cut.positions]
            padded = jnp.concatenate([jnp.zeros((_HALO, taken.shape[1]), taken.dtype), taken[:_HALO]], axis=0)
            before += weight[d : d + 1] * padded[d : d + _HALO]
        return at, before

    dx, dtail = pulled(own=True)
    dx_ref[...] = dx.astype(dx_ref.dtype)
    if cut.blocks and with_context:
        dcontext, dtail = pulled(own=False)
        context_refs[1][...] = dcontext.astype(context_refs[1].dtype)
    if context_refs:

        @pl.when(step == 0)
        def _():
            context_refs[0][...] = dtail


def _call(cut: StepTiles, kernel, batch: int, channels: int, inputs, outputs):
    return pl.pallas_call(
        kernel,
        grid=(batch, channels // cut.channels, cut.steps),
        in_specs=[spec for spec, _ in inputs],
        out_specs=[spec for spec, _, _ in outputs],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=cut.interpret,
    )(*(array for _, array in inputs))


def _sources(cut: StepTiles, sources, *specs):
    return [(spec, v) for spec in specs for v in sources]


def _forward(cut: StepTiles, x, before, weight, reach):
    """(B, L, C) of x (B, L, C); before: the context if there are blocks, and the tail (B, halo, C).

    weight: (8, C) float32, by distance, then the bias. reach: (B, 2, L) float32, own and seen, or None.
    """
    *context, tail = before
    inputs = _sources(cut, (x, *context), cut.main(), cut.left())
    inputs += [(cut.first(), tail), (cut.weights(), weight)]
    inputs += [(cut.reach(), reach)] if cut.limited else []
    outputs = [(cut.main(), x.shape, x.dtype)]
    (out,) = _call(cut, functools.partial(_forward_kernel, cut=cut), x.shape[0], x.shape[2], inputs, outputs)
    return out


def _backward(cut, x, before, weight, reach, dy, wanted):
    *context, tail = before
    batch, _, channels = x.shape
    inputs = _sources(cut, (x, *context), cut.main(), cut.left(), cut.right())
    inputs += [(cut.first(), tail), (cut.weights(), weight), (cut.main(), dy), (cut.right(), dy)]
    inputs += [(cut.reach(), reach), (cut.reach_right(), reach)] if cut.limited else []
    outputs = [
        (cut.main(), x.shape, x.dtype),
        (cut.per_step(), (batch, cut.steps, 8, channels), jnp.float32),
    ]
    outputs += [(cut.first(), tail.shape, jnp.float32)] if wanted else []
    outputs += [(cut.main(), v.shape, v.dtype) for v in context] if wanted else []
    kernel = functools.partial(_backward_kernel, cut=cut, with_context=wanted)
    return _call(cut, kernel, batch, channels, inputs, outputs)


_conv = with_gradients(_forward, _backward)


def _run(x, context, weight, bias, block_size, tail, before, positions, interpret):
    batch, length, channels = x.shape
    width = weight.shape[0]
    unit = _HALO if interpret else LANES
    positions = min(positions, length + -length % unit)
    padding = -length % positions
    limited = context is not None or before is not None
    in_step = next((n for n in (_CHANNELS, 256, LANES) if channels % n == 0), channels)
    steps = (length + padding) // positions
    cut = StepTiles(width, in_step, positions, steps, context is not None, limited, interpret)

    def pad(v):
        return jnp.pad(v, [(0, 0), (0, padding), (0, 0)]) if padding else v

    given = operands(x, weight, bias, tail, before, block_size)
    reach = None if given.reach is None else jnp.pad(given.reach.astype(jnp.float32), [(0, 0), (0, 0), (0, padding)])
    tail = jnp.pad(given.tail, [(0, 0), (_HALO - (width - 1), 0), (0, 0)])
    rows = jnp.pad(given.weight, [(0, 8 - width - 1), (0, 0)])
    sources = (tail,) if context is None else (pad(context.astype(x.dtype)), tail)
    return _conv(cut, pad(x), sources, rows, reach)[:, :length]


def _unsupported(channels: int, width: int) -> str | None:
    if channels % LANES:
        return f"{channels} channels are not a multiple of {LANES}"
    if width > _WIDEST:
        return f"a width of {width} is more than {_WIDEST}"
    return None


def unsupported(x, *arguments) -> str | None:
    """Why the hardware cannot run these shapes of either convolution, or None."""
    # The context comes before the weight in one, the block's size after the bias.
    weight = next(v for v in arguments if len(v.shape) == 2)
    return _unsupported(x.shape[2], weight.shape[0])


def causal_conv(x, weight, bias, tail=None, before=None, *, positions=_POSITIONS, interpret=False):
    """`kernels.causal_conv`, same arguments and results. `interpret` runs it on any backend, with any shapes.

    positions: that a grid step takes at most; a multiple of 128, or of 16 under the interpreter.
    """
    return _run(x, None, weight, bias, None, tail, before, positions, interpret)


def block_causal_conv(
    x, context, weight, bias, block_size, tail=None, before=None, *, positions=_POSITIONS, interpret=False
):
    """`kernels.block_causal_conv`, same arguments and results."""
    return _run(x, context, weight, bias, block_size, tail, before, positions, interpret)
