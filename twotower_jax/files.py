"""Opening files of a folder that may be broken or hostile."""

import itertools
import json
import os
import pathlib
import stat
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, BinaryIO

from twotower_jax.paths import in_store

if TYPE_CHECKING:
    import numpy as np

# The index of the release has 1.2 MB, a full-size conversion.json 4 MB.
_MAX_JSON_BYTES = 32 << 20


# Names that a message shows of a list that may be of any length.
_SHOWN = 3


class CheckpointError(ValueError):
    """A checkpoint that is broken or is not of this model; the message names file and tensor."""


def some(names: Collection[str]) -> str:
    """The first names of a list, and how many more there are, for a message of one line."""
    first = ", ".join(itertools.islice(names, _SHOWN))
    return first if len(names) <= _SHOWN else f"{first} and {len(names) - _SHOWN} more"


def check_folder(path: pathlib.Path, wanted: str) -> None:
    """Refuses a folder that a user named and that is not there; what is there and broken is a `CheckpointError`.

    Args:
      wanted: what to give instead, in words.

    Raises:
      ValueError: naming the path.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: {'is a file, not a folder' if path.exists() else 'no such folder'}; {wanted}")


def open_regular(path: pathlib.Path) -> BinaryIO:
    """Opens a regular file, unbuffered.

    Raises:
      CheckpointError: if it is missing, cannot be read, or is a pipe, a device or a folder.
    """
    if in_store(path):
        return _open_object(path)
    try:
        # Not blocking, so that a pipe in a file's place is found out instead of waited for.
        file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)  # noqa: SIM115
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise CheckpointError(f"{path}: is not a regular file")
        return file
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from None


def _open_object(path: Any) -> BinaryIO:
    """Opens an object of a store, of which nothing else is known to be wrong than that it is not there."""
    try:
        return path.open("rb", buffering=0)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def size_of(file: BinaryIO) -> int:
    """The bytes of a file that `open_regular` has opened."""
    return file.size if hasattr(file, "size") else os.fstat(file.fileno()).st_size


def is_there(path: pathlib.Path) -> bool:
    """Whether anything has that name, a link that leads nowhere included."""
    return path.exists() if in_store(path) else os.path.lexists(path)


def read_file(path: pathlib.Path) -> "np.ndarray":
    """The content of a file of any size, as uint8.

    Raises:
      CheckpointError: see `open_regular`.
    """
    with open_regular(path) as file:
        return read_exactly(path, file, size_of(file))


def read_exactly(path: pathlib.Path, file: BinaryIO, size: int) -> "np.ndarray":
    """The next `size` bytes of an open file, as uint8.

    Raises:
      CheckpointError: if it ends before.
    """
    import numpy as np  # here, because every command needs this module, and --help nothing of it

    data = np.empty(size, np.uint8)
    done = 0
    while done < size:
        count = file.readinto(data[done:].data)
        if not count:
            raise CheckpointError(f"{path}: ends {size - done} bytes too early; cut off meanwhile?")
        done += count
    return data


def read_bytes(path: pathlib.Path, limit: int) -> bytes:
    """The content of a small file.

    Raises:
      CheckpointError: see `open_regular`; also if it has more than `limit` bytes.
    """
    with open_regular(path) as file:
        size = size_of(file)
        if size > limit:
            raise CheckpointError(f"{path}: has {size} bytes; {limit} is the limit")
        return file.read()


def read_json(path: pathlib.Path) -> Any:
    """The content of a JSON file.

    Raises:
      CheckpointError: if it cannot be read, is not JSON, or has an object with one key twice.
    """
    try:
        return parse_json(read_bytes(path, _MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None


def parse_json(data: bytes) -> Any:
    """JSON in UTF-8, without the liberty of one key standing twice in an object (ValueError)."""
    return json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} stands twice")
            seen.add(key)
    return out


def check_link(file: pathlib.Path) -> None:
    """Refuses a file that is a symbolic link to somewhere else.

    A link may lead to a file of the same folder, or from a snapshot in the Hub's cache to that cache's blobs.

    Raises:
      CheckpointError: if it leads anywhere else, or is not there.
    """
    if in_store(file):
        return  # where there are none
    try:
        if not stat.S_ISLNK(os.lstat(file).st_mode):
            return
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({getattr(error, 'strerror', error)})") from None
    target, folder = pathlib.Path(os.path.realpath(file)), pathlib.Path(os.path.realpath(file.parent))
    if target.parent == folder:
        return
    if folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs":
        return
    raise CheckpointError(f"{file}: is a link to {target}, outside the checkpoint's folder")
