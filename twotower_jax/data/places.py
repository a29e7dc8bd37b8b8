"""Files of text where they lie, on this machine or in a store: what is known of them, and their bytes."""

import io
import os
from typing import BinaryIO

from twotower_jax.data.documents import DataError
from twotower_jax.data.rows import File
from twotower_jax.paths import AnyPath, as_path, in_store

_BUFFER_BYTES = 1 << 20


def look(path: AnyPath) -> File:
    """What is found there.

    Raises:
      OSError: nothing, or the store does not answer.
    """
    status = path.stat()
    return File(str(path), status.st_size, status.st_mtime_ns)


def open_file(path: str) -> BinaryIO:
    """Its bytes, to be read in any order; those of a store come a few blocks ahead of a reader.

    Raises:
      OSError: it cannot be read.
    """
    place = as_path(path)
    return io.BufferedReader(place.open("rb"), _BUFFER_BYTES) if in_store(place) else open(path, "rb")


def check_unchanged(file: File) -> None:
    """Compares a file with what was found at first.

    Raises:
      DataError: it is another one, or not there any more.
    """
    try:
        now = look(as_path(file.path))
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read any more ({error.strerror or error})") from None
    if now != file:
        raise DataError(f"{file.path}: was changed while it was read")


def same_file(path: AnyPath) -> str:
    """By what two names of one file are told."""
    return str(path) if in_store(path) else os.path.realpath(path)
