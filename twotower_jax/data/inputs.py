"""Reading the text of large data sets, in parts that can be read apart from one another.

    .txt, .txt.gz      a document
    .jsonl, .jsonl.gz  a document a row, in one field of a JSON object; blank lines are ignored
    .parquet           a document a row, in one column of strings (needs pyarrow)

All text is UTF-8. Plain JSON Lines can be divided at any byte, Parquet between row groups, anything else not at all.
"""

import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from twotower_jax.data.documents import DataError
from twotower_jax.data.sources import row_text

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")

# Bytes of text that a byte of gzip stands for, near enough to make parts of similar size.
_GZIP_RATIO = 3


class File(NamedTuple):
    """An input as it was found: path, bytes, and time of the last change in nanoseconds."""

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
    """A document, or what is wrong with it; and how far its slice is read, from 0 to 1."""

    text: str | None
    problem: str | None
    done: float


def find_files(inputs: Sequence[str]) -> list[File]:
    """The files that the inputs stand for: each a file, a folder (of which all files of a known kind) or a pattern.

    Files come in the order of the inputs, and sorted within each.

    Raises:
      ValueError: an input stands for nothing, a file is of an unknown kind, or is named twice.
    """
    found: dict[str, Path] = {}
    for name in inputs:
        path = Path(name)
        if not name:
            raise ValueError("an input is empty; give files, folders or patterns")
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if _suffix(file) and file.is_file())
            if not files:
                raise ValueError(f"{name}: no {', '.join(SUFFIXES)} files in this folder or below it")
        elif path.is_file():
            files = [path]
        else:
            anchor = Path(path.anchor or ".")
            files = sorted(file for file in anchor.glob(str(path.relative_to(path.anchor))) if file.is_file())
            if not files:
                raise ValueError(f"{name}: no such file or folder, and as a pattern it matches no file")
        for file in files:
            if not _suffix(file):
                raise ValueError(f"{file}: cannot read files of this kind; known are {', '.join(SUFFIXES)}")
            if str(file.resolve()) in found:
                raise ValueError(f"{file}: is among the inputs twice")
            found[str(file.resolve())] = file
    return [File(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found.values()]


def divide(files: Sequence[File], part_bytes: int) -> list[list[Slice]]:
    """Parts of at most `part_bytes` bytes of text, as far as files can be divided; the same for the same files."""
    parts: list[list[Slice]] = []
    room = 0
    for piece in (piece for file in files for piece in _slices(file, part_bytes)):
        if not parts or piece.weight > room:
            parts.append([])
            room = part_bytes
        parts[-1].append(piece)
        room -= piece.weight
    return parts


def read_rows(piece: Slice, field: str) -> Iterator[Row]:
    """Yields the documents of a slice in order, and what is broken where it stands.

    What cannot be read beyond some place (a gzip file cut off, a broken Parquet file) ends with a problem.

    Raises:
      DataError: the file is not the one that was found at first, or became another while it was read.
      ValueError: reading Parquet needs pyarrow, which is not installed.
    """
    _check_unchanged(piece.file)
    kind = _suffix(Path(piece.file.path))
    if kind in (".txt", ".txt.gz"):
        yield _read_text(piece)
    elif kind == ".jsonl":
        yield from _read_lines(piece, field)
    elif kind == ".jsonl.gz":
        yield from _read_gzip_lines(piece, field)
    else:
        yield from _read_parquet(piece, field)
    _check_unchanged(piece.file)


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)


def _check_unchanged(file: File) -> None:
    try:
        now = os.stat(file.path)
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read any more ({error.strerror})") from None
    if (now.st_size, now.st_mtime_ns) != (file.size, file.changed):
        raise DataError(f"{file.path}: was changed while it was read")


def _slices(file: File, part_bytes: int) -> list[Slice]:
    kind = _suffix(Path(file.path))
    if kind == ".jsonl" and file.size > part_bytes:
        count = -(-file.size // part_bytes)
        cuts = [file.size * i // count for i in range(count + 1)]
        return [Slice(file, a, b, b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
    if kind == ".parquet":
        return _parquet_slices(file, part_bytes)
    return [Slice(file, 0, file.size, file.size * (_GZIP_RATIO if kind.endswith(".gz") else 1))]


def _read_text(piece: Slice) -> Row:
    path = piece.file.path
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Row(None, f"{path}: not UTF-8 text ({error})", 1.0)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        return Row(None, f"{path}: not a whole gzip file ({error})", 1.0)
    if not text.strip():
        return Row(None, f"{path}: the file holds no text", 1.0)
    return Row(text, None, 1.0)


def _read_lines(piece: Slice, field: str) -> Iterator[Row]:
    """The lines that begin in the slice."""
    path = piece.file.path
    with open(path, "rb") as file:
        at = piece.start
        if at:
            file.seek(at - 1)
            at += len(file.readline()) - 1
        while at < piece.stop and (line := file.readline()):
            done = min(1.0, (at + len(line) - piece.start) / (piece.stop - piece.start))
            if line.strip():
                try:
                    yield Row(row_text(line, field), None, done)
                except ValueError as error:
                    yield Row(None, f"{path}, line {_line_number(path, at)}: {error}", done)
            at += len(line)


def _line_number(path: str, at: int) -> int:
    """Of the line that begins at byte `at`; counted anew, for few lines are asked for."""
    lines = 1
    with open(path, "rb") as file:
        while at > 0 and (block := file.read(min(at, 1 << 20))):
            lines += block.count(b"\n")
            at -= len(block)
    return lines


def _read_gzip_lines(piece: Slice, field: str) -> Iterator[Row]:
    path, number = piece.file.path, 0
    with open(path, "rb") as raw, gzip.open(raw) as file:
        while True:
            try:
                line = file.readline()
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                yield Row(None, f"{path}, line {number + 1}: the gzip file is cut off or broken here ({error})", 1.0)
                return
            if not line:
                return
            number += 1
            if line.strip():
                done = raw.tell() / max(1, piece.file.size)
                try:
                    yield Row(row_text(line, field), None, done)
                except ValueError as error:
                    yield Row(None, f"{path}, line {number}: {error}", done)


def _parquet():
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "reading .parquet needs pyarrow, which is not installed: pip install 'twotower_jax[data]'"
        ) from None
    return pyarrow


def _parquet_slices(file: File, part_bytes: int) -> list[Slice]:
    """Neighboring row groups together as far as they fit; all of the file if it cannot be read, to be reported then."""
    pyarrow = _parquet()
    try:
        metadata = pyarrow.parquet.read_metadata(file.path)
    except (pyarrow.ArrowException, OSError):
        return [Slice(file, 0, 0, file.size)]
    pieces: list[Slice] = []
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).total_byte_size
        if pieces and pieces[-1].weight + size <= part_bytes:
            pieces[-1] = pieces[-1]._replace(stop=group + 1, weight=pieces[-1].weight + size)
        else:
            pieces.append(Slice(file, group, group + 1, size))
    return pieces


def _read_parquet(piece: Slice, field: str) -> Iterator[Row]:
    pyarrow, path = _parquet(), piece.file.path
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            problem = _column_problem(pyarrow, file.schema_arrow, field)
            if problem:
                yield Row(None, f"{path}: {problem}", 1.0)
                return
            groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            number = sum(groups[: piece.start])
            first, rows = number, max(1, sum(groups[piece.start : piece.stop]))
            for batch in file.iter_batches(256, row_groups=range(piece.start, piece.stop), columns=[field]):
                for value in batch.column(0):
                    number += 1
                    done = (number - first) / rows
                    try:
                        yield Row(_value_text(value, field), None, done)
                    except ValueError as error:
                        yield Row(None, f"{path}, row {number}: {error}", done)
    except (pyarrow.ArrowException, OSError) as error:
        yield Row(None, f"{path}, row {number + 1}: the Parquet file is broken here ({error})", 1.0)


def _column_problem(pyarrow, schema, field: str) -> str | None:
    if field not in schema.names:
        return f"no column {field!r} among {', '.join(schema.names)}"
    kind = schema.field(field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        return f"column {field!r} holds {kind}, not strings"
    return None


def _value_text(value, field: str) -> str:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error})") from None
    if text is None or not text.strip():
        raise ValueError(f'the field "{field}" holds no text')
    return text
