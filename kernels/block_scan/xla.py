"""`kernels.block_scan` as the ops that it fuses."""

from twotower_jax.kernels.block_scan import add_skip, split_channels
from twotower_jax.kernels.causal_conv.xla import causal_conv
from twotower_jax.kernels.numerics.gated_norm import gated_norm
from twotower_jax.kernels.ssd.xla import ssd


def block_scan(z, xbc, dt, log_decay, weights, tail, state, *, groups, epsilon, next_state):
    """`kernels.block_scan`, same arguments and results."""
    xbc = causal_conv(xbc, weights.conv_weight, weights.conv_bias, tail)
    x, b, c = split_channels(xbc, z.shape[-1], *state.shape[2:])
    y, last = ssd(x, dt, log_decay, b, c, initial_state=state, chunk_size=max(z.shape[1], 1))
    out = gated_norm(add_skip(y, x, weights.skip), z, weights.norm, epsilon, groups)
    return out, last if next_state else None
