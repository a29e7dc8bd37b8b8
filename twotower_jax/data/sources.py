"""Documents: lists of strings, from Python's own documentation or from files."""

import ast
import json
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

# Below this many characters a page is a stub ("Internal module.") that teaches nothing.
_MIN_PAGE_CHARACTERS = 200

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})

_SUFFIXES = (".txt", ".jsonl")


def python_documentation() -> list[str]:
    """Returns the documentation shipped with the running Python, one document per language topic and per module.

    The topics are those of `help()`; a module's page is its docstrings, each under the name and signature of what it
    documents. Source files are parsed, never executed. The order is fixed, exact copies and very short pages are left
    out. The text is that of one Python version with one selection of standard modules; packages do not enter it.
    """
    pages = [topics[name] for name in sorted(topics)]
    pages += _module_pages(Path(sysconfig.get_path("stdlib")))
    # A docstring may spell a lone surrogate ("\ud800"), which no tokenizer can encode.
    pages = [page.encode("utf-8", "replace").decode("utf-8") for page in pages]
    return _distinct(page for page in pages if len(page) >= _MIN_PAGE_CHARACTERS)


def read_documents(path: str | Path) -> list[str]:
    """Reads the documents of a file, or of every .txt and .jsonl file below a folder in sorted order.

    A .txt file is one document. A .jsonl file holds one a line, in the field "text" of a JSON object; blank lines are
    ignored. Both are UTF-8. Exact copies are left out, so that a held-out document has no twin in the training text.

    Raises:
      FileNotFoundError: nothing is at `path`.
      ValueError: `path` has another suffix, a folder holds no such files, or a file or row holds no usable text; the
        message names the file and, for .jsonl, the line.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
        if not files:
            raise ValueError(f"{path}: no .txt or .jsonl files in this folder or below it")
    elif not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; give a .txt file, a .jsonl file or a folder of them")
    elif path.suffix not in _SUFFIXES:
        raise ValueError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; give a .txt or .jsonl file")
    else:
        files = [path]
    return _distinct(
        document for file in files for document in (_read_rows(file) if file.suffix == ".jsonl" else [_read_text(file)])
    )


def _distinct(documents: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(documents))


def _read_text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{file}: the file holds no text; remove it or fill it")
    return text


def _read_rows(file: Path) -> Iterator[str]:
    """Yields the text of each row of a JSON Lines file; ValueError, naming the line, at the first bad one."""
    empty = True
    # Read as bytes: a line ends at "\n" only, while str.splitlines would also cut at U+2028 inside a JSON string.
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                empty = False
                try:
                    yield row_text(line)
                except ValueError as error:
                    raise ValueError(f"{file}, line {number}: {error}") from error
    if empty:
        raise ValueError(f"{file}: the file holds no rows; remove it or fill it")


def row_text(line: bytes, field: str = "text") -> str:
    """Returns the text of a row of JSON Lines; ValueError if it has none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON object in UTF-8: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        raise ValueError(f'every row must be a JSON object with a string field "{field}"')
    text = row[field]
    if not text.strip():
        raise ValueError(f'the field "{field}" holds no text')
    # JSON can spell half of a surrogate pair, which is not text and which the tokenizer would refuse much later.
    text.encode("utf-8")
    return text


def _module_pages(root: Path) -> Iterator[str]:
    for folder, subfolders, names in root.walk():
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        for file in (folder / name for name in sorted(names) if name.endswith(".py")):
            try:
                with warnings.catch_warnings():
                    # Old modules spell invalid escapes; that is not our caller's concern.
                    warnings.simplefilter("ignore", SyntaxWarning)
                    warnings.simplefilter("ignore", DeprecationWarning)
                    tree = ast.parse(file.read_bytes())
            except (SyntaxError, ValueError):  # another Python's syntax, or an encoding that is none
                continue
            parts = file.relative_to(root).with_suffix("").parts
            yield "\n\n".join(_sections(tree, ".".join(part for part in parts if part != "__init__")))


def _sections(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[str]:
    """Yields `name`, signature and docstring of a definition, then those of the definitions in its body."""
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    docstring = ast.get_docstring(node)
    if docstring:
        yield f"{name}({ast.unparse(node.args)})\n\n{docstring}" if is_function else f"{name}\n\n{docstring}"
    if not is_function:  # a function's inner functions are nobody's interface
        for child in _definitions(node):
            yield from _sections(child, f"{name}.{child.name}")


def _definitions(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yields the classes and functions defined by `node`'s statements, also those under `if`, `try` and `with`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.stmt | ast.excepthandler):
            yield from _definitions(child)
