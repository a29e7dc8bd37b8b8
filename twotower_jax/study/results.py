"""What a study has found, in study.json of its workdir: written anew after each training and each way of asking."""

import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from twotower_jax.config import Variant
from twotower_jax.data.tasks import questions
from twotower_jax.files import read_json
from twotower_jax.outputs import output_file
from twotower_jax.study.cells import AR, Cell, Part, Study, TrainingRun, runs_of

NAME = "study.json"
_VERSION = 1


class Mean(NamedTuple):
    """A mean over so many seeds, and its standard error; None for one seed."""

    value: float
    error: float | None
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Mean | None":
        """None for no value."""
        values = list(values)
        if not values:
            return None
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        return cls(statistics.fmean(values), error, len(values))


@dataclasses.dataclass
class Results:
    """What is known of each run, by its key.

    Attributes:
      runs: of each "changes", "start", "seconds" of training so far, "metrics" when it is trained, and "answers": what
        came of asking it, by way; for ways that are timed under `answer_key`.
      about: when and where it was measured.
    """

    study: Study
    path: pathlib.Path
    runs: dict[str, dict[str, Any]]
    about: dict[str, Any]

    @classmethod
    def read(cls, study: Study, workdir: pathlib.Path) -> "Results":
        """Those of a workdir, none if it is new.

        Raises:
          ValueError: if they are another study's. CheckpointError: if the file is broken.
        """
        path = workdir / NAME
        if not path.exists():
            if workdir.is_dir() and any(workdir.iterdir()):
                raise ValueError(f"{workdir}: holds something else than a study; give a folder that is new or empty")
            return cls(study, path, {}, {})
        found = read_json(path)
        now = identity(study)
        differing = [name for name, value in found["study"].items() if now.get(name) != value]
        if found["version"] != _VERSION or differing:
            what = "its version" if found["version"] != _VERSION else differing[0]
            raise ValueError(f"{path}: is of another study ({what} differs); give another workdir")
        return cls(study, path, found["runs"], found["about"])

    def write(self) -> None:
        """The file as it is to be now. Cells that are finished are told one by one, with what they have in common."""
        self.about |= _about(self.about)
        seeds = sorted({run["changes"]["seed"] for run in self.runs.values()})
        places = [(part, cell, seed) for part in self.study.parts for cell in part.cells for seed in seeds]
        told = {
            "version": _VERSION,
            "study": identity(self.study),
            "about": self.about,
            "cells": [self._cell(*place) for place in places if self.is_finished(*place)],
            "runs": self.runs,
        }
        with output_file(self.path) as file:
            file.write(json.dumps(told, indent=1) + "\n")

    def known(self, run: TrainingRun) -> dict[str, Any]:
        """What is known of a run, to be added to."""
        new = {"changes": dict(run.changes), "start": run.start and run.start.key, "seconds": 0.0, "answers": {}}
        return self.runs.setdefault(run.key, new)

    def metrics(self, run: TrainingRun) -> dict[str, Any] | None:
        """The metrics of a training that is finished; else None."""
        return self.runs.get(run.key, {}).get("metrics")

    def answers(self, part: Part, cell: Cell, seed: int, way: str) -> dict[str, Any] | None:
        """What came of asking a cell in one of its ways, if it was."""
        asked = asked_run(self.study, part, cell, seed, way)
        return self.runs.get(asked.key, {}).get("answers", {}).get(answer_key(part, cell, way))

    def trained(self, cell: Cell, seed: int) -> dict[str, Any] | None:
        """The metrics of a cell's denoiser, when it is trained."""
        return self.metrics(runs_of(self.study, cell, seed)[1])

    def ar(self, part: Part, cell: Cell, seed: int) -> dict[str, Any] | None:
        """What came of asking a cell's backbone a token at a time; where that is timed, in turns with the others."""
        if part.timed:
            return self.answers(part, cell, seed, AR)
        return self.runs.get(runs_of(self.study, cell, seed)[0].key, {}).get("answers", {}).get(AR)

    def is_finished(self, part: Part, cell: Cell, seed: int) -> bool:
        """Whether nothing of a cell is left to be done."""
        return self.trained(cell, seed) is not None and all(
            self.answers(part, cell, seed, way) is not None for way in cell.ways
        )

    def _cell(self, part: Part, cell: Cell, seed: int) -> dict[str, Any]:
        backbone, denoiser = runs_of(self.study, cell, seed)
        answers = {way: self.answers(part, cell, seed, way) for way in cell.ways}
        seconds = self.runs[denoiser.key]["seconds"] + sum(found["seconds"] for found in answers.values())
        return {
            "part": part.name,
            "cell": cell.name,
            "seed": seed,
            "settings": {"backbone": dict(backbone.changes), "denoiser": dict(denoiser.changes)},
            "runs": [backbone.key, denoiser.key],
            "metrics": self.metrics(denoiser),
            "answers": answers,
            "seconds": round(seconds, 1),
        }


def answer_key(part: Part, cell: Cell, way: str) -> str:
    """The name of a way among the answers of a run: speeds are of ways that were timed together."""
    return f"{way}, in turns with {' '.join(other for other in cell.ways if other != way)}" if part.timed else way


def asked_run(study: Study, part: Part, cell: Cell, seed: int, way: str) -> TrainingRun:
    """Whom to ask: for AR under a frozen context the backbone, which all denoisers on it have in common."""
    backbone, denoiser = runs_of(study, cell, seed)
    frozen = denoiser.changes.get("variant.context", Variant().context) == "frozen"
    return backbone if way == AR and frozen and not part.timed else denoiser


def identity(study: Study) -> dict[str, Any]:
    """What makes a study this one: its config, field by field, the denoisers', and the questions. Its parts may change:
    runs and ways are known by what they are."""
    asked = [questions(task, "test", study.questions) for task in study.tasks]
    config = json.loads(json.dumps(study.config.to_dict()))
    return {
        **{f"config.{name}": value for name, value in config.items()},
        "denoiser": dict(study.denoiser),
        "questions": hashlib.sha256(json.dumps(asked).encode()).hexdigest(),
    }


def _about(before: dict[str, Any]) -> dict[str, Any]:
    today = datetime.date.today().isoformat()
    machine = f"{os.cpu_count()} CPU cores" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    return {"began": before.get("began", today), "date": today, "machine": machine, "jax": jax.__version__}
