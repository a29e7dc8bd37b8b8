"""Prompts in, tokens out: a table of rows on the device, and the host that fills and empties it between blocks.

The host calls one compiled function per block (blocks.py) and looks at what came of it: rows that are done
free their slot, and waiting prompts are read into it, in pieces. While rows are being generated a long prompt is read
one piece per block, so that they do not wait for it.

A row's numbers come from the same compiled arithmetic whatever its neighbors are; with another batch size the shapes
of the matrix products are others, and so may be the last bits of its logits, but not its tokens.
"""

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from twotower_jax import memory, sharding
from twotower_jax.diffusion import SamplingConfig, per_row
from twotower_jax.generation.blocks import Table
from twotower_jax.generation.modes import Call, Emitted, Recipe, Trace
from twotower_jax.generation.placement import TowerMeshes
from twotower_jax.generation.settings import Result, Settings, Step
from twotower_jax.generation.slots import First, Piece, cache_bytes, end_token_array
from twotower_jax.generation.stops import Decode, Ending
from twotower_jax.parameters import Params
from twotower_jax.tokens import check_ids
from twotower_jax.two_tower import TwoTower

# The shortest piece of a prompt, of which caches are a multiple.
_PIECE = 64
# Each longer piece is so many times the one before, up to prefill_chunk: few lengths, so that few are compiled.
_PIECE_GROWTH = 4
# Pieces are read together as long as they are not more tokens than this.
_TOKENS_PER_READ = 512


class Progress(NamedTuple):
    """What a row got from one block.

    Attributes:
      number: the row's.
      block: number of the block (of the call, where one token is generated at a time), or None: the first token of ar
        and speculative, which reading the prompt gives.
      start: how many new tokens the row had before.
      tokens: new in this block, before the row is cut.
      steps: the denoiser's, if a trace is recorded.
      accepted: how many of the first tokens are a draft's, in speculative mode.
      result: if the row is done.
    """

    number: int
    block: int | None
    start: int
    tokens: list[int]
    steps: list[Step] | None
    accepted: int | None
    result: Result | None


@dataclasses.dataclass
class _Row:
    """A row's bookkeeping, from `submit` to its result."""

    number: int
    prompt: np.ndarray
    limit: int
    to_read: np.ndarray
    ending: Ending
    read: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    denoiser_evaluations: int = 0
    context_evaluations: int = 0
    blocks: int = 0
    accepted: int = 0
    trace: list[Step] = dataclasses.field(default_factory=list)

    @property
    def reading(self) -> bool:
        return self.read < max(1, len(self.to_read))


def positions(prompt_length: int, max_new_tokens: int, settings: Settings) -> int:
    """The cache positions that a row may come to use, whatever happens."""
    new = max_new_tokens
    if settings.mode in ("diffusion", "speculative"):
        # A block is written whole, also where the row ends inside it.
        new = _round_up(max_new_tokens, settings.sampling.block_size) + settings.sampling.block_size
    # The last piece of a prompt is written with its padding.
    chunk = settings.prefill_chunk
    whole = (prompt_length - 1) // chunk * chunk
    return max(prompt_length + new, whole + _piece_width(prompt_length - whole, chunk))


def _piece_width(left: int, chunk: int) -> int:
    """How many tokens the next piece of a prompt has, padding included; it depends on the prompt's own length alone."""
    width = _PIECE
    while width < left:
        width *= _PIECE_GROWTH
    return min(width, chunk)


class Engine:
    """Generates continuously: rows are submitted at any time, and `step` advances all that are there by a block.

    Args:
      capacity: cache positions of each slot; see `positions`.
      slots: rows computed together; None takes `settings.batch_size`. Rounded up to what the placement divides.
      decode: tokens to text, needed for stop texts.
      record_trace: keep the denoiser's steps.
      record_routing: with them the experts that it used.
      placement: the devices of both towers; parameters that lie elsewhere are moved.

    Raises:
      ValueError: before anything is allocated, if the caches need more memory than there is, the placement does not
        divide the model, or a stop text is set and no `decode` given.
    """

    def __init__(
        self,
        model: TwoTower,
        params: Params,
        settings: Settings,
        *,
        capacity: int,
        slots: int | None = None,
        decode: Decode | None = None,
        record_trace: bool = False,
        record_routing: bool = False,
        placement: TowerMeshes = TowerMeshes(),  # noqa: B008 (frozen)
    ):
        if settings.stop and decode is None:
            raise ValueError(f"stop={settings.stop!r} needs a tokenizer, to turn tokens into text")
        placement.check(model.config)
        self._model, self._settings = model, settings
        self._decode, self._record = decode, record_trace
        self._capacity = _round_up(capacity, _PIECE)
        self._eos = settings.end_tokens(model.config)
        self._rows_apart = placement.rows
        batch = _round_up(slots or settings.batch_size, placement.rows)
        self._table: list[_Row | None] = [None] * batch
        self._waiting: deque[_Row] = deque()
        self._submitted = 0
        self.cache_bytes = cache_bytes(model, batch, self._capacity, placement.context)
        _check_memory(self.cache_bytes, batch, self._capacity, settings.max_cache_gb, placement)
        # AR's choice knows nothing of blocks, and the strategy is an argument of a block: what does not count is left
        # out, so that less is compiled.
        sampling = settings.sampling
        choice = SamplingConfig(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
        self._first = choice if settings.mode in ("ar", "speculative") else None
        blocks = settings.mode in ("diffusion", "speculative")
        self._strategy = per_row(sampling.rule, batch) if blocks else None
        self._recipe = Recipe(
            settings.mode,
            sampling.without_strategy() if blocks else choice,
            record_trace,
            record_routing,
        )
        self._rows = Table(
            model, params, placement, self._recipe, batch=batch, capacity=self._capacity, first=self._first
        )

    def submit(self, prompt: Sequence[int], max_new_tokens: int | None = None) -> int:
        """Adds a row; it waits until a slot is free. Returns its number, counting from 0.

        Raises:
          ValueError: for an empty prompt, an id outside the vocabulary, or a row that does not fit a slot.
        """
        number = self._submitted
        ids = _checked(self._model, prompt, number)
        limit = self._settings.max_new_tokens if max_new_tokens is None else max_new_tokens
        if limit < 1:
            raise ValueError(f"prompt {number + 1}: max_new_tokens must be at least 1, not {limit}")
        needed = positions(len(ids), limit, self._settings)
        if needed > self._capacity:
            raise ValueError(f"prompt {number + 1} needs {needed} cache positions, and a slot has {self._capacity}")
        to_read = ids[:-1] if self._settings.mode == "mock_ar" else ids
        ending = Ending(limit, eos=self._eos, stop=self._settings.stop, decode=self._decode)
        self._waiting.append(_Row(number, ids, limit, to_read, ending))
        self._submitted += 1
        return number

    @property
    def busy(self) -> bool:
        """Whether a row is waiting or being generated."""
        return bool(self._waiting) or any(self._table)

    def step(self) -> list[Progress]:
        """Reads prompts into free slots and generates one block of every row that is ready.

        Returns:
          what each row got, in the order of their numbers.

        Raises:
          FloatingPointError: if a row's logits are not finite; no row can go on after it.
        """
        firsts = self._read_prompts()
        alive = np.array([row is not None and not row.reading for row in self._table])
        emitted = self._block(alive) if alive.any() else None
        # One transfer, after the block: the first tokens do not hold it up.
        chosen, emitted = jax.device_get(sharding.whole(([first for _, first in firsts], emitted)))
        progress = []
        for (rows, _), first in zip(firsts, chosen, strict=True):
            for i, row in rows:
                if not first.finite[i]:
                    raise _not_finite(row)
                row.tokens.append(int(first.tokens[i]))
                progress.append(Progress(row.number, None, 0, list(row.tokens), None, None, None))
        progress += [self._harvest(int(slot), emitted) for slot in np.flatnonzero(alive)]
        return sorted(progress, key=lambda p: p.number)

    # Reading prompts.

    def _read_prompts(self) -> list[tuple[list[tuple[int, _Row]], First]]:
        """Fills free slots; reads a piece of every prompt that is not read, or all pieces if nothing else is to do.

        Returns:
          for each call that chose first tokens, which of them belong to which rows, and the tokens.
        """
        for slot, row in enumerate(self._table):
            if row is None and self._waiting:
                self._table[slot] = self._waiting.popleft()
        firsts = []
        while True:
            reading = [slot for slot, row in enumerate(self._table) if row is not None and row.reading]
            by_width = {}
            for slot in reading:
                row = self._table[slot]
                width = _piece_width(len(row.to_read) - row.read, self._settings.prefill_chunk)
                by_width.setdefault(width, []).append(slot)
            for width, group in sorted(by_width.items()):
                firsts += self._read_pieces(width, group)
            others = any(row is not None and not row.reading for row in self._table)
            if others or not reading:
                return firsts

    def _read_pieces(self, width: int, group: list[int]) -> list[tuple[list[tuple[int, _Row]], First]]:
        """The next pieces of the prompts in these slots, some of them in one call."""
        firsts = []
        apart = self._rows_apart
        together = min(len(self._table), _round_up(max(_TOKENS_PER_READ, width) // width, apart))
        while group:
            # A few prompts are read one by one rather than with a table of padding.
            size = together if len(group) * 4 > together else apart
            firsts += self._read_rows(width, group[:size], size)
            group = group[size:]
        return firsts

    def _read_rows(self, width: int, group: list[int], size: int) -> list[tuple[list[tuple[int, _Row]], First]]:
        """The next pieces of the prompts in the slots of `group`, in a call for `size` rows."""
        piece = Piece(
            ids=np.full((size, width), self._model.config.pad_token_id, np.int32),
            lengths=np.zeros(size, np.int32),
            slot=np.full(size, len(self._table), np.int32),
            first=np.zeros(size, bool),
            last=np.zeros(size, bool),
            number=np.zeros(size, np.uint32),
            limit=np.zeros(size, np.int32),
            unread=np.zeros(size, np.int32),
        )
        for i, slot in enumerate(group):
            row = self._table[slot]
            ids = row.to_read[row.read : row.read + width]
            piece.ids[i, : len(ids)] = ids
            piece.lengths[i], piece.slot[i] = len(ids), slot
            piece.first[i] = row.read == 0
            row.context_evaluations += len(ids) > 0 and row.read == 0
            row.read += max(1, len(ids))
            piece.last[i] = not row.reading
            piece.number[i], piece.limit[i], piece.unread[i] = row.number, row.limit, row.prompt[-1]
        first = self._rows.read(piece, *self._seed_and_eos())
        ready = [(i, self._table[group[i]]) for i in np.flatnonzero(piece.last).tolist()]
        return [(ready, first)] if self._first and ready else []

    # Blocks.

    def _seed_and_eos(self) -> tuple[np.uint32, np.ndarray]:
        return np.uint32(self._settings.seed), end_token_array(self._eos)

    def _block(self, alive: np.ndarray) -> Emitted:
        tolerance = np.float32(self._settings.tolerance)
        return self._rows.block(Call(alive, *self._seed_and_eos(), self._strategy, tolerance))

    def _harvest(self, slot: int, emitted: Emitted) -> Progress:
        row, settings = self._table[slot], self._settings
        if not emitted.finite[slot]:
            raise _not_finite(row)
        block, before, count = row.blocks, len(row.tokens), int(emitted.count[slot])
        new = emitted.tokens[slot, :count].tolist()
        mask = self._model.config.mask_token_id
        steps = None if emitted.trace is None else _steps(emitted.trace, slot, block, mask)
        row.tokens += new
        row.trace += steps or ()
        row.blocks += count > 0
        row.denoiser_evaluations += int(emitted.denoiser_evaluations[slot])
        row.context_evaluations += int(emitted.context_evaluations[slot])
        end = row.ending.look(row.tokens)
        accepted = None if emitted.accepted is None else int(emitted.accepted[slot])
        if accepted is not None:
            row.accepted += min(accepted, max(0, len(row.tokens if end is None else end.tokens) - before))
        result = None
        if end is not None:
            self._table[slot] = None
            drafts = settings.mode in ("diffusion", "speculative")
            result = Result(
                prompt_ids=row.prompt.tolist(),
                tokens=end.tokens,
                denoiser_evaluations=row.denoiser_evaluations,
                context_evaluations=row.context_evaluations,
                finish_reason=end.reason,
                text=end.text,
                blocks=row.blocks if drafts else None,
                accepted_draft_tokens=row.accepted if settings.mode == "speculative" else None,
                trace=row.trace if self._record and drafts else None,
            )
        return Progress(row.number, block, before, new, steps, accepted, result)


def generate(
    model: TwoTower,
    params: Params,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    *,
    record_trace: bool = False,
    decode: Decode | None = None,
    placement: TowerMeshes = TowerMeshes(),  # noqa: B008 (frozen)
) -> Iterator[Result]:
    """Continues every prompt; yields one result a prompt, in order, each as soon as those before it are done.

    Args:
      prompts: token ids, at least one each.
      record_trace: keep the denoiser's steps in the results.
      decode: tokens to text; needed for `settings.stop`.
      placement: the devices of both towers.

    Raises:
      ValueError: before anything is computed, for an empty prompt, an id outside the vocabulary, or caches that do not
        fit; FloatingPointError if a row's logits are not finite.
    """
    options = {"record_trace": record_trace, "decode": decode, "placement": placement}
    engine = start(model, params, prompts, settings, **options)
    return in_order(progress for steps in iter_steps(engine) for progress in steps)


def start(
    model: TwoTower,
    params: Params,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    **options,
) -> Engine:
    """An engine with room for these prompts, all of them submitted. Options as of `Engine`, errors as of `generate`."""
    if not prompts:
        raise ValueError("no prompts given")
    rows = [_checked(model, prompt, number) for number, prompt in enumerate(prompts)]
    engine = Engine(
        model,
        params,
        settings,
        capacity=max(positions(len(row), settings.max_new_tokens, settings) for row in rows),
        slots=min(settings.batch_size, len(rows)),
        **options,
    )
    for row in rows:
        engine.submit(row)
    return engine


def iter_steps(engine: Engine) -> Iterator[list[Progress]]:
    """Block by block what the rows of an engine get, until none is left."""
    while engine.busy:
        yield engine.step()


def in_order(steps: Iterable[Progress]) -> Iterator[Result]:
    """The results in the order of their rows."""
    done, number = {}, 0
    for progress in steps:
        if progress.result is not None:
            done[progress.number] = progress.result
        while number in done:
            yield done.pop(number)
            number += 1


def _checked(model: TwoTower, prompt: Sequence[int], number: int) -> np.ndarray:
    ids = check_ids(prompt, model.config.vocab_size, f"prompt {number + 1}")
    if ids.ndim != 1:
        raise ValueError(f"prompt {number + 1}: expected one list of token ids, found lists in it")
    if ids.size == 0:
        raise ValueError(f"prompt {number + 1} is empty; the model continues at least one token")
    return ids


def _check_memory(needed: int, slots: int, capacity: int, limit_gb: float | None, placement: TowerMeshes) -> None:
    """Refuses a table that needs more of a device than it has free, or than is allowed."""
    if limit_gb is not None:
        available, where = int(limit_gb * 1e9), "max_cache_gb allows"
    elif found := memory.room(placement.devices):
        # Processors share what there is. Nothing is known here of a device of another process.
        sharing = sum(device.process_index == jax.process_index() for device in placement.devices)
        available, where = found.free // (sharing if found.shared else 1), found.where
    else:
        return
    if needed > available:
        each = " on each device" if len(placement.devices) > 1 else ""
        fitting = int(available * slots // needed) // placement.rows * placement.rows
        remedy = f"lower batch_size to {fitting}, or" if fitting else "not one row fits; shorten the prompts or lower"
        raise ValueError(
            f"the caches of {slots} rows of {capacity} positions need {needed / 1e9:.3g} GB{each}, and {where} "
            f"{available / 1e9:.3g} GB; {remedy} max_new_tokens"
        )


def _not_finite(row: _Row) -> FloatingPointError:
    return FloatingPointError(f"prompt {row.number + 1}: the model's logits are not finite; are its weights?")


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _steps(trace: Trace, slot: int, block: int, mask_token_id: int) -> list[Step]:
    return [
        Step(
            block,
            step,
            float(trace.t[step, slot]),
            trace.xt[step, slot].tolist(),
            trace.tokens[step, slot].tolist(),
            trace.confidence[step, slot].tolist(),
            None if trace.routing is None else trace.routing[step, :, slot].tolist(),
            mask_token_id,
        )
        for step in np.flatnonzero(trace.active[:, slot]).tolist()
    ]
