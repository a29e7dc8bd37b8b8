"""Reading one safetensors file, trusting nothing in it.

The library's own reader accepts duplicate keys, relabelled dtypes and unknown fields. Here the header must describe
the file exactly: known dtypes, shapes that match their bytes, no overlap and no hole.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, the data.
"""

import math
import pathlib
import struct
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from twotower_jax.files import CheckpointError, open_regular, parse_json, read_exactly, size_of

DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
# The release in a single file would have a header of 1.7 MB; a million tensors are 100 MB and cost seconds to parse.
MAX_HEADER_BYTES = 4 << 20


class Entry(NamedTuple):
    """Where a tensor lies: bytes start … stop of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: pathlib.Path) -> dict[str, Entry]:
    """The tensors of one file.

    Raises:
      CheckpointError: if the file is missing, cut off, or its header is anything but an exact description of it.
    """
    with open_regular(path) as file:
        size = size_of(file)
        head = file.read(8)
        if len(head) < 8:
            raise CheckpointError(f"{path}: {size} bytes are too few for a safetensors file")
        (header_size,) = struct.unpack("<Q", head)
        if header_size > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path}: the header claims {header_size} bytes; the file has {size}, the limit is {MAX_HEADER_BYTES}"
            )
        text = file.read(header_size)
    try:
        header = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise CheckpointError(f"{path}: __metadata__ is not an object of strings")
    entries = {name: _entry(path, name, raw, 8 + header_size, size) for name, raw in header.items()}
    end = 8 + header_size
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            kind = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {name!r} {kind} (byte {entry.start}, expected {end})")
        end = entry.stop
    if end != size:
        raise CheckpointError(f"{path}: the tensors end at byte {end} but the file has {size}; cut off or padded?")
    return entries


def read_tensor(path: pathlib.Path, entry: Entry) -> np.ndarray:
    """One tensor.

    Raises:
      CheckpointError: if the file has been cut off since its header was read.
    """
    with open_regular(path) as file:
        file.seek(entry.start)
        return next_tensor(path, file, entry)


def next_tensor(path: pathlib.Path, file: BinaryIO, entry: Entry) -> np.ndarray:
    """Like `read_tensor`, from an open file that stands at the tensor's start."""
    return read_exactly(path, file, entry.stop - entry.start).view(entry.dtype).reshape(entry.shape)


def _entry(path: pathlib.Path, name: str, raw, data_start: int, size: int) -> Entry:
    def fail(what: str):
        raise CheckpointError(f"{path}: tensor {name!r} {what}")

    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        fail("is not described by dtype, shape and data_offsets")
    if not isinstance(raw["dtype"], str) or raw["dtype"] not in DTYPES:
        fail(f"has dtype {raw['dtype']!r}; known are {', '.join(DTYPES)}")
    for field in ("shape", "data_offsets"):
        numbers = raw[field]
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 60 for n in numbers):
            fail(f"has {field} {numbers!r}")
    if len(raw["data_offsets"]) != 2:
        fail(f"has data_offsets {raw['data_offsets']!r}")
    start, stop = (data_start + offset for offset in raw["data_offsets"])
    dtype = DTYPES[raw["dtype"]]
    if stop - start != math.prod(raw["shape"]) * dtype.itemsize:
        fail(f"of {raw['dtype']} {raw['shape']} does not fill its {stop - start} bytes")
    if stop > size:
        fail(f"ends at byte {stop} but the file has {size}")
    return Entry(dtype, tuple(raw["shape"]), start, stop)
