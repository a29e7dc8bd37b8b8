"""Prompts of a file, as text or as token ids."""

import pathlib
from collections.abc import Sequence
from typing import Any

from twotower_jax.data import encode
from twotower_jax.jsonl import read_rows
from twotower_jax.texts import check_text


def read_prompts(path: str | pathlib.Path) -> list[dict]:
    """Rows of a prompts file, each with either "text", a string, or "ids", a list.

    Raises:
      ValueError: naming the file and the row, for a row that is neither, or no text.
      OSError: if the file cannot be read.
    """
    return check_prompts(read_rows(path), path)


def check_prompts(rows: list[dict], path: str | pathlib.Path) -> list[dict]:
    """The rows themselves, read from `path`; ValueError as `read_prompts`."""
    for number, row in enumerate(rows, 1):
        if ("text" in row) == ("ids" in row):
            raise ValueError(f'{path}, row {number}: expected either "text" or "ids"')
        if "text" in row and not isinstance(row["text"], str):
            raise ValueError(f'{path}, row {number}: "text" must be a string')
        if "text" in row:
            check_text(row["text"], f'{path}, row {number}, "text"')
        if "ids" in row and not isinstance(row["ids"], list):
            raise ValueError(f'{path}, row {number}: "ids" must be a list of token ids')
    return rows


def prompt_ids(rows: Sequence[dict], tokenizer: Any) -> list[Sequence[int]]:
    """The token ids of each row; `tokenizer` may be None if none is text."""
    texts = iter(encode(tokenizer, [row["text"] for row in rows if "text" in row]) if tokenizer else ())
    return [row["ids"] if "ids" in row else next(texts) for row in rows]
