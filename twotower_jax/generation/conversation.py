"""Conversations with a chat model: of a file, or typed turn by turn."""

import pathlib
from collections.abc import Callable, Iterator
from typing import IO

from twotower_jax.data.chat import ChatTemplate, check_messages
from twotower_jax.files import CheckpointError, read_json
from twotower_jax.jsonl import read_rows
from twotower_jax.paths import as_path

EXIT = "/exit"


def read_conversations(path: str | pathlib.Path) -> list[dict]:
    """The rows {"messages": [{"role": …, "content": …}, …]} of a JSON Lines file, or of a JSON file with one or a list.

    "tools" and "documents" of a row are for the template.

    Raises:
      ValueError: naming file and row, for anything else; OSError if the file cannot be read.
    """
    path = as_path(path)
    rows = _read_json(path) if path.suffix == ".json" else read_rows(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or "messages" not in row:
            raise ValueError(f'{path}, row {number}: expected {{"messages": […]}}')
        try:
            check_messages(row["messages"])
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from None
    return rows


def conversation_ids(rows: list[dict], template: ChatTemplate) -> list[list[int]]:
    """The token ids of each row, up to where the assistant is to answer.

    Raises:
      ValueError: naming the row, if the template refuses it.
    """
    prompts = []
    for number, row in enumerate(rows, 1):
        try:
            encoded = template.encode(row["messages"], True, tools=row.get("tools"), documents=row.get("documents"))
        except ValueError as error:
            raise ValueError(f"conversation {number}: {error}") from None
        prompts.append(encoded.ids.tolist())
    return prompts


def typed_turns(lines: IO[str], prompt: Callable[[], object]) -> Iterator[str]:
    """What is typed, a line per turn, without empty ones, until /exit or the end of the input (Ctrl-D)."""
    while True:
        prompt()
        line = lines.readline()
        if not line or line.strip() == EXIT:
            return
        if line.strip():
            yield line.strip()


def _read_json(path: pathlib.Path) -> list:
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    try:
        value = read_json(path)
    except CheckpointError as error:
        raise ValueError(str(error)) from None
    rows = value if isinstance(value, list) else [value]
    if not rows:
        raise ValueError(f"{path}: the file holds no rows")
    return rows
