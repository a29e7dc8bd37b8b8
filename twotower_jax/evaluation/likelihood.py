"""Log-probabilities of continuations given contexts, in three ways. Each says something else:

context     exact, of the context tower: Σ log p(x_i | all tokens before)
bound       at most log p(continuation) of the denoiser that reveals one token at a time in random order, by Monte Carlo
blockwise   exact, of the denoiser that commits in the order of greedy decoding, each token drawn from what it predicts

For the latter two a continuation is cut into blocks of S that begin where the context ends, as generation has it. Where
the last block holds fewer tokens, the positions after them stay masked: they are revealed after the continuation, and
what is bounded or computed is the probability of the tokens before. The denoiser is told the masked fraction of the
whole block, as in sampling, and the mask token gets no probability.

**The bound** (Nie et al. 2025, arXiv 2502.09992, equation 6; Hoogeboom et al. 2022, arXiv 2110.02037). Of a block's n
tokens x,

    −log p(x) ≤ Σ_{k=1}^{n} (1/k) E[Σ over k masked positions of −log p(x_i | the others)]

over uniform sets of k of them: an expectation over k uniform in 1 … n and a set, weighted by n/k. It is the discrete
form of ∫ m′(t)/m(t) E[…] dt, in which the trained noise schedule m drops out: m′(t) dt / m = dm / m, and the denoiser
is told the level, never the time (Kingma et al. 2021, arXiv 2107.00630). Draws are a function of the seed, the context
and the number of the block, and of nothing else: all choices of one question see the same order of positions and the
same level, so that their difference is less noisy than either.

**Blockwise.** Which positions an evaluation commits follows from its predictions alone, by the strategy's rule with the
most probable tokens (see `ORDERED`); each token committed is drawn from what was predicted there. So Σ exp over all
continuations of one length is 1. Greedy decoding goes through the same states as long as it gives the same tokens, and
the sum is the log-probability of its own answer. With temperature 1, sampling as generation does it is another process:
there the confidence is the drawn token's.
"""

import functools
import hashlib
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from twotower_jax.cache import Cache
from twotower_jax.compiling import jit
from twotower_jax.diffusion import Draft, SamplingConfig, noise_level, per_row, token_log_probabilities
from twotower_jax.diffusion.prediction import without_token
from twotower_jax.generation.placement import filled_up
from twotower_jax.parameters import Params, bind
from twotower_jax.randomness import key as random_key
from twotower_jax.tokens import check_ids, pad_rows
from twotower_jax.two_tower import TwoTower

KINDS = ("context", "bound", "blockwise")
# Strategies whose commits follow from the predictions alone and are never taken back.
ORDERED = ("confidence", "entropy_bounded", "factor")

# Tokens whose logits exist at a time.
_LOGITS = 512
# Rows are padded to at least so many tokens, and continuations of several tokens to so many, so that few are compiled.
_SHORTEST, _FEWEST = 32, 8


class Pair(NamedTuple):
    """Token ids of a context, at least one, and of its continuation."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Scored(NamedTuple):
    """What a continuation got.

    Attributes:
      log_likelihood: in nats; of `bound` its estimate from below.
      greedy: whether each token was the most probable one where it was looked at.
      standard_error: of the estimate; 0 where it is exact.
    """

    log_likelihood: float
    greedy: bool
    standard_error: float = 0.0


Done = Callable[[int, Scored], None]


def check_pairs(pairs: Sequence[Pair], vocab_size: int) -> None:
    """Refuses pairs that cannot be scored.

    Raises:
      ValueError: naming the pair, for an empty context or an id outside the vocabulary.
    """
    for number, pair in enumerate(pairs, 1):
        if not pair.context:
            raise ValueError(f"pair {number}: the context is empty; it holds at least one token")
        check_ids([*pair.context, *pair.continuation], vocab_size, f"pair {number}")


def context_scores(model: TwoTower, params: Params, pairs: Sequence[Pair], done: Done, *, batch_size: int = 8) -> None:
    """The context tower's exact log-likelihoods. Pairs that share all but their last tokens are read once.

    Args:
      done: gets each pair's number and score, in any order.

    Raises:
      ValueError: as `check_pairs`.
    """
    check_pairs(pairs, model.config.vocab_size)
    # What is read: all but the last token.
    same: dict[tuple, list[int]] = defaultdict(list)
    for number, pair in enumerate(pairs):
        if pair.continuation:
            same[(*pair.context, *pair.continuation[:-1]), len(pair.continuation)].append(number)
        else:
            done(number, Scored(0.0, True))
    shapes = defaultdict(list)
    for (ids, count), numbers in same.items():
        most = 1 if count == 1 else max(_FEWEST, _power(count))
        shapes[_width(len(ids)), most, _power(len(numbers))].append((ids, count, numbers))
    for (width, most, choices), rows in sorted(shapes.items(), key=lambda item: item[0]):
        for batch in itertools.batched(rows, batch_size):
            filled = filled_up(batch, batch_size, batch_size)
            ids, _ = pad_rows([np.array(row[0], np.int32) for row in filled], model.config.pad_token_id, width)
            starts = np.array([len(row[0]) - row[1] for row in filled], np.int32)
            targets = np.zeros((len(filled), choices, most), np.int32)
            for i, (_, count, numbers) in enumerate(filled):
                for k, number in enumerate(numbers):
                    targets[i, k, :count] = pairs[number].continuation
            found = _context(params, ids, starts, targets, model=model)
            logprobs, best = (np.asarray(part) for part in found)
            for i, (_, count, numbers) in enumerate(batch):
                for k, number in enumerate(numbers):
                    greedy = bool((best[i, :count] == targets[i, k, :count]).all())
                    done(number, Scored(float(logprobs[i, k, :count].sum(dtype=np.float64)), greedy))


@jit(static_argnames="model")
def _context(
    params: Params, ids: Int[Array, "B L"], starts: Int[Array, " B"], targets: Int[Array, "B K M"], *, model: TwoTower
) -> tuple[Float[Array, "B K M"], Int[Array, "B M"]]:
    """log p of the targets, of which the first comes after position `starts` of a row, and the best tokens there."""
    bound = bind(model, params)
    states = bound.context_tower.causal(ids)
    rows, _, most = targets.shape
    places = jnp.minimum(starts[:, None] + jnp.arange(most), ids.shape[1] - 1)
    states = jnp.take_along_axis(states, places[..., None], axis=1)
    part = min(most, max(1, 2 ** (max(1, _LOGITS // rows).bit_length() - 1)))

    def of_part(states: Float[Array, "B P D"], targets: Int[Array, "B K P"]):
        logits = bound.context_head(states)
        each = jax.vmap(token_log_probabilities, in_axes=(None, 1), out_axes=1)
        return each(logits, targets), jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def parts(values, axis):
        shape = values.shape[:axis] + (most // part, part) + values.shape[axis + 1 :]
        return jnp.moveaxis(values.reshape(shape), axis, 0)

    logprobs, best = jax.lax.map(lambda args: of_part(*args), (parts(states, 1), parts(targets, 2)))
    return jnp.moveaxis(logprobs, 0, 2).reshape(targets.shape), jnp.moveaxis(best, 0, 1).reshape(rows, most)


def bound_scores(
    model: TwoTower,
    params: Params,
    pairs: Sequence[Pair],
    done: Done,
    *,
    block_size: int,
    samples: int = 32,
    seed: int = 0,
    batch_size: int = 8,
) -> None:
    """The denoiser's bound of each pair, and its standard error, from `samples` draws for each block.

    Args:
      done: gets each pair's number and score, in any order.

    Raises:
      ValueError: as `check_pairs`, and for fewer than 2 samples.
    """
    if samples < 2:
        raise ValueError(f"samples={samples} must be at least 2, for a standard error")
    for batch, blocks in _batches(model, pairs, done, block_size, batch_size):
        cache = _prefill(model, params, [pair.context for pair in batch.pairs], blocks * block_size)
        totals, greedy = np.zeros((samples, len(batch.pairs))), np.ones(len(batch.pairs), bool)
        for number in range(blocks):
            block, counts = batch.block(number, block_size)
            draws = [_masks(seed, pair.context, number, int(n), samples, block_size)
                     for pair, n in zip(batch.pairs, counts, strict=True)]  # fmt: skip
            masked = np.stack(draws, axis=1)
            losses, best = _bound(params, cache, block, masked, model=model)
            levels = np.maximum(masked.sum(axis=2), 1)
            totals += np.asarray(losses, np.float64) * counts / levels
            greedy &= np.asarray(best)
            if number + 1 < blocks:
                cache = _extend(params, cache, block, counts, model=model)
        for i, pair_number in enumerate(batch.numbers):
            error = float(totals[:, i].std(ddof=1) / math.sqrt(samples))
            done(pair_number, Scored(-float(totals[:, i].mean()), bool(greedy[i]), error))


@functools.partial(jax.jit, static_argnames=("model",))
def _bound(
    params: Params, cache: Cache, block: Int[Array, "B S"], masked: Bool[Array, "n B S"], *, model: TwoTower
) -> tuple[Float[Array, "n B"], Bool[Array, " B"]]:
    """Σ over the masked tokens of the block of −log p for each draw, and whether all of them were the best ones.

    `masked` holds the tokens that count; where the block holds no token (id −1) it is masked in every draw.
    """
    bound, mask_id = bind(model, params), model.config.mask_token_id
    there = block >= 0
    tokens = jnp.maximum(block, 0)

    def draw(masked):
        xt = jnp.where(masked | ~there, mask_id, tokens)
        logits = without_token(bound.denoise(xt, noise_level(xt, mask_id), cache), mask_id)
        losses = jnp.where(masked, -token_log_probabilities(logits, tokens), 0.0)
        return jnp.sum(losses, axis=1), jnp.all(~masked | (jnp.argmax(logits, axis=-1) == tokens), axis=1)

    losses, best = jax.lax.map(draw, masked)
    return losses, jnp.all(best, axis=0)


def _masks(
    seed: int, context: Sequence[int], block: int, count: int, samples: int, block_size: int
) -> Bool[np.ndarray, "n S"]:
    """Draws of which of the first `count` positions of a block are masked: k of them, k uniform in 1 … count."""
    digest = hashlib.sha256(np.asarray(context, np.int32).tobytes()).digest()
    rng = np.random.default_rng([seed, block, *np.frombuffer(digest, np.uint32).tolist()])
    draws = rng.random((samples, block_size + 1))
    level = 1 + np.floor(draws[:, :1] * count)
    first = draws[:, 1 : count + 1]
    rank = np.argsort(np.argsort(first, axis=1), axis=1)
    return np.pad(rank < level, ((0, 0), (0, block_size - count)))


def blockwise_scores(
    model: TwoTower,
    params: Params,
    pairs: Sequence[Pair],
    done: Done,
    *,
    sampling: SamplingConfig,
    batch_size: int = 8,
) -> None:
    """The exact log-probability of each pair under the greedy commit order of `sampling`; see the head of this file.

    Args:
      done: gets each pair's number and score, in any order.

    Raises:
      ValueError: as `check_pairs`, and for a strategy that is none of `ORDERED`.
    """
    if sampling.strategy not in ORDERED:
        raise ValueError(
            f"blockwise: commits of strategy={sampling.strategy!r} do not follow from the predictions alone, "
            f"as those of {', '.join(ORDERED)} do"
        )
    size = sampling.block_size
    for batch, blocks in _batches(model, pairs, done, size, batch_size):
        cache = _prefill(model, params, [pair.context for pair in batch.pairs], blocks * size)
        totals, greedy = np.zeros(len(batch.pairs)), np.ones(len(batch.pairs), bool)
        for number in range(blocks):
            block, counts = batch.block(number, size)
            rule = per_row(sampling.rule, len(batch.pairs))
            steps = np.int32(sampling.steps_per_block)
            logprobs, best = _blockwise(params, cache, block, rule, steps, model=model)
            totals += np.asarray(logprobs, np.float64)
            greedy &= np.asarray(best)
            if number + 1 < blocks:
                cache = _extend(params, cache, block, counts, model=model)
        for i, pair_number in enumerate(batch.numbers):
            done(pair_number, Scored(float(totals[i]), bool(greedy[i])))


@functools.partial(jax.jit, static_argnames=("model",))
def _blockwise(params, cache, block, rule, steps, *, model) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Σ log p of a block's tokens (id −1: there is none) as they are committed, and whether each was the best one."""
    bound, mask_id = bind(model, params), model.config.mask_token_id
    there = block >= 0
    tokens = jnp.maximum(block, 0)

    def commits(xt, undecided, logits, best, confidence, rule, step):
        draft = Draft(xt, undecided, logits, best, confidence, random_key(0), step, steps, mask_id)
        chosen = undecided & (rule.new_block(draft) != mask_id)
        return jnp.where(step >= steps - 1, undecided, chosen)

    def go_on(carry):
        step, undecided, _, _ = carry
        return (step < steps) & jnp.any(undecided)

    def one_step(carry):
        step, undecided, total, greedy = carry
        xt = jnp.where(undecided | ~there, mask_id, tokens)
        logits = without_token(bound.denoise(xt, noise_level(xt, mask_id), cache), mask_id)
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        confidence = jnp.exp(token_log_probabilities(logits, best))
        by_row = jax.vmap(commits, in_axes=(0, 0, 0, 0, 0, 0, None))
        chosen = by_row(xt, undecided, logits, best, confidence, rule, step)
        logprobs = jnp.where(chosen, token_log_probabilities(logits, tokens), 0.0)
        greedy &= jnp.all(~chosen | (best == tokens), axis=1)
        return step + 1, undecided & ~chosen, total + jnp.sum(logprobs, axis=1), greedy

    rows = block.shape[0]
    start = jnp.int32(0), there, jnp.zeros(rows, jnp.float32), jnp.ones(rows, bool)
    _, _, total, greedy = jax.lax.while_loop(go_on, one_step, start)
    return total, greedy


# What bound and blockwise share: contexts in a cache, and continuations block by block.


class _Batch(NamedTuple):
    """Pairs that are computed together, the last of them repeated until the batch is full, and their numbers."""

    pairs: list[Pair]
    numbers: list[int]

    def block(self, number: int, size: int) -> tuple[Int[np.ndarray, "B S"], Int[np.ndarray, " B"]]:
        """A block's tokens (B, S) int32, −1 where there is none, and how many each row has of it (B,) int32."""
        parts = [pair.continuation[number * size : (number + 1) * size] for pair in self.pairs]
        block = np.full((len(parts), size), -1, np.int32)
        for row, part in zip(block, parts, strict=True):
            row[: len(part)] = part
        return block, np.array([len(part) for part in parts], np.int32)


def _batches(
    model: TwoTower, pairs: Sequence[Pair], done: Done, block_size: int, batch_size: int
) -> Iterator[tuple[_Batch, int]]:
    """Batches of pairs of similar lengths, and how many blocks their continuations have."""
    check_pairs(pairs, model.config.vocab_size)
    shapes = defaultdict(list)
    for number, pair in enumerate(pairs):
        if pair.continuation:
            shapes[_width(len(pair.context)), _power(-(-len(pair.continuation) // block_size))].append(number)
        else:
            done(number, Scored(0.0, True))
    for (_, blocks), numbers in sorted(shapes.items()):
        for some in itertools.batched(numbers, batch_size):
            filled = filled_up(some, batch_size, batch_size)
            yield _Batch([pairs[number] for number in filled], list(some)), blocks


def _prefill(model: TwoTower, params: Params, contexts: Sequence[Sequence[int]], more: int) -> Cache:
    """The context's cache of these, with room for `more` tokens."""
    width = _width(max(map(len, contexts)))
    ids, lengths = pad_rows([np.array(c, np.int32) for c in contexts], model.config.pad_token_id, width)
    return _read(params, ids, lengths, model=model, capacity=width + more)


@jit(static_argnames=("model", "capacity"))
def _read(params, ids, lengths, *, model, capacity) -> Cache:
    return bind(model, params).prefill(ids, lengths, capacity)[1]


@functools.partial(jax.jit, static_argnames=("model",))
def _extend(params, cache, block, counts, *, model) -> Cache:
    return bind(model, params).extend(jnp.maximum(block, 0), counts, cache)[1]


def _width(length: int) -> int:
    """A length rounded up such that few are compiled and little is wasted: four in each octave."""
    step = max(_SHORTEST, 2 ** (max(1, length).bit_length() - 3))
    return -(-max(1, length) // step) * step


def _power(count: int) -> int:
    """The least power of two that is not less."""
    return 1 << (count - 1).bit_length()
