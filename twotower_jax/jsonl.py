"""JSON Lines files of the commands: read with errors that name file and line, written whole or not at all."""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from twotower_jax.outputs import output_file
from twotower_jax.paths import as_path


def read_rows(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, blank lines left out.

    Raises:
      ValueError: naming file and line, for a line that is not a JSON object, or a file without any.
      OSError: if the file cannot be read.
    """
    path = as_path(path)
    rows = []
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder; give a file of rows") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error})") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: the file holds no rows")
    return rows


@contextlib.contextmanager
def row_writer(path: str | pathlib.Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives a function that writes a row; the file appears under its name when all rows are written.

    Raises:
      ValueError, OSError: as `output_file`, before anything is computed.
    """
    with output_file(path) as file:
        yield lambda row: file.write(json.dumps(row, ensure_ascii=False) + "\n")
