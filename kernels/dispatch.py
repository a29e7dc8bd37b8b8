"""One signature, several implementations: which one runs, and why.

A public op takes `implementation`. A name runs that implementation or raises. None chooses: the first one that is made
for the platform and takes the shapes, XLA otherwise. The choice is made while tracing, so that only what was chosen is
compiled.

A new implementation is a file in the op's folder, with a function of the op's name and arguments, and its line in the
op's description (the folder's `__init__.py`).
"""

import dataclasses
import importlib
import types
from collections.abc import Callable
from typing import NamedTuple

import jax


class Choice(NamedTuple):
    """What runs, and why."""

    implementation: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
      name: what `implementation` of the op takes.
      module: that has the function: ".file" in the op's folder, or absolute. Imported when first needed, so that nobody
        pays for another platform's compiler.
      platform: on which None may choose it; None if it only runs when named. The module of one that is made for a
        platform has `unsupported(...)` too, with the op's arguments: what the hardware cannot take, or None.
      interpreted: whether it also runs on any platform, slowly, as `NAME_interpret`: its function takes `interpret`.
    """

    name: str
    module: str
    platform: str | None = None
    interpreted: bool = False


class Op:
    """A public op. One of its implementations is called "xla": it runs anywhere, with any arguments.

    Attributes:
      name: of the op, and of the function that computes it in the modules of its implementations.
      setting: the field of `Backends` that names its implementation; several ops may share one.
      implementations: by name, in the order in which they are tried.
    """

    def __init__(self, name: str, folder: str, *implementations: Implementation, setting: str | None = None):
        """`folder`: the package that relative modules lie in."""
        self._own: dict[str, Callable] = {}
        self.name, self.folder, self.setting = name, folder, setting or name
        self.implementations: dict[str, Implementation] = {}
        for one in implementations:
            self.implementations[one.name] = one
            if one.interpreted:
                interpreter = dataclasses.replace(one, name=f"{one.name}{_INTERPRETER}", platform=None)
                self.implementations[interpreter.name] = interpreter

    def register(self, name: str, function: Callable) -> None:
        """Adds an implementation from outside this package: it runs when named, on any platform.

        Args:
          function: with the arguments of the op's other implementations.

        Raises:
          ValueError: for a name that the op has.
        """
        if name in self.implementations and name not in self._own:
            raise ValueError(f"{self.name} has an implementation {name!r} already")
        self.implementations[name] = Implementation(name, function.__module__)
        self._own[name] = function

    def registered(self, implementation: str | None) -> Callable | None:
        """The function that a user's file has registered under a name; None for this package's own."""
        return self._own.get(implementation)

    def load(self, implementation: str) -> Callable:
        """The function of an implementation, imported."""
        if implementation in self._own:
            return self._own[implementation]
        return getattr(self._module(implementation), self.name)

    def choose(self, *args, implementation: str | None = None, **kwargs) -> Choice:
        """What `run` does with these arguments (arrays, or anything with their shapes and dtypes).

        Raises:
          ValueError: if there is no implementation of that name, or it cannot take the arguments.
        """
        if implementation is not None:
            if implementation not in self.implementations:
                names = ", ".join(self.implementations)
                raise ValueError(f"{self.name} has no implementation {implementation!r}; there are {names}")
            problem = self._unsupported(implementation, *args, **kwargs) or self._elsewhere(implementation)
            if problem:
                raise ValueError(f"{self.name} cannot run as {implementation!r}: {problem}")
            return Choice(implementation, "named")
        here = platform()
        refused = []
        for name, candidate in self.implementations.items():
            if candidate.platform != here:
                continue
            problem = _divided_by_xla() or self._unsupported(name, *args, **kwargs)
            if problem is None:
                return Choice(name, f"made for {here}")
            refused.append(f"not {name}: {problem}")
        return Choice("xla", "; ".join(refused) or f"nothing is made for {here}")

    def run(self, implementation: str | None, *args, **kwargs):
        """Runs the op.

        Raises:
          ValueError: as `choose`.
        """
        name = self.choose(*args, implementation=implementation, **kwargs).implementation
        interpret = {"interpret": True} if name.endswith(_INTERPRETER) else {}
        return self.load(name)(*args, **kwargs, **interpret)

    def _module(self, implementation: str) -> types.ModuleType:
        return importlib.import_module(self.implementations[implementation].module, self.folder)

    def _unsupported(self, name: str, *args, **kwargs) -> str | None:
        """Why an implementation cannot take the arguments, or None."""
        if self.implementations[name].platform is None:
            return None
        return self._module(name).unsupported(*args, **kwargs)

    def _elsewhere(self, name: str) -> str | None:
        """Why a kernel that only an interpreter could run here cannot run, or None."""
        one = self.implementations[name]
        if one.platform in (None, platform()) or not one.interpreted:
            return None
        interpreted = f"{name}{_INTERPRETER}"
        return f"made for {one.platform}, and this is {platform()} ({interpreted!r} runs anywhere, slowly)"


_INTERPRETER = "_interpret"  # At the end of an implementation's name.


def platform() -> str:
    """What is compiled for: that of the mesh in use (which may be of devices that are not there), else the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _divided_by_xla() -> str | None:
    """Why a hand-written kernel cannot stand here, or None: XLA divides arrays over devices, but not such kernels."""
    mesh = jax.sharding.get_abstract_mesh()
    if jax.device_count() == 1 if mesh.empty else (mesh.size == 1 or mesh.are_all_axes_manual):
        return None
    return "several devices outside of shard_map"
