"""Reading the text in a file of any kind, in parts that can be read apart from one another.

    .txt                a document
    .jsonl, .ndjson     a document a row, in one field of a JSON object; blank lines are ignored
    .json               an array of such objects, a single one, or rows of them as in .jsonl
    .parquet            a document a row, in one column of strings (needs pyarrow)

All but the last also compressed, as .gz or .zst (needs zstandard). Endings may be in capitals. All text is UTF-8; the
lines of a .txt end with "\\n", whatever they ended with in the file. Plain JSON Lines can be divided at any byte,
Parquet between row groups, anything else not at all.
"""

import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from twotower_jax.data.documents import DataError

_TEXT, _LINES, _JSON, _PARQUET = range(4)
_KINDS = {".txt": _TEXT, ".jsonl": _LINES, ".ndjson": _LINES, ".json": _JSON, ".parquet": _PARQUET}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

KNOWN = ", ".join(_KINDS) + ", and all but the last also with .gz or .zst"

# Bytes of text that a byte of a compressed file stands for, near enough to make parts of similar size.
_RATIO = 3

# Where a row of JSON or Parquet has its text: the name of a field or, in JSON alone, a function of the row that gives
# it or raises ValueError.
Field = str | Callable[[Any], str]


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
            _zstandard(file.path)
        if kind == _PARQUET:
            _parquet(file.path)


def read_rows(piece: Slice, field: Field) -> Iterator[Row]:
    """Yields the documents of a slice in order, and what is broken where it stands.

    What cannot be read beyond some place (a compressed file cut off, a broken Parquet file) ends with a problem.

    Raises:
      DataError: the file is not the one that was found at first, or became another while it was read.
      ValueError: reading needs a package that is not installed.
    """
    _check_unchanged(piece.file)
    kind, compression = format_of(piece.file.path)
    if callable(field) and kind in (_TEXT, _PARQUET):
        yield Row(None, f"{piece.file.path}: conversations are rows of JSON; keep other files apart from them", 1.0)
    elif kind == _PARQUET:
        yield from _read_parquet(piece, field)
    elif kind == _LINES and not compression:
        yield from _read_lines(piece, field)
    elif kind == _LINES:
        yield from _read_compressed_lines(piece, field)
    elif kind == _TEXT:
        yield _read_text(piece)
    else:
        yield from _read_json(piece, field)
    _check_unchanged(piece.file)


def row_text(line: bytes, field: Field = "text") -> str:
    """Returns the text of a row of JSON Lines; ValueError if it has none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON object in UTF-8: {error}") from error
    return _object_text(row, field)


def _object_text(row: Any, field: Field) -> str:
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


def _check_unchanged(file: File) -> None:
    try:
        now = os.stat(file.path)
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read any more ({error.strerror})") from None
    if (now.st_size, now.st_mtime_ns) != (file.size, file.changed):
        raise DataError(f"{file.path}: was changed while it was read")


def slices(file: File, part_bytes: int) -> list[Slice]:
    """The parts of a file, of at most `part_bytes` bytes of text each as far as it can be divided."""
    kind, compression = format_of(file.path)
    if kind == _LINES and not compression and file.size > part_bytes:
        count = -(-file.size // part_bytes)
        cuts = [file.size * i // count for i in range(count + 1)]
        return [Slice(file, a, b, b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
    if kind == _PARQUET:
        return _parquet_slices(file, part_bytes)
    return [Slice(file, 0, file.size, file.size * (_RATIO if compression else 1))]


# Compression.

_CUT_OFF = (EOFError, gzip.BadGzipFile, zlib.error)


def _opened(path: str, raw: BinaryIO) -> BinaryIO:
    """The content of a file; one of `_CUT_OFF` where it cannot be had."""
    match format_of(path).compression:
        case "gzip":
            return gzip.open(raw)
        case "zstd":
            return io.BufferedReader(_ZstdReader(raw, _zstandard(path)))
    return raw


def _zstandard(path: str):
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            f"{path}: reading .zst needs zstandard, which is not installed: pip install 'twotower_jax[data]'"
        ) from None
    return zstandard


class _ZstdReader(io.RawIOBase):
    """Frames one after the other. The package's own reader takes a file that is cut off for one that ends."""

    def __init__(self, raw: BinaryIO, zstandard):
        self._raw, self._error = raw, zstandard.ZstdError
        # Files made with --long are not refused.
        self._make_frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame, self._input, self._output = None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output:
            self._input = self._input or self._raw.read(1 << 16)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the last frame does not end")
                return 0
            self._frame = self._frame or self._make_frame()
            try:
                self._output = self._frame.decompress(self._input)
            except self._error as error:
                raise EOFError(error) from None
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count


# The kinds.


def _read_whole(piece: Slice) -> tuple[bytes, str | None]:
    """All bytes, or what is wrong."""
    path = piece.file.path
    with open(path, "rb") as raw:
        try:
            return _opened(path, raw).read(), None
        except _CUT_OFF as error:
            return b"", f"{path}: not a whole {format_of(path).compression} file ({error})"


def _read_text(piece: Slice) -> Row:
    path = piece.file.path
    content, problem = _read_whole(piece)
    if problem:
        return Row(None, problem, 1.0)
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        return Row(None, f"{path}: not UTF-8 text ({error})", 1.0)
    if not text.strip():
        return Row(None, f"{path}: the file holds no text; remove it or fill it", 1.0)
    return Row(text, None, 1.0)


def _read_json(piece: Slice, field: Field) -> Iterator[Row]:
    path = piece.file.path
    content, problem = _read_whole(piece)
    if problem:
        yield Row(None, problem, 1.0)
        return
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        if content.lstrip()[:1] == b"[":
            yield Row(None, f"{path}: not a whole JSON array in UTF-8: {error}", 1.0)
            return
        lines = [(number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
        for number, line in lines:
            yield _row(line, field, f"{path}, line {number}", number / lines[-1][0])
        return
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, start=1):
        yield _row(row, field, f"{path}, entry {number}", number / len(rows))


def _row(row: Any, field: Field, where: str, done: float) -> Row:
    """The text of a line, or of a value that was parsed already."""
    try:
        return Row(row_text(row, field) if isinstance(row, bytes) else _object_text(row, field), None, done)
    except ValueError as error:
        return Row(None, f"{where}: {error}", done)


def _read_lines(piece: Slice, field: Field) -> Iterator[Row]:
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
    """The number of the line that begins at byte `at`; counted anew, for few lines are asked for."""
    lines = 1
    with open(path, "rb") as file:
        while at > 0 and (block := file.read(min(at, 1 << 20))):
            lines += block.count(b"\n")
            at -= len(block)
    return lines


def _read_compressed_lines(piece: Slice, field: Field) -> Iterator[Row]:
    path, number = piece.file.path, 0
    with open(path, "rb") as raw:
        file = _opened(path, raw)
        while True:
            try:
                line = file.readline()
            except _CUT_OFF as error:
                kind = format_of(path).compression
                yield Row(None, f"{path}, line {number + 1}: the {kind} file is cut off or broken here ({error})", 1.0)
                return
            if not line:
                return
            number += 1
            if line.strip():
                yield _row(line, field, f"{path}, line {number}", raw.tell() / max(1, piece.file.size))


def _parquet(path: str):
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{path}: reading .parquet needs pyarrow, which is not installed: pip install 'twotower_jax[data]'"
        ) from None
    return pyarrow


def _parquet_slices(file: File, part_bytes: int) -> list[Slice]:
    """Neighboring row groups together as far as they fit; all of the file if it cannot be read, to be reported then."""
    pyarrow = _parquet(file.path)
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
    path = piece.file.path
    pyarrow = _parquet(path)
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
