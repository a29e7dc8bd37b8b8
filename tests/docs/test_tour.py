"""The notebook that tours the library runs, and what stands in it is what it prints."""

import json

import notebooks
import pytest

from helpers import ROOT

NOTEBOOK = json.loads((ROOT / "docs/tour.ipynb").read_text())
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def printed(outputs: list[dict]) -> str:
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def test_it_was_run_in_order():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    assert all(cell["outputs"] for cell in CELLS)


@pytest.mark.whole
def test_its_cells_print_and_show_what_stands_there(monkeypatch):
    monkeypatch.chdir(ROOT)
    for cell, found in zip(CELLS, notebooks.outputs(NOTEBOOK), strict=True):
        assert printed(found) == printed(cell["outputs"])
        assert [output["output_type"] for output in found] == [output["output_type"] for output in cell["outputs"]]
