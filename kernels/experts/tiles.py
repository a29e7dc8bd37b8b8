"""Rows laid out in tiles, each tile the rows of one expert, the last of an expert's tiles filled up with zero rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from twotower_jax.kernels.experts import sort_by_expert, weighted_sum


class Tiles(NamedTuple):
    """Where each row goes.

    Attributes:
      row: (T, k) int32, the place of each (token, choice) in the tiled layout; one after the last where there is none.
      token: (tiles · tile,) int32, the token in each place; T in a place of padding.
      expert, filled: (tiles,) int32, each tile's expert and how many rows it holds.
      used: () int32, how many tiles hold rows.
      first, count: (E,) int32, the tiles of each expert.
    """

    row: jax.Array
    token: jax.Array
    expert: jax.Array
    filled: jax.Array
    used: jax.Array
    first: jax.Array
    count: jax.Array

    def gather(self, x: jax.Array) -> jax.Array:
        """(T, …) → (tiles · tile, …), zeros in places of padding."""
        return jnp.concatenate([x, jnp.zeros_like(x[:1])])[self.token]

    def weighted_sum(self, rows: jax.Array, gates: jax.Array) -> jax.Array:
        """(tiles · tile, D) → (T, D) float32: the sum of each token's rows, weighted with its gates (T, k)."""
        return weighted_sum(rows.at[self.row].get(mode="fill", fill_value=0), gates)


def in_tiles(indices: jax.Array, num_experts: int, tile: int) -> Tiles:
    """The layout for (T, k) int32 indices in [0, E], E standing for none, in tiles of so many rows."""
    tokens, choices = indices.shape
    rows = tokens * choices
    expert = indices.reshape(-1)
    place, _, sizes = sort_by_expert(expert, num_experts)
    tiles = -(-sizes // tile)
    before = jnp.tril(jnp.ones((num_experts, num_experts), jnp.int32), -1)
    first_row, first_tile = jnp.sum(before * sizes, axis=1), jnp.sum(before * tiles, axis=1)
    count = -(-rows // tile) + min(num_experts, rows)
    place += (first_tile * tile - first_row)[jnp.minimum(expert, num_experts - 1)]
    place = jnp.where(expert < num_experts, place, count * tile)
    token = jnp.arange(rows, dtype=jnp.int32) // choices
    number = jnp.arange(count)
    of_tile = jnp.sum(number[:, None] >= first_tile, axis=1, dtype=jnp.int32) - 1
    return Tiles(
        row=place.reshape(tokens, choices),
        token=jnp.full(count * tile, tokens, jnp.int32).at[place].set(token, mode="drop"),
        expert=of_tile,
        filled=jnp.clip(sizes[of_tile] - (number - first_tile[of_tile]) * tile, 0, tile),
        used=jnp.sum(tiles, dtype=jnp.int32),
        first=first_tile,
        count=tiles,
    )
