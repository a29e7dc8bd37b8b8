"""The two-tower scan with a state per block: the plain way, which measurements compare with.

Exact, and may be named like any implementation; nothing chooses it.
"""

import jax
import jax.numpy as jnp

from twotower_jax.kernels.ssd import xla


def two_tower_ssd(
    x, dt, log_decay, b, c, context_x, context_dt, context_log_decay, context_b, *, block_size, chunk_size=None
):
    """`kernels.two_tower_ssd` with the context's state at the left edge of every block, and a scan from each.

    Memory grows with the number of blocks; the size of chunks plays no part.
    """
    batch, length = x.shape[:2]
    blocks = length // block_size

    def split(v):
        return v.reshape(batch * blocks, block_size, *v.shape[2:])

    context = map(split, (context_x, context_dt, context_log_decay, context_b, context_b))
    _, added = xla.ssd(*context, chunk_size=block_size)
    decays = jnp.sum(context_log_decay.astype(jnp.float32).reshape(batch, blocks, block_size, -1), axis=2)

    def step(state, this):
        added, decay = this
        return jnp.exp(decay)[..., None, None] * state + added, state

    added = added.reshape(batch, blocks, *added.shape[1:])
    _, left = jax.lax.scan(step, jnp.zeros_like(added[:, 0]), (jnp.moveaxis(added, 1, 0), jnp.moveaxis(decays, 1, 0)))
    seeds = jnp.moveaxis(left, 0, 1).reshape(-1, *added.shape[2:])
    y, _ = xla.ssd(*map(split, (x, dt, log_decay, b, c)), initial_state=seeds, chunk_size=block_size)
    return y.reshape(x.shape)
