"""Several sources mixed by weight: which source gives which row, and the file that lists them."""

import json
import os
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from twotower_jax.data.mixture_schedule import Course, Run, Schedule, read_course
from twotower_jax.data.windows import Unloaded
from twotower_jax.paths import AnyPath, as_path, is_address, local_path

_EXAMPLE = '{"books": {"path": "books", "weight": 0.7}, "code": {"path": "/data/code", "weight": 0.3}}'


class Mixture(Unloaded):
    """Windows of several sources, each with a share of the rows.

    Which source gives row number r of all rows ever drawn, and as its how-many-eth, is a function of r and the weights
    alone. After any number of rows n, a source of share w has given n w of them, give or take less than the number of
    sources. Where shares change over the run, that is n times their mean over these rows; see mixture_schedule.py.

    Attributes:
      sources: windows by name, in the order of the names.
      shares: of each source, exact, together 1; None where they change.
      batch_size: rows in a step, where shares change by steps; None where they stay.
      sequence_length: tokens in a window, L.
      tokens: in all windows of all sources.
    """

    def __init__(self, sources: Mapping[str, Any], weights: Mapping[str, Fraction | Course], run: Run | None = None):
        """Mixes windows.

        Args:
          sources: windows, at least one, of one sequence length.
          weights: of the same names, positive, of any sum; or how they change.
          run: how long the run is; needed where one changes.

        Raises:
          ValueError: the weights cannot be.
        """
        self.sources = dict(sorted(sources.items()))
        self.sequence_length = next(iter(self.sources.values())).sequence_length
        self.tokens = sum(source.tokens for source in self.sources.values())
        self._schedule = schedule_of({name: weights[name] for name in self.sources}, run)
        self.shares, self.batch_size = None, None
        if self._schedule is not None:
            self.batch_size = self._schedule.batch_size
            return
        total = sum(weights.values())
        self.shares = {name: Fraction(weights[name]) / total for name in self.sources}
        left, self._chain = Fraction(1), []
        for share in self.shares.values():  # of each source, its part of what the sources before it leave
            self._chain.append((share / left).as_integer_ratio())
            left -= share

    def locate(self, row: int) -> tuple[int, int]:
        """The number of the source that gives a row, and how many rows it has given before.

        The first source takes a row whenever its share of the rows so far passes a whole number; the rows that it
        leaves are divided among the others in the same way.
        """
        if self._schedule is not None:
            return self._schedule.locate(row)
        for number, (part, whole) in enumerate(self._chain):
            before = row * part // whole
            if (row + 1) * part // whole > before:
                return number, before
            row -= before
        raise AssertionError("the last source takes every row that comes to it")

    def identity(self) -> dict[str, Any]:
        """JSON-able values that are equal for equal mixtures, and in practice for no others."""
        values = {"sequence_length": self.sequence_length}
        if self._schedule is None:
            values |= {f"{name}.share": str(share) for name, share in self.shares.items()}
        else:
            told = zip(self.sources, self._schedule.identity(), strict=True)
            values |= {f"{name}.shares": shares for name, shares in told}
        for name, source in self.sources.items():
            own = source.identity().items()
            values |= {f"{name}.{field}": value for field, value in own if field != "sequence_length"}
        return values


def schedule_of(weights: Mapping[str, Fraction | Course], run: Run | None) -> Schedule | None:
    """How shares change; None if they do not.

    Raises:
      ValueError: they cannot change so, or it is not known how long the run is.
    """
    if not any(isinstance(weight, tuple) for weight in weights.values()):
        return None
    if run is None:
        raise ValueError("its weights change over a run, and this is none")
    return Schedule(dict(sorted(weights.items())), run)


class Entry(NamedTuple):
    """One source of a mixture file; its weight, or how that changes."""

    path: str
    weight: Fraction | Course


def read_mixture(path: str | Path) -> dict[str, Entry]:
    """Reads a mixture file: a JSON object of names, each with a path and a positive weight, or with weights by the
    place in the run from which they hold.

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
        if isinstance(weight, dict):
            try:
                entries[name] = Entry(_path(path, value["path"]), read_course(weight))
            except ValueError as error:
                fail(f"{name!r}: {error}")
            continue
        if isinstance(weight, bool) or not isinstance(weight, int | Fraction) or weight <= 0:
            fail(f"{name!r} has weight {weight!r}, which is not a positive number")
        entries[name] = Entry(_path(path, value["path"]), Fraction(weight))
    return entries


def _path(file: AnyPath, given: str) -> str:
    """A path as a file means it: from its own folder on."""
    path = local_path(given)
    return path if is_address(path) or os.path.isabs(path) else str(file.parent / path)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return values
