"""Data sets of Megatron-LM, `PREFIX.bin` and `PREFIX.idx`, read as they are.

`.bin` is nothing but token ids. `.idx` says of which type, where each sequence lies, and which sequences make a
document. There are two layouts of it, all numbers little-endian:

    MMIDIDX  9 bytes of magic, u64 version 1, u8 type, u64 sequences, u64 n; then int32 lengths and int64 byte offsets
             of the sequences, and n int64 numbers of the sequences at which documents begin, the last one their count;
             of multimodal sets also an int8 mode of each sequence
    TNTIDX   8 bytes of magic, u64 version 1, u64 type, u64 its size, u64 sequences, u64 s, u64 n; then, in int64,
             sequences + 1 numbers of dimensions so far, as many offsets in tokens, s lengths, and the n as above

Sequences must lie in `.bin` one after the other, as every writer of the format leaves them.
"""

import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np

from twotower_jax.data.documents import DataError
from twotower_jax.files import open_regular
from twotower_jax.paths import as_path, in_store

_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_NO_INTEGERS = (6, 7)
_MMAP, _LEGACY = b"MMIDIDX\0\0", b"TNTIDX\0\0"

# Entries of an index that are compared at a time, and the sample of .bin that stands for all of it in `identity`.
_BLOCK = 1 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


def is_megatron(prefix: str | Path) -> bool:
    """Whether there are such files; `prefix` may also be either of them."""
    return all(file.is_file() for file in _files(prefix))


class MegatronDocuments:
    """The documents of one such set, memory-mapped; see `documents.Documents`. Safe to read from several threads."""

    def __init__(self, prefix: str | Path):
        """Checks all of the index against the size of the data.

        Raises:
          DataError: the files are not such a set or do not fit together.
        """
        self._bin, self._idx = _files(prefix)
        self._index = _map(self._idx)
        if self._index[: len(_MMAP)].tobytes() == _MMAP:
            self._read_index()
        elif self._index[: len(_LEGACY)].tobytes() == _LEGACY:
            self._read_legacy_index()
        else:
            self._fail("is not an index of Megatron-LM (neither MMIDIDX nor TNTIDX)")
        data = _map(self._bin)
        if len(data) % self._dtype.itemsize:
            raise DataError(f"{self._bin}: {len(data)} bytes are no whole number of {self._dtype.name} tokens")
        self._data = data.view(self._dtype)
        self.tokens, self.count = len(self._data), len(self._borders) - 1
        self._check()

    def lengths(self, start: int, stop: int) -> np.ndarray:
        return np.diff(self._starts(self._borders[start : stop + 1]))

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._data[start:stop]

    def identity(self) -> dict[str, Any]:
        """All of .idx counts, and of .bin its size and a sample of 4 MiB: sets can be larger than could be hashed."""
        sample, data = hashlib.sha256(), self._data.view(np.uint8)
        for start in np.linspace(0, max(0, len(data) - _SAMPLE_BYTES), _SAMPLES, dtype=np.int64):
            sample.update(data[start : start + _SAMPLE_BYTES])
        return {
            "documents": self.count,
            "bytes": len(data),
            "idx_sha256": hashlib.sha256(self._index).hexdigest(),
            "bin_sample_sha256": sample.hexdigest(),
        }

    def _read_index(self) -> None:
        version, code, sequences, borders = self._unpack("<QBQQ", len(_MMAP))
        self._check_header(version, code)
        self._at = len(_MMAP) + 25
        self._check_size(4 * sequences + 8 * sequences + 8 * borders, optional=sequences)
        self._lengths = self._take("<i4", sequences)
        self._offsets, self._unit = self._take("<i8", sequences), self._dtype.itemsize
        self._borders = self._take("<i8", borders)
        if self._take("<i1", len(self._index) - self._at).any():
            self._fail("has sequences that are not text (multimodal modes)")

    def _read_legacy_index(self) -> None:
        version, code, size, sequences, numbers, borders = self._unpack("<QQQQQQ", len(_LEGACY))
        self._check_header(version, code)
        if size != self._dtype.itemsize or numbers != sequences:
            self._fail(f"has {numbers} lengths for {sequences} sequences, tokens of {size} bytes: not one line of text")
        self._at = len(_LEGACY) + 48
        self._check_size(8 * (2 * (sequences + 1) + numbers + borders))
        self._take("<i8", sequences + 1)
        self._offsets, self._unit = self._take("<i8", sequences + 1)[:-1], 1
        self._lengths = self._take("<i8", numbers)
        self._borders = self._take("<i8", borders)

    def _unpack(self, layout: str, at: int) -> tuple[int, ...]:
        size = struct.calcsize(layout)
        if len(self._index) < at + size:
            self._fail("ends within its header")
        return struct.unpack(layout, self._index[at : at + size].tobytes())

    def _check_header(self, version: int, code: int) -> None:
        if version != 1:
            self._fail(f"has version {version}; 1 is the only one known")
        if code not in _DTYPES:
            what = "numbers that are no integers" if code in _NO_INTEGERS else f"an unknown type of token, {code}"
            self._fail(f"has {what}; known are {', '.join(np.dtype(name).name for name in _DTYPES.values())}")
        self._dtype = np.dtype(_DTYPES[code])

    def _check_size(self, size: int, optional: int = 0) -> None:
        found = len(self._index) - self._at
        if found not in (size, size + optional):
            self._fail(f"has {found} bytes after its header where its counts need {size}; cut off or padded?")

    def _take(self, dtype: str, count: int) -> np.ndarray:
        """The next `count` numbers of the index."""
        start, self._at = self._at, self._at + count * np.dtype(dtype).itemsize
        return self._index[start : self._at].view(dtype)

    def _starts(self, sequences: np.ndarray) -> np.ndarray:
        """Where these sequences begin, in tokens, int64; the number after the last one stands for the end."""
        inside = sequences < len(self._offsets)
        starts = np.full(len(sequences), self.tokens, np.int64)
        starts[inside] = self._offsets[sequences[inside]] // self._unit
        return starts

    def _check(self) -> None:
        sequences, borders, expected = len(self._lengths), self._borders, 0
        for start in range(0, sequences, _BLOCK):
            lengths = self._lengths[start : start + _BLOCK].astype(np.int64)
            ends = expected + np.cumsum(lengths)
            offsets, wanted = self._offsets[start : start + _BLOCK], (ends - lengths) * self._unit
            wrong = np.flatnonzero((lengths < 0) | (offsets != wanted))
            if wrong.size:
                at = int(wrong[0])
                self._fail(
                    f"sequence {start + at} has length {lengths[at]} and offset {offsets[at]}; after the sequence "
                    f"before it the offset should be {wanted[at]}"
                )
            expected = int(ends[-1])
        if expected != self.tokens:
            raise DataError(
                f"{self._bin}: has {self.tokens} {self._dtype.name} tokens, {self._idx.name} lists {expected}; cut off?"
            )
        if not len(borders) or borders[0] != 0 or borders[-1] != sequences:
            self._fail(f"its documents do not begin at sequence 0 and end at sequence {sequences}")
        for start in range(0, len(borders) - 1, _BLOCK):
            falling = np.flatnonzero(np.diff(borders[start : start + _BLOCK + 1]) < 0)
            if falling.size:
                self._fail(f"document {start + int(falling[0])} ends before it begins")

    def _fail(self, what: str):
        raise DataError(f"{self._idx}: {what}")


def _files(prefix: str | Path) -> tuple[Path, Path]:
    prefix = as_path(prefix)
    if prefix.suffix in (".bin", ".idx"):
        prefix = prefix.with_suffix("")
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


def _map(path: Path) -> np.ndarray:
    """A file's bytes, uint8, read from the disk when looked at."""
    if in_store(path):
        from twotower_jax.stores import cache

        path = cache.local(path)
    with open_regular(path) as file:
        if not file.seek(0, 2):
            return np.zeros(0, np.uint8)
        return np.asarray(np.memmap(file, np.uint8, mode="r"))
