"""Which files of text an input stands for, and what is in them: the one way for runs and for launch/prepare.py.

The kinds of files are those of formats.py. What a folder holds besides is left out, and said.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from twotower_jax.data.conversations import is_conversation
from twotower_jax.data.formats import KNOWN, check_installed, format_of, read_rows, slices
from twotower_jax.data.places import look, same_file
from twotower_jax.data.rows import Field, File, Row, Slice
from twotower_jax.paths import AnyPath, as_path, in_store

__all__ = [
    "File",
    "Row",
    "Slice",
    "distinct_documents",
    "divide",
    "find_files",
    "holds_conversations",
    "read_documents",
    "read_rows",
    "text_files",
]

_SHOWN = 3

# Objects of a store that are asked about at a time.
_REQUESTS = 16


def read_documents(path: str | Path) -> list[str]:
    """The `distinct_documents` of the `text_files` at a path."""
    return distinct_documents(text_files(path))


def text_files(path: str | Path, report: Callable[[str], None] = lambda line: None) -> list[File]:
    """A file, or every file of a known kind below a folder in sorted order; `report` as for `find_files`.

    Raises:
      FileNotFoundError: nothing is at `path`.
      ValueError: `path` is of another kind, a folder holds no such files, or a package to read them is missing.
    """
    if not as_path(path).exists():
        raise FileNotFoundError(f"{path}: no such file or folder; give a file of text or a folder of them ({KNOWN})")
    return find_files([str(path)], report=report)


def distinct_documents(
    files: Sequence[File], field: Field = "text", report: Callable[[str], None] = lambda line: None
) -> list[str]:
    """All documents of files, `field` saying where rows have their text; `report` as for `find_files`.

    Exact copies are left out, so that a held-out document has no twin in the training text.

    Raises:
      ValueError: a file or row holds no usable text; the message names the file and the line or row.
    """
    left_out: list[str] = []
    texts = list(dict.fromkeys(_texts(files, field, left_out)))
    if left_out:
        report(said_of_members(len(left_out), left_out))
    return texts


def said_of_members(count: int, first: Sequence[str]) -> str:
    """A line about what archives hold that was left out."""
    return f"left out of archives, as no text: {_listed(first, count)}"


def _texts(files: Sequence[File], field: Field, left_out: list[str]) -> Iterator[str]:
    for file in files:
        empty = True
        for piece in slices(file, max(1, file.size)):
            for row in read_rows(piece, field):
                if row.problem:
                    raise ValueError(row.problem)
                if row.left_out:
                    left_out.append(row.left_out)
                    continue
                empty = False
                yield row.text
        if empty:
            raise ValueError(f"{file.path}: the file holds no rows; remove it or fill it")


def find_files(
    inputs: Sequence[str], field: str = "text", report: Callable[[str], None] = lambda line: None
) -> list[File]:
    """The files that the inputs stand for: each a file, a folder (of which all files of a known kind) or a pattern.

    Files come in the order of the inputs, and sorted within each. In a folder, links are followed, hidden files and
    folders left out, and .json files without text as well.

    Args:
      inputs: names.
      field: of rows, where their text stands.
      report: is given a line about what a folder holds that is left out, and why.

    Raises:
      ValueError: an input stands for nothing, a file is of an unknown kind, is named twice, or needs a package that is
        not installed.
      OSError: a store does not answer.
    """
    found: dict[str, AnyPath] = {}
    for name in inputs:
        if not name:
            raise ValueError("an input is empty; give files, folders or patterns")
        path = as_path(name)
        if in_store(path):
            path.check()
        if path.is_dir():
            files, left_out = _files_below(path, field)
            if not files:
                but = f" (left out: {left_out})" if left_out else ""
                raise ValueError(f"{name}: no {KNOWN} files in this folder or below it{but}")
            if left_out:
                report(f"{name}: left out: {left_out}")
        elif path.is_file():
            files = [path]
        elif path.exists():
            raise ValueError(f"{name}: is no regular file, and cannot be read in parts; save what it gives first")
        else:
            files = _matching(path)
            if not files:
                raise ValueError(f"{name}: no such file or folder, and as a pattern it matches no file")
        for file in files:
            if not format_of(file.name):
                kind = file.suffix or "without suffix"
                raise ValueError(f"{file}: cannot read files of this kind ({kind}); known are {KNOWN}")
            if same_file(file) in found:
                raise ValueError(f"{file}: is among the inputs twice")
            found[same_file(file)] = file
    files = _look_at(list(found.values()))
    check_installed(files)
    return files


def _look_at(paths: list[AnyPath]) -> list[File]:
    """What is found at each; at those of a store at several at a time."""
    if not any(map(in_store, paths)):
        return [look(path) for path in paths]
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return list(pool.map(look, paths))


def _matching(pattern: AnyPath) -> list[AnyPath]:
    """The files that fit a pattern, sorted."""
    if not in_store(pattern):
        anchor = Path(pattern.anchor or ".")
        return sorted(file for file in anchor.glob(str(pattern.relative_to(pattern.anchor))) if file.is_file())
    anchor = next((p for p in pattern.parents if not any(c in str(p) for c in "*?[")), None)
    return [] if anchor is None else sorted(file for file in anchor.glob(pattern.relative_to(anchor)) if file.is_file())


def _files_below(folder: AnyPath, field: str) -> tuple[list[AnyPath], str]:
    """The files of a folder to read, each once, sorted; and what is left out, in words."""
    left: dict[str, list[str]] = {}

    def leave_out(why: str, path: AnyPath) -> None:
        left.setdefault(why, []).append(str(path.relative_to(folder)))

    files = []
    for path in sorted((_objects_below if in_store(folder) else _linked_files_below)(folder, leave_out)):
        if format_of(path.name).may_be_something_else and not _holds_text(path, field):
            leave_out(f"JSON without a text in {field!r}", path)
        else:
            files.append(path)
    return files, "; ".join(f"{why}: {_listed(sorted(names))}" for why, names in sorted(left.items()))


def _objects_below(folder: AnyPath, leave_out: Callable[[str, AnyPath], None]) -> Iterator[AnyPath]:
    """The objects of a store that are of a known kind."""
    for name in folder.sizes():
        path = folder / name
        if any(part.startswith(".") for part in name.split("/")):
            leave_out("hidden", path)
        elif not format_of(path.name):
            leave_out("of other kinds", path)
        else:
            yield path


def _linked_files_below(folder: Path, leave_out: Callable[[str, Path], None]) -> list[Path]:
    """The files of a known kind, each once, wherever links lead."""
    found: dict[str, Path] = {}
    # Links come last, so that what is in the folder itself stands where it lies. A folder is entered once, or a link
    # to a folder around it would never end.
    folders, linked_folders, linked_files, entered = [folder], [], [], set()
    while folders or linked_folders:
        current = folders.pop() if folders else linked_folders.pop(0)
        if (real := os.path.realpath(current)) in entered:
            leave_out("linked twice", current)
            continue
        entered.add(real)
        try:
            entries = sorted(current.iterdir())
        except OSError:
            leave_out("not readable", current)
            continue
        for path in entries:
            if path.name.startswith("."):
                leave_out("hidden", path)
            elif path.is_dir():
                (linked_folders if path.is_symlink() else folders).append(path)
            elif not path.is_file():
                leave_out("broken links or no regular files", path)
            elif not format_of(path.name):
                leave_out("of other kinds", path)
            elif path.is_symlink():
                linked_files.append(path)
            elif (real := os.path.realpath(path)) not in found:
                found[real] = path
    for path in linked_files:
        if os.path.realpath(path) in found:
            leave_out("linked twice", path)
        else:
            found[os.path.realpath(path)] = path
    return list(found.values())


def _listed(names: Sequence[str], count: int | None = None) -> str:
    """The number of all, `count` of them where only the first are there, and some of the names."""
    count = len(names) if count is None else count
    return f"{count} ({', '.join(names[:_SHOWN])}{', …' if count > _SHOWN else ''})"


def holds_conversations(files: Sequence[File], field: str = "text") -> bool:
    """Whether the first row of the first file is a conversation: then all are to be. A `field` of one's own is text."""
    return field == "text" and bool(files) and _first_text(files[0], _mark) is not None


def _holds_text(path: AnyPath, field: str) -> bool:
    """Whether the first row has a text, or is a conversation."""
    file = look(path)
    return _first_text(file, field) is not None or holds_conversations([file], field)


def _first_text(file: File, field: Field) -> str | None:
    rows = (row for piece in slices(file, max(1, file.size)) for row in read_rows(piece, field))
    row = next((row for row in rows if not row.left_out), None)
    return None if row is None else row.text


def _mark(row: Any) -> str:
    if not is_conversation(row):
        raise ValueError("no conversation")
    return ""


def divide(files: Sequence[File], part_bytes: int) -> list[list[Slice]]:
    """Parts of at most `part_bytes` bytes of text, as far as files can be divided; the same for the same files."""
    parts: list[list[Slice]] = []
    room = 0
    for piece in (piece for file in files for piece in slices(file, part_bytes)):
        if not parts or piece.weight > room:
            parts.append([])
            room = part_bytes
        parts[-1].append(piece)
        room -= piece.weight
    return parts
