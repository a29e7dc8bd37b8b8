"""Things chosen by name, the shipped ones and a user's own, and the files that a user's own come from.

    WEIGHTS.register("sqrt", SqrtWeight())        # in a config file or a script: an object
    @STRATEGIES.register("margin")                # or above a class
    class Margin(Strategy): ...
    layers.registry.register("R", Recurrence)     # a kind of layer, by its letter in the pattern

What is registered outside this package is part of a run's identity (`registered`), since its source decides what the
name does.
"""

import hashlib
import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

_PACKAGE = pathlib.Path(__file__).parent.resolve()
_ALL: list["Registry"] = []


class Registry(Mapping[str, Any]):
    """Names to things of one kind, in the order of registration.

    Args:
      kind: what is registered, as messages and config.json call it.
      base: of which every registered object must be an instance or, for a class, a subclass.
    """

    def __init__(self, kind: str, base: type):
        self._kind, self._base = kind, base
        self._things: dict[str, Any] = {}
        self._files: dict[str, tuple[pathlib.Path, ...]] = {}
        _ALL.append(self)

    def register(self, name: str, thing: Any = None, *, file: str | None = None) -> Any:
        """Registers a thing, or what stands below as a decorator. A file that is run again replaces its own.

        `file` is the one that registers it, by default the caller's.

        Raises:
          ValueError: for a name that another file, or this package, has registered; TypeError for a thing of another
            kind.
        """
        caller = pathlib.Path(file or sys._getframe(1).f_code.co_filename).resolve()

        def add(thing: Any) -> Any:
            if not (issubclass(thing, self._base) if isinstance(thing, type) else isinstance(thing, self._base)):
                raise TypeError(f"{self._kind} {name!r}: {thing!r} is no {self._base.__name__}")
            files = (caller, *_own_file(thing, caller))
            if name in self._files and self._files[name][0] != caller:
                raise ValueError(f"{self._kind} {name!r} is registered already, by {self._files[name][0]}")
            self._things[name], self._files[name] = thing, files
            return thing

        return add if thing is None else add(thing)

    def unregister(self, name: str) -> None:
        """Forgets a thing: for tests, and for sessions that try several."""
        del self._things[name], self._files[name]

    def __getitem__(self, name: str) -> Any:
        """Raises ValueError for a name that is not registered, with those that are."""
        if name not in self._things:
            raise ValueError(f"{self._kind}={name!r} is unknown: choose one of {', '.join(self._things)}")
        return self._things[name]

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __len__(self) -> int:
        return len(self._things)

    def sources(self) -> dict[str, str]:
        """For each name that was registered outside this package, its files and the SHA-256 of each."""
        return {
            name: ", ".join(f"{file.name} sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files)
            for name, files in self._files.items()
            if not _is_shipped(files[0])
        }


def registered() -> dict[str, dict[str, str]]:
    """All that was registered outside this package: kind → name → files with their hashes."""
    return {registry._kind: found for registry in _ALL if (found := registry.sources())}


def run_file(path: str | pathlib.Path) -> None:
    """Runs a user's file, for what it registers.

    Raises:
      ValueError: in one line, if it cannot be read or raises an error.
    """
    path = pathlib.Path(path).resolve()
    if not path.is_file():
        raise ValueError(f"--register={path}: there is no such file")
    name = f"registered_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise ValueError(f"--register={path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Where dataclasses look for the types of their fields.
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # noqa: BLE001 (the user's own code may raise anything)
        del sys.modules[name]
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error


def _own_file(thing: Any, caller: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """The file of a thing's class, where it is neither the registering file nor this package's."""
    try:
        file = pathlib.Path(inspect.getfile(thing if isinstance(thing, type) else type(thing))).resolve()
    except (TypeError, OSError):
        return ()
    return () if file == caller or _is_shipped(file) or not file.is_file() else (file,)


def _is_shipped(file: pathlib.Path) -> bool:
    """Whether a file is this package's. Configs are not, where installed with it: a user may edit them."""
    return file.is_relative_to(_PACKAGE) and not file.is_relative_to(_PACKAGE / "configs")
