"""Runs a notebook's cells without Jupyter.

    python tests/support/notebooks.py docs/tour.ipynb

writes into the notebook what its cells print and show.
"""

import ast
import contextlib
import io
import json
import pathlib
import sys
from typing import Any


def outputs(notebook: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """What each code cell prints and shows, as a notebook holds it; all cells share one namespace."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    return [
        _run("".join(cell["source"]), namespace, number)
        for number, cell in enumerate(notebook["cells"])
        if cell["cell_type"] == "code"
    ]


def _run(source: str, namespace: dict[str, Any], number: int) -> list[dict[str, Any]]:
    tree, printed, shown = ast.parse(source), io.StringIO(), None
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    name = f"cell {number}"
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), namespace)
        if last is not None:
            shown = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    found = []
    if printed.getvalue():
        found.append({"name": "stdout", "output_type": "stream", "text": _lines(printed.getvalue())})
    if shown is not None:
        data = {"text/plain": ["<picture>"], "image/svg+xml": _lines(shown._repr_svg_())}
        found.append({"data": data, "metadata": {}, "output_type": "display_data"})
    return found


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main(path: pathlib.Path) -> None:
    notebook = json.loads(path.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for count, (cell, found) in enumerate(zip(cells, outputs(notebook), strict=True), 1):
        cell["execution_count"], cell["outputs"] = count, found
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
