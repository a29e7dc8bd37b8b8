"""Expert products by `jax.lax.ragged_dot`, which TPUs have natively: forward and both gradients are one kernel each.

On v6e and tpu7x each is a fusion that reads as a product of all experts with all rows, of which its loop leaves out the
tiles that are not an expert's own (planning/predict.py, `is_ragged`).

Rows are sorted by expert. On GPUs `ragged_dot` is a dense product over all experts; do not use it there.

XLA's TPU compiler lays a stack of matrices (E, K, N) down with K along the lanes where that takes less padding, as with
N = 1856 (29 × 64) and K = 2688 (21 × 128), and would turn all of them for the product. They are multiplied as
(E, N, K) then, which is how they lie.
"""

import jax
import jax.numpy as jnp

from twotower_jax.kernels.experts import Activation, Weights, sort_by_expert, weighted_sum
from twotower_jax.kernels.numerics.quantized import Quantized

_TILE = (8, 128)


def unsupported(x, indices, gates, weights: Weights, *, activation: Activation) -> str | None:
    """What it cannot take, or None."""
    if any(isinstance(part, Quantized) for part in weights):
        return "quantized weights would be dequantized as a whole"
    return None


def expert_mlp(
    x: jax.Array, indices: jax.Array, gates: jax.Array, weights: Weights, *, activation: Activation
) -> jax.Array:
    """See `experts.expert_mlp`."""
    num_experts = weights.up.shape[0]
    place, order, sizes = sort_by_expert(indices.reshape(-1), num_experts)
    expert = jnp.minimum(indices.reshape(-1)[order], num_experts - 1)

    def product(rows, matrices, bias):
        out = _ragged_dot(rows, matrices.astype(rows.dtype), sizes)
        return out if bias is None else out + bias.astype(rows.dtype)[expert]

    hidden = activation(product(_sorted_rows(x, order, place), weights.up, weights.up_bias))
    out = _by_token(product(hidden, weights.down, weights.down_bias), order, place)
    out = jnp.where((indices < num_experts)[..., None], out.reshape(*indices.shape, -1), 0)
    return weighted_sum(out, gates).astype(x.dtype)


def _ragged_dot(rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    """(R, K) sorted, (E, K, N) and the rows of each → (R, N)."""
    if not _lies_turned(*matrices.shape[1:]):
        return _dot(rows, matrices, sizes, 1)
    # The barrier keeps XLA from merging the turn with products, some of which would want (E, K, N) again.
    return _dot_turned(rows, jax.lax.optimization_barrier(jnp.swapaxes(matrices, 1, 2)), sizes)


def _dot(rows, matrices, sizes, contracted):
    """Over `contracted`, one of the sides of `matrices`; over rows, into a matrix for each expert, if that is 0."""
    by_expert = [] if contracted == 0 else [0]
    sides = ((0,), (0,)) if contracted == 0 else ((1,), (contracted,))
    return jax.lax.ragged_dot_general(
        *(rows, matrices, sizes, jax.lax.RaggedDotDimensionNumbers((sides, ((), ())), [0], by_expert)),
        precision=jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None,
        preferred_element_type=rows.dtype,
    )


@jax.custom_vjp
def _dot_turned(rows, turned, sizes):
    """With matrices (E, N, K), and gradients of them; JAX's own rule makes gradients (E, K, N) and turns them."""
    return _dot(rows, turned, sizes, 2)


def _dot_turned_backward(residuals, g):
    rows, turned, sizes = residuals
    return _dot(g, turned, sizes, 1), _dot(g, rows, sizes, 0), None


_dot_turned.defvjp(lambda *operands: (_dot_turned(*operands), operands), _dot_turned_backward)


def _lies_turned(rows: int, columns: int) -> bool:
    """Whether a matrix takes fewer tiles of a TPU's memory with its rows along the lanes."""

    def padded(along_sublanes: int, along_lanes: int) -> int:
        return -(-along_sublanes // _TILE[0]) * _TILE[0] * -(-along_lanes // _TILE[1]) * _TILE[1]

    return padded(columns, rows) < padded(rows, columns)


# Both moves of rows are gathers, and so are their transposes: a scatter of rows is slow on TPUs.


@jax.custom_vjp
def _sorted_rows(x, order, place):
    """(T, D) → (T·k, D), each row once for each of its choices, sorted."""
    return x[order // (order.size // x.shape[0])]


def _sorted_rows_forward(x, order, place):
    return _sorted_rows(x, order, place), (x, place)


def _sorted_rows_backward(residuals, g):
    x, place = residuals
    total = jnp.sum(g[place].reshape(x.shape[0], -1, x.shape[1]).astype(jnp.float32), axis=1)
    return total.astype(x.dtype), None, None


_sorted_rows.defvjp(_sorted_rows_forward, _sorted_rows_backward)


@jax.custom_vjp
def _by_token(rows, order, place):
    """Sorted rows back in the order of tokens and choices."""
    return rows[place]


_by_token.defvjp(lambda rows, order, place: (rows[place], order), lambda order, g: (g[order], None, None))
