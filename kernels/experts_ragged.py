"""Expert products by `jax.lax.ragged_dot`, which TPUs have natively: forward and both gradients are one kernel each.

Rows are sorted by expert. On GPUs `ragged_dot` is a dense product over all experts; do not use it there.
"""

import jax
import jax.numpy as jnp

from twotower_jax.kernels.experts import Activation, Weights, sort_by_expert, weighted_sum
from twotower_jax.kernels.quantized import Quantized


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
        precision = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
        out = jax.lax.ragged_dot(
            rows, matrices.astype(rows.dtype), sizes, precision=precision, preferred_element_type=rows.dtype
        )
        return out if bias is None else out + bias.astype(rows.dtype)[expert]

    hidden = activation(product(_sorted_rows(x, order, place), weights.up, weights.up_bias))
    out = _by_token(product(hidden, weights.down, weights.down_bias), order, place)
    out = jnp.where((indices < num_experts)[..., None], out.reshape(*indices.shape, -1), 0)
    return weighted_sum(out, gates).astype(x.dtype)


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
