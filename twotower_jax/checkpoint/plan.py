"""Which published tensor becomes which part of which parameter, settled from a configuration alone."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from twotower_jax import parameters
from twotower_jax.choices import TIME_INITS
from twotower_jax.config import ModelConfig
from twotower_jax.parameters import Parameter, Path, parameter_table
from twotower_jax.stack import segments
from twotower_jax.two_tower import Backbone, TwoTower


class Place(NamedTuple):
    """Where a published tensor lies: in which parameter, and where among its stacked tensors."""

    parameter: Parameter
    index: tuple[int, ...]


class ConversionPlan(NamedTuple):
    """What goes where, settled before any data is read.

    Attributes:
      table: of the model in the layout on disk.
      places: of every two-tower tensor, by name.
      targets: by name of a source tensor, the two-tower tensors that it becomes.
      fresh: the parameters that are made here.
    """

    table: dict[Path, Parameter]
    places: dict[str, Place]
    targets: dict[str, tuple[str, ...]]
    fresh: dict[Path, Parameter]


def segment_list(config: ModelConfig) -> list[list]:
    """Unit and repeats of the layers that are stacked on disk, as JSON has them."""
    return [[stretch.unit, stretch.repeats] for stretch in segments(config.hybrid_override_pattern)]


def table_places(table: Mapping[Path, Parameter]) -> dict[str, Place]:
    """Every tensor of a table by its published name."""
    return {
        str(name): Place(parameter, index)
        for parameter in table.values()
        for index, name in np.ndenumerate(parameter.tensors)
    }


def make_plan(config: ModelConfig, single_tower: bool, time_init: str = "identity") -> ConversionPlan:
    """The plan for a model of this configuration.

    Args:
      time_init: "identity" makes the denoiser of a single tower compute what the tower computes; "reference" draws the
        tables as the published code does, from N(0, 1/D).
    """
    if time_init not in TIME_INITS:
        raise ValueError(f"time_init={time_init!r} is not one of {', '.join(TIME_INITS)}")
    table_init = parameters.normal(config.hidden_size**-0.5) if time_init == "reference" else None
    table = parameter_table(TwoTower(config, time_table_init=table_init))
    places = table_places(table)
    if not single_tower:
        return ConversionPlan(table, places, {name: (name,) for name in places}, {})
    targets = {name: _both_towers(name) for name in table_places(parameter_table(Backbone(config)))}
    return ConversionPlan(table, places, targets, parameters.fresh(table))


def _both_towers(name: str) -> tuple[str, str]:
    """The tensors of both towers that start from one of a backbone."""
    if name.startswith("backbone."):
        rest = name.removeprefix("backbone.")
        return f"context_tower.{rest}", f"denoiser_tower.{rest}"
    return f"context_{name}", name
