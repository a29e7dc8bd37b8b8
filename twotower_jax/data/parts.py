"""A part of the input made into shards, in a process of its own; and the settings by which it is.

What a part becomes depends on its text and the settings alone, and where copies are left out on which of its rows are.
"""

import dataclasses
import hashlib
import multiprocessing
import os
import pathlib
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait as wait_for
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from twotower_jax.data import inputs
from twotower_jax.data.conversations import Coder, Encoding, conversation_text
from twotower_jax.data.documents import DataError
from twotower_jax.data.duplicates import KINDS, Fingerprinter, Near, joined, load_array
from twotower_jax.data.inputs import Row, Slice
from twotower_jax.data.prepared import TRAIN, VALIDATION, write_json
from twotower_jax.data.rows import Field
from twotower_jax.data.shards import Shard, ShardWriter
from twotower_jax.data.tokenizer import EOS_ID, encode, id_range, load_tokenizer
from twotower_jax.paths import AnyPath, as_path, in_store

# What goes away from the folder that is made when it is complete.
PROGRESS = "progress"

# Characters, or documents, that are tokenized at a time.
_CHUNK_CHARACTERS, _CHUNK_DOCUMENTS = 1 << 20, 1024

SHOWN_PROBLEMS = 3


@dataclasses.dataclass(frozen=True)
class Settings:
    """How text becomes data.

    Attributes:
      text_field: of JSON Lines and Parquet, where a row's text stands.
      validation_fraction: the chance of each document to be held out.
      seed: of that choice.
      shard_size: tokens in a shard, about.
      skip_bad: leave out what is broken, and count it, instead of giving up.
      end_token: the token that closes every document.
      end_tokens: of conversations, all that end an answer, the first of which closes one that has none.
      template_sha256: of conversations, that of their chat template, "" without one; None for other texts. `prepare`
        sees to it.
      dedup: the copies of documents that are left out: "exact", "near" (both), or "" for none; see duplicates.py.
      dedup_threshold, dedup_ngram, dedup_permutations: with "near", those of `duplicates.Near`.

    Raises:
      ValueError: at construction, for values that cannot be.
    """

    text_field: str = "text"
    validation_fraction: float = 0.0
    seed: int = 0
    shard_size: int = 1 << 28
    skip_bad: bool = False
    end_token: int = EOS_ID
    end_tokens: tuple[int, ...] = ()
    template_sha256: str | None = None
    dedup: str = ""
    dedup_threshold: float = Near.threshold
    dedup_ngram: int = Near.ngram
    dedup_permutations: int = Near.permutations

    def __post_init__(self):
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be at least 0 and less than 1, not {self.validation_fraction}")
        if self.shard_size < 1:
            raise ValueError(f"shard_size must be positive, not {self.shard_size}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be at least 0 and less than 2**32, not {self.seed}")
        if self.dedup not in ("", *KINDS):
            raise ValueError(f"dedup must be one of {', '.join(KINDS)}, not {self.dedup!r}")
        _ = self.near

    @property
    def conversational(self) -> bool:
        return self.template_sha256 is not None

    @property
    def near(self) -> Near | None:
        """What makes documents near copies; None where that does not matter."""
        if self.dedup != "near":
            return None
        return Near(self.dedup_threshold, self.dedup_ngram, self.dedup_permutations)

    def values(self) -> dict[str, Any]:
        """JSON-able, those of conversations only where there are some, and of copies where some are left out."""
        values = dataclasses.asdict(self) | {"end_tokens": list(self.end_tokens)}
        if not self.conversational:
            del values["end_tokens"], values["template_sha256"]
        for name in [name for name in values if name.startswith("dedup_") and self.near is None]:
            del values[name]
        if not self.dedup:
            del values["dedup"]
        return values


class Part(NamedTuple):
    """What became of a part: its shards, how much was broken with the first problems as lines, and how many files of
    archives were left out as no text, with the first names."""

    shards: list[Shard]
    skipped: int = 0
    problems: Sequence[str] = ()
    left_out: int = 0
    members: Sequence[str] = ()


# In the worker processes.


class _Worker(NamedTuple):
    output: AnyPath
    settings: Settings
    tokenizer: Tokenizer
    coder: Coder | None
    weight: Any
    tokens: Any
    stop: Any


_worker: _Worker


def start_worker(output: str, settings: Settings, weight: Any, tokens: Any, stop: Any) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    folder = as_path(output)
    tokenizer, coder = load_tokenizer(folder), None
    if settings.conversational:
        coder = Coder(tokenizer, folder if settings.template_sha256 else None, settings.end_tokens)
    _worker = _Worker(folder, settings, tokenizer, coder, weight, tokens, stop)
    # Nobody would tell a worker whose parent was killed; it would wait for its next part for ever.
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    wait_for([multiprocessing.parent_process().sentinel])
    os._exit(1)


def make_fingerprints(number: int, part: list[Slice]) -> None:
    """Writes the fingerprints of a part's documents."""
    settings, fingerprinter = _worker.settings, Fingerprinter(_worker.settings.near)
    pieces, row = [fingerprinter([], [])], 0
    for rows, weight in _chunks(part, conversation_text if settings.conversational else settings.text_field):
        _check(rows)
        there = [(one.text, row + i) for i, one in enumerate(rows) if one.text is not None]
        pieces.append(fingerprinter([text for text, _ in there], [place for _, place in there]))
        row += len(rows)
        _count(weight, 0)
    joined(pieces).save(_worker.output / PROGRESS, number)


def _check(rows: list[Row]) -> list[str]:
    """What is wrong with some rows, if that may be.

    Raises:
      DataError: it may not. InterruptedError: the work is to stop.
    """
    if _worker.stop.is_set():
        raise InterruptedError("another part failed")
    problems = [row.problem for row in rows if row.problem]
    if problems and not _worker.settings.skip_bad:
        raise DataError(problems[0])
    return problems


def _count(weight: float, tokens: int) -> None:
    with _worker.weight.get_lock():
        _worker.weight.value += weight
        _worker.tokens.value += tokens


def make_part(number: int, part: list[Slice]) -> Part:
    """Tokenizes a part and writes its shards and its record.

    For a store, shards are made on this machine's disk, and sent when all of the part are there.
    """
    if not in_store(_worker.output):
        return _make_part(number, part, _worker.output / PROGRESS)
    with tempfile.TemporaryDirectory() as scratch:
        return _make_part(number, part, pathlib.Path(scratch))


def _make_part(number: int, part: list[Slice], scratch: pathlib.Path) -> Part:
    output, settings, tokenizer = _worker.output, _worker.settings, _worker.tokenizer
    writers = {s: _SplitWriter(number, s, scratch, settings.shard_size, token_dtype(tokenizer))
               for s in (TRAIN, VALIDATION)}  # fmt: skip
    skipped, problems, left_out, members, row = 0, [], 0, [], 0
    copies = frozenset(load_array(copies_file(output, number)).tolist()) if settings.dedup else ()
    encoding = None if _worker.coder is None else Encoding(_worker.coder)
    for rows, weight in _chunks(part, settings.text_field if encoding is None else encoding):
        found = _check(rows)
        skipped, problems = skipped + len(found), [*problems, *found][:SHOWN_PROBLEMS]
        found = [row.left_out for row in rows if row.left_out]
        left_out, members = left_out + len(found), [*members, *found][:SHOWN_PROBLEMS]
        texts = [one.text for i, one in enumerate(rows) if one.text is not None and row + i not in copies]
        row += len(rows)
        tokens = 0
        if encoding is None:
            end = np.int32(settings.end_token)
            documents = ((np.append(ids, end), None) for ids in encode(tokenizer, texts))
        else:
            documents = [encoding.turns[text] for text in texts]
            encoding.turns.clear()
        for text, (ids, parts) in zip(texts, documents, strict=True):
            split = VALIDATION if _is_held_out(text, settings) else TRAIN
            writers[split].add(ids, parts)
            tokens += len(ids)
        _count(weight, tokens)
    made = [pair for writer in writers.values() for pair in writer.finish()]
    for partial, shard in made:
        if in_store(output):
            (output / shard.name).write_bytes(partial.read_bytes())
        else:
            os.replace(partial, output / shard.name)
    result = Part([shard for _, shard in made], skipped, problems, left_out, members)
    values = result._asdict() | {"shards": [shard._asdict() for shard in result.shards]}
    write_json(output / PROGRESS / f"{number:06d}.json", values)
    return result


def copies_file(output: AnyPath, number: int) -> AnyPath:
    """Where the rows of a part stand that are left out as copies, int64."""
    return output / PROGRESS / f"{number:06d}.copies.npy"


class _SplitWriter:
    """The shards of one split of one part; a new one begins where the next document would exceed the size."""

    def __init__(self, part: int, split: str, folder: pathlib.Path, shard_size: int, dtype: np.dtype):
        self._stem, self._split, self._folder = f"{split}-{part:06d}", split, folder
        self._shard_size, self._dtype = shard_size, dtype
        self._current: ShardWriter | None = None
        self._done: list[tuple[pathlib.Path, Shard]] = []

    def add(self, ids: np.ndarray, parts: np.ndarray | None = None) -> None:
        if self._current is not None and self._current.tokens + len(ids) > self._shard_size:
            self._close()
        if self._current is None:
            self._current = ShardWriter(self._partial(), self._dtype)
        self._current.add(ids, parts)

    def finish(self) -> list[tuple[pathlib.Path, Shard]]:
        """Each shard and where it lies for now."""
        if self._current is not None:
            self._close()
        return self._done

    def _close(self) -> None:
        self._done.append((self._partial(), self._current.finish(self._name(), self._split)))
        self._current = None

    def _name(self) -> str:
        return f"{self._stem}-{len(self._done):03d}.array_record"

    def _partial(self) -> pathlib.Path:
        return self._folder / f"{self._name()}.{os.getpid()}"


def _chunks(part: list[Slice], field: Field) -> Iterator[tuple[list[Row], float]]:
    """The rows of a part, some at a time, and the weight of the input that they took."""
    rows: list[Row] = []
    characters = given = before = 0.0
    for piece in part:
        for row in inputs.read_rows(piece, field):
            rows.append(row)
            characters += len(row.text or "")
            if characters >= _CHUNK_CHARACTERS or len(rows) >= _CHUNK_DOCUMENTS:
                at = before + row.done * piece.weight
                yield rows, at - given
                rows, characters, given = [], 0, at
        before += piece.weight
    yield rows, before - given


def _is_held_out(text: str, settings: Settings) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=settings.seed.to_bytes(4, "little")).digest()
    return int.from_bytes(digest, "little") < settings.validation_fraction * 2**64


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if max(id_range(tokenizer), EOS_ID + 1) <= 1 << 16 else "<u4")
