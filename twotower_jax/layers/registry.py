"""The layer kinds by their letter in `hybrid_override_pattern`.

A kind is a class, `mixer.Mixer`, that holds all that is particular to it. `register` adds one, from a config file or a
script too; nothing outside of a kind's own file asks which kind a layer is.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twotower_jax.layers.mixer import Mixer

_KINDS: dict[str, type["Mixer"]] = {}


def register(letter: str, cls: type["Mixer"]) -> None:
    """Makes `cls` the kind of layers with this letter.

    Raises:
      ValueError: if it is not one letter, or another class has it.
    """
    if len(letter) != 1:
        raise ValueError(f"a layer kind is registered by one letter, not {letter!r}")
    if kinds().get(letter, cls) is not cls:
        raise ValueError(f"layer kind {letter!r} is {_KINDS[letter].__name__} already; register another letter")
    _KINDS[letter] = cls


def kind(letter: str) -> type["Mixer"]:
    """The class of layers with this letter, which `ModelConfig` has seen to exist."""
    return kinds()[letter]


def kinds() -> dict[str, type["Mixer"]]:
    """All kinds by letter."""
    if not _KINDS:
        # The kinds are made of configs, and configs ask here which kinds there are: hence not above.
        from twotower_jax.layers import attention, experts, mamba, mlp

        _KINDS.update({"M": mamba.Mamba, "*": attention.Attention, "E": experts.Experts, "-": mlp.DenseMLP})
    return _KINDS
