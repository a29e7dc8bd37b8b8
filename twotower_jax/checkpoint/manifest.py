"""`conversion.json`: what was converted, and the size and SHA-256 of every file, by which a checkpoint is checked.

Orbax loads flipped bits silently; nothing of a checkpoint is trusted before its files have been compared with this.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from twotower_jax.files import CheckpointError, open_regular, read_json
from twotower_jax.paths import in_store
from twotower_jax.quantization import METHODS, Method

NAME = "conversion.json"
VERSION = 1
_BLOCK = 4 << 20


class Digest(NamedTuple):
    """Size and SHA-256 of a file."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `conversion.json` says.

    Attributes:
      source: the Hub id, or the name of the folder, that was converted.
      revision: the Hub's commit, where known.
      kind: "two_tower" or "single_tower", of the source.
      time_init: how the time conditioning was made, "identity" or "reference"; None where it came with the source.
      tensors: number of published tensors, those of both towers.
      parameters: number of parameters.
      dtypes: number of tensors by dtype.
      segments: unit and repeats of the layers that are stacked, in order; what the arrays are called follows from them.
      source_files: of the source, by name.
      files: of this checkpoint, by path relative to its folder.
      quantization: how weights were quantized (`quantization.Method.describe`); None, and not in the file, if not.
    """

    source: str
    revision: str | None
    kind: str
    time_init: str | None
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    segments: list[list]
    source_files: dict[str, Digest]
    files: dict[str, Digest]
    quantization: dict[str, Any] | None = None

    @property
    def method(self) -> Method | None:
        """How weights were quantized."""
        return None if self.quantization is None else METHODS[self.quantization["method"]]

    def write(self, folder: pathlib.Path) -> None:
        values = {"version": VERSION} | dataclasses.asdict(self)
        if self.quantization is None:
            del values["quantization"]
        for field in ("source_files", "files"):
            values[field] = {name: digest._asdict() for name, digest in sorted(getattr(self, field).items())}
        write_file(folder / NAME, [(json.dumps(values, indent=1) + "\n").encode()])


def read(folder: pathlib.Path) -> Manifest:
    """Reads a checkpoint's manifest.

    Raises:
      CheckpointError: if it is missing or is not one.
    """
    path = folder / NAME
    raw = read_json(path)

    def fail(what: str):
        raise CheckpointError(f"{path}: {what}")

    fields = {field.name for field in dataclasses.fields(Manifest)} - {"quantization"}
    if not isinstance(raw, dict) or set(raw) - {"quantization"} != fields | {"version"}:
        fail(f"is not an object with the fields {', '.join(['version', *sorted(fields)])}")
    if raw.pop("version") != VERSION:
        fail(f"has a version other than {VERSION}, the only one known")
    if raw["kind"] not in ("two_tower", "single_tower"):
        fail(f"has kind {raw['kind']!r}; known are two_tower and single_tower")
    if "quantization" in raw:
        stored = raw["quantization"]
        if not isinstance(stored, dict) or stored.get("method") not in list(METHODS):
            fail(f"has quantization {stored!r}; known methods are {', '.join(METHODS)}")
    for field in ("source_files", "files"):
        if not isinstance(raw[field], dict):
            fail(f"has {field} that are not an object")
        raw[field] = {name: parse_digest(path, name, value) for name, value in raw[field].items()}
    return Manifest(**raw)


def parse_digest(path: pathlib.Path, name: str, value: Any) -> Digest:
    parts = pathlib.PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\0" in name:
        raise CheckpointError(f"{path}: lists {name!r}, which is outside the checkpoint's folder")
    ok = isinstance(value, dict) and set(value) == {"size", "sha256"}
    if not ok or type(value["size"]) is not int or not isinstance(value["sha256"], str):
        raise CheckpointError(f"{path}: gives {name!r} no size and sha256")
    return Digest(**value)


def digest_of(data: bytes) -> Digest:
    """The digest of a file with these bytes."""
    return Digest(len(data), hashlib.sha256(data).hexdigest())


def digest_file(path: pathlib.Path) -> Digest:
    """The digest of a regular file.

    Raises:
      CheckpointError: if it is not there, not a regular file, or cannot be read.
    """
    with open_regular(path) as file:
        digest, size, block = hashlib.sha256(), 0, bytearray(_BLOCK)
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
            size += count
        return Digest(size, digest.hexdigest())


def write_file(path: pathlib.Path, pieces: Iterable[bytes | memoryview]) -> Digest:
    """Writes a new file, its folder included.

    Raises:
      OSError: naming the file, if it cannot be written or exists.
    """
    if in_store(path):
        data = b"".join(pieces)
        path.create(data)
        return digest_of(data)
    digest, size = hashlib.sha256(), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb", buffering=0) as file:
            for piece in pieces:
                view = memoryview(piece)
                digest.update(view)
                size += len(view)
                while len(view):
                    view = view[file.write(view) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    return Digest(size, digest.hexdigest())


def compare(path: pathlib.Path, found: Digest, expected: Digest) -> None:
    """Raises CheckpointError if a file is not the one that was recorded."""
    if found.size != expected.size:
        raise CheckpointError(f"{path}: has {found.size} bytes, recorded were {expected.size}")
    if found.sha256 != expected.sha256:
        raise CheckpointError(
            f"{path}: its content is not what was recorded (SHA-256 {found.sha256}, recorded {expected.sha256})"
        )


def verify(folder: pathlib.Path, files: Mapping[str, Digest], names: Iterable[str]) -> None:
    """Compares the files `names` with what is recorded; each process of a mesh reads a share, and all learn of a fault.

    Raises:
      CheckpointError: naming the first file that differs.
    """
    mine = sorted(names)[jax.process_index() :: jax.process_count()]
    fault = None
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        checks = [pool.submit(lambda name: compare(folder / name, digest_file(folder / name), files[name]), name)
                  for name in mine]  # fmt: skip
        try:
            for check in checks:
                check.result()
        except CheckpointError as error:
            fault = error
            pool.shutdown(cancel_futures=True)
    if jax.process_count() > 1:
        faults = multihost_utils.process_allgather(np.array(fault is not None))
        if fault is None and faults.any():
            fault = CheckpointError(f"{folder}: process {int(np.argmax(faults))} found a broken file")
    if fault is not None:
        raise fault
