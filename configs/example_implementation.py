"""An implementation of an op of one's own: routed experts one after the other, each over all rows.

    python launch/train.py --config=configs/example_implementation.py --workdir=runs/example

E / k times the work of the chosen experts, and the memory of one expert's activations.
"""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from twotower_jax.kernels import OPS
from twotower_jax.train.config import shipped


def expert_mlp(x, indices, gates, weights, *, activation):
    """As `kernels.expert_mlp`, for matrices that are not quantized."""

    def add(total, expert):
        number, (up, down, up_bias, down_bias) = expert
        h = jnp.dot(x, up.astype(x.dtype), precision="highest")
        h = activation(h if up_bias is None else h + up_bias.astype(x.dtype))
        y = jnp.dot(h, down.astype(x.dtype), precision="highest")
        y = y if down_bias is None else y + down_bias.astype(x.dtype)
        gate = jnp.sum(jnp.where(indices == number, gates, 0), axis=1, keepdims=True)
        return total + gate.astype(jnp.float32) * y, None

    experts = jnp.arange(weights.up.shape[0]), tuple(weights)
    return jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), experts)[0].astype(x.dtype)


OPS["expert_mlp"].register("one_by_one", expert_mlp)


def get_config() -> ConfigDict:
    config = shipped("tiny")
    config.kernels.expert_mlp = "one_by_one"
    return config
