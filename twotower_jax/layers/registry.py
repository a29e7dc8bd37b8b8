"""The layer kinds by their letter in `hybrid_override_pattern`.

A kind is a class, `mixer.Mixer`, that holds all that is particular to it. `register` adds one, from a config file or a
script too; nothing outside of a kind's own file asks which kind a layer is.
"""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from twotower_jax.registry import Registry

if TYPE_CHECKING:
    from twotower_jax.layers.mixer import Mixer

_KINDS = Registry("layer_kind", object)


def register(letter: str, cls: type["Mixer"]) -> None:
    """Makes `cls` the kind of layers with this letter. A file that is run again replaces its own.

    Raises:
      ValueError: if it is not one letter, or another file has registered it.
    """
    from twotower_jax.layers.mixer import Mixer

    if len(letter) != 1:
        raise ValueError(f"a layer kind is registered by one letter, not {letter!r}")
    if not issubclass(cls, Mixer):
        raise TypeError(f"layer kind {letter!r}: {cls.__name__} is no layers.mixer.Mixer")
    kinds()
    _KINDS.register(letter, cls, file=sys._getframe(1).f_code.co_filename)


def unregister(letter: str) -> None:
    """Forgets the kind of layers with this letter; see `Registry.unregister`."""
    _KINDS.unregister(letter)


def kind(letter: str) -> type["Mixer"]:
    """The class of layers with this letter, which `ModelConfig` has seen to exist."""
    return kinds()[letter]


def kinds() -> Mapping[str, type["Mixer"]]:
    """All kinds by letter."""
    if not _KINDS:
        # The kinds are made of configs, and configs ask here which kinds there are: hence not above.
        from twotower_jax.layers import attention, experts, mamba, mlp

        shipped = {"M": mamba.Mamba, "*": attention.Attention, "E": experts.Experts, "-": mlp.DenseMLP}
        for letter, cls in shipped.items():
            _KINDS.register(letter, cls)
    return _KINDS
