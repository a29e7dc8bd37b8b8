"""What the host says with each call: which rows go together, how long a call lasts, and what stands in their blocks."""

from collections.abc import Sequence

import jax
import numpy as np

from twotower_jax.config import ModelConfig
from twotower_jax.diffusion import Choice
from twotower_jax.generation.blocks import TOKENS_PER_CALL
from twotower_jax.generation.modes import Call, Emitted, Recipe
from twotower_jax.generation.rows import Kind, Row
from twotower_jax.generation.slots import Draws, Given, allowed_bits, end_token_array

# The shortest piece of a prompt on accelerators, of which caches are a multiple.
PIECE = 64
# The shortest one on processors.
_NARROWEST = 16
# Each longer piece is so many times the one before, up to prefill_chunk: few lengths, so that few are compiled.
_PIECE_GROWTH = 4
# Enough for most of what is typed at a prompt.
_LEAST_BUCKET = 4 * PIECE
# More evaluations than any call makes.
_NO_LIMIT = 2**30

# A row's place in the table: the row, or None where there is none, or one that does not take part.
Places = Sequence[Row | None]


def round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def bucket(positions: int) -> int:
    """The next of the few sizes that caches are rounded up to: 256, 384, 512, 768, 1024 and so on."""
    size = _LEAST_BUCKET
    while size < positions:
        size = size // 2 * 3 if size.bit_count() == 1 else size // 3 * 4
    return size


def piece_width(left: int, chunk: int, narrow: bool = False) -> int:
    """How many tokens the next piece of a prompt has, padding included.

    Args:
      left: tokens to be read. chunk: the most of a piece.
      narrow: whether pieces may be of 16 and 32 tokens, too; see `reads_narrow`.
    """
    width = _NARROWEST if narrow else PIECE
    while width < left:
        width *= 2 if width < PIECE else _PIECE_GROWTH
    return min(width, chunk)


def reads_narrow(platform: str) -> bool:
    """Whether short prompts are read in narrow pieces, those of a call as wide as the longest of them needs.

    A processor needs half of the time for 16 positions that it needs for 64; an accelerator waits for the weights in
    both cases, and would compile three programs in place of one.
    """
    return platform == "cpu"


def recipe(kind: Kind, rows: Places, record: bool, routing: bool, vocab_size: int) -> Recipe:
    """What the rows of a kind need, so that one call serves them all."""
    requests = [row.request for row in rows if row is not None]
    return Recipe(
        kind.mode,
        kind.block_size,
        record=record,
        routing=routing,
        alternatives=alternatives(requests, vocab_size),
        context=kind.mode == "diffusion" and any(request.context_logprobs for request in requests),
    )


def alternatives(requests, vocab_size: int) -> int:
    """How many of the most probable tokens to tell: a power of two, so that few programs are compiled."""
    most = max((request.logprobs or 0 for request in requests), default=0)
    return min(1 << (most - 1).bit_length(), vocab_size) if most else 0


def standing(kind: Kind, rows: Places, eos_width: int, config: ModelConfig) -> Call:
    """What a call for the rows of a kind says as long as they are the same rows; places that are None take no part.

    Where a caller says something of positions, the blocks to come included, `given` is not among it: see `now`.
    """
    some = next(row for row in rows if row is not None)
    strategy = None
    if some.blockwise:
        rules = [(row or some).rule for row in rows]
        strategy = jax.tree.map(lambda *knobs: np.array(knobs, _knob_dtype(knobs[0])), *rules)
    stepwise = any(row is not None and (row.request.provisional or row.guide) for row in rows)
    return Call(
        alive=np.array([row is not None for row in rows]),
        draws=draws(rows),
        eos=end_tokens(rows, eos_width),
        strategy=strategy,
        steps=_column(rows, np.int32, 1, lambda row: row.request.sampling.steps_per_block),
        tolerance=_column(rows, np.float32, 0.0, lambda row: row.request.tolerance),
        fresh=np.zeros(len(rows), bool),
        given=given([None] * len(rows), [0] * len(rows), _positions(kind), config),
        quorum=np.int32(0),
        most=np.int32(1 if stepwise else _NO_LIMIT),
    )


def now(standing: Call, kind: Kind, rows: Places, quorum: int, config: ModelConfig) -> Call:
    """The call, of what stands and what is said this time."""
    fresh = _column(rows, bool, False, lambda row: row.fresh)
    standing = standing._replace(fresh=fresh, quorum=np.int32(quorum))
    if not any(row is not None and row.request.holds for row in rows):
        return standing
    firsts = [row.position - row.given if row else 0 for row in rows]
    standing = standing._replace(given=given(rows, firsts, _positions(kind), config))
    if kind.mode != "diffusion" or not any(row is not None and row.guide for row in rows):
        return standing
    return standing._replace(
        steps=_column(rows, np.int32, 1, lambda row: row.steps),
        again=np.stack([np.zeros(kind.block_size, bool) if row is None else row.again for row in rows]),
        held=_column(rows, bool, False, lambda row: row.guide is not None and not row.guide.whole),
    )


def told(emitted: Emitted, rows: Places) -> Emitted:
    """What of a call the rows are to be told: to fetch an array from a device takes its time."""
    requests = [row.request for row in rows if row is not None]
    said, revealed = emitted.said._replace(finite=None), emitted.revealed
    guided = any(request.constraint for request in requests)
    if not guided and not any(request.tells for request in requests):
        said = said._replace(log_probability=None)
        revealed = revealed and revealed._replace(log_probability=None)
    provisional = any(request.provisional for request in requests)
    return emitted._replace(said=said, revealed=revealed, blocks=emitted.blocks if provisional or guided else None)


def draws(rows: Places) -> Draws:
    """Seeds, temperatures and filters of rows; greedy where there is none."""
    return Draws(
        seed=_column(rows, np.uint32, 0, lambda row: row.request.seed),
        sample=_column(rows, np.uint32, 0, lambda row: row.sample),
        choice=Choice(
            temperature=_column(rows, np.float32, 0.0, lambda row: row.request.sampling.temperature),
            top_k=_column(rows, np.int32, 0, lambda row: row.request.sampling.top_k),
            top_p=_column(rows, np.float32, 1.0, lambda row: row.request.sampling.top_p),
        ),
    )


def end_tokens(rows: Places, width: int) -> np.ndarray:
    """(B, width) int32: what ends each row, padded with −1."""
    out = np.full((len(rows), width), -1, np.int32)
    for i, row in enumerate(rows):
        if row is not None:
            out[i, : len(row.end_tokens)] = row.end_tokens
    return out


def end_token_width(row: Row) -> int:
    return len(end_token_array(row.end_tokens))


def given(rows: Places, firsts: Sequence[int], count: int, config: ModelConfig) -> Given:
    """What callers say of `count` positions of their rows, from those in `firsts` on."""
    tokens = np.full((len(rows), count), config.mask_token_id, np.int32)
    fixed = np.zeros((len(rows), count), bool)
    allowed = None
    if any(row is not None and (row.request.allowed or row.guide) for row in rows):
        # At other positions too: compiled once for the whole row.
        allowed = np.full((len(rows), count, -(-config.vocab_size // 8)), 255, np.uint8)
    for i, (row, first) in enumerate(zip(rows, firsts, strict=True)):
        if row is None or not row.request.holds:
            continue
        request = row.request
        for place in range(count):
            position = first + place
            if request.start is not None and 0 <= position < len(request.start):
                tokens[i, place] = request.start[position]
            if position in request.pinned:
                tokens[i, place], fixed[i, place] = request.pinned[position], True
            if request.allowed and position in request.allowed:
                allowed[i, place] = allowed_bits(request.allowed[position], config.vocab_size)
        if row.guide is not None:
            known = count if row.blockwise else 1  # Where one token is said at a time, what follows it is not known.
            allowed[i, :known] = row.guide.allowed(known, config.vocab_size)
    return Given(tokens, fixed, allowed)


def _positions(kind: Kind) -> int:
    """How many positions a call may decide, and is told of."""
    if kind.mode == "speculative":
        return kind.block_size + 1
    return kind.block_size if kind.mode == "diffusion" else TOKENS_PER_CALL


def _column(rows: Places, dtype, nothing, value) -> np.ndarray:
    return np.array([nothing if row is None else value(row) for row in rows], dtype)


def _knob_dtype(knob) -> type:
    return np.int32 if isinstance(knob, int) else np.float32
