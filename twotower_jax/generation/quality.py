"""Numbers for quality: likelihood of given text under either tower, likelihood of generated text, and repetition.

All likelihoods are in nats per token; `exp` of them is a perplexity.
"""

import collections
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from twotower_jax.compiling import jit
from twotower_jax.diffusion import token_log_probabilities
from twotower_jax.generation.placement import filled_up
from twotower_jax.generation.score import score_ar
from twotower_jax.parameters import Params, bind
from twotower_jax.tokens import check_ids, pad_rows
from twotower_jax.two_tower import TwoTower

_BLOCKS_MULTIPLE = 4
_LONGEST_PERIOD = 32


class Estimate(NamedTuple):
    """A Monte Carlo mean over `tokens` tokens, in nats per token, and its standard error."""

    mean: float
    standard_error: float
    tokens: int


class Likelihood(NamedTuple):
    """Σ log p of `tokens` tokens, in nats."""

    log_likelihood: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(-self.log_likelihood / self.tokens) if self.tokens else math.nan


def text_likelihood(model: TwoTower, params: Params, rows: Sequence[Sequence[int]], batch_size: int = 8) -> Likelihood:
    """The likelihood of rows of ids under the context tower, each row's first token being given."""
    scores = score_ar(model, params, rows, batch_size)
    return Likelihood(sum(float(s.sum(dtype=np.float64)) for s in scores), sum(map(len, scores)))


def generated_likelihoods(
    model: TwoTower,
    params: Params,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int = 8,
) -> list[Likelihood]:
    """The likelihood of each row's new tokens under the context tower, given its prompt: (prompt ids, new tokens).

    Low perplexity alone is not quality: a row that repeats itself is very probable. See `repetition`.
    """
    scores = score_ar(model, params, [[*prompt, *tokens] for prompt, tokens in rows], batch_size)
    new = [score[len(prompt) - 1 :] for score, (prompt, _) in zip(scores, rows, strict=True)]
    return [Likelihood(float(s.sum(dtype=np.float64)), len(s)) for s in new]


@jit(static_argnames=("model", "block_size"))
def _bound_samples(params, ids, masked, t, counted, *, model, block_size):
    """One sample of each row's bound, in nats (B,), from masks (B, L) with the masked fraction t (B,) in each block."""
    mask_id = model.config.mask_token_id
    logits, _ = bind(model, params).training_logits(ids, jnp.where(masked, mask_id, ids), t, block_size)
    logits = jnp.where(jnp.arange(logits.shape[-1]) == mask_id, -jnp.inf, logits)
    losses = jnp.where(masked & counted, -token_log_probabilities(logits, ids), 0.0)
    return jnp.sum(losses, axis=1) / t


def nll_bound(
    model: TwoTower,
    params: Params,
    rows: Sequence[Sequence[int]],
    *,
    block_size: int,
    samples: int = 16,
    seed: int = 0,
    batch_size: int = 8,
) -> list[Estimate]:
    """An upper bound of each row's negative log-likelihood under block diffusion, estimated by Monte Carlo.

    −log p(x) ≤ Σ over blocks of E_t[(1/t) Σ over masked i of −log p(x_i | the block's other tokens, earlier blocks)],
    the bound of MDLM (Sahoo et al. 2024, arXiv 2406.07524) with the linear schedule, a block at a time (Arriola et al.
    2025, arXiv 2503.09573). The weight 1/t with t ~ U[0, 1] and independent masks has infinite variance. So t is one of
    1/S … S/S here, and exactly t·S tokens of every block are masked: the same expectation for a model that is not told
    t (Nie et al. 2025, arXiv 2502.09992), a bound for any (Hoogeboom et al. 2022, arXiv 2110.02037), and the t that
    sampling tells the denoiser. As in sampling, the mask token gets no probability. What is bounded is the process that
    decides one token at a time in random order; deciding several at once, which makes diffusion fast, is another one.

    Args:
      rows: token ids; of each row the whole blocks count, and a rest does not.
      samples: draws of (t, mask) per row, at least 2. A row's draws are a function of `seed` and its number.

    Raises:
      ValueError: for ids outside the vocabulary or holding the mask token, a row of less than a block, or too few
        samples.
    """
    if samples < 2 or block_size < 1:
        raise ValueError(f"samples={samples} must be at least 2 and block_size={block_size} at least 1")
    mask_id, work = model.config.mask_token_id, []
    for number, row in enumerate(rows):
        ids = check_ids(row, model.config.vocab_size, f"row {number + 1}")
        ids = ids[: len(ids) // block_size * block_size]
        if ids.ndim != 1 or not ids.size:
            raise ValueError(f"row {number + 1} is shorter than a block of {block_size}")
        if (ids == mask_id).any():
            raise ValueError(f"row {number + 1} holds the mask token {mask_id}, which no sample can hold")
        work += [(number, sample, ids) for sample in range(samples)]

    width = block_size * _BLOCKS_MULTIPLE
    longest = -(-max(len(ids) for _, _, ids in work) // width) * width
    values = collections.defaultdict(list)
    for batch in itertools.batched(work, batch_size):
        filled = filled_up(batch, batch_size, len(work))
        # Blocks of padding after a row are seen by none of its own.
        ids, lengths = pad_rows([ids for _, _, ids in filled], model.config.pad_token_id, longest)
        draws = [_draw(seed, number, sample, ids.shape[1], block_size) for number, sample, _ in filled]
        masked, t = (np.array(column) for column in zip(*draws, strict=True))
        counted = np.arange(ids.shape[1]) < lengths[:, None]
        bounds = _bound_samples(params, ids, masked, t, counted, model=model, block_size=block_size)
        for (number, _, ids), bound in zip(batch, np.asarray(bounds), strict=False):
            values[number].append(float(bound) / len(ids))
    tokens = {number: len(ids) for number, _, ids in work}
    return [
        Estimate(float(np.mean(v)), float(np.std(v, ddof=1) / math.sqrt(samples)), tokens[number])
        for number, v in sorted(values.items())
    ]


def mean_estimate(estimates: Sequence[Estimate]) -> Estimate:
    """Over all tokens of independent rows."""
    tokens = sum(e.tokens for e in estimates)
    mean = sum(e.mean * e.tokens for e in estimates) / tokens
    error = math.sqrt(sum((e.standard_error * e.tokens) ** 2 for e in estimates)) / tokens
    return Estimate(mean, error, tokens)


def _draw(seed: int, number: int, sample: int, length: int, block_size: int) -> tuple[np.ndarray, np.float32]:
    rng = np.random.default_rng((seed, number, sample))
    count = rng.integers(1, block_size + 1)
    order = rng.permuted(np.tile(np.arange(block_size), (length // block_size, 1)), axis=1)
    return (order < count).reshape(-1), np.float32(count / block_size)


class Repetition(NamedTuple):
    """How much a row repeats itself.

    Attributes:
      distinct: of its 1-, 2- and 3-grams, the part that are different ones (Li et al. 2016, arXiv 1510.03055); 1.0
        where there are none.
      loop: tokens in its longest stretch of period at most 32 that lasts for at least two periods; 0 if there is none.
      collapsed: whether that stretch is at least half of a row of 16 tokens or more.
    """

    distinct: tuple[float, float, float]
    loop: int
    collapsed: bool


def repetition(tokens: Sequence[int]) -> Repetition:
    """The repetition in a row's tokens."""

    def distinct(n: int) -> float:
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        return len(set(grams)) / len(grams) if grams else 1.0

    loop = 0
    for period in range(1, min(_LONGEST_PERIOD, len(tokens) // 2) + 1):
        run = 0
        for i in range(period, len(tokens)):
            run = run + 1 if tokens[i] == tokens[i - period] else 0
            if run >= period:
                loop = max(loop, run + period)
    return Repetition((distinct(1), distinct(2), distinct(3)), loop, len(tokens) >= 16 and 2 * loop >= len(tokens))
