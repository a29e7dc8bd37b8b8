"""The oracles of `kernels.ssd` and `kernels.two_tower_ssd`: the recurrences, as literally as the maths allows. Slow."""

import jax
import jax.numpy as jnp

from twotower_jax.kernels.numerics.precision import float32_or_more


def ssd_sequential(x, dt, log_decay, b, c, initial_state=None):
    """The recurrence of `ssd`, one position after the other: h = exp(dt A) h + dt x Bᵀ, y = h C.

    Arguments and results as in `kernels.ssd`; runs in the dtype of x.
    """
    heads, groups = x.shape[2], b.shape[2]
    b, c = (jnp.repeat(v, heads // groups, axis=2) for v in (b, c))
    if initial_state is None:
        initial_state = jnp.zeros((*x.shape[:1], *x.shape[2:], b.shape[-1]), x.dtype)

    def step(h, inputs):
        x, dt, log_decay, b, c = inputs
        h = jnp.exp(log_decay)[..., None, None] * h + jnp.einsum("bh,bhp,bhn->bhpn", dt, x, b, precision="highest")
        return h, jnp.einsum("bhpn,bhn->bhp", h, c, precision="highest")

    last, y = jax.lax.scan(step, initial_state, jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), (x, dt, log_decay, b, c)))
    return jnp.moveaxis(y, 0, 1), last


def two_tower_ssd_sequential(
    x, dt, log_decay, b, c, context_x, context_dt, context_log_decay, context_b, *, block_size
):
    """One block after the other: the denoiser's block from the context's state, then the context's block onto it."""

    def in_blocks(v):
        return jnp.moveaxis(v.reshape(v.shape[0], -1, block_size, *v.shape[2:]), 1, 0)

    def step(state, block):
        own, context = block
        y, _ = ssd_sequential(*own, state)
        _, state = ssd_sequential(*context, state)
        return state, y

    own = map(in_blocks, (x, dt, log_decay, b, c))
    context = map(in_blocks, (context_x, context_dt, context_log_decay, context_b, context_b))
    zeros = jnp.zeros((*x.shape[:1], *x.shape[2:], b.shape[-1]), x.dtype)
    _, y = jax.lax.scan(step, zeros, (tuple(own), tuple(context)))
    return jnp.moveaxis(y, 0, 1).reshape(x.shape)


def ssd(x, dt, log_decay, b, c, *, initial_state=None, chunk_size=None):
    """`kernels.ssd` by the recurrence, in float32, or in float64 if it is given that."""
    arrays = map(float32_or_more, (x, dt, log_decay, b, c))
    return ssd_sequential(*arrays, None if initial_state is None else float32_or_more(initial_state))


def two_tower_ssd(*arrays, block_size, chunk_size=None):
    """`kernels.two_tower_ssd` by the recurrence, in float32, or in float64 if it is given that."""
    return two_tower_ssd_sequential(*map(float32_or_more, arrays), block_size=block_size)
