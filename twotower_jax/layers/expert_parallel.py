"""Expert products over a mesh: tokens go to the devices that hold their experts, and come back.

Inside `sharding.local` a device has its own tokens, E/n of the E experts, n devices along the axis "expert", and F/m of
every expert's width, m devices along "tensor". Rows (a token and one of its experts) are sorted by expert, hence by
device, and exchanged in all-to-all of fixed size: at most `capacity` rows from any device to any other. What does not
fit goes in a further round, so that no row is dropped and memory does not depend on how uneven the routing is; all
devices agree on the number of rounds, which is 1 unless one pair has more than `_SLACK` times its even share.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from twotower_jax import kernels, sharding
from twotower_jax.kernels.experts import Activation, Weights, is_quantized, sort_by_expert
from twotower_jax.sharding import EXPERT, TENSOR

# Room for a pair of devices, as a multiple of its even share of the rows.
_SLACK = 1.5


def expert_mlp(
    x: Float[Array, "T D"],
    indices: Int[Array, "T k"],
    gates: Float[Array, "T k"],
    weights: Weights,
    *,
    activation: Activation,
    implementation: str | None,
) -> Float[Array, "T D"]:
    """`kernels.expert_mlp` of this device's tokens, with its part of the weights.

    Args:
      x: (T, D). indices: (T, k) int32 in [0, E). gates: (T, k). weights: of E/n experts, F/m wide.
      activation, implementation: as in `kernels.expert_mlp`.

    Returns:
      (T, D), complete.
    """
    if sharding.shards(TENSOR) > 1 and weights.down_bias is not None:
        # The sum over "tensor" is to hold it once.
        first = jax.lax.axis_index(TENSOR) == 0
        weights = weights._replace(down_bias=jnp.where(first, weights.down_bias, 0))
    mlp = functools.partial(kernels.expert_mlp, activation=activation, implementation=implementation)
    y = mlp(x, indices, gates, weights) if sharding.shards(EXPERT) == 1 else _exchanged(mlp, x, indices, gates, weights)
    return jax.lax.psum(y, TENSOR) if sharding.shards(TENSOR) > 1 else y


class _Plan(NamedTuple):
    """Which rows go where.

    Attributes:
      order: (T·k,) int32, rows sorted by expert.
      first, count: (n,) int32, the rows of each device in that order.
      expert: (T·k,) int32, each row's expert, unsorted.
    """

    order: jax.Array
    first: jax.Array
    count: jax.Array
    expert: jax.Array


def _exchanged(mlp, x, indices, gates, weights):
    shards, here = sharding.shards(EXPERT), weights.up.shape[0]
    tokens, choices = indices.shape
    expert = indices.reshape(-1)
    by_expert = sort_by_expert(expert, shards * here)
    count = jnp.sum(by_expert.sizes.reshape(shards, here), axis=1)
    plan = _Plan(by_expert.order, jnp.cumsum(count) - count, count, expert)
    capacity = min(expert.size, max(8, math.ceil(_SLACK * expert.size / shards)))
    axes = [axis for axis in sharding.MESH_AXES if sharding.shards(axis) > 1]
    rounds = jax.lax.pmax(jnp.max(-(-count // capacity)), axes)
    rows = _in_rounds(mlp, capacity, x, weights, plan, rounds)
    chosen = rows.reshape(tokens, choices, -1).astype(jnp.float32)
    return jnp.sum(chosen * gates.astype(jnp.float32)[..., None], axis=1).astype(x.dtype)


def _one_round(mlp, capacity, plan, number, x, weights):
    """What round `number` adds to the rows (T·k, D): the outputs of the rows that it takes, zeros elsewhere."""
    shards, here, total = sharding.shards(EXPERT), weights.up.shape[0], plan.expert.size
    place = number * capacity + jnp.arange(capacity)  # among the rows of one pair of devices
    taken = place[None] < plan.count[:, None]
    row = plan.order[jnp.where(taken, plan.first[:, None] + place[None], 0)]  # (n, capacity)
    choices = total // x.shape[0]
    sent = jnp.where(taken[..., None], x[row // choices], 0)
    expert = jnp.where(taken, plan.expert[row] % here, here)  # `here`: no row
    received, expert = (jax.lax.all_to_all(v, EXPERT, 0, 0, tiled=True) for v in (sent, expert))
    ones = jnp.ones((shards * capacity, 1), jnp.float32)
    y = mlp(received.reshape(-1, x.shape[1]), expert.reshape(-1, 1), ones, weights)
    back = jax.lax.all_to_all(y.reshape(received.shape), EXPERT, 0, 0, tiled=True)
    row = jnp.where(taken, row, total)
    return jnp.zeros((total, x.shape[1]), x.dtype).at[row].set(back, mode="drop")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_rounds(mlp, capacity, x, weights, plan, rounds):
    """The outputs of all rows, (T·k, D), not yet weighted."""

    def body(number, rows):
        return rows + _one_round(mlp, capacity, plan, number, x, weights)

    return jax.lax.fori_loop(0, rounds, body, jnp.zeros((plan.expert.size, x.shape[1]), x.dtype))


def _in_rounds_forward(mlp, capacity, x, weights, plan, rounds):
    return _in_rounds(mlp, capacity, x, weights, plan, rounds), (x, weights, plan, rounds)


def _in_rounds_backward(mlp, capacity, residuals, g):
    x, weights, plan, rounds = residuals

    if is_quantized(weights):

        def of_rows(number, total):
            _, pullback = jax.vjp(lambda rows: _one_round(mlp, capacity, plan, number, rows, weights), x)
            return total + pullback(g)[0]

        return jax.lax.fori_loop(0, rounds, of_rows, jnp.zeros_like(x)), None, None, None

    def body(number, total):
        _, pullback = jax.vjp(functools.partial(_one_round, mlp, capacity, plan, number), x, weights)
        return jax.tree.map(jnp.add, total, pullback(g))

    dx, dweights = jax.lax.fori_loop(0, rounds, body, jax.tree.map(jnp.zeros_like, (x, weights)))
    return dx, dweights, None, None


_in_rounds.defvjp(_in_rounds_forward, _in_rounds_backward)
