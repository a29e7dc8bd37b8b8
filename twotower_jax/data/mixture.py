"""Several sources mixed by weight: which source gives which row, and the file that lists them."""

import json
import os
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from twotower_jax.data.windows import Unloaded
from twotower_jax.paths import AnyPath, as_path, is_address, local_path

_EXAMPLE = '{"books": {"path": "books", "weight": 0.7}, "code": {"path": "/data/code", "weight": 0.3}}'


class Mixture(Unloaded):
    """Windows of several sources, each with a share of the rows.

    Which source gives row number r of all rows ever drawn, and as its how-many-eth, is a function of r and the weights
    alone. After any number of rows n, a source of share w has given n w of them, give or take less than the number of
    sources.

    Attributes:
      sources: windows by name, in the order of the names.
      shares: of each source, exact, together 1.
      sequence_length: tokens in a window, L.
      tokens: in all windows of all sources.
    """

    def __init__(self, sources: Mapping[str, Any], weights: Mapping[str, Fraction]):
        """`sources`: windows, at least one, of one sequence length; `weights`: of the same names, positive, any sum."""
        self.sources = dict(sorted(sources.items()))
        total = sum(weights.values())
        self.shares = {name: Fraction(weights[name]) / total for name in self.sources}
        self.sequence_length = next(iter(self.sources.values())).sequence_length
        self.tokens = sum(source.tokens for source in self.sources.values())
        left, self._chain = Fraction(1), []
        for share in self.shares.values():  # of each source, its part of what the sources before it leave
            self._chain.append((share / left).as_integer_ratio())
            left -= share

    def locate(self, row: int) -> tuple[int, int]:
        """The number of the source that gives a row, and how many rows it has given before.

        The first source takes a row whenever its share of the rows so far passes a whole number; the rows that it
        leaves are divided among the others in the same way.
        """
        for number, (part, whole) in enumerate(self._chain):
            before = row * part // whole
            if (row + 1) * part // whole > before:
                return number, before
            row -= before
        raise AssertionError("the last source takes every row that comes to it")

    def identity(self) -> dict[str, Any]:
        """JSON-able values that are equal for equal mixtures, and in practice for no others."""
        values = {"sequence_length": self.sequence_length}
        for name, source in self.sources.items():
            values[f"{name}.share"] = str(self.shares[name])
            own = source.identity().items()
            values |= {f"{name}.{field}": value for field, value in own if field != "sequence_length"}
        return values


class Entry(NamedTuple):
    """One source of a mixture file."""

    path: str
    weight: Fraction


def read_mixture(path: str | Path) -> dict[str, Entry]:
    """Reads a mixture file: a JSON object of names, each with a path and a positive weight.

    A path that is not absolute starts at the file's folder. Weights are taken as the decimal numbers they are written
    as, and need not sum to 1.

    Raises:
      ValueError: it is not such a file; the message names the entry.
      OSError: it cannot be read.
    """
    path = as_path(path)

    def fail(what: str):
        raise ValueError(f"{path}: {what}; a mixture looks like {_EXAMPLE}")

    try:
        # Not one name twice: JSON would let the last win.
        raw = json.loads(path.read_text(encoding="utf-8"), parse_float=Fraction, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        fail(f"not valid JSON ({error})")
    if not isinstance(raw, dict) or not raw:
        fail("not an object of sources")
    entries = {}
    for name, value in raw.items():
        if not isinstance(value, dict) or value.keys() != {"path", "weight"} or not isinstance(value["path"], str):
            fail(f"{name!r} does not have just a path and a weight")
        weight = value["weight"]
        if isinstance(weight, bool) or not isinstance(weight, int | Fraction) or weight <= 0:
            fail(f"{name!r} has weight {weight!r}, which is not a positive number")
        entries[name] = Entry(_beside(path.parent, local_path(value["path"])), Fraction(weight))
    return entries


def _beside(folder: AnyPath, path: str) -> str:
    """A path as a file of the folder means it."""
    return path if is_address(path) or os.path.isabs(path) else str(folder / path)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return values
