"""What stands in for packages that a machine with jax, flax and numpy alone need not have.

`jaxtyping` says what arrays are, and does nothing; `ml_collections` holds the configs of configs/, of which a
measurement needs no more than fields that can be set.
"""

import importlib
import sys
import types
import typing
from collections.abc import Mapping


def install() -> None:
    """Before anything of the package that computes is imported."""
    for name, stand_in in (("jaxtyping", _jaxtyping), ("ml_collections", _ml_collections)):
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = stand_in()


class _Annotation:
    def __class_getitem__(cls, _):
        return typing.Any


def _jaxtyping() -> types.ModuleType:
    module = types.ModuleType("jaxtyping")
    module.__getattr__ = lambda name: _Annotation
    return module


class ConfigDict(dict):
    """A dictionary whose items are attributes, and whose dictionaries are of its own kind."""

    def __init__(self, values: Mapping = types.MappingProxyType({})):
        super().__init__()
        self.update(values)

    def __setitem__(self, name, value):
        super().__setitem__(name, ConfigDict(value) if isinstance(value, Mapping) else value)

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    __setattr__ = __setitem__

    def update(self, values=(), **named):
        """Item by item, also of dictionaries in dictionaries."""
        for name, value in (dict(values) | named).items():
            if isinstance(value, Mapping) and isinstance(self.get(name), ConfigDict):
                self[name].update(value)
            else:
                self[name] = value

    def to_dict(self) -> dict:
        """All of it as plain dictionaries."""
        return {name: value.to_dict() if isinstance(value, ConfigDict) else value for name, value in self.items()}


def _ml_collections() -> types.ModuleType:
    module = types.ModuleType("ml_collections")
    module.ConfigDict = ConfigDict
    module.config_dict = types.SimpleNamespace(placeholder=lambda kind: None)
    return module
