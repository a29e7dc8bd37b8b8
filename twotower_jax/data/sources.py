"""Documents from Python's own documentation."""

import ast
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

# Below this many characters a page is a stub ("Internal module.") that teaches nothing.
_MIN_PAGE_CHARACTERS = 200

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


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


def _distinct(documents: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(documents))


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
