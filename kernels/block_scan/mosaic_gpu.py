"""`kernels.block_scan` as a Pallas Mosaic GPU kernel (Hopper), and a pass of XLA's after it.

One program takes a few heads of one group of one row, each with its state (P, N), which it reads once, straight into
registers, and multiplies there. With h the state, a the sums of log-decays from the block's left edge, w_j = dt_j
exp(a_S − a_j), and everything transposed, so that 64 of the P places of a head are the 64 rows of a warpgroup's product
and a block of few tokens its few columns:

    M_ji = exp(a_i − a_j) dt_j (B_j·C_i) for j < i,  dt_i (B_i·C_i) + D for j = i,  0 for j > i
    yᵀ   = (h Cᵀ) ∘ exp(a_i) + xᵀ M           h' = exp(a_S) h + (w ∘ x)ᵀ B

    C, Cᵀ      c_smem, c_columns     (S, N) of the group, after the convolution
    B          b_smem, b_rows        (S, N)
    B·C        scores                (64, S), B_j·C_i with j along the rows
    a          coarse + fine         (64, S), of i along the columns; by rows in sums_smem
    M          mixing_smem           (64, S), of one head
    x, w ∘ x   x_smem, weighted_smem (S, 64), of 64 places of the head
    h          state                 (64, N), of these places
    h Cᵀ, xᵀ M across, within        (64, S)

Where P is no multiple of 64, the last product of a head begins earlier, and computes some rows once more.

Products are as exact as float32: operands of that type are cut into parts (numerics/split.py), the state's in
registers.

The norm couples all heads of a group. Programs of whole groups would leave most of the processors idle at small
batches, where this op is bound by latency; programs of a cluster could exchange their sums, but not when interpreted.
So y leaves the kernel without gate and norm, and XLA fuses these into a second pass over y and z. That moves 8 S bytes
per channel, mostly inside the L2 cache, against the state's 512 (1024 if the next state is wanted).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from twotower_jax.kernels.block_scan import LONGEST_BLOCK
from twotower_jax.kernels.hardware import versions
from twotower_jax.kernels.hardware.hopper import interpreter, not_hopper
from twotower_jax.kernels.numerics.gated_norm import gated_norm
from twotower_jax.kernels.numerics.log_decay import two_parts
from twotower_jax.kernels.numerics.split import PARTS
from twotower_jax.kernels.numerics.split import parts as _float32_parts

_ROWS = 64  # Rows of one product of a warpgroup; positions are padded to as many where they are rows.
_UNIT = 16  # Positions are padded to multiples of this where they are summed over.
_SHARED_BYTES = 220 * 2**10  # A program may have 227 KiB.
_PROGRAMS = 4 * 132  # At least as many, if there are: four for each processor of an H100 or H200.
_MOST_CHANNELS = 256  # Channels of a program's heads: as many as a copy takes.

# What is given for each position, step size and log-decay in two parts; and the sums of the last two.
_DT, _COARSE, _FINE = range(3)


def _heads_per_program(batch: int, heads: int, per_group: int, head_dim: int, programs: int) -> int:
    """As many heads of one group as leave so many programs; they share the group's convolutions and products B·C."""
    fitting = [r for r in range(1, _MOST_CHANNELS // head_dim + 1) if per_group % r == 0]
    return max((r for r in fitting if batch * heads // r >= programs), default=1)


def _first_rows(head_dim: int) -> list[int]:
    """Where the products of a head begin among its P places."""
    return [*range(0, head_dim - _ROWS, _ROWS), head_dim - _ROWS]


def _shared_bytes(length: int, state: int, head_dim: int, heads: int, width: int, dtype: jnp.dtype) -> int:
    padded, copies = length + -length % _UNIT, 1 if dtype == jnp.bfloat16 else 3
    raw = (width - 1 + padded) * (2 * state + heads * head_dim) * dtype.itemsize
    return raw + 2 * (copies * (_ROWS + padded) * state + (3 + copies) * padded * _ROWS + 3 * _ROWS * padded)


def _parts(x: jax.Array) -> list[jax.Array]:
    """bfloat16 arrays whose sum is x, the largest first."""
    return [x] if x.dtype == jnp.bfloat16 else _float32_parts(x)


def _product(shape: tuple[int, int], a: list, b: list) -> jax.Array:
    """Σ a · Σ b in float32, less the products of parts that are below its last bit."""

    def passes(accumulator):
        # The smallest first.
        for total in reversed(range(PARTS)):
            for i, one in enumerate(a):
                if 0 <= total - i < len(b):
                    plgpu.wgmma(accumulator, one, b[total - i])
        return accumulator[...]  # Awaits them.

    return pl.run_scoped(passes, plgpu.ACC(shape))


def _tiled(shape: tuple[int, int], swizzle: int):
    """Shared memory of a bfloat16 matrix, laid out as the matrix unit reads it."""
    transforms = plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def _kernel(
    xbc_ref, tail_ref, weight_ref, bias_ref, rows_ref, skip_ref, state_ref, y_ref, *refs,
    heads: int, per_group: int, length: int, inner: int, swizzle: int, next_state: bool,
):  # fmt: skip
    next_ref, scratch = (refs[0], refs[1:]) if next_state else (None, refs)
    raw_x, raw_b, raw_c, b_smem, c_smem, x_smem, weighted_smem, mixing_smem, sums_smem, state_smem, barrier = scratch
    row, block = lax.axis_index("row"), lax.axis_index("heads")
    head_dim, state_size = state_ref.shape[2:]
    width, padded = weight_ref.shape[0], x_smem[0].shape[0]
    group, groups = block * heads // per_group, state_ref.shape[1] // per_group
    first_x = block * (heads * head_dim)
    first_b, first_c = (inner + (i * groups + group) * state_size for i in range(2))

    square = (_ROWS, padded)
    j = plgpu.broadcasted_iota(jnp.int32, square, 0, layout=plgpu.Layout.WGMMA)
    i = plgpu.broadcasted_iota(jnp.int32, square, 1, layout=plgpu.Layout.WGMMA)

    def start_copies():
        for raw, start in ((raw_x, first_x), (raw_b, first_b), (raw_c, first_c)):
            columns = pl.ds(start, raw.shape[1])
            if width > 1:
                plgpu.copy_gmem_to_smem(tail_ref.at[row, :, columns], raw.at[pl.ds(0, width - 1)], barrier)
            plgpu.copy_gmem_to_smem(xbc_ref.at[row, :, columns], raw.at[pl.ds(width - 1, length)], barrier)

    def states(r, first):
        # Starts the longest wait, which nothing before the first product needs.
        rows = state_ref.at[row, block * heads + r, pl.ds(first, _ROWS)]
        return plgpu.load(rows, layout=plgpu.Layout.WGMMA, optimized=False)

    def convolved(raw, offset, first, count):
        """SiLU(conv) of `count` channels from `first` on, (S, count) in the inputs' dtype, zeros at padding."""
        layout = plgpu.Layout.SMEM_GMEM_COPY((padded, count), jnp.bfloat16, swizzle)

        def per_channel(ref):
            vector = plgpu.load(ref, layout=layout.reduce(0), optimized=False).astype(jnp.float32)
            return plgpu.layout_cast(lax.broadcast_in_dim(vector, (padded, count), (1,)), layout)

        columns = pl.ds(first, count)
        total = per_channel(bias_ref.at[columns])
        for k in range(width):
            taken = raw.at[pl.ds(k, padded), pl.ds(offset, count)]
            inputs = plgpu.load(taken, layout=layout, optimized=False).astype(jnp.float32)
            total += inputs * per_channel(weight_ref.at[k, columns])
        out = total * (1 / (1 + jnp.exp(-total)))
        if padded > length:
            position = plgpu.broadcasted_iota(jnp.int32, (padded, count), 0, layout=layout)
            out = jnp.where(position < length, out, 0.0)
        return out.astype(raw.dtype), layout

    def of_registers(values):
        """Left operands, which the matrix unit takes from registers, but the interpreter only from shared memory."""
        if not state_smem:
            return values
        for ref, value in zip(state_smem, values, strict=True):
            ref[...] = value
        plgpu.commit_smem()
        return state_smem

    def down(vector):
        """A number per row."""
        return lax.broadcast_in_dim(vector, square, (0,))

    def along(ref):
        """A number per column."""
        vector = plgpu.load(ref.at[pl.ds(0, padded)], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
        return lax.broadcast_in_dim(vector, square, (1,))

    def put(refs, value):
        for ref, part in zip(refs, _parts(value), strict=True):
            ref[...] = part

    def share_b_and_c():
        """B and C of the group to shared memory; returns B·C (64, S), Cᵀ and B as operands."""
        for raw, start, copies in ((raw_b, first_b, b_smem), (raw_c, first_c, c_smem)):
            for ref, part in zip(copies, _parts(convolved(raw, 0, start, state_size)[0]), strict=True):
                ref[pl.ds(0, padded), :] = part
        plgpu.commit_smem()
        c_columns = [ref.transpose((1, 0)) for ref in c_smem]
        b_rows = [ref.at[pl.ds(0, padded)] for ref in b_smem]
        return _product((_ROWS, padded), b_smem, c_columns), c_columns, b_rows

    def mix(h, scores):
        """M of a head to shared memory; returns the two parts of a by columns (64, S)."""
        sums = [jnp.sum(jnp.where(i <= j, along(rows_ref.at[row, h, k]), 0.0), axis=1) for k in (_COARSE, _FINE)]
        for k, vector in enumerate(sums):
            sums_smem[k, :] = vector
        coarse, fine = (along(sums_smem.at[k]) for k in range(2))
        # Masked before the exponential, which would overflow below the diagonal.
        difference = (coarse - down(sums[0])) + (fine - down(sums[1]))
        decay = jnp.exp(jnp.where(j <= i, difference, -jnp.inf))
        dt = plgpu.load(rows_ref.at[row, h, _DT], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
        mixing = scores * decay * down(dt) + jnp.where(j == i, skip_ref[h].astype(jnp.float32), 0.0)
        # Below the last position the scores are of rows that nobody wrote.
        put(mixing_smem, jnp.where(j <= i, mixing, 0.0))
        return coarse, fine

    def share_x(r, h, first):
        """x of 64 places of a head, and w ∘ x if it is needed, to shared memory; returns a_S in two parts."""
        offset = r * head_dim + first
        x, layout = convolved(raw_x, offset, first_x + offset, _ROWS)
        put(x_smem, x)
        if not next_state:
            return None
        last = [sums_smem[k, _ROWS - 1] for k in range(2)]

        def of_rows(ref):
            return plgpu.load(ref.at[pl.ds(0, padded)], layout=layout.reduce(1), optimized=False)

        to_edge = (last[0] - of_rows(sums_smem.at[0])) + (last[1] - of_rows(sums_smem.at[1]))
        weights = of_rows(rows_ref.at[row, h, _DT]) * jnp.exp(to_edge)
        weights = plgpu.layout_cast(lax.broadcast_in_dim(weights, x.shape, (0,)), layout)
        put(weighted_smem, x.astype(jnp.float32) * weights)
        return last

    start_copies()
    state = states(0, 0)
    plgpu.barrier_wait(barrier)
    scores, c_columns, b_rows = share_b_and_c()
    for r in range(heads):
        h = block * heads + r
        if r:
            state = states(r, 0)
        coarse, fine = mix(h, scores)
        for first in _first_rows(head_dim):
            if first:
                state = states(r, first)
            last = share_x(r, h, first)
            plgpu.commit_smem()
            across = _product(square, of_registers(_parts(state)), c_columns)
            mixing_rows = [ref.at[pl.ds(0, padded)] for ref in mixing_smem]
            within = _product(square, [ref.transpose((1, 0)) for ref in x_smem], mixing_rows)
            y = across * jnp.exp(coarse + fine) + within
            places = pl.ds(first, _ROWS)
            versions.store(y_ref.at[row, h, places], y)
            if next_state:
                added = _product(state.shape, [ref.transpose((1, 0)) for ref in weighted_smem], b_rows)
                kept = state * jnp.exp(last[0] + last[1])
                versions.store(next_ref.at[row, h, places], kept + added)


def unsupported(z, xbc, dt, log_decay, weights, tail, state, *, groups, epsilon, next_state) -> str | None:
    """Why the hardware cannot run these shapes, or None."""
    length, width = z.shape[1], weights.conv_weight.shape[0]
    heads, head_dim, state_size = state.shape[1:]
    if not 0 < length <= LONGEST_BLOCK:
        return f"a block of {length} tokens is not one of 1 to {LONGEST_BLOCK}"
    if head_dim % _UNIT or not _ROWS <= head_dim <= _MOST_CHANNELS or state_size % 64 or state_size > 256:
        return (
            f"heads of {head_dim} with a state of {state_size}: only multiples of {_UNIT} from {_ROWS} to "
            f"{_MOST_CHANNELS} with 64, 128, 192 or 256"
        )
    in_program = _heads_per_program(z.shape[0], heads, heads // groups, head_dim, _PROGRAMS)
    needed = _shared_bytes(length, state_size, head_dim, in_program, width, xbc.dtype)
    if needed > _SHARED_BYTES:
        return f"{length} tokens of {xbc.dtype} take {needed} bytes of shared memory, more than {_SHARED_BYTES}"
    return not_hopper()


def block_scan(
    z, xbc, dt, log_decay, weights, tail, state,
    *, groups, epsilon, next_state, programs=_PROGRAMS, interpret=False,
):  # fmt: skip
    """`kernels.block_scan`, same arguments and results. Programs take several heads where so many programs are left."""
    batch, length, inner = z.shape
    heads, head_dim, state_size = state.shape[1:]
    padded = length + -length % _UNIT
    width, channels = weights.conv_weight.shape
    in_program = _heads_per_program(batch, heads, heads // groups, head_dim, programs)
    swizzle = min(64, plgpu.find_swizzle(padded * 16))

    rows = jnp.stack([dt.astype(jnp.float32), *two_parts(log_decay.astype(jnp.float32), _ROWS)])
    rows = jnp.pad(jnp.moveaxis(rows, (1, 3, 0, 2), (0, 1, 2, 3)), [(0, 0)] * 3 + [(0, _ROWS - length)])
    tail = tail[:, tail.shape[1] - (width - 1) :].astype(xbc.dtype)
    bias = jnp.zeros(channels, jnp.float32) if weights.conv_bias is None else weights.conv_bias

    copies = 1 if xbc.dtype == jnp.bfloat16 else 3
    raw = width - 1 + padded
    scratch = [
        plgpu.SMEM((raw, in_program * head_dim), xbc.dtype),
        plgpu.SMEM((raw, state_size), xbc.dtype),
        plgpu.SMEM((raw, state_size), xbc.dtype),
        [_tiled((_ROWS, state_size), swizzle)] * copies,
        [_tiled((padded, state_size), swizzle)] * copies,
        [_tiled((padded, _ROWS), swizzle)] * copies,
        [_tiled((padded, _ROWS), swizzle)] * (3 if next_state else 0),
        [_tiled((_ROWS, padded), swizzle)] * 3,
        plgpu.SMEM((2, _ROWS), jnp.float32),
        [_tiled((_ROWS, state_size), swizzle)] * (3 if interpret else 0),
        plgpu.Barrier(num_arrivals=6 if width > 1 else 3),
    ]
    outputs = [jax.ShapeDtypeStruct((batch, heads, head_dim, padded), jnp.float32)]
    if next_state:
        outputs.append(jax.ShapeDtypeStruct(state.shape, jnp.float32))
    body = functools.partial(
        _kernel,
        heads=in_program,
        per_group=heads // groups,
        length=length,
        inner=inner,
        swizzle=swizzle,
        next_state=next_state,
    )
    body.__name__ = "block_scan"  # As profilers and compilers call it.
    kernel = plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=scratch,
        grid=(batch, heads // in_program),
        grid_names=("row", "heads"),
        interpret=interpreter(interpret),
    )
    y, *last = kernel(
        xbc,
        tail,
        weights.conv_weight,
        bias,
        rows,
        weights.skip,
        state.astype(jnp.float32),
    )
    y = jnp.moveaxis(y[..., :length], 3, 1)
    out = gated_norm(y, z, weights.norm, epsilon, groups)
    return out, last[0] if next_state else None
