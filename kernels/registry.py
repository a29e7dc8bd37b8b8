"""Every op, by name, and what a config says of them. What implementations an op has, its folder says.

A new op is a folder, and its place in `OPS`.
"""

import dataclasses

from twotower_jax.kernels.attention import ATTENTION
from twotower_jax.kernels.block_scan import BLOCK_SCAN
from twotower_jax.kernels.causal_conv import BLOCK_CAUSAL_CONV, CAUSAL_CONV
from twotower_jax.kernels.dispatch import Choice
from twotower_jax.kernels.experts import EXPERT_MLP
from twotower_jax.kernels.ssd import SSD, TWO_TOWER_SSD

OPS = {op.name: op for op in (SSD, TWO_TOWER_SSD, BLOCK_SCAN, CAUSAL_CONV, BLOCK_CAUSAL_CONV, ATTENTION, EXPERT_MLP)}


def implementations(op: str) -> tuple[str, ...]:
    """The names that `implementation` of an op takes; empty for an op that has only one form and no such argument."""
    return tuple(OPS[op].implementations) if op in OPS else ()


def platform_of(op: str, implementation: str) -> str | None:
    """The platform that an implementation is made for, on which None may choose it; None if it is for no one."""
    return OPS[op].implementations[implementation].platform


def chosen(op: str, *args, implementation: str | None = None, **kwargs) -> Choice:
    """Which implementation a call of an op runs, and why.

    Args:
      op: its name, a key of `OPS`.
      args, kwargs: of the call; arrays or `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: as the call would: no such implementation, or one that cannot take these shapes.
    """
    return OPS[op].choose(*args, implementation=implementation, **kwargs)


class _Named:
    """What `Backends` does with its fields."""

    def __post_init__(self):
        for op in OPS.values():
            name = getattr(self, op.setting)
            if name is not None and name not in op.implementations:
                known = ", ".join(op.implementations)
                raise ValueError(f"kernels: {op.name} has no implementation {name!r}; there are {known}")

    @classmethod
    def parse(cls, pairs: list[str]) -> "Backends":
        """From the words of a flag, such as ["ssd=xla", "attention=reference"].

        Raises:
          ValueError: for a word that is not of this form, an unknown op or an unknown name.
        """
        names = {}
        for pair in pairs:
            op, _, name = pair.partition("=")
            if not name:
                raise ValueError(f"kernels: {pair!r} is not of the form OP=IMPLEMENTATION")
            names[op] = name
        if unknown := sorted(set(names) - set(_SETTINGS)):
            raise ValueError(f"kernels: there is no op {unknown[0]!r}; there are {', '.join(_SETTINGS)}")
        return cls(**names)


_SETTINGS = tuple(dict.fromkeys(op.setting for op in OPS.values()))
# One value, handed down to whatever calls ops: a frozen dataclass with a field for each op (`causal_conv` is for
# `block_causal_conv` too), the name of an implementation, or None to let the op choose by platform and shapes. Raises
# ValueError at construction for a name that an op does not have.
Backends = dataclasses.make_dataclass(
    "Backends",
    [(setting, str | None, None) for setting in _SETTINGS],
    bases=(_Named,),
    frozen=True,
    module=__name__,
)
