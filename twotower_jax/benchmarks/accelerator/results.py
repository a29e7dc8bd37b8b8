"""One JSON file with what every unit came to, on every device and under all versions that it was measured with."""

import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterable
from typing import Any

# A unit that failed, hung or ended the process is begun once more by a later call, and then no more.
TRIES = 2


def digest(root: pathlib.Path, names: Iterable[str]) -> str:
    """A hash of all Python files of some folders (or files) under `root`: what was changed is measured again."""
    found = hashlib.sha256()
    for name in names:
        path = root / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:16]


def unit_key(unit: dict[str, Any]) -> str:
    """What a unit is called in the file: part and name."""
    return f"{unit['part']}: {unit['name']}"


class Results:
    """The file, in memory, written whole after each change.

    Layout: {"environments": [{"device": …, "versions": …, …, "units": {"part: name": {"parameters", "sources", "tries",
    "date", "took", and "result" or "error" unless it was begun and never ended}}}]}.
    """

    def __init__(self, path: pathlib.Path):
        """Raises ValueError if there is such a file and it is none of these."""
        self.path = path
        self.everything: dict[str, Any] = {"environments": []}
        if path.exists():
            try:
                self.everything = json.loads(path.read_text(encoding="utf-8"))
                environments = self.everything["environments"]
            except (ValueError, KeyError, TypeError):
                environments = None
            if not isinstance(environments, list):
                raise ValueError(f"{path}: not results of this command; choose another --output or remove it")
        self.units: dict[str, Any] = {}

    def enter(self, environment: dict[str, Any]) -> None:
        """What follows was measured there."""
        environments = self.everything["environments"]
        found = [one for one in environments if {**one, "units": None} == {**environment, "units": None}]
        if found:
            environments.remove(found[0])
        # The newest last.
        environments.append(found[0] if found else environment | {"units": {}})
        self.units = environments[-1]["units"]

    def tries(self, unit: dict[str, Any]) -> int | None:
        """How often a unit was begun in vain; None if there is nothing left to do: it is done, or was begun twice."""
        known = self._known(unit)
        if known is None:
            return 0
        return None if "result" in known or known["tries"] >= TRIES else known["tries"]

    def begin(self, unit: dict[str, Any]) -> None:
        """Noted before the work, in case nothing is left to note it after."""
        known = self._known(unit)
        record = {name: unit[name] for name in ("part", "name", "parameters", "sources")}
        self.units[unit_key(unit)] = record | {"tries": 1 + (known["tries"] if known else 0), "date": _now()}
        self._write()

    def end(self, unit: dict[str, Any], took: float, **outcome: Any) -> None:
        """`outcome`: result or error."""
        self.units[unit_key(unit)] |= {"took": round(took, 2), **outcome}
        self._write()

    def take_back(self, unit: dict[str, Any]) -> None:
        """What was begun and interrupted from outside does not count."""
        record = self.units[unit_key(unit)]
        record["tries"] -= 1
        if not record["tries"]:
            del self.units[unit_key(unit)]
        self._write()

    def _known(self, unit: dict[str, Any]) -> dict[str, Any] | None:
        known = self.units.get(unit_key(unit))
        same = known and all(known[name] == unit[name] for name in ("parameters", "sources"))
        return known if same else None

    def _write(self) -> None:
        partial = self.path.with_name(f".{self.path.name}.partial")
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(self.everything, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M")
