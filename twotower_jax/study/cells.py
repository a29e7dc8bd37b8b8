"""What a study is: parts of cells, each a backbone, a denoiser trained on it, and the ways in which that is asked.

All of it is data. Cells that need the same training share it: a run is known by what it is trained with.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from twotower_jax.diffusion import SamplingConfig
from twotower_jax.evaluation.points import Point, parse_points
from twotower_jax.generation.settings import Settings
from twotower_jax.train.config import TrainConfig, freeze

AR = "ar"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One setting of a part.

    Attributes:
      name: in tables.
      denoiser, backbone: fields of the config in which its runs differ from the study's, dotted.
      tokens: what the denoiser trains on, as a part of what the backbone has trained on; None as the study says.
      ways: to ask, as `--modes` of launch/evaluate.py spells them. Blocks are as trained where a way says nothing else.
    """

    name: str
    denoiser: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    backbone: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokens: float | None = None
    ways: tuple[str, ...] = (AR, "diffusion")


class Curve(NamedTuple):
    """Values of `report.METRICS` over one another, cell by cell and way by way; `log` for a logarithmic axis."""

    across: str
    up: str
    log: bool = False


@dataclasses.dataclass(frozen=True)
class Part:
    """Cells that are compared, the first one being what the others differ from.

    Attributes:
      name: for flags and files. title: the question. published: what the paper says to it; "" for nothing.
      metrics: the columns of its table, of `report.METRICS`.
      timed: whether speeds are measured: a question at a time, all ways of a cell in turns.
    """

    name: str
    title: str
    published: str
    cells: tuple[Cell, ...]
    metrics: tuple[str, ...] = ("validation_loss", "accuracy", "words", "retained", "tokens_per_evaluation")
    curves: tuple[Curve, ...] = ()
    timed: bool = False


@dataclasses.dataclass(frozen=True)
class Study:
    """All of it, and what its cells have in common.

    Attributes:
      config: of a backbone's run, on tasks; not changed. denoiser: fields in which all denoisers' runs differ from it.
      tokens: what a denoiser trains on, as a part of what its backbone has trained on.
      questions: of each task, from the test's split, the same for all.
    """

    config: ConfigDict
    parts: tuple[Part, ...]
    denoiser: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tokens: float = 1.0
    questions: int = 40

    @property
    def tasks(self) -> list[str]:
        return self.config.data.removeprefix("tasks:").split(",")

    def tokens_of(self, cell: Cell) -> float:
        """What a cell's denoiser trains on, as a part of what its backbone has trained on."""
        return self.tokens if cell.tokens is None else cell.tokens

    def choose(self, names: list[str]) -> tuple[Part, ...]:
        """The parts of these names, in their order.

        Raises:
          ValueError: for one that there is not.
        """
        known = {part.name: part for part in self.parts}
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"--parts: there is no part {unknown[0]!r}; choose among {', '.join(known)}")
        return tuple(known[name] for name in names)


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """A run of a cell.

    Attributes:
      changes: fields of the study's config, dotted. start: the run whose checkpoint it begins with.
    """

    changes: Mapping[str, Any]
    start: "TrainingRun | None" = None

    @property
    def key(self) -> str:
        """A name that runs have in common that are trained alike."""
        said = json.dumps([self.changes, self.start and self.start.key], sort_keys=True)
        return f"{self.changes['objective']}-{hashlib.sha256(said.encode()).hexdigest()[:12]}"

    def config(self, study: Study, workdir: pathlib.Path) -> TrainConfig:
        """Its settings, in a study's workdir.

        Raises:
          ValueError: for changes that no run can have.
        """
        config = study.config.copy_and_resolve_references()
        config.update_from_flattened_dict(dict(self.changes))
        config.init_from = "" if self.start is None else str(workdir / self.start.key)
        return freeze(config)


def runs_of(study: Study, cell: Cell, seed: int) -> tuple[TrainingRun, TrainingRun]:
    """The backbone's run of a cell, and the denoiser's."""
    own = {"objective": "autoregressive", "seed": seed, **cell.backbone}
    backbone = TrainingRun(own)
    steps = max(1, round(study.tokens_of(cell) * cell.backbone.get("steps", study.config.steps)))
    changes = {"objective": "denoiser", "seed": seed, "steps": steps, **study.denoiser, **cell.denoiser}
    return backbone, TrainingRun(changes, backbone)


def points_of(cell: Cell, block_size: int, max_new_tokens: int, batch_size: int) -> list[Point]:
    """The ways of a cell, as they are asked of a denoiser that was trained with blocks of this size."""
    base = Settings(
        max_new_tokens=max_new_tokens, sampling=SamplingConfig(block_size, block_size), batch_size=batch_size
    )
    return parse_points(cell.ways, base)
