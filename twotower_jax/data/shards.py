"""One shard of prepared data: an ArrayRecord file with the tokens of documents, and their lengths.

Its records are, in order: the documents end to end, `RECORD_TOKENS` tokens per record; then the documents' lengths as
uint32, `RECORD_TOKENS` a record. Of conversations, in the same way, how many turns each has, and of each turn two
numbers, `conversations.Turns.parts`. The last record of each kind is shorter. Records are neither grouped nor
compressed, so that any window is read without the rest. How many tokens and documents there are stands in the data
set's manifest.
"""

import hashlib
import os
import pathlib
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from twotower_jax.data.documents import DataError
from twotower_jax.files import open_regular, size_of

RECORD_TOKENS = 4096
_LONGEST_DOCUMENT = 2**32 - 1


class Shard(NamedTuple):
    """What a manifest says of a shard; `split` is "train" or "validation", `size` is in bytes."""

    name: str
    split: str
    tokens: int
    documents: int
    size: int
    sha256: str


class ShardWriter:
    """Writes one shard, document by document. The tokens are not held in memory, the lengths are."""

    def __init__(self, path: pathlib.Path, dtype: np.dtype):
        self._path, self._dtype = path, dtype
        self._writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        self._lengths, self._waiting = array("I"), np.zeros(0, dtype)
        self._turns, self._parts = array("I"), array("I")
        self.tokens = 0

    def add(self, ids: np.ndarray, parts: np.ndarray | None = None) -> None:
        """Appends a document, token ids (length,) that fit the dtype; of a conversation with its parts (turns, 2).

        Raises:
          ValueError: it has 2**32 tokens or more.
          OSError: the file cannot be written.
        """
        if len(ids) > _LONGEST_DOCUMENT:
            raise ValueError(f"a document of {len(ids)} tokens is too long; {_LONGEST_DOCUMENT} is the limit")
        self._lengths.append(len(ids))
        if parts is not None:
            self._turns.append(len(parts))
            self._parts.extend(parts.ravel().tolist())
        self.tokens += len(ids)
        if len(ids) and not 0 <= ids.min() <= ids.max() <= np.iinfo(self._dtype).max:
            raise ValueError(f"{self._path}: token ids {ids.min()} to {ids.max()} do not fit {self._dtype.name}")
        waiting = np.concatenate([self._waiting, ids.astype(self._dtype)])
        whole = len(waiting) // RECORD_TOKENS * RECORD_TOKENS
        self._write(waiting[:whole])
        self._waiting = waiting[whole:]

    def finish(self, name: str, split: str) -> Shard:
        """Completes the file, waits until it is on the disk, and says what a manifest should.

        Raises:
          OSError: the file cannot be written.
        """
        self._write(self._waiting)
        for numbers in (self._lengths, self._turns, self._parts):
            self._write(np.frombuffer(numbers, np.uint32).astype("<u4"))
        self._do(self._writer.close)
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return Shard(name, split, self.tokens, len(self._lengths), *size_and_sha256(self._path))

    def _write(self, values: np.ndarray) -> None:
        for start in range(0, len(values), RECORD_TOKENS):
            self._do(self._writer.write, values[start : start + RECORD_TOKENS].tobytes())

    def _do(self, action: Callable[..., None], *arguments: bytes) -> None:
        try:
            action(*arguments)
        except RuntimeError as error:  # of the library, for a full disk too
            raise OSError(f"{self._path}: cannot be written ({error})") from None


class ShardReader:
    """Reads one shard, whose size or hash has been checked before: ArrayRecord may crash on a broken file."""

    def __init__(self, path: pathlib.Path, shard: Shard, dtype: np.dtype, conversations: bool = False):
        """Opens the file; `conversations` says whether it holds them.

        Raises:
          DataError: it does not hold as many records as it should.
        """
        self._path, self._shard, self._dtype = path, shard, dtype
        self._first_lengths = -(-shard.tokens // RECORD_TOKENS)
        expected = self._first_turns = self._first_lengths - (-shard.documents // RECORD_TOKENS)
        try:
            self._reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
            found = self._reader.num_records()
        except Exception as error:  # the library raises what it likes
            raise DataError(f"{path}: cannot be read as ArrayRecord ({error})") from error
        if conversations:
            expected -= -shard.documents // RECORD_TOKENS
            self._first_parts = expected
            if found > expected:
                expected -= -2 * int(self.turns().sum()) // RECORD_TOKENS
        if found != expected:
            raise DataError(f"{path}: holds {found} records where {expected} were recorded")

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` ... `stop` - 1, (stop - start,)."""
        return self._read(0, start, stop, self._dtype)

    def lengths(self, start: int, stop: int) -> np.ndarray:
        """Lengths of the documents `start` ... `stop` - 1, int64 (stop - start,)."""
        return self._read(self._first_lengths, start, stop, np.dtype("<u4")).astype(np.int64)

    def turns(self) -> np.ndarray:
        """How many turns each of the conversations has, int64 (documents,)."""
        return self._read(self._first_turns, 0, self._shard.documents, np.dtype("<u4")).astype(np.int64)

    def parts(self) -> np.ndarray:
        """The parts of all conversations end to end, int64 (turns, 2)."""
        count = 2 * int(self.turns().sum())
        return self._read(self._first_parts, 0, count, np.dtype("<u4")).astype(np.int64).reshape(-1, 2)

    def _read(self, first_record: int, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        first, last = start // RECORD_TOKENS, -(-stop // RECORD_TOKENS)
        try:
            records = self._reader.read(first_record + first, first_record + last)
        except Exception as error:  # the library raises what it likes
            raise DataError(f"{self._path}: records {first} to {last} cannot be read ({error})") from error
        values = np.frombuffer(b"".join(records), dtype)[start - first * RECORD_TOKENS :][: stop - start]
        if len(values) != stop - start:
            raise DataError(f"{self._path}: records {first} to {last} are shorter than recorded")
        return values


def size_and_sha256(path: pathlib.Path) -> tuple[int, str]:
    """The size in bytes and the SHA-256 of a regular file.

    Raises:
      CheckpointError: it is not there or cannot be read.
    """
    with open_regular(path) as file:
        return size_of(file), hashlib.file_digest(file, "sha256").hexdigest()


def check(path: pathlib.Path, shard: Shard, *, content: bool) -> None:
    """Compares a file with what was recorded: its size, and with `content` its hash.

    Raises:
      CheckpointError: it is not there.
      DataError: it differs.
    """
    with open_regular(path) as file:
        size = size_of(file)
        if size != shard.size:
            raise DataError(f"{path}: has {size} bytes, recorded were {shard.size}")
        if content and (found := hashlib.file_digest(file, "sha256").hexdigest()) != shard.sha256:
            raise DataError(f"{path}: its content is not what was recorded (SHA-256 {found}, recorded {shard.sha256})")


def parse(raw: Any) -> Shard:
    """A shard from JSON.

    Raises:
      ValueError: it is not one.
    """
    kinds = {"name": str, "split": str, "tokens": int, "documents": int, "size": int, "sha256": str}
    if not isinstance(raw, dict) or {name: type(value) for name, value in raw.items()} != kinds:
        raise ValueError(f"not a shard: {raw!r}")
    shard = Shard(**raw)
    if pathlib.PurePath(shard.name).name != shard.name or "\0" in shard.name:
        raise ValueError(f"shard {shard.name!r} is not in the data set's folder")
    if shard.split not in ("train", "validation") or min(shard.tokens, shard.documents, shard.size) < 1:
        raise ValueError(f"shard {shard.name!r} has split {shard.split!r} and counts that cannot be")
    return shard
