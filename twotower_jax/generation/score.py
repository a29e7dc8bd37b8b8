"""Log-probabilities of given tokens, under either tower."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from twotower_jax.compiling import jit
from twotower_jax.diffusion import token_log_probabilities
from twotower_jax.generation.placement import filled_up
from twotower_jax.parameters import Params, bind
from twotower_jax.tokens import check_ids, pad_rows
from twotower_jax.two_tower import TwoTower

_LENGTH_MULTIPLE = 32


class DenoiserRow(NamedTuple):
    """One sequence for the denoiser.

    Attributes:
      ids: clean tokens, a multiple of `block_size` of them.
      masked: whether each is replaced by the mask token.
      t: the noise level to condition on.
      block_size: S.
    """

    ids: Sequence[int]
    masked: Sequence[bool]
    t: float
    block_size: int


@jit(static_argnames="model")
def _ar(params: Params, ids: Int[Array, "B L"], *, model: TwoTower) -> Float[Array, "B L-1"]:
    return token_log_probabilities(bind(model, params).context_logits(ids)[:, :-1], ids[:, 1:])


@jit(static_argnames=("model", "block_size"))
def _denoiser(
    params: Params,
    ids: Int[Array, "B L"],
    masked: Bool[Array, "B L"],
    t: Float[Array, " B"],
    *,
    model: TwoTower,
    block_size: int,
) -> Float[Array, "B L"]:
    noisy = jnp.where(masked, model.config.mask_token_id, ids)
    logits, _ = bind(model, params).training_logits(ids, noisy, t, block_size)
    return token_log_probabilities(logits, ids)


def score_ar(model: TwoTower, params: Params, rows: Sequence[Sequence[int]], batch_size: int = 8) -> list[np.ndarray]:
    """log p(ids[i + 1] | ids[..i]) under the context tower: for each row of n ids, n − 1 float32 numbers.

    Raises:
      ValueError: for an empty row or an id outside the vocabulary.
    """
    checked = []
    for i, ids in enumerate(rows):
        checked.append(_checked(ids, model, i))
    out = []
    for batch in itertools.batched(checked, batch_size):
        # Causal: padding on the right changes nothing before it. At least two columns, for one transition.
        ids, lengths = pad_rows(filled_up(batch, batch_size, len(checked)), model.config.pad_token_id, _LENGTH_MULTIPLE)
        logprobs = np.asarray(_ar(params, ids, model=model))
        out += [logprobs[i, : lengths[i] - 1] for i in range(len(batch))]
    return out


def score_denoiser(
    model: TwoTower, params: Params, rows: Sequence[DenoiserRow], batch_size: int = 8
) -> list[np.ndarray]:
    """log p(ids[i]) of the denoiser's output at i in the training-time forward pass: n float32 numbers per row.

    Raises:
      ValueError: for ids outside the vocabulary, a length that is not a multiple of the block, masks of another length,
        or a t outside [0, 1].
    """
    checked = []
    for i, row in enumerate(rows):
        ids = _checked(row.ids, model, i)
        try:
            masked = np.asarray(row.masked)
        except ValueError:  # lists in it
            masked = np.zeros(0)
        if masked.dtype != bool or masked.shape != ids.shape:
            raise ValueError(f"row {i + 1}: masked must hold {ids.size} true or false values, one per id")
        if not isinstance(row.block_size, int) or isinstance(row.block_size, bool) or row.block_size < 1:
            raise ValueError(f"row {i + 1}: block_size must be a positive whole number, not {row.block_size!r}")
        if ids.size % row.block_size:
            raise ValueError(f"row {i + 1}: the length {ids.size} is not a multiple of block_size={row.block_size}")
        if isinstance(row.t, bool) or not isinstance(row.t, int | float) or not 0 <= row.t <= 1:
            raise ValueError(f"row {i + 1}: t must be a number in [0, 1], not {row.t!r}")
        checked.append((ids, masked, row.t, row.block_size))

    out: dict[int, np.ndarray] = {}
    # Rows of one shape are computed together; padding would be seen inside a block.
    shape = {i: (ids.size, block_size) for i, (ids, _, _, block_size) in enumerate(checked)}
    for (_, block_size), group in itertools.groupby(sorted(shape, key=shape.get), key=shape.get):
        group = list(group)
        for numbers in itertools.batched(group, batch_size):
            batch = filled_up([checked[i] for i in numbers], batch_size, len(group))
            ids, masked, t, _ = (np.array(column) for column in zip(*batch, strict=True))
            logprobs = _denoiser(params, ids, masked, np.float32(t), model=model, block_size=block_size)
            out.update(zip(numbers, np.asarray(logprobs), strict=False))
    return [out[i] for i in range(len(checked))]


def _checked(ids, model, i) -> np.ndarray:
    ids = check_ids(ids, model.config.vocab_size, f"row {i + 1}")
    if ids.ndim != 1 or ids.size == 0:
        raise ValueError(f"row {i + 1}: ids must be a list of at least one token id")
    return ids
