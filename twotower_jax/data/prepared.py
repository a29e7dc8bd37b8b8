"""A folder of prepared data, as launch/prepare.py writes it.

dataset.json     what the data are and were made of; its presence says that the folder is complete
tokenizer.json … the tokenizer's files
*.array_record   the shards, those of held-out documents named validation-, the others train-
"""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import threading
from typing import Any

import numpy as np

from twotower_jax.data import shards
from twotower_jax.data.conversations import Turns
from twotower_jax.data.documents import DataError
from twotower_jax.data.shards import Shard, ShardReader
from twotower_jax.data.tokenizer import EOS_ID
from twotower_jax.files import CheckpointError, check_folder, parse_json, read_bytes
from twotower_jax.paths import as_path, in_store

NAME, VERSION = "dataset.json", 1
TRAIN, VALIDATION = "train", "validation"

# A million input files are listed in less.
_MAX_JSON_BYTES = 1 << 30

# A set no larger than this is hashed whenever it is opened, which takes about a second; of a larger one, sizes only.
_HASHED_BYTES = 1 << 30

# Open files at a time, in each process; a shard that is not among them takes a fraction of a millisecond to open.
_OPEN_SHARDS = 256


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `dataset.json` says.

    Attributes:
      tokenizer_sha256: of tokenizer.json.
      vocab_size: the tokenizer's largest id plus one.
      dtype: of the tokens in the shards, "uint16" or "uint32", little-endian.
      settings: with which the data were made.
      inputs: path as it was given, and size in bytes, of each file read, in order.
      skipped: rows and files left out because they were broken.
      shards: in the order of their documents.
      copies: how many documents were left out as copies of earlier ones, by the kind of copy; None where copies were
        not looked for.
    """

    tokenizer_sha256: str
    vocab_size: int
    dtype: str
    settings: dict[str, Any]
    inputs: list[dict[str, Any]]
    skipped: int
    shards: list[Shard]
    copies: dict[str, int] | None = None

    @property
    def end_token(self) -> int:
        """The token that closes every document; sets made before there was a choice have token 2."""
        return self.settings.get("end_token", EOS_ID)

    @property
    def conversational(self) -> bool:
        """Whether the documents are conversations."""
        return "template_sha256" in self.settings

    def total(self, split: str, what: str) -> int:
        """Sum of "tokens" or "documents" of a split."""
        return sum(getattr(shard, what) for shard in self.shards if shard.split == split)

    def write(self, folder: pathlib.Path) -> None:
        """All of the file or nothing."""
        totals = {s: {w: self.total(s, w) for w in ("tokens", "documents")} for s in (TRAIN, VALIDATION)}
        values = {"version": VERSION} | dataclasses.asdict(self) | {"totals": totals}
        values["shards"] = [shard._asdict() for shard in self.shards]
        if self.copies is None:
            del values["copies"]
        write_json(folder / NAME, values)


def is_prepared(path: str | pathlib.Path) -> bool:
    """Whether there is a complete folder of prepared data."""
    return (as_path(path) / NAME).is_file()


def read_manifest(folder: pathlib.Path) -> Manifest:
    """Reads and checks a manifest.

    Raises:
      DataError: it is missing, or is not one.
    """
    path = folder / NAME
    raw = read_json(path)
    try:
        if not isinstance(raw, dict) or raw.pop("version", None) != VERSION:
            raise ValueError(f"not the manifest of a data set of version {VERSION}")
        raw.pop("totals", None)
        kinds = {"tokenizer_sha256": str, "vocab_size": int, "dtype": str, "settings": dict, "inputs": list,
                 "skipped": int, "shards": list}  # fmt: skip
        if "copies" in raw:
            kinds["copies"] = dict
        if {name: type(value) for name, value in raw.items()} != kinds:
            raise ValueError(f"does not have just the fields {', '.join(sorted(kinds))}")
        if raw["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"dtype {raw['dtype']!r} is neither uint16 nor uint32")
        parsed = [shards.parse(shard) for shard in raw.pop("shards")]
        if len({shard.name for shard in parsed}) < len(parsed):
            raise ValueError("lists a shard twice")
        return Manifest(**raw, shards=parsed)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


def verify(folder: str | pathlib.Path) -> Manifest:
    """Compares the tokenizer and every shard with the recorded sizes and hashes.

    Raises:
      CheckpointError: naming the first file that is missing or (DataError) differs.
      ValueError: if there is no such folder.
    """
    folder = as_path(folder)
    check_folder(folder, "give a folder that launch/prepare.py made")
    manifest = read_manifest(folder)
    _check_tokenizer(folder, manifest)
    for shard in manifest.shards:
        shards.check(folder / shard.name, shard, content=True)
    return manifest


class PreparedDocuments:
    """One split of a folder of prepared data; see `documents.Documents`. Safe to read from several threads."""

    def __init__(self, folder: str | pathlib.Path, split: str):
        """Checks the shards' sizes and, where all of them have 1 GiB or less, their hashes.

        Raises:
          CheckpointError: a file is missing, or (DataError) is not the one recorded.
        """
        self._folder = as_path(folder)
        self.manifest = read_manifest(self._folder)
        _check_tokenizer(self._folder, self.manifest)
        self._shards = [shard for shard in self.manifest.shards if shard.split == split]
        small = sum(shard.size for shard in self.manifest.shards) <= _HASHED_BYTES
        if in_store(self._folder):
            _check_room(self._folder, self._shards)
        for shard in () if in_store(self._folder) else self._shards:
            shards.check(self._folder / shard.name, shard, content=small)
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._token_ends = np.cumsum([0, *(shard.tokens for shard in self._shards)])
        self._document_ends = np.cumsum([0, *(shard.documents for shard in self._shards)])
        self.tokens, self.count = int(self._token_ends[-1]), int(self._document_ends[-1])
        self._readers: collections.OrderedDict[int, ShardReader] = collections.OrderedDict()
        self._lock = threading.Lock()

    def lengths(self, start: int, stop: int) -> np.ndarray:
        return self._gather(self._document_ends, start, stop, ShardReader.lengths, np.int64)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._gather(self._token_ends, start, stop, ShardReader.tokens, self._dtype)

    def identity(self) -> dict[str, Any]:
        """The hashes of all shards, in their order, as one."""
        hashes = json.dumps([shard.sha256 for shard in self._shards]).encode()
        return {"shards": len(self._shards), "sha256": hashlib.sha256(hashes).hexdigest()}

    def _gather(self, ends: np.ndarray, start: int, stop: int, read, dtype) -> np.ndarray:
        """What `read` gives of entries `start` ... `stop` - 1, counted over all shards."""
        pieces = []
        number = int(np.searchsorted(ends, start, side="right")) - 1
        while start < stop:
            first, end = int(ends[number]), min(stop, int(ends[number + 1]))
            pieces.append(read(self._reader(number), start - first, end - first))
            start, number = end, number + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, dtype), *pieces])

    def _file(self, shard: Shard) -> pathlib.Path:
        """A shard's file; of a set in a store, a copy that has the recorded hash."""
        path = self._folder / shard.name
        if not in_store(path):
            return path
        from twotower_jax.stores import cache

        return cache.local(path, shard.sha256)

    def _reader(self, number: int) -> ShardReader:
        with self._lock:
            if number in self._readers:
                self._readers.move_to_end(number)
                return self._readers[number]
            shard = self._shards[number]
            reader = ShardReader(self._file(shard), shard, self._dtype, self.manifest.conversational)
            self._readers[number] = reader
            if len(self._readers) > _OPEN_SHARDS:
                self._readers.popitem(last=False)  # a thread that reads from it holds it until it is done
            return reader


class PreparedConversations(PreparedDocuments):
    """One split of a folder of prepared conversations; see `conversations.Conversations`.

    What is said is read when asked for. How much is held in memory, 16 bytes for each turn and each conversation.
    """

    def __init__(self, folder: str | pathlib.Path, split: str):
        """As `PreparedDocuments`."""
        super().__init__(folder, split)
        told = [(reader.turns(), reader.parts()) for reader in map(self._reader, range(len(self._shards)))]
        self._counts = np.concatenate([np.zeros(0, np.int64), *(turns for turns, _ in told)])
        self._parts = np.concatenate([np.zeros((0, 2), np.int64), *(parts for _, parts in told)])
        self._ends = np.cumsum(self._counts)
        if int(self._parts.sum()) != self.tokens or (self._counts < 1).any():
            raise DataError(f"{self._folder}: the turns of its conversations are not those of its tokens")
        self._token_stops = np.cumsum(self._parts.sum(axis=1))

    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        return self._counts, self._parts

    def __getitem__(self, number: int) -> Turns:
        last = int(self._ends[number])
        first = last - int(self._counts[number])
        start = int(self._token_stops[first - 1]) if first else 0
        ids = self.read(start, int(self._token_stops[last - 1]))
        return Turns(ids.astype(np.int32), self._parts[first:last])


def open_prepared(folder: str | pathlib.Path, split: str) -> PreparedDocuments | PreparedConversations:
    """One split of a folder, of whichever kind it holds; errors as `PreparedDocuments`."""
    kind = PreparedConversations if read_manifest(as_path(folder)).conversational else PreparedDocuments
    return kind(folder, split)


def read_json(path: pathlib.Path) -> Any:
    """What a JSON file says.

    Raises:
      DataError: it is not there, or not JSON.
    """
    try:
        return parse_json(read_bytes(path, _MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise DataError(str(error) if isinstance(error, CheckpointError) else f"{path}: {error}") from None


def write_json(path: pathlib.Path, values: Any) -> None:
    """Writes a JSON file: all of it or nothing, and on the disk, or in a store."""
    if in_store(path):
        path.write_text(json.dumps(values, indent=1) + "\n")
        return
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _check_room(folder: Any, listed: list[Shard]) -> None:
    """Compares the sizes of a split's shards in a store with those recorded, and their sum with the room for copies."""
    sizes = folder.sizes()
    for shard in listed:
        if sizes.get(shard.name) != shard.size:
            found = f"has {sizes[shard.name]} bytes" if shard.name in sizes else "is not there"
            raise DataError(f"{folder / shard.name}: {found}, recorded were {shard.size}")
    from twotower_jax.stores import cache

    cache.check_room(str(folder), sum(shard.size for shard in listed))


def _check_tokenizer(folder: pathlib.Path, manifest: Manifest) -> None:
    file = folder / "tokenizer.json"
    if shards.size_and_sha256(file)[1] != manifest.tokenizer_sha256:
        raise DataError(f"{file}: is not the tokenizer that the data were made with")
