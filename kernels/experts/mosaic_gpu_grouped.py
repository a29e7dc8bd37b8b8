"""Expert products of many rows on NVIDIA Hopper: grouped products (mosaic_gpu_products.py), also for both gradients.

Rows lie in blocks of 64 of one expert each. Forward is two products, the activation applied as the first is written.
The backward pass keeps nothing but the arguments. With u = rows @ up, h = activation(u) and g each row's gradient,

    d gate = (g downᵀ) · h        d down = (gate h)ᵀ g        d u = gate (g downᵀ) activation'(u)

so that the outputs themselves are not computed again.
"""

import functools

import jax
import jax.numpy as jnp

from twotower_jax.kernels.experts import Activation, Weights
from twotower_jax.kernels.experts.mosaic_gpu_products import STEP, Groups, outer, product
from twotower_jax.kernels.experts.tiles import Tiles, in_tiles
from twotower_jax.kernels.hardware.hopper import not_hopper
from twotower_jax.kernels.hardware.pipeline_gpu import BLOCK, Interpret
from twotower_jax.kernels.numerics.quantized import Quantized


def unsupported(x, indices, gates, weights: Weights, *, activation: Activation) -> str | None:
    """Why the hardware cannot run these arguments, or None."""
    if weights.up_bias is not None or weights.down_bias is not None:
        return "the experts have biases"
    if any(isinstance(part, Quantized) for part in weights):
        return "the experts are quantized"
    if x.dtype != jnp.bfloat16:
        return f"rows are {x.dtype}, not bfloat16"
    model, width = weights.up.shape[1:]
    if model % STEP or width % STEP:
        return f"rows of {model} numbers and experts {width} wide are not both multiples of {STEP}"
    return not_hopper()


def expert_mlp(
    x: jax.Array,
    indices: jax.Array,
    gates: jax.Array,
    weights: Weights,
    *,
    activation: Activation,
    interpret: Interpret = False,
) -> jax.Array:
    """See `experts.expert_mlp`; rows in bfloat16, no biases."""
    tiles = in_tiles(indices, weights.up.shape[0], BLOCK)
    return _expert_mlp(activation, interpret, x, gates, weights.up, weights.down, tiles)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _expert_mlp(activation, interpret, x, gates, up, down, tiles: Tiles):
    groups = Groups(tiles.first, tiles.count)
    rows, matrices = tiles.gather(x), (up.astype(x.dtype), down.astype(x.dtype))
    hidden = product(rows, matrices[0], groups, activation=activation, interpret=interpret)
    out = product(hidden, matrices[1], groups, interpret=interpret)
    return tiles.weighted_sum(out, gates).astype(x.dtype)


def _forward(activation, interpret, x, gates, up, down, tiles):
    return _expert_mlp(activation, interpret, x, gates, up, down, tiles), (x, gates, up, down, tiles)


def _backward(activation, interpret, residuals, g):
    x, gates, up, down, tiles = residuals
    groups = Groups(tiles.first, tiles.count)
    up_cast, down_cast = up.astype(x.dtype), down.astype(x.dtype)
    rows, of_rows = tiles.gather(x), tiles.gather(g)
    gate = jnp.zeros(tiles.token.size, jnp.float32)
    gate = gate.at[tiles.row].set(gates.astype(jnp.float32), mode="drop", unique_indices=True)[:, None]
    before = product(rows, up_cast, groups, interpret=interpret)
    of_hidden = product(of_rows, down_cast, groups, transposed=True, interpret=interpret).astype(jnp.float32)
    hidden, pullback = jax.vjp(activation, before.astype(jnp.float32))
    hidden = hidden.astype(x.dtype).astype(jnp.float32)
    of_gate = jnp.sum(of_hidden * hidden, axis=1).at[tiles.row].get(mode="fill", fill_value=0)
    of_before = pullback(gate * of_hidden)[0].astype(x.dtype)
    of_down = outer((gate * hidden).astype(x.dtype), of_rows, groups, interpret=interpret)
    # Rows are gathered once more, so that they are not there while the hidden layer and its gradient both are.
    x, of_down = jax.lax.optimization_barrier((x, of_down))
    of_up = outer(tiles.gather(x), of_before, groups, interpret=interpret)
    of_x = product(of_before, up_cast, groups, transposed=True, interpret=interpret)
    of_x = jnp.sum(of_x.at[tiles.row].get(mode="fill", fill_value=0).astype(jnp.float32), axis=1)
    gradients = of_x.astype(x.dtype), of_gate.astype(gates.dtype), of_up.astype(up.dtype), of_down.astype(down.dtype)
    return (*gradients, None)


_expert_mlp.defvjp(_forward, _backward)
