"""Expert products as a loop over tiles: the form that runs anywhere.

Rows are sorted by expert and laid out in tiles, each tile the rows of one expert (the last of an expert's tiles is
padded with zero rows). A loop over the tiles in use multiplies each with its expert's two matrices. No dense expansion
over experts, and an expert that no row chose is neither read nor multiplied.

The backward pass recomputes the hidden layer from the rows, so that forward keeps nothing F wide.
"""

import functools

import jax
import jax.numpy as jnp

from twotower_jax.kernels.experts import Activation, Weights, refuse_gradient
from twotower_jax.kernels.experts_tiles import in_tiles
from twotower_jax.kernels.quantized import as_array


def _one_tile(activation: Activation, x: jax.Array, weights: Weights) -> jax.Array:
    """The MLP of one expert on one tile: x (tile, D), weights without their leading axis; float32 accumulation."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    hidden = jnp.matmul(x, as_array(weights.up, x.dtype), precision=precision)
    if weights.up_bias is not None:
        hidden += weights.up_bias.astype(x.dtype)
    out = jnp.matmul(activation(hidden), as_array(weights.down, x.dtype), precision=precision)
    if weights.down_bias is not None:
        out += weights.down_bias.astype(x.dtype)
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled_mlp(activation: Activation, x: jax.Array, weights: Weights, expert: jax.Array, used: jax.Array):
    """x (tiles, tile, D) → (tiles, tile, D); tiles from `used` on stay zero."""

    def body(i, out):
        of_expert = jax.tree.map(lambda w: w[expert[i]], weights)
        return out.at[i].set(_one_tile(activation, x[i], of_expert))

    return jax.lax.fori_loop(0, used, body, jnp.zeros_like(x))


def _tiled_mlp_forward(activation, x, weights, expert, used):
    refuse_gradient(weights)
    return _tiled_mlp(activation, x, weights, expert, used), (x, weights, expert, used)


def _tiled_mlp_backward(activation, residuals, g):
    x, weights, expert, used = residuals

    def body(i, carry):
        dx, dweights = carry
        of_expert = jax.tree.map(lambda w: w[expert[i]], weights)
        _, pullback = jax.vjp(functools.partial(_one_tile, activation), x[i], of_expert)
        dx_i, dweights_i = pullback(g[i])
        add = functools.partial(jax.tree.map, lambda total, part: total.at[expert[i]].add(part.astype(total.dtype)))
        return dx.at[i].set(dx_i), add(dweights, dweights_i)

    # Gradients of weights are summed over tiles in float32, whatever the weights are stored in.
    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    dx, dweights = jax.lax.fori_loop(0, used, body, (jnp.zeros_like(x), zeros))
    return dx, jax.tree.map(lambda d, w: d.astype(w.dtype), dweights, weights), None, None


_tiled_mlp.defvjp(_tiled_mlp_forward, _tiled_mlp_backward)


def tile_size(rows: int, num_experts: int) -> int:
    """Rows a tile: about an expert's share, in powers of two from 8 to 256."""
    share = max(1, rows // num_experts)
    return min(256, max(8, 1 << (share - 1).bit_length()))


def expert_mlp(
    x: jax.Array, indices: jax.Array, gates: jax.Array, weights: Weights, *, activation: Activation
) -> jax.Array:
    """See `experts.expert_mlp`."""
    num_experts = weights.up.shape[0]
    tile = tile_size(indices.size, num_experts)
    tiles = in_tiles(indices, num_experts, tile)
    rows = tiles.gather(x).reshape(-1, tile, x.shape[1])
    out = _tiled_mlp(activation, rows, weights, tiles.expert, tiles.used)
    return tiles.weighted_sum(out.reshape(-1, x.shape[1]), gates).astype(x.dtype)
