"""Prompts in, tokens out: a table of rows on the device, and the host that fills and empties it between blocks.

The host calls one compiled function (blocks.py) for the rows of each kind, and looks at what came of it: rows that are
done free their slot, and waiting prompts are read into it, in pieces. While rows are being generated a long prompt is
read one piece per call, so that they do not wait for it. A call lasts until some of its rows have finished their blocks
(quorum.py); the others go on in the next one.

Where each tower has devices of its own, both work at once: the slots are two groups, of which the denoiser makes one's
blocks while the context reads the other's. Calls return before they are done, so that the host has only to ask for both
before it waits for one: a step begins the blocks of one group, and finishes those of the other, begun a step before.

A row's numbers come from the same compiled arithmetic whatever its neighbors are; with another batch size the shapes
of the matrix products are others, and so may be the last bits of its logits, but not its tokens.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np

from twotower_jax import memory, sharding
from twotower_jax.generation import scheduling
from twotower_jax.generation.blocks import Draft, Table
from twotower_jax.generation.modes import Call, Emitted, Recipe
from twotower_jax.generation.placement import TowerMeshes
from twotower_jax.generation.prefix_cache import PrefixCache, borders
from twotower_jax.generation.quorum import Quorum
from twotower_jax.generation.request import Request, from_settings
from twotower_jax.generation.rows import Kind, Progress, Row
from twotower_jax.generation.scheduling import PIECE, piece_width, reads_narrow, round_up
from twotower_jax.generation.settings import Result, Settings, has_blocks
from twotower_jax.generation.slots import Piece, Said, cache_bytes
from twotower_jax.generation.stops import Decode, Ending
from twotower_jax.parameters import Params
from twotower_jax.tokens import check_ids
from twotower_jax.two_tower import TwoTower

# Pieces are read together as long as they are not more tokens than this.
_TOKENS_PER_READ = 512
# Bytes of each device by which caches may be larger than they need to be; caches up to this size are not checked
# against the memory that is free.
_SPARE_BYTES = 64 * 2**20


def positions(prompt_length: int, max_new_tokens: int, settings: Settings, request: Request | None = None) -> int:
    """The cache positions that a row may come to use, whatever happens.

    Args:
      request: whose mode and block size count, in place of the settings'.
    """
    asked = request or settings
    new = max_new_tokens
    if has_blocks(asked.mode):
        # A block is written whole, also where the row ends inside it.
        new = round_up(max_new_tokens, asked.sampling.block_size) + asked.sampling.block_size
    # The last piece of a prompt is written with its padding, of which there is most where rows are read together.
    chunk = settings.prefill_chunk
    whole = (prompt_length - 1) // chunk * chunk
    return max(prompt_length + new, whole + piece_width(prompt_length - whole, chunk))


class Engine:
    """Generates continuously: requests are submitted at any time, and `step` advances all that are there.

    Args:
      settings: of the table, and of requests that are nothing but a prompt.
      capacity: cache positions of each slot; see `positions`.
      slots: rows computed together; None takes `settings.batch_size`. Rounded up to what the placement divides.
      decode: tokens to text, needed for stop texts.
      record_trace: keep the denoiser's steps.
      record_routing: with them the experts that it used.
      placement: the devices of both towers; parameters that lie elsewhere are moved.
      prefix_cache: of prompts that begin alike, see prefix_cache.py; its own alone.
      adapters: by name, parameters in place of `params` for the requests that name one: the same arrays, with an update
        beside some of them (lora.py). Rows of several adapters share the table; each is called for by itself.
      table: what holds the rows and calls the compiled functions.

    Attributes:
      capacity, slots: as they are after rounding. cache_bytes: what the slots take on each device.

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
        prefix_cache: PrefixCache | None = None,
        adapters: Mapping[str, Params] | None = None,
        table: type[Table] = Table,
    ):
        _check_stop(settings.stop, decode)
        placement.check(model.config)
        self._model, self._settings = model, settings
        self._decode, self._record, self._routing = decode, record_trace, record_routing
        self.capacity = round_up(capacity, PIECE)
        self._eos = settings.end_tokens(model.config)
        self._eos_width = 0
        self._rows_apart = placement.rows
        self.slots = batch = round_up(slots or settings.batch_size, placement.rows)
        self._narrow = reads_narrow(placement.devices[0].platform)
        self._table: list[Row | None] = [None] * batch
        self._waiting: deque[Row] = deque()
        self._submitted = 0
        self._prefixes = prefix_cache
        self._quorums: defaultdict[Kind, Quorum] = defaultdict(Quorum)
        # For each kind and group, which rows it was said for, and what it says.
        self._standing: dict[tuple[Kind, int], tuple[tuple, Call]] = {}
        # Where the towers are apart: the group of slots whose blocks were begun last, and these blocks.
        self._group = 0
        self._begun: list[tuple[Kind, list[Row | None], Call, Recipe, Draft | None]] = []
        self.cache_bytes = cache_bytes(model, batch, self.capacity, placement.context)
        _check_memory(self.cache_bytes, batch, self.capacity, settings.max_cache_gb, placement)
        # AR needs no denoiser: apart from the context it is then left out.
        self._ar_only = settings.mode == "ar" and placement.denoiser is not None
        self._adapters = adapters or {}
        options = {"denoiser": not self._ar_only, "adapters": self._adapters}
        self._rows = table(model, params, placement, batch=batch, capacity=self.capacity, **options)

    def submit(self, request: Request | Sequence[int], max_new_tokens: int | None = None) -> int:
        """Adds a row; it waits until a slot is free. Returns its number, counting from 0.

        Args:
          request: what to do, or a prompt alone, for which the settings say it; then `max_new_tokens` may be given.

        Raises:
          ValueError: for an empty prompt, an id outside the vocabulary, a row that does not fit a slot, or a request
            that the model cannot do.
        """
        number = self._submitted
        if not isinstance(request, Request):
            _checked(self._model, request, number)
            try:
                request = from_settings(self._settings, request, max_new_tokens)
            except ValueError as error:
                raise ValueError(f"prompt {number + 1}: {error}") from None
        elif max_new_tokens is not None:
            raise ValueError("max_new_tokens is said by the request")
        ids = _checked(self._model, request.prompt, number)
        request.check(self._model.config)
        _check_stop(request.stop, self._decode)
        if self._ar_only and request.mode != "ar":
            raise ValueError(f"mode {request.mode!r}: the engine was made for mode 'ar', without a denoiser")
        if request.adapter is not None and request.adapter not in self._adapters:
            raise ValueError(f"adapter {request.adapter!r} is not one of the engine's")
        needed = positions(len(ids), request.max_new_tokens, self._settings, request)
        if needed > self.capacity:
            raise ValueError(f"prompt {number + 1} needs {needed} cache positions, and a slot has {self.capacity}")
        eos = self._eos if request.end_tokens is None else tuple(request.end_tokens)
        ending = Ending(request.max_new_tokens, eos=eos, stop=request.stop, decode=self._decode)
        row = Row(number, request, ids, eos, ending, self._record, self._model.config.mask_token_id)
        self._eos_width = max(self._eos_width, scheduling.end_token_width(row))
        self._waiting.append(row)
        self._submitted += 1
        return number

    def cancel(self, number: int) -> None:
        """Forgets a row, whose slot is free from the next step on; nothing happens if it is already done."""
        self._waiting = deque(row for row in self._waiting if row.number != number)
        self._table = [None if row is not None and row.number == number else row for row in self._table]

    @property
    def busy(self) -> bool:
        """Whether a row is waiting or being generated."""
        return bool(self._waiting) or any(self._table)

    @property
    def running(self) -> int:
        """How many rows are in a slot."""
        return sum(row is not None for row in self._table)

    @property
    def waiting(self) -> int:
        """How many rows wait for one."""
        return len(self._waiting)

    def step(self) -> list[Progress]:
        """Reads prompts into free slots, and advances every row that is ready: one call for each kind of rows.

        A row whose logits are not finite ends with an error; the others go on.

        Returns:
          what rows got, in the order of their numbers. Of those whose block is not finished nothing, or what they asked
          for.
        """
        if self._rows.apart:
            firsts, calls = self._in_turns()
        else:
            firsts = self._read_prompts()
            calls = [(places, self._advance(kind, places)) for kind, places in self._kinds().items()]
        # One transfer, after the calls: the first tokens do not hold them up.
        told = [chosen for _, chosen in firsts], [emitted for _, emitted in calls]
        chosen, emitted = jax.device_get(sharding.whole(told))
        progress, failed = [], set()
        for (rows, _), first in zip(firsts, chosen, strict=True):
            for i, row in rows:
                progress.append(row.first(first, i))
                if progress[-1].error is not None:
                    failed.add(row.number)
        for (places, _), of_call in zip(calls, emitted, strict=True):
            for slot, row in enumerate(places):
                if row is not None and row.number not in failed and (got := row.take(of_call, slot)) is not None:
                    progress.append(got)
                    if row.blockwise and got.tokens:
                        self._quorums[row.kind].add(row.evaluations)
        done = {p.number for p in progress if p.result is not None or p.error is not None}
        self._table = [None if row is not None and row.number in done else row for row in self._table]
        return sorted(progress, key=lambda p: p.number)

    # Reading prompts.

    def _read_prompts(self) -> list[tuple[list[tuple[int, Row]], Said]]:
        """Fills free slots; reads a piece of every prompt that is not read, or all pieces if nothing else is to do.

        Returns:
          for each call that chose first tokens, which of them belong to which rows, and the tokens.
        """
        for slot, row in enumerate(self._table):
            if row is None and self._waiting:
                self._table[slot] = row = self._waiting.popleft()
                self._find_prefix(slot, row)
        firsts = []
        while True:
            reading = [slot for slot, row in enumerate(self._table) if row is not None and row.reading]
            groups = {}
            for slot in reading:
                row = self._table[slot]
                width = piece_width(len(row.to_read) - row.read, self._settings.prefill_chunk)
                alike = width, row.chooses_first, row.needs_state, row.request.adapter or ""
                groups.setdefault(alike, []).append(slot)
            for (width, *_), group in sorted(groups.items()):
                firsts += self._read_pieces(width, group)
            others = any(row is not None and not row.reading for row in self._table)
            if others or not reading:
                return firsts

    def _read_pieces(self, width: int, group: list[int]) -> list[tuple[list[tuple[int, Row]], Said]]:
        """The next pieces of the prompts in these slots, some of them in one call."""
        firsts = []
        apart = self._rows_apart
        together = min(len(self._table), round_up(max(_TOKENS_PER_READ, width) // width, apart))
        while group:
            # A few prompts are read one by one rather than with a table of padding.
            size = together if len(group) * 4 > together else apart
            firsts += self._read_rows(group[:size], size)
            group = group[size:]
        return firsts

    def _read_rows(self, group: list[int], size: int) -> list[tuple[list[tuple[int, Row]], Said]]:
        """The next pieces of the prompts in the slots of `group`, in a call for `size` rows."""
        config, rows = self._model.config, [self._table[slot] for slot in group]
        longest = max(len(row.to_read) - row.read for row in rows)
        width = piece_width(longest, self._settings.prefill_chunk, self._narrow)
        places = rows + [None] * (size - len(rows))
        piece = Piece(
            ids=np.full((size, width), config.pad_token_id, np.int32),
            lengths=np.zeros(size, np.int32),
            slot=np.full(size, len(self._table), np.int32),
            first=np.zeros(size, bool),
            last=np.zeros(size, bool),
            limit=np.zeros(size, np.int32),
            unread=np.zeros(size, np.int32),
            draws=scheduling.draws(places),
            eos=scheduling.end_tokens(places, self._eos_width),
            given=scheduling.given(places, [0] * size, 1, config),
        )
        for i, (slot, row) in enumerate(zip(group, rows, strict=True)):
            ids = row.to_read[row.read : row.read + width]
            piece.ids[i, : len(ids)] = ids
            piece.lengths[i], piece.slot[i] = len(ids), slot
            piece.first[i] = row.read == 0
            row.context_evaluations += len(ids) > 0 and not row.begun
            row.begun = True
            row.read += max(1, len(ids))
            piece.last[i] = not row.reading
            piece.limit[i], piece.unread[i] = row.request.max_new_tokens, row.ids[-1]
        first = rows[0].chooses_first
        told = scheduling.alternatives([row.request for row in rows], config.vocab_size) if first else 0
        options = {"first": first, "state": rows[0].needs_state, "alternatives": told}
        chosen = self._rows.read(piece, adapter=rows[0].request.adapter, **options)
        self._keep_prefixes(group, piece.lengths.tolist())
        ready = [(i, rows[i]) for i in np.flatnonzero(piece.last).tolist()]
        return [(ready, chosen)] if first and ready else []

    def _find_prefix(self, slot: int, row: Row) -> None:
        """Begins a prompt with what is known of it."""
        if self._prefixes is not None:
            chunk = self._settings.prefill_chunk
            row.borders = borders(row.to_read, chunk, row.request.adapter)
            # The last token is read again in any case, since the logits after it are wanted.
            pieces = self._prefixes.find(row.borders[: max(0, len(row.to_read) - 1) // chunk])
            self._rows.put_pieces(slot, pieces)
            row.read = chunk * len(pieces)
            self._prefixes.queries += len(row.to_read)
            self._prefixes.hits += row.read

    def _keep_prefixes(self, group: list[int], lengths: list[int]) -> None:
        """Keeps what whole pieces, just read in these slots, have added."""
        chunk = self._settings.prefill_chunk
        for slot, length in zip(group, lengths, strict=False):
            row = self._table[slot]
            if self._prefixes is not None and length == chunk:
                known = row.borders[: row.read // chunk]
                if self._prefixes.lacks(known):
                    self._prefixes.add(known, self._rows.piece(slot, row.read - chunk, chunk))

    # Blocks.

    def _in_turns(self) -> tuple[list, list[tuple[list[Row | None], Emitted]]]:
        """Begins the blocks of a group, and finishes those of the other."""
        begun, self._begun = self._begun, []
        groups = [self._kinds(group) for group in (1 - self._group, self._group)]
        # Blocks that are begun are not begun again; without any, whichever group has rows.
        chosen = 0 if begun or groups[0] else 1
        self._group = 1 - self._group if chosen == 0 else self._group
        for kind, places in groups[chosen].items():
            call, recipe = self._call(kind, places)
            self._begun.append((kind, places, call, recipe, self._rows.begin(call, recipe, kind, kind.adapter)))
        firsts, calls = self._read_prompts(), []
        for kind, places, call, recipe, draft in begun:
            # A row may have been canceled since, and its slot be another's.
            places = [row if row is self._table[slot] else None for slot, row in enumerate(places)]
            if any(places):
                call = call._replace(alive=np.array([row is not None for row in places]))
                emitted = self._rows.finish(call, recipe, draft, kind, kind.adapter)
                calls.append((places, scheduling.told(emitted, places)))
        return firsts, calls

    def _kinds(self, group: int | None = None) -> dict[Kind, list[Row | None]]:
        """The rows that are ready, by kind, each at its place in the table; of every second slot, if `group` says."""
        kinds = {}
        for slot, row in enumerate(self._table):
            if row is not None and row.ready and group in (None, slot % 2):
                kinds.setdefault(row.kind, [None] * len(self._table))[slot] = row
        return kinds

    def _advance(self, kind: Kind, places: list[Row | None]) -> Emitted:
        call, recipe = self._call(kind, places)
        return scheduling.told(self._rows.block(call, recipe, kind, kind.adapter), places)

    def _call(self, kind: Kind, places: list[Row | None]) -> tuple[Call, Recipe]:
        config = self._model.config
        recipe = scheduling.recipe(kind, places, self._record, self._routing, config.vocab_size)
        quorum = self._quorums[kind].of(sum(row is not None for row in places))
        return scheduling.now(self._stand(kind, places), kind, places, quorum, config), recipe

    def _stand(self, kind: Kind, places: list[Row | None]) -> Call:
        """What is the same in every call for these rows, made once."""
        rows = self._eos_width, *(None if row is None else row.number for row in places)
        of = kind, self._group
        if self._standing.get(of, (None, None))[0] != rows:
            self._standing[of] = rows, scheduling.standing(kind, places, self._eos_width, self._model.config)
        return self._standing[of][1]


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
    needed = max(positions(len(row), settings.max_new_tokens, settings) for row in rows)
    slots = min(settings.batch_size, len(rows))
    placement = options.get("placement", TowerMeshes())
    placement.check(model.config)
    capacity = _roomy(model, needed, slots, settings, placement)
    engine = Engine(model, params, settings, capacity=capacity, slots=slots, **options)
    for row in rows:
        engine.submit(row)
    return engine


def _roomy(model: TwoTower, needed: int, slots: int, settings: Settings, placement: TowerMeshes) -> int:
    """A capacity of at least `needed` positions, one of few, so that what is compiled for these prompts serves the next
    ones too; no larger than needed where that would take more than a little memory."""
    least, roomy = round_up(needed, PIECE), scheduling.bucket(needed)
    rows = round_up(slots, placement.rows)
    of_least, of_roomy = (cache_bytes(model, rows, size, placement.context) for size in (least, roomy))
    allowed = settings.max_cache_gb is None or of_roomy <= settings.max_cache_gb * 1e9
    return roomy if allowed and of_roomy - of_least <= _SPARE_BYTES else least


def iter_steps(engine: Engine) -> Iterator[list[Progress]]:
    """Call by call what the rows of an engine get, until none is left."""
    while engine.busy:
        yield engine.step()


def in_order(steps: Iterable[Progress]) -> Iterator[Result]:
    """The results in the order of their rows.

    Raises:
      FloatingPointError: if a row failed.
    """
    done, number = {}, 0
    for progress in steps:
        if progress.error is not None:
            raise FloatingPointError(progress.error)
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


def _check_stop(stop: Sequence[str], decode: Decode | None) -> None:
    if stop and decode is None:
        raise ValueError(f"stop={stop!r} needs a tokenizer, to turn tokens into text")


def _check_memory(needed: int, slots: int, capacity: int, limit_gb: float | None, placement: TowerMeshes) -> None:
    """Refuses a table that needs more of a device than it has free, or than is allowed."""
    if limit_gb is not None:
        available, where = int(limit_gb * 1e9), "max_cache_gb allows"
    elif needed <= _SPARE_BYTES:
        return  # Reading the files that say what is free takes as long as an answer of a small model.
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
