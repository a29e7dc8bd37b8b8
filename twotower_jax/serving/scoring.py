"""Log-probabilities of prompts under the context tower, with the most probable tokens, for `echo` with `logprobs`."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from twotower_jax.compiling import jit
from twotower_jax.diffusion import token_log_probabilities
from twotower_jax.generation.placement import TowerMeshes, bind_part, in_force
from twotower_jax.generation.settings import TokenLogprob
from twotower_jax.parameters import Params
from twotower_jax.tokens import check_ids, pad_rows
from twotower_jax.two_tower import TwoTower

# Rows are padded to a power of two of at least this, so that few lengths are compiled.
_SHORTEST = 32
# Tokens of rows that are computed together, and of those whose logits exist at a time.
_TOGETHER, _LOGITS = 2048, 512

# One prompt: for each token what the context thought of it before it came, best tokens first; None for the first.
Scored = list[TokenLogprob | None]


class _Found(NamedTuple):
    chosen: jax.Array
    tokens: jax.Array
    logprobs: jax.Array


@jit(static_argnames=("model", "top"))
def _score(params: Params, ids: Int[Array, "B L"], *, model: TwoTower, top: int) -> _Found:
    """What was thought of each token after the first: (B, L), (B, L, top) and (B, L, top). The last says nothing."""
    bound = bind_part(model, params)
    states = bound.context_tower.causal(ids)
    batch, length, width = states.shape
    following = jnp.concatenate([ids[:, 1:], ids[:, :1]], axis=1)
    part = max(1, min(length, _LOGITS // batch))

    def of_part(states: Float[Array, "B P D"], following: Int[Array, "B P"]) -> _Found:
        logits = bound.context_head(states)
        _, tokens = jax.lax.top_k(logits, max(1, top))
        each = jax.vmap(token_log_probabilities, in_axes=(None, 2), out_axes=2)
        return _Found(token_log_probabilities(logits, following), tokens, each(logits, tokens))

    def parts(values):
        return jnp.moveaxis(values.reshape(batch, length // part, part, *values.shape[2:]), 1, 0)

    found = jax.lax.map(lambda args: of_part(*args), (parts(states), parts(following)))
    return jax.tree.map(lambda v: jnp.moveaxis(v, 0, 1).reshape(batch, length, *v.shape[3:]), found)


class Scorer:
    """Scores prompts with parameters, or those of an adapter's name, where `placement` has them."""

    def __init__(
        self,
        model: TwoTower,
        params: Params,
        placement: TowerMeshes,
        adapters: Mapping[str, Params] | None = None,
    ):
        self._model, self._placement = model, placement
        with in_force(placement.context):
            named = {None: params, **(adapters or {})}
            self._params = {name: placement.context_params(model, one) for name, one in named.items()}

    def __call__(self, prompts: Sequence[Sequence[int]], top: int, adapter: str | None = None) -> list[Scored]:
        """What the context thinks of each token of each prompt, and of its `top` best.

        Raises:
          ValueError: for an empty prompt or an id outside the vocabulary.
        """
        rows = [check_ids(ids, self._model.config.vocab_size, f"prompt {n}") for n, ids in enumerate(prompts)]
        if any(row.ndim != 1 or not row.size for row in rows):
            raise ValueError("a prompt is empty")
        found: dict[int, Scored] = {}
        by_width: dict[int, list[int]] = {}
        for number, row in enumerate(rows):
            by_width.setdefault(_padded(len(row)), []).append(number)
        for width, numbers in by_width.items():
            size = max(1, min(8, _TOGETHER // width))
            for batch in itertools.batched(numbers, size):
                # Filled up with the last row, so that it is compiled for one size.
                given = [rows[n] for n in batch] + [rows[batch[-1]]] * (size - len(batch))
                found |= dict(zip(batch, self._batch(given, width, top, adapter), strict=False))
        return [found[number] for number in range(len(rows))]

    def _batch(self, rows: list[np.ndarray], width: int, top: int, adapter: str | None) -> list[Scored]:
        ids, lengths = pad_rows(rows, self._model.config.pad_token_id, width)
        with in_force(self._placement.context):
            out = jax.device_get(_score(self._params[adapter], ids, model=self._model, top=top))
        scored: list[Scored] = []
        for row, length in enumerate(lengths.tolist()):
            told: Scored = [None]
            for place in range(length - 1):
                pairs = zip(out.tokens[row, place, :top].tolist(), out.logprobs[row, place, :top].tolist(), strict=True)
                told.append(TokenLogprob(int(ids[row, place + 1]), float(out.chosen[row, place]), list(pairs)))
            scored.append(told)
        return scored


def _padded(length: int) -> int:
    return max(_SHORTEST, 1 << (length - 1).bit_length())
