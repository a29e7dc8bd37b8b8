"""What a Mamba layer needs of the devices that hold the earlier parts of a sequence.

Inside `sharding.local` each device has L/n consecutive positions of every sequence, n devices along the axis
"sequence". The recurrence h_t = exp(a_t) h_{t-1} + u_t is linear, so every device scans its part from zero, and the
state before the part is added afterwards:

    h_t = h_t from zero + exp(a_1 + … + a_t) h_before           h_before of part i = Σ_{j<i} exp(Σ_{j<k<i} A_k) last_j

with A_k the log-decay over part k and last_j the state that part j reaches from zero. The devices exchange one state
each. The convolution needs the W − 1 inputs before the part.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from twotower_jax import sharding
from twotower_jax.sharding import SEQUENCE


def divided() -> bool:
    """Whether sequences are divided over devices."""
    return bool(sharding.dividing("length"))


def inputs_before(x: Float[Array, "B L C"], count: int) -> Float[Array, "B {count} C"]:
    """The `count` positions before this device's part of (B, L, C): (B, count, C), zeros before the first part."""
    if x.shape[1] < count:
        raise ValueError(f"a device holds {x.shape[1]} positions, fewer than the {count} its neighbor needs of it")
    shards = sharding.shards(SEQUENCE)
    return jax.lax.ppermute(x[:, -count:], SEQUENCE, [(i, i + 1) for i in range(shards - 1)])


def state_before(last: Float[Array, "B H P N"], log_decay: Float[Array, "B L H"]) -> Float[Array, "B H P N"]:
    """The state at the left edge of this device's part, (B, H, P, N).

    Args:
      last: (B, H, P, N), the state that the part reaches from zero.
      log_decay: (B, L, H), dt·A of the part.
    """
    lasts = jax.lax.all_gather(last, SEQUENCE)
    decays = jnp.exp(jax.lax.all_gather(jnp.sum(log_decay, axis=1), SEQUENCE))
    part = jax.lax.axis_index(SEQUENCE)
    state = jnp.zeros_like(last)
    for j in range(sharding.shards(SEQUENCE) - 1):
        state = jnp.where(j < part, decays[j][..., None, None] * state + lasts[j], state)
    return state


def from_state(
    c: Float[Array, "B L G N"], state: Float[Array, "B H P N"], log_decay: Float[Array, "B L H"]
) -> Float[Array, "B L H P"]:
    """exp(log_decay_i) h C_i: what a state adds to the outputs (B, L, H, P), float32.

    Args:
      c: (B, L, G, N). state: (B, H, P, N). log_decay: (B, L, H), summed from the state to the position.
    """
    batch, heads, head_dim, _ = state.shape
    grouped = state.reshape(batch, c.shape[2], -1, head_dim, state.shape[-1])
    y = jnp.einsum("blgn,bgrpn->blgrp", c.astype(jnp.float32), grouped, precision=jax.lax.Precision.HIGHEST)
    return y.reshape(*c.shape[:2], heads, head_dim) * jnp.exp(log_decay)[..., None]
