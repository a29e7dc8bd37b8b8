"""Reading a column of texts from Parquet, row group by row group."""

from collections.abc import Iterator
from typing import BinaryIO

from twotower_jax.data.places import open_file
from twotower_jax.data.rows import File, Row, Slice

# Rows that are decoded at a time.
_BATCH_ROWS = 256


def pyarrow(where: str):
    """The package; ValueError if it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"{where}: reading .parquet needs pyarrow, which is not installed: pip install 'twotower_jax[data]'"
        ) from None
    return pyarrow


def parquet_slices(file: File, part_bytes: int) -> list[Slice]:
    """Neighboring row groups together as far as they fit; all of the file if it cannot be read, to be reported then."""
    arrow = pyarrow(file.path)
    try:
        with open_file(file.path) as raw:
            metadata = arrow.parquet.read_metadata(raw)
    except (arrow.ArrowException, OSError):
        return [Slice(file, 0, 0, file.size)]
    pieces: list[Slice] = []
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).total_byte_size
        if pieces and pieces[-1].weight + size <= part_bytes:
            pieces[-1] = pieces[-1]._replace(stop=group + 1, weight=pieces[-1].weight + size)
        else:
            pieces.append(Slice(file, group, group + 1, size))
    return pieces


def read_parquet(source: BinaryIO, where: str, groups: range | None, field: str) -> Iterator[Row]:
    """The documents of some row groups, or of all with None; what is broken ends with a problem.

    Args:
      source: a file that can be sought in.
      where: its name, for messages.

    Raises:
      ValueError: pyarrow is not installed.
    """
    arrow = pyarrow(where)
    number = 0
    try:
        with arrow.parquet.ParquetFile(source) as file:
            problem = _column_problem(arrow, file.schema_arrow, field)
            if problem:
                yield Row(None, f"{where}: {problem}", 1.0)
                return
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            groups = range(len(sizes)) if groups is None else groups
            number = sum(sizes[: groups.start])
            first, rows = number, max(1, sum(sizes[groups.start : groups.stop]))
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=[field]):
                for value in batch.column(0):
                    number += 1
                    done = (number - first) / rows
                    try:
                        yield Row(_value_text(value, field), None, done)
                    except ValueError as error:
                        yield Row(None, f"{where}, row {number}: {error}", done)
    except (arrow.ArrowException, OSError) as error:
        yield Row(None, f"{where}, row {number + 1}: the Parquet file is broken here ({error})", 1.0)


def _column_problem(arrow, schema, field: str) -> str | None:
    if field not in schema.names:
        return f"no column {field!r} among {', '.join(schema.names)}"
    kind = schema.field(field).type
    if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
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
