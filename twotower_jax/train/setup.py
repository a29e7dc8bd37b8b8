"""All of a run that does not change while it runs, read and checked before anything is written."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable

import jax
import optax

from twotower_jax.checkpoint.workdir import CONFIG, Workdir, read_settings
from twotower_jax.data import TrainingData
from twotower_jax.files import CheckpointError
from twotower_jax.outputs import refuse_read_only
from twotower_jax.parameters import count, flatten, unflatten
from twotower_jax.paths import as_path
from twotower_jax.registry import registered
from twotower_jax.train.config import ADDED, CHANGEABLE, TrainConfig
from twotower_jax.train.objectives import Objective
from twotower_jax.train.placement import Placement
from twotower_jax.train.programs import Programs
from twotower_jax.train.samples import Answers, Sampler, Samples
from twotower_jax.train.schedule import BlockStage, block_stages
from twotower_jax.train.start import Start, check_room, read_inputs, with_params
from twotower_jax.train.step import apart, make_optimizer, tables
from twotower_jax.train.validation import Validation

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts of a run.

    Attributes:
      folder: what the workdir holds. start: what the run starts from.
      programs: the compiled steps. stages: the block sizes in their order.
      validation, samples, answers: None where the run has none.
    """

    config: TrainConfig
    report: Report
    folder: Workdir
    start: Start
    optimizer: optax.GradientTransformation
    placement: Placement
    programs: Programs
    stages: tuple[BlockStage, ...]
    validation: Validation | None
    samples: Samples | None
    answers: Answers | None

    @property
    def objective(self) -> Objective:
        return self.start.objective

    @functools.cached_property
    def devices(self) -> list[jax.Device]:
        """The devices that the run uses, of all processes."""
        mesh = self.placement.mesh
        return jax.devices()[:1] if mesh is None else list(mesh.devices.flat)

    def data(self) -> TrainingData:
        """Batches from the first on."""
        config = self.config
        return TrainingData(
            self.start.training, batch_size=config.batch_size, seed=config.seed, **self.placement.reading
        )

    def describe(self) -> None:
        """Says what is trained, where, and on how much text."""
        config, start = self.config, self.start
        trained, others = tables(self.objective)
        balanced, frozen = (count(flatten(part)) for part in apart(self.objective, unflatten(others)))
        follow = f"{balanced:,} follow the load of experts, " if balanced else ""
        devices, processes = self.devices, jax.process_count()
        among = f"{len(devices)} × {devices[0].device_kind}" if len(devices) > 1 else devices[0].device_kind
        among += f" in {processes} processes" if processes > 1 else ""
        self.report(
            f"{config.objective}: {count(trained):,} parameters train, {follow}{frozen:,} are frozen; {config.dtype} "
            f"on {among}, {start.model.num_hidden_layers} layers {start.model.hybrid_override_pattern}"
            f"{', unrolled' if config.unroll_layers else ''}"
        )
        held_out = 0 if start.validation is None else start.validation.tokens
        self.report(
            f"{config.batch_size * config.sequence_length:,} tokens per step ({config.batch_size} sequences of "
            f"{config.sequence_length}) of {start.training.tokens:,}, {held_out:,} more held out; "
            f"vocabulary {start.model.vocab_size:,}"
        )
        if self.validation is not None and self.validation.warning:
            self.report(self.validation.warning)


def make_setup(config: TrainConfig, folder: Workdir, report: Report) -> Setup:
    """Reads what a run starts from, traces its steps, and compiles the first to come; writes nothing.

    Parameters are read last, when it is known that what the step needs is there.

    Raises:
      ValueError, OSError: for inputs that are missing, broken, or do not fit together.
    """
    start = read_inputs(config, folder, report)
    objective, placement = start.objective, Placement(start.mesh, config.batch_size)
    optimizer = make_optimizer(config, tables(objective)[0])
    programs = Programs(config, objective, optimizer, placement, start.conversational)
    stages = block_stages(config)
    validation = samples = answers = None
    if start.validation is not None:
        validation = Validation(start.validation, objective, placement, config.batch_size)
    sampler = Sampler(objective.model, config.sample_tokens, placement.mesh) if config.two_towers else None
    if config.sample_every:
        samples = Samples(folder.logs, start.tokenizer, sampler, config.sample_prompts)
    if config.sample_answers:
        held_out = start.validation if start.conversational else None
        turns = [] if held_out is None else held_out.first_turns(config.sample_answers)
        if not turns:
            raise ValueError(f"sample_answers={config.sample_answers} needs conversations that are held out")
        answers = Answers(start.tokenizer, sampler, turns)
    programs.check(tuple(stage.block_size for stage in stages))
    if to_come := [stage for stage in stages if stage.stop > (folder.step or 0)]:
        temporaries = programs.compile(to_come[0].block_size).temporaries
        check_room(config, *programs.weights, temporaries or 0, start.mesh)
    start = with_params(config, folder, start)
    parts = programs, tuple(stages), validation, samples, answers
    return Setup(config, report, folder, start, optimizer, placement, *parts)


def settled(config: TrainConfig, workdir: str | pathlib.Path) -> TrainConfig:
    """The settings with what they leave to the run decided: as the workdir's run has it, or as a new one would.

    A run from before there were such settings had none of what they do.

    Raises:
      ValueError: for an address of a store that is only read.
    """
    path, saved = as_path(workdir), None
    refuse_read_only(path)
    if (path / CONFIG).is_file():
        with contextlib.suppress(CheckpointError):  # which `Workdir` is to report
            saved = read_settings(path)
    new = {f"router_{name}": value for name, value in dataclasses.asdict(config.balance).items()}
    open_ = [name for name in new if getattr(config, name) is None]
    return dataclasses.replace(
        config, **{name: new[name] if saved is None else saved.get(name, ADDED[name]) for name in open_}
    )


def look(config: TrainConfig, workdir: str | pathlib.Path) -> Workdir:
    """What the workdir holds now.

    Raises:
      ValueError: if that is something else, or a run with other settings, or one that is beyond `config.steps`.
    """
    settings, own = dataclasses.asdict(settled(config, workdir)), registered()
    folder = Workdir(workdir, settings | ({"registered": own} if own else {}), CHANGEABLE, ADDED, config.local_copy)
    if folder.step is not None and folder.step > config.steps:
        raise ValueError(f"workdir {folder.path} is at step {folder.step} already, beyond steps={config.steps}")
    return folder
