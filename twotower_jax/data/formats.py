"""Reading the text in a file of any kind, in parts that can be read apart from one another.

    .txt                a document
    .jsonl, .ndjson     a document a row, in one field of a JSON object; blank lines are ignored
    .json               an array of such objects, a single one, or rows of them as in .jsonl
    .tar                the files in it, of all kinds but .tar, in its order
    .parquet            a document a row, in one column of strings (needs pyarrow)

All but the last also compressed, as .gz or .zst (needs zstandard); .tgz is .tar.gz. Endings may be in capitals. All
text is UTF-8; the lines of a .txt end with "\\n", whatever they ended with in the file. Plain JSON Lines can be divided
at any byte, Parquet between row groups, anything else not at all. Everything is read as it comes: no more than a
document is held, of .json a file, and a Parquet file in a .tar goes to a temporary one.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from twotower_jax.data.archives import BrokenArchive, members
from twotower_jax.data.compression import CUT_OFF, decompressed, zstandard
from twotower_jax.data.parquet import parquet_slices, pyarrow, read_parquet
from twotower_jax.data.places import check_unchanged, open_file
from twotower_jax.data.rows import Field, File, Row, Slice, object_text, row_text

_TEXT, _LINES, _JSON, _TAR, _PARQUET = range(5)
_KINDS = {".txt": _TEXT, ".jsonl": _LINES, ".ndjson": _LINES, ".json": _JSON, ".tar": _TAR, ".parquet": _PARQUET}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_SHORT = {".tgz": ".tar.gz"}

KNOWN = ", ".join(_KINDS) + ", and all but the last also with .gz or .zst"

# Bytes of text that a byte of a compressed file stands for, near enough to make parts of similar size.
_RATIO = 3


class Format(NamedTuple):
    """What a file's name says of its content: the kind, and the name of the compression or ""."""

    kind: int
    compression: str

    @property
    def may_be_something_else(self) -> bool:
        """Whether files of this format often hold no text: settings and other JSON."""
        return self.kind == _JSON


def format_of(path: str) -> Format | None:
    """None for a file that cannot be read."""
    stem, ending = os.path.splitext(os.path.basename(path).lower())
    if ending in _SHORT:
        stem, ending = os.path.splitext(stem + _SHORT[ending])
    compression = _COMPRESSIONS.get(ending, "")
    kind = _KINDS.get(os.path.splitext(stem)[1] if compression else ending)
    if kind is None or (kind == _PARQUET and compression):
        return None
    return Format(kind, compression)


def check_installed(files: Iterable[File]) -> None:
    """Raises ValueError if reading one of the files needs a package that is not there."""
    for file in files:
        kind, compression = format_of(file.path)
        if compression == "zstd":
            zstandard(file.path)
        if kind == _PARQUET:
            pyarrow(file.path)


def slices(file: File, part_bytes: int) -> list[Slice]:
    """The parts of a file, of at most `part_bytes` bytes of text each as far as it can be divided."""
    kind, compression = format_of(file.path)
    if kind == _LINES and not compression and file.size > part_bytes:
        count = -(-file.size // part_bytes)
        cuts = [file.size * i // count for i in range(count + 1)]
        return [Slice(file, a, b, b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
    if kind == _PARQUET:
        return parquet_slices(file, part_bytes)
    return [Slice(file, 0, file.size, file.size * (_RATIO if compression else 1))]


def read_rows(piece: Slice, field: Field) -> Iterator[Row]:
    """Yields the documents of a slice in order, and what is broken where it stands.

    What cannot be read beyond some place (a compressed file cut off, a broken Parquet file) ends with a problem.

    Raises:
      DataError: the file is not the one that was found at first, or became another while it was read.
      ValueError: reading needs a package that is not installed.
    """
    check_unchanged(piece.file)
    path = piece.file.path
    kind, compression = format_of(path)
    if kind == _PARQUET and not callable(field):
        with open_file(path) as raw:
            yield from read_parquet(raw, path, range(piece.start, piece.stop), field)
    elif kind == _LINES and not compression:
        yield from _read_lines(piece, field)
    else:
        with open_file(path) as raw:
            size = max(1, piece.file.size)
            read = _read_tar if kind == _TAR else _read_stream
            yield from read(raw, Format(kind, compression), path, field, lambda: raw.tell() / size)
    check_unchanged(piece.file)


# The kinds. How far a stream is read is asked of `done`, for it may be part of another.

_Done = Callable[[], float]


def _read_stream(raw: BinaryIO, format: Format, where: str, field: Field, done: _Done) -> Iterator[Row]:
    """The documents of a file, or of one in an archive, that is read from its beginning to its end."""
    if callable(field) and format.kind in (_TEXT, _PARQUET):
        yield Row(None, f"{where}: conversations are rows of JSON; keep other files apart from them", done())
    elif format.kind == _PARQUET:
        with tempfile.TemporaryFile() as copy:  # it is read from its end
            shutil.copyfileobj(raw, copy)
            for row in read_parquet(copy, where, None, field):
                yield row._replace(done=done())
    else:
        file = decompressed(raw, format.compression, where)
        if format.kind == _LINES:
            yield from _read_line_by_line(file, format, where, field, done)
            return
        try:
            content = file.read()
        except CUT_OFF as error:
            yield Row(None, f"{where}: not a whole {format.compression} file ({error})", done())
            return
        rows = [_text(content, where)] if format.kind == _TEXT else _json(content, where, field)
        for row in rows:
            yield row._replace(done=done())


def _text(content: bytes, where: str) -> Row:
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        return Row(None, f"{where}: not UTF-8 text ({error})", 1.0)
    if not text.strip():
        return Row(None, f"{where}: the file holds no text; remove it or fill it", 1.0)
    return Row(text, None, 1.0)


def _json(content: bytes, where: str, field: Field) -> Iterator[Row]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        if content.lstrip()[:1] == b"[":
            yield Row(None, f"{where}: not a whole JSON array in UTF-8: {error}", 1.0)
            return
        for number, line in enumerate(content.split(b"\n"), start=1):
            if line.strip():
                yield _row(line, field, f"{where}, line {number}", 1.0)
        return
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        yield _row(row, field, f"{where}, entry {number}", 1.0)


def _row(row: Any, field: Field, where: str, done: float) -> Row:
    """The text of a line, or of a value that was parsed already."""
    try:
        return Row(row_text(row, field) if isinstance(row, bytes) else object_text(row, field), None, done)
    except ValueError as error:
        return Row(None, f"{where}: {error}", done)


def _read_line_by_line(file: BinaryIO, format: Format, where: str, field: Field, done: _Done) -> Iterator[Row]:
    number = 0
    while True:
        try:
            line = file.readline()
        except CUT_OFF as error:
            kind = format.compression
            yield Row(None, f"{where}, line {number + 1}: the {kind} file is cut off or broken here ({error})", done())
            return
        if not line:
            return
        number += 1
        if line.strip():
            yield _row(line, field, f"{where}, line {number}", done())


def _read_tar(raw: BinaryIO, format: Format, path: str, field: Field, done: _Done) -> Iterator[Row]:
    """The documents of the files in an archive. As in a folder, what is hidden or of another kind is left out, and JSON
    without a text."""
    place = "at its beginning"
    try:
        for member in members(decompressed(raw, format.compression, path)):
            where = f"{path}, member {member.name}"
            place = f"after member {member.name}"
            inner = format_of(member.name)
            if member.problem:
                yield Row(None, f"{where}: {member.problem}", done())
            elif member.hidden or inner is None or inner.kind == _TAR:
                yield Row(None, None, done(), left_out=where)
            else:
                rows = _read_stream(member.content, inner, where, field, done)
                first = next(rows, None)
                if first is not None and first.text is None and inner.may_be_something_else:
                    yield Row(None, None, done(), left_out=where)
                elif first is not None:
                    yield first
                    yield from rows
    except BrokenArchive as error:
        yield Row(None, f"{path}: the tar archive is cut off or broken {place} ({error})", 1.0)


def _read_lines(piece: Slice, field: Field) -> Iterator[Row]:
    """The lines that begin in the slice."""
    path = piece.file.path
    with open_file(path) as file:
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
    """The number of the line that begins at byte `at`; counted anew, for few lines are asked for."""
    lines = 1
    with open_file(path) as file:
        while at > 0 and (block := file.read(min(at, 1 << 20))):
            lines += block.count(b"\n")
            at -= len(block)
    return lines
