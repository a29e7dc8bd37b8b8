"""One signature, several implementations: which one runs, and why.

A public op takes `implementation`. A name runs that implementation or raises. None chooses: the first one that is made
for the platform and takes the shapes, XLA otherwise. The choice is made while tracing, so that only what was chosen is
compiled.
"""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Choice(NamedTuple):
    """What runs, and why."""

    implementation: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
      module: in this package; imported when first needed, so that nobody pays for another platform's compiler.
      function: its name there; takes the op's arguments.
      platform: on which None may choose it; None if it only runs when named.
      options: further keyword arguments.
      has_limits: whether the module has `unsupported(...)`, with the op's arguments, that says what it cannot take.
    """

    module: str
    function: str
    platform: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    has_limits: bool = False

    def load(self) -> Callable:
        return getattr(importlib.import_module(f"twotower_jax.kernels.{self.module}"), self.function)

    def unsupported(self, *args, **kwargs) -> str | None:
        if not self.has_limits:
            return None
        module = importlib.import_module(f"twotower_jax.kernels.{self.module}")
        return module.unsupported(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Op:
    """A public op. One of its implementations is called "xla": it runs anywhere, with any arguments."""

    name: str
    implementations: dict[str, Implementation]

    def choose(self, *args, implementation: str | None = None, **kwargs) -> Choice:
        """What `run` does with these arguments (arrays, or anything with their shapes and dtypes).

        Raises:
          ValueError: if there is no implementation of that name, or it cannot take the arguments.
        """
        if implementation is not None:
            if implementation not in self.implementations:
                names = ", ".join(self.implementations)
                raise ValueError(f"{self.name} has no implementation {implementation!r}; there are {names}")
            named = self.implementations[implementation]
            problem = named.unsupported(*args, **kwargs) or self._elsewhere(implementation)
            if problem:
                raise ValueError(f"{self.name} cannot run as {implementation!r}: {problem}")
            return Choice(implementation, "named")
        here = platform()
        refused = []
        for name, candidate in self.implementations.items():
            if candidate.platform != here:
                continue
            problem = _divided_by_xla() or candidate.unsupported(*args, **kwargs)
            if problem is None:
                return Choice(name, f"made for {here}")
            refused.append(f"not {name}: {problem}")
        return Choice("xla", "; ".join(refused) or f"nothing is made for {here}")

    def _elsewhere(self, name: str) -> str | None:
        """Why a kernel that only an interpreter could run here cannot run, or None."""
        made_for, interpreted = self.implementations[name].platform, f"{name}_interpret"
        if made_for in (None, platform()) or interpreted not in self.implementations:
            return None
        return f"made for {made_for}, and this is {platform()} ({interpreted!r} runs anywhere, slowly)"

    def run(self, implementation: str | None, *args, **kwargs):
        """Runs the op.

        Raises:
          ValueError: as `choose`.
        """
        chosen = self.implementations[self.choose(*args, implementation=implementation, **kwargs).implementation]
        return chosen.load()(*args, **kwargs, **dict(chosen.options))


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
