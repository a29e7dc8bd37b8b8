"""Steps whose loss or gradient is not finite: how many there may be, and which sequences are to blame."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Tokenizer

from twotower_jax.parameters import Params
from twotower_jax.train.objectives import NoiseKey, Objective
from twotower_jax.train.placement import Batch, Placement
from twotower_jax.train.step import merge, total_loss

# Enough to look at; where all are at fault, it is not the data.
_NAMED_ROWS = 8
_EXCERPT_TOKENS = 16


class Skips:
    """Counts the steps that were left out. Its state goes into a checkpoint."""

    def __init__(self, most_in_a_row: int):
        self._most = most_in_a_row
        self.in_a_row = self.total = 0

    def add(self, skipped: bool) -> bool:
        """Counts a step; returns whether it is one too many."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.total += skipped
        return self.in_a_row > self._most

    def get_state(self) -> dict[str, int]:
        """JSON-able."""
        return {"in_a_row": self.in_a_row, "total": self.total}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on from what `get_state` returned."""
        self.in_a_row, self.total = state["in_a_row"], state["total"]


class Blame(NamedTuple):
    """Rows of the global batch that alone have such a loss or gradient, with the tokens of those this process read."""

    rows: list[int]
    tokens: dict[int, np.ndarray]

    def text(self, tokenizer: Tokenizer) -> str:
        """What to tell the person: the rows, and how they begin."""
        if not self.rows:
            return "no row of the batch is like that by itself"
        begins = [
            f"row {row} begins {tokenizer.decode(ids[:_EXCERPT_TOKENS].tolist())!r}" for row, ids in self.tokens.items()
        ]
        more = " (and maybe more)" if len(self.rows) == _NAMED_ROWS else ""
        return "; ".join([f"rows of the batch to blame: {', '.join(map(str, self.rows))}{more}", *begins])


def blame(
    objective: Objective,
    noise: Callable[[jax.Array], NoiseKey],
    block_size: int,
    trained: Params,
    frozen: Params,
    batch: Batch,
    placement: Placement,
) -> Blame:
    """Finds the rows of a batch that alone give a loss or gradient that is not finite.

    `noise` is that of the step, given the rows' numbers. All processes of a run call this alike.
    """
    size, mine = batch.ids.shape[0], placement.numbers

    @functools.partial(jax.jit, out_shardings=placement.everywhere)
    def finite(trained: Params, frozen: Params, batch: Batch, counted: jax.Array) -> jax.Array:
        ids, documents = batch.ids, batch.documents
        # In the place of a row that does not count stands one that does: 0 · ∞ in its backward pass would be NaN.
        first = jnp.argmax(counted)
        ids, documents = jax.tree.map(lambda v: jnp.where(counted[:, None], v, v[first]), (ids, documents))

        def loss(trained: Params) -> jax.Array:
            params = merge(trained, frozen)
            losses = objective.losses(params, ids, counted, noise(batch.index), block_size, documents)
            return total_loss(objective, losses)

        value, gradients = jax.value_and_grad(loss)(trained)
        return jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(gradients))

    def is_finite(rows: range) -> bool:
        counted = placement.rows(np.isin(mine, rows))
        with placement.in_force():
            return bool(jax.device_get(finite(trained, frozen, batch, counted)))

    rows = _search(is_finite, range(size))[:_NAMED_ROWS]
    return Blame(rows, {row: batch.rows[row - mine[0]] for row in rows if row in mine})


def _search(is_finite: Callable[[range], bool], rows: range) -> list[int]:
    """The rows that are not, by halves; stops when there are enough."""
    found: list[int] = []
    stack = [rows]
    while stack and len(found) < _NAMED_ROWS:
        rows = stack.pop()
        if is_finite(rows):
            continue
        if len(rows) == 1:
            found.append(rows[0])
        else:
            stack += [rows[len(rows) // 2 :], rows[: len(rows) // 2]]
    return found
