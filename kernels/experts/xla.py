"""Expert products as a loop over tiles: the form that runs anywhere.

Rows are sorted by expert and laid out in tiles, each tile the rows of one expert (the last of an expert's tiles is
padded with zero rows). A loop over the tiles in use multiplies each with its expert's two matrices. No dense expansion
over experts, and an expert that no row chose is neither read nor multiplied.

Taking an expert's matrices out of the stack copies them, which with few rows per expert takes longer than multiplying.
So where rows are few and touch most experts all the same, the first tile of every expert is part of one batched product
with the stack as it lies, and the loop is left with the other tiles.

On a CPU few rows go through their experts one by one, with nothing filled up: products of one row, which read a matrix
where it lies.

The backward pass is always the loop over tiles. It recomputes the hidden layer from the rows, so that forward keeps
nothing F wide.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from twotower_jax.kernels.dispatch import platform
from twotower_jax.kernels.experts import Activation, Weights, is_quantized, weighted_sum
from twotower_jax.kernels.experts.tiles import Tiles, in_tiles
from twotower_jax.kernels.numerics.quantized import Quantized, as_array

# What is multiplied of a tile has at least so many rows: with fewer, XLA's products on CPUs round otherwise.
_LEAST = 64


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


def _of_filled[T](compute: Callable[[int], T], tile: int, filled: jax.Array) -> T:
    """`compute` of as many of a tile's first rows as hold all that are there, in a few steps.

    A branch costs a CPU nothing, and padding is up to half of what is multiplied without it.
    """
    if platform() != "cpu" or tile <= _LEAST:
        return compute(tile)
    step = max(_LEAST // 2, tile // 4)
    sizes = range(max(_LEAST, step), tile + 1, step)
    branch = jnp.maximum(-(-(filled - sizes[0]) // step), 0)
    return jax.lax.switch(branch, [functools.partial(compute, rows) for rows in sizes])


def _in_whole_tile(rows: jax.Array, tile: int) -> jax.Array:
    return jnp.pad(rows, ((0, tile - len(rows)), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tiled_mlp(activation: Activation, batched: bool, x: jax.Array, weights: Weights, tiles: Tiles):
    """x (tiles, tile, D) → (tiles, tile, D); tiles that are not in use stay zero."""
    number, last, out = jnp.arange(x.shape[0]), tiles.used, jnp.zeros_like(x)
    order = number
    if batched:
        place = jnp.where(tiles.count > 0, tiles.first, x.shape[0])
        rows = x.at[place].get(mode="fill", fill_value=0)
        out = out.at[place].set(jax.vmap(functools.partial(_one_tile, activation))(rows, weights), mode="drop")
        others = (number != tiles.first[tiles.expert]) & (number < tiles.used)
        order, last = jnp.nonzero(others, size=x.shape[0], fill_value=0)[0], jnp.sum(others)

    def body(i, out):
        tile = order[i]
        of_expert = jax.tree.map(lambda w: w[tiles.expert[tile]], weights)

        def of_rows(count):
            return _in_whole_tile(_one_tile(activation, x[tile, :count], of_expert), x.shape[1])

        return out.at[tile].set(_of_filled(of_rows, x.shape[1], tiles.filled[tile]))

    return jax.lax.fori_loop(0, last, body, out)


def _tiled_mlp_forward(activation, batched, x, weights, tiles):
    return _tiled_mlp(activation, batched, x, weights, tiles), (x, weights, tiles)


def _tiled_mlp_backward(activation, batched, residuals, g):
    x, weights, tiles = residuals
    expert = tiles.expert
    if is_quantized(weights):

        def of_rows(i, dx):
            of_expert = jax.tree.map(lambda w: w[expert[i]], weights)
            _, pullback = jax.vjp(lambda rows: _one_tile(activation, rows, of_expert), x[i])
            return dx.at[i].set(pullback(g[i])[0])

        return jax.lax.fori_loop(0, tiles.used, of_rows, jnp.zeros_like(x)), None, None

    def body(i, carry):
        dx, dweights = carry
        of_expert = jax.tree.map(lambda w: w[expert[i]], weights)

        def of_rows(count):
            _, pullback = jax.vjp(functools.partial(_one_tile, activation), x[i, :count], of_expert)
            dx, dweights = pullback(g[i, :count])
            return _in_whole_tile(dx, x.shape[1]), dweights

        dx_i, dweights_i = _of_filled(of_rows, x.shape[1], tiles.filled[i])
        add = functools.partial(jax.tree.map, lambda total, part: total.at[expert[i]].add(part.astype(total.dtype)))
        return dx.at[i].set(dx_i), add(dweights, dweights_i)

    # Gradients of weights are summed over tiles in float32, whatever the weights are stored in.
    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    dx, dweights = jax.lax.fori_loop(0, tiles.used, body, (jnp.zeros_like(x), zeros))
    return dx, jax.tree.map(lambda d, w: d.astype(w.dtype), dweights, weights), None


_tiled_mlp.defvjp(_tiled_mlp_forward, _tiled_mlp_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _row_by_row(
    activation: Activation, x: jax.Array, indices: jax.Array, gates: jax.Array, weights: Weights
) -> jax.Array:
    """`experts.expert_mlp` of few rows."""
    experts, choices = indices.reshape(-1), indices.shape[1]
    # An expert's rows in succession, while its matrices are in the processor's caches.
    order = jnp.argsort(experts)

    def body(i, out):
        place = order[i]
        expert = experts[place]
        row = jax.lax.dynamic_slice_in_dim(x, place // choices, 1)
        y = _one_tile(activation, row, jax.tree.map(lambda w: w[expert], weights))
        return out.at[place].set(jnp.where(expert < weights.up.shape[0], y[0], 0))

    out = jax.lax.fori_loop(0, experts.size, body, jnp.zeros((experts.size, x.shape[1]), x.dtype))
    return weighted_sum(out.reshape(*indices.shape, -1), gates).astype(x.dtype)


def _row_by_row_forward(activation, x, indices, gates, weights):
    return _row_by_row(activation, x, indices, gates, weights), (x, indices, gates, weights)


def _row_by_row_backward(activation, residuals, g):
    x, indices, gates, weights = residuals

    def in_tiles(x, gates, weights):
        return _by_tiles(activation, x, indices, gates, weights)

    dx, dgates, dweights = jax.vjp(in_tiles, x, gates, weights)[1](g)
    return dx, None, dgates, None if is_quantized(weights) else dweights


_row_by_row.defvjp(_row_by_row_forward, _row_by_row_backward)


def tile_size(rows: int, num_experts: int) -> int:
    """Rows per tile: about an expert's share, in powers of two from 8 to 256."""
    share = max(1, rows // num_experts)
    return min(256, max(8, 1 << (share - 1).bit_length()))


# Rows of a tile that is still few.
_FEW = 32
# Fewer rows for each expert are best taken one by one; from here on most experts are touched by several.
_SINGLE = 2


def _is_batched(rows: int, weights: Weights, dtype: jnp.dtype) -> bool:
    """Whether most experts are touched by few rows each, and their stack can be multiplied with as it lies."""
    num_experts = weights.up.shape[0]
    as_it_lies = all(w is None or not isinstance(w, Quantized) and w.dtype == dtype for w in weights)
    return as_it_lies and rows >= _SINGLE * num_experts and tile_size(2 * rows, num_experts) <= _FEW


def expert_mlp(
    x: jax.Array, indices: jax.Array, gates: jax.Array, weights: Weights, *, activation: Activation
) -> jax.Array:
    """See `experts.expert_mlp`."""
    if platform() == "cpu" and indices.size < _SINGLE * weights.up.shape[0]:
        return _row_by_row(activation, x, indices, gates, weights)
    return _by_tiles(activation, x, indices, gates, weights)


def _by_tiles(
    activation: Activation, x: jax.Array, indices: jax.Array, gates: jax.Array, weights: Weights
) -> jax.Array:
    num_experts = weights.up.shape[0]
    batched = _is_batched(indices.size, weights, x.dtype)
    # An expert's first tile is to hold all of its rows, even if it has more than its share.
    tile = tile_size(2 * indices.size if batched else indices.size, num_experts)
    tiles = in_tiles(indices, num_experts, tile)
    rows = tiles.gather(x).reshape(-1, tile, x.shape[1])
    out = _tiled_mlp(activation, batched, rows, weights, tiles)
    return tiles.weighted_sum(out.reshape(-1, x.shape[1]), gates).astype(x.dtype)
