"""Expert products: every row through the experts that its router chose, none dropped.

    out_t = Σ_k weight_tk · down_{e(t,k)}ᵀ act(up_{e(t,k)}ᵀ x_t)

No capacity: however uneven the choices are, every row gets all of its experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32, Integer

from twotower_jax.kernels.dispatch import Implementation, Op
from twotower_jax.kernels.numerics.quantized import Quantized

Activation = Callable[[jax.Array], jax.Array]


def relu2(x: jax.Array) -> jax.Array:
    """ReLU squared (So et al. 2021, arXiv 2109.08668)."""
    return jnp.square(jax.nn.relu(x))


class Weights(NamedTuple):
    """The routed experts' matrices: up (E, D, F), down (E, F, D), and biases (E, F), (E, D) or None.

    Either matrix may be `Quantized`: it stands for what `dequantize` gives in the rows' dtype.
    """

    up: Float[Array, "E D F"] | Quantized
    down: Float[Array, "E F D"] | Quantized
    up_bias: Float[Array, "E F"] | None = None
    down_bias: Float[Array, "E D"] | None = None


def is_quantized(weights: Weights) -> bool:
    """Whether a matrix is quantized. Whole numbers have no gradient, so that weights are then constants, biases too."""
    return any(isinstance(part, Quantized) for part in weights)


EXPERT_MLP = Op(
    "expert_mlp",
    __name__,
    Implementation("xla", ".xla"),
    Implementation("dense", ".dense"),
    Implementation("pallas_tpu", ".tpu", platform="tpu", interpreted=True),
    Implementation("ragged_dot", ".ragged_dot", platform="tpu"),
    Implementation("mosaic_gpu", ".mosaic_gpu", platform="gpu", interpreted=True),
    Implementation("mosaic_gpu_grouped", ".mosaic_gpu_grouped", platform="gpu", interpreted=True),
)


def expert_mlp(
    x: Float[Array, "T D"],
    indices: Integer[Array, "T k"],
    gates: Float[Array, "T k"],
    weights: Weights,
    *,
    activation: Activation = relu2,
    implementation: str | None = None,
) -> Float[Array, "T D"]:
    """The weighted sum of each row's experts.

    Differentiable in x and gates, and in weights unless one of them is quantized.

    Args:
      x: (T, D).
      indices: (T, k) int32, the experts of each row, all different; E stands for none.
      gates: (T, k), their weights in the sum.
      weights: see `Weights`; any float dtype, cast to x's, or quantized.
      activation: between the two products.
      implementation: "xla"; on TPUs "pallas_tpu" for few rows (tpu.py) and "ragged_dot"; on NVIDIA Hopper "mosaic_gpu"
        for few rows or quantized weights and "mosaic_gpu_grouped"; or None, see dispatch.py.

    Returns:
      (T, D) in x's dtype; the sum over k runs in float32.
    """
    return EXPERT_MLP.run(implementation, x, indices, gates, weights, activation=activation)


def weighted_sum(chosen: jax.Array, gates: jax.Array) -> jax.Array:
    """Σ_k gates_tk · chosen_tk of (T, k, D) and (T, k), (T, D) float32."""
    # Not a matrix product, which TPUs would round to bfloat16.
    return jnp.sum(chosen.astype(jnp.float32) * gates.astype(jnp.float32)[..., None], axis=1)


class Sorted(NamedTuple):
    """Rows in the order of their experts, rows of one expert in the order that they had.

    Attributes:
      place: (R,) int32, where each row goes. order: (R,) int32, the row in each place.
      sizes: (E,) int32, the rows of each expert. Rows of no expert come last.
    """

    place: Int32[Array, " R"]
    order: Int32[Array, " R"]
    sizes: Int32[Array, " E"]


# The name of `Sorted` and of what a router chose, for policies of `jax.checkpoint`: small, and costly to find again.
ROUTING = "routing"
_TILE = 128


def sort_by_expert(expert: Integer[Array, " R"], num_experts: int) -> Sorted:
    """Sorts rows by counting, for (R,) int32 experts, E standing for none.

    How many rows of the same expert lie before a row is a product with a triangle of ones, within tiles and across
    them: small whole numbers, exact in any precision of the product. (A sort takes TPU's compiler seconds.)
    """
    rows = expert.size
    padded = jnp.pad(expert, (0, -rows % _TILE), constant_values=num_experts)
    chosen = (padded.reshape(-1, _TILE, 1) == jnp.arange(num_experts + 1)).astype(jnp.float32)
    in_tile = jnp.sum(chosen, axis=1)

    def before(counts, axis):
        ones = jnp.tril(jnp.ones((counts.shape[axis],) * 2, jnp.float32), -1)
        return jnp.moveaxis(jnp.tensordot(ones, counts, (1, axis)), 0, axis)

    earlier = (before(chosen, 1) + before(in_tile, 0)[:, None]).astype(jnp.int32)
    sizes = jnp.sum(in_tile, axis=0).astype(jnp.int32)
    first = jnp.cumsum(sizes) - sizes
    place = jnp.sum(jnp.where(chosen > 0, earlier + first, 0), axis=-1).reshape(-1)[:rows]
    order = jnp.zeros(rows, jnp.int32).at[place].set(jnp.arange(rows, dtype=jnp.int32), unique_indices=True)
    return jax.tree.map(lambda v: checkpoint_name(v, ROUTING), Sorted(place, order, sizes[:num_experts]))
