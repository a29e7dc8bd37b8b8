"""`kernels.block_scan` as one Pallas TPU kernel.

One grid step takes all heads of one group of one row: its part of z, x, B and C, its state, and its part of the norm,
so that nothing is exchanged between steps. x, B and C are three blocks of the one array xBC. Where a group's channels
do not fill whole lanes, x is a copy in which each group is padded to some that do, as are z and the parameters.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from twotower_jax.kernels.block_scan import LONGEST_BLOCK
from twotower_jax.kernels.hardware.tpu_layout import LANES, SUBLANES, VMEM_BYTES, Layout
from twotower_jax.kernels.numerics.log_decay import Sum, cumulative
from twotower_jax.kernels.ssd.tpu import Chunk


def _convolved(ref, tail_ref, weight_ref, bias_ref):
    """SiLU(conv) of one block of channels, (S, ·), in the dtype of its inputs."""
    x = ref[...]
    padded = jnp.concatenate([tail_ref[...].astype(jnp.float32), x.astype(jnp.float32)], axis=0)
    total = bias_ref[...]
    for k in range(weight_ref.shape[0]):
        total = total + padded[k : k + x.shape[0]] * weight_ref[k : k + 1]
    return (total * jax.nn.sigmoid(total)).astype(x.dtype)


def _kernel(*refs, cut: Layout, epsilon: float):
    parts, (z_ref, skip_ref, norm_ref, dt_ref, coarse_ref, fine_ref, state_ref), outputs = (
        refs[:12],
        refs[12:19],
        refs[19:],
    )
    x, b, c = (_convolved(*parts[i : i + 4]) for i in (0, 4, 8))
    x, skip, norm = (v[cut.of_heads] for v in (x, skip_ref, norm_ref))
    chunk = Chunk(cut, dt_ref[...], Sum(coarse_ref[...], fine_ref[...]))
    state, z = state_ref[...], z_ref[cut.of_heads].astype(jnp.float32)
    y = chunk.output(x, b, c, state) + skip * x.astype(jnp.float32)
    gated = y * (z * jax.nn.sigmoid(z))
    scale = jax.lax.rsqrt(jnp.mean(gated * gated, axis=1, keepdims=True) + epsilon)
    out_ref, *next_ref = outputs
    out_ref[cut.of_heads] = (gated * scale * norm).astype(out_ref.dtype)
    for ref in next_ref:
        ref[...] = chunk.next_state(x, b, state)


def unsupported(z, xbc, dt, log_decay, weights, tail, state, *, groups, epsilon, next_state) -> str | None:
    """Why the hardware cannot run these shapes, or None."""
    per_group, state_size = z.shape[2] // groups, state.shape[3]
    if z.shape[1] > LONGEST_BLOCK:
        return f"a block of {z.shape[1]} tokens is longer than {LONGEST_BLOCK}"
    if per_group < LANES or state_size % LANES or z.shape[2] % state_size:
        return (
            f"{per_group} channels of a group with a state of {state_size} (made for {LANES} or more, and states that "
            f"are multiples of {LANES} and divide {z.shape[2]} channels)"
        )
    return None


def block_scan(z, xbc, dt, log_decay, weights, tail, state, *, groups, epsilon, next_state, interpret=False):
    """`kernels.block_scan`, same arguments and results."""
    batch, length, inner = z.shape
    heads, head_dim, state_size = state.shape[1:]
    if inner % state_size:  # B and C are found by whole blocks of the state's width.
        raise ValueError(f"block_scan: a state of {state_size} does not divide {inner} channels")
    padded = length + -length % SUBLANES
    width = inner // groups
    lanes = width + -width % (1 if interpret and width < LANES else LANES)
    cut = Layout(heads // groups, head_dim, state_size, padded, groups, groups, lanes, interpret)

    def pad(v):  # Positions with dt = 0 and log_decay = 0.
        return jnp.pad(v, [(0, 0), (0, padded - length), (0, 0)])

    z, xbc, dt, log_decay = pad(z), pad(xbc), pad(dt.astype(jnp.float32)), pad(log_decay.astype(jnp.float32))
    rows = [cut.to_rows(v.reshape(batch, padded, heads)) for v in (dt, *cumulative(log_decay[:, None], padded))]
    kernel_size, channels = weights.conv_weight.shape
    tail = tail[:, tail.shape[1] - (kernel_size - 1) :]
    bias = jnp.zeros(channels) if weights.conv_bias is None else weights.conv_bias
    conv_weight, bias = weights.conv_weight.astype(jnp.float32), bias.astype(jnp.float32)[None]
    skip = jnp.repeat(weights.skip.astype(jnp.float32), head_dim)[None]

    def wide(v):
        """(…, G·R·P) → (…, G·W)."""
        if lanes == width:
            return v
        v = v.reshape(*v.shape[:-1], groups, width)
        v = jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, lanes - width)])
        return v.reshape(*v.shape[:-2], -1)

    def of_xbc(first, lanes, *arrays):
        """xBC, its tail and the convolution's parameters: from block `first` of so many lanes on, one per group."""
        specs = [
            pl.BlockSpec((None, padded, lanes), lambda i, g: (i, 0, first + g)),
            pl.BlockSpec((None, kernel_size - 1, lanes), lambda i, g: (i, 0, first + g)),
            pl.BlockSpec((kernel_size, lanes), lambda i, g: (0, first + g)),
            pl.BlockSpec((1, lanes), lambda i, g: (0, first + g)),
        ]
        return list(zip(specs, arrays, strict=True))

    per_token = pl.BlockSpec((None, padded, lanes), lambda i, g: (i, 0, g))
    per_channel = pl.BlockSpec((1, lanes), lambda i, g: (0, g))
    row = pl.BlockSpec((None, None, heads // groups, padded), lambda i, g: (i, g, 0, 0))
    one_state = pl.BlockSpec((None, None, width, state_size), lambda i, g: (i, g, 0, 0))
    first_b = inner // state_size
    convolution = xbc, tail, conv_weight, bias
    of_x = convolution if lanes == width else [wide(v[..., :inner]) for v in convolution]
    inputs = of_xbc(0, lanes, *of_x)
    inputs += of_xbc(first_b, state_size, *convolution) + of_xbc(first_b + groups, state_size, *convolution)
    inputs += [
        (per_token, wide(z)),
        (per_channel, wide(skip)),
        (per_channel, wide(weights.norm.astype(jnp.float32)[None])),
    ]
    inputs += [(row, v) for v in rows]
    inputs += [(one_state, state.astype(jnp.float32).reshape(batch, groups, width, state_size))]
    outputs = [(per_token, jax.ShapeDtypeStruct((batch, padded, groups * lanes), z.dtype))]
    if next_state:
        outputs.append((one_state, jax.ShapeDtypeStruct((batch, groups, width, state_size), jnp.float32)))
    out, *last = pl.pallas_call(
        functools.partial(_kernel, cut=cut, epsilon=epsilon),
        grid=(batch, groups),
        in_specs=[spec for spec, _ in inputs],
        out_specs=[spec for spec, _ in outputs],
        out_shape=[shape for _, shape in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_BYTES),
        interpret=interpret,
    )(*(array for _, array in inputs))
    out = cut.heads_of(out[:, :length]).reshape(batch, length, inner)
    return out, last[0].reshape(state.shape) if next_state else None
