"""Operating points: the ways to generate that are compared, as `--modes` spells them.

    ar,diffusion,diffusion:confidence_threshold=0.9,diffusion:strategy=factor:factor=1.5,speculative

Each is a mode and, after colons, settings that differ from those of the flags; what is no setting is a knob of the
strategy.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from twotower_jax.diffusion import SamplingConfig
from twotower_jax.diffusion.strategies import knobs
from twotower_jax.generation.settings import MODES, Settings, has_blocks

_SAMPLING = {
    "block_size": int,
    "steps_per_block": int,
    "strategy": str,
    "confidence_threshold": float,
    "schedule": str,
    "temperature": float,
    "top_k": int,
    "top_p": float,
}
_SETTINGS = {"seed": int, "tolerance": float}


class Point(NamedTuple):
    """A way to generate.

    Attributes:
      name: as the user spelled it.
      settings: all of them.
      given: those that the name says, for a server that has its own for the others.
    """

    name: str
    settings: Settings
    given: Mapping[str, Any]

    @property
    def mode(self) -> str:
        return self.settings.mode


def parse_points(texts: Sequence[str], base: Settings) -> list[Point]:
    """The points of `--modes`, each with the settings of `base` where it says nothing else.

    Raises:
      ValueError: naming the text, for a mode that there is not, a setting that is none or cannot be used, or a point
        that is given twice.
    """
    if not texts:
        raise ValueError(f"--modes is empty; name a mode, several with commas: {', '.join(MODES)}")
    points = []
    for text in texts:
        mode, *words = text.strip().split(":")
        if mode not in MODES:
            raise ValueError(f"--modes: {text!r}: there is no mode {mode!r}; the modes are {', '.join(MODES)}")
        values = {}
        for word in words:
            name, given, value = word.partition("=")
            if not given or not name or name in values:
                raise ValueError(f"--modes: {text!r}: expected MODE:SETTING=VALUE:…, each setting once")
            values[name] = value
        try:
            settings = with_values(base, mode, values)
        except ValueError as error:
            raise ValueError(f"--modes: {text!r}: {error}") from None
        points.append(Point(text.strip(), settings, _given(settings, values)))
    names = [point.name for point in points]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"--modes: {twice!r} is given twice")
    if not points:
        raise ValueError("--modes: give at least one mode")
    return points


def with_values(base: Settings, mode: str, values: Mapping[str, Any]) -> Settings:
    """`base` in another mode and with other settings, which may be texts.

    Raises:
      ValueError: for one that the mode or the strategy does not have, or that is out of range.
    """
    values = dict(values)
    others = {name: _read(name, values.pop(name), kind) for name, kind in _SETTINGS.items() if name in values}
    named = {name: _read(name, values.pop(name), kind) for name, kind in _SAMPLING.items() if name in values}
    if values and not has_blocks(mode):
        raise ValueError(f"{next(iter(values))}: there is no such setting")
    unused = [name for name in (*named, *values) if name not in ("temperature", "top_k", "top_p")]
    if unused and not has_blocks(mode):
        raise ValueError(f"{unused[0]} changes nothing in mode {mode!r}, token by token")
    old = base.sampling
    kept = {field.name: getattr(old, field.name) for field in dataclasses.fields(SamplingConfig)}
    if named.get("strategy", old.strategy) != old.strategy:
        for name in ("strategy_options", "confidence_threshold", "schedule"):
            del kept[name]
    if "confidence_threshold" not in knobs(named.get("strategy", old.strategy)):
        kept.pop("confidence_threshold", None)
    if "block_size" in named and "steps_per_block" not in named and old.steps_per_block == old.block_size:
        kept["steps_per_block"] = named["block_size"]
    if values:
        kept["strategy_options"] = dict(kept.get("strategy_options", ())) | values
    sampling = SamplingConfig(**kept | named)
    tolerance = others.pop("tolerance", base.tolerance if mode == "speculative" else 0.0)
    return dataclasses.replace(base, mode=mode, sampling=sampling, tolerance=tolerance, **others)


def _given(settings: Settings, values: Mapping[str, str]) -> dict[str, Any]:
    """The settings that were given, as requests of a server have them."""
    found = {name: getattr(settings.sampling, name) for name in values if name in _SAMPLING}
    found |= {name: getattr(settings, name) for name in values if name in _SETTINGS}
    if others := [name for name in values if name not in found]:
        options = dict(settings.sampling.strategy_options)
        found["strategy_options"] = {name: options[name] for name in others}
    return found


def _read(name: str, value: Any, kind: type) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} is no {kind.__name__}") from None
