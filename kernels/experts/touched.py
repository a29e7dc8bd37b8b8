"""What the kernels for few rows share: the list of experts that some row chose, and a gradient.

The kernels compute forward. Their gradient is that of the form for many rows, which recomputes from the same arguments;
quantized weights have none.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from twotower_jax.kernels.experts import Activation, Weights, is_quantized, sort_by_expert, xla


class Touched(NamedTuple):
    """The experts that some row chose, in order, and where their rows are.

    A row here is a token and one of its experts; there are R = T·k.

    Attributes:
      expert: (n,) int32, n = min(E, R); after the last one in use it is repeated.
      first, count: (n,) int32, each one's rows in `order`; count is 0 after the last one in use.
      used: () int32, how many there are.
      order: (R,) int32, the row in each place once sorted by expert. place: (R,) int32, each row's place in it.
    """

    expert: jax.Array
    first: jax.Array
    count: jax.Array
    used: jax.Array
    order: jax.Array
    place: jax.Array


def touched_experts(indices: jax.Array, num_experts: int) -> Touched:
    """For (T, k) int32 indices, E standing for none."""
    place, order, sizes = sort_by_expert(indices.reshape(-1), num_experts)
    slots = min(num_experts, indices.size)
    touched = sizes > 0
    used = jnp.sum(touched, dtype=jnp.int32)
    slot = jnp.where(touched, jnp.cumsum(touched) - 1, slots)
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    expert = jnp.zeros(slots, jnp.int32).at[slot].set(experts, mode="drop")
    here = jnp.arange(slots, dtype=jnp.int32) < used
    expert = jnp.where(here, expert, expert[jnp.maximum(used - 1, 0)])
    first = (jnp.cumsum(sizes) - sizes)[expert]
    return Touched(expert, first, jnp.where(here, sizes[expert], 0), used, order, place)


# (activation, interpret, x, indices, gates, weights) → y.
Forward = Callable[[Activation, bool, jax.Array, jax.Array, jax.Array, Weights], jax.Array]


def with_gradient(forward: Forward, again: Forward) -> Forward:
    """`forward` with the gradient of `again`, which computes the same; of quantized experts, with that of xla.py."""
    function = functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))(forward)

    def keep(activation, interpret, x, indices, gates, weights):
        return forward(activation, interpret, x, indices, gates, weights), (x, indices, gates, weights)

    def backward(activation, interpret, residuals, g):
        x, indices, gates, weights = residuals
        if is_quantized(weights):

            def by_tiles(x, gates):
                return xla.expert_mlp(x, indices, gates, weights, activation=activation)

            dx, dgates = jax.vjp(by_tiles, x, gates)[1](g)
            return dx, None, dgates, None

        def call(x, gates, weights):
            return again(activation, interpret, x, indices, gates, weights)

        dx, dgates, dweights = jax.vjp(call, x, gates, weights)[1](g)
        return dx, None, dgates, dweights

    function.defvjp(keep, backward)
    return function
