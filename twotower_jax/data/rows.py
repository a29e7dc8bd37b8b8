"""What reading files of text speaks of: a file, a part of one, and the documents in it."""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

# Where a row of JSON or Parquet has its text: the name of a field or, in JSON alone, a function of the row that gives
# it or raises ValueError.
Field = str | Callable[[Any], str]


class File(NamedTuple):
    """An input as it was found: path, bytes, and time of the last change in nanoseconds; in a store, in its place a
    number that its version gives."""

    path: str
    size: int
    changed: int


class Slice(NamedTuple):
    """A part of a file: bytes `start` ... `stop` of JSON Lines, row groups of Parquet, or all of it.

    `weight` is about how many bytes of text it holds.
    """

    file: File
    start: int
    stop: int
    weight: int


class Row(NamedTuple):
    """A document, or what is wrong with it, or what of an archive is left out as no text; and how far its slice is
    read, from 0 to 1."""

    text: str | None
    problem: str | None
    done: float
    left_out: str | None = None


def row_text(line: bytes, field: Field = "text") -> str:
    """Returns the text of a row of JSON Lines; ValueError if it has none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON object in UTF-8: {error}") from error
    return object_text(row, field)


def object_text(row: Any, field: Field) -> str:
    """Returns the text of a row that was parsed; ValueError if it has none."""
    if callable(field):
        return field(row)
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        raise ValueError(f'every row must be a JSON object with a string field "{field}"')
    text = row[field]
    if not text.strip():
        raise ValueError(f'the field "{field}" holds no text')
    # JSON can spell half of a surrogate pair, which is not text and which the tokenizer would refuse much later.
    text.encode("utf-8")
    return text
