"""A training run, from its first batch to its last checkpoint."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from twotower_jax.checkpoint.orbax_steps import SaveError
from twotower_jax.checkpoint.workdir import CHECKPOINTS, Saver, Workdir
from twotower_jax.data import TrainingData, save_tokenizer
from twotower_jax.kernels import Backends
from twotower_jax.parameters import Params, count
from twotower_jax.registry import registered
from twotower_jax.train import distributed, flops, watch
from twotower_jax.train.config import ADDED, CHANGEABLE, TrainConfig
from twotower_jax.train.metrics import (
    LossWindow,
    MetricsWriter,
    Row,
    Stopwatch,
    finite,
    import_wandb,
    last_row,
    progress_line,
    writing,
)
from twotower_jax.train.objectives import Documents, Losses, NoiseKey
from twotower_jax.train.placement import Batch, Placement
from twotower_jax.train.samples import Samples
from twotower_jax.train.schedule import BlockStage, block_stages
from twotower_jax.train.skips import Skips, blame
from twotower_jax.train.start import Start, make_start
from twotower_jax.train.step import (
    StepMetrics,
    TrainState,
    abstract_state,
    make_optimizer,
    make_step,
    merge,
    start_state,
    tables,
)
from twotower_jax.train.validation import Validation

Report = Callable[[str], None]

# What the processes of a run tell one another at every step; the largest number counts.
_GO_ON, _STOP, _SAVE_FAILED = range(3)


class TrainResult(NamedTuple):
    """How a run ended.

    Attributes:
      step: steps made in all.
      metrics: the last row of metrics.jsonl: `loss`, `validation_loss` where text is held out, and the rest.
      stopped: the signal that ended the run before its last step, or "".
    """

    step: int
    metrics: Row
    stopped: str = ""


def _print(line: str) -> None:
    print(line, flush=True)


def _say_nothing(line: str) -> None:
    """The report of all processes but the first."""


def train(
    config: TrainConfig,
    workdir: str | pathlib.Path,
    report: Report = _print,
    *,
    stop: Callable[[], str] = lambda: "",
    profile: watch.Profile | None = None,
) -> TrainResult:
    """Trains, or goes on from the newest checkpoint in `workdir`.

    An interrupted run goes on as if nothing had happened: parameters, losses and batches are the same to the bit.

    Args:
      config: checked settings; see `freeze`.
      workdir: new, empty, or of this same run.
      report: is given each line about the run's progress, on the first process.
      stop: is asked at every step; anything but "" saves and ends the run, on all processes if on one.
      profile: steps to trace.

    Raises:
      ValueError, OSError: for settings, text, checkpoint or workdir that cannot be used; nothing has been written.
      FloatingPointError: if more than `max_skipped_steps` steps in a row have a loss or gradient that is not finite.
      SaveError: if a checkpoint or the metrics cannot be written; the checkpoints before are whole.
      ProcessLost: if another process of the run does not answer any more.
    """
    folder = _look(config, workdir)
    if config.wandb_project:
        import_wandb(config.wandb_project)
    report = report if distributed.is_leader() else _say_nothing
    run = _Run(config, folder, make_start(config, folder, report), report, stop, profile)
    run.check()
    with distributed.noticing_loss():
        distributed.barrier("before anything is written")
    with distributed.noticing_loss(), folder.locked():
        distributed.barrier("the workdir is this run's")
        now = _look(config, workdir)
        if (now.step, now.model) != (folder.step, folder.model):
            # Another run of this workdir was there meanwhile, and has left it.
            del run
            run, folder = _Run(config, now, make_start(config, now, report), report, stop, profile), now
        run.describe()
        if folder.step is None:
            run.begin()
        else:
            run.resume()
        if run.step == config.steps:
            run.report(f"step {run.step} is already made; nothing to do")
        else:
            run.go()
        return TrainResult(run.step, last_row(folder.path) or {}, run.stopped)


def _look(config: TrainConfig, workdir: str | pathlib.Path) -> Workdir:
    """What the workdir holds now."""
    settings, own = dataclasses.asdict(config), registered()
    folder = Workdir(workdir, settings | ({"registered": own} if own else {}), CHANGEABLE, ADDED)
    if folder.step is not None and folder.step > config.steps:
        raise ValueError(f"workdir {folder.path} is at step {folder.step} already, beyond steps={config.steps}")
    return folder


class _Run:
    """The changing parts of a run: state, place in the data, losses since the last log line, clock."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Workdir,
        start: Start,
        report: Report,
        stop: Callable[[], str],
        profile: watch.Profile | None,
    ):
        self.config, self.folder, self.start, self.report, self.stop = config, folder, start, report, stop
        self.objective = start.objective
        self.optimizer = make_optimizer(config, tables(self.objective)[0])
        self.placement = Placement(start.mesh, config.batch_size)
        reading = self.placement.reading
        self.data = TrainingData(start.training, batch_size=config.batch_size, seed=config.seed, **reading)
        self.agreement = distributed.Agreement()
        self.profiler = watch.Profiler(profile)
        self.samples = self._make_samples()
        self.validation = None
        if start.validation is not None:
            self.validation = Validation(start.validation, self.objective, self.placement, config.batch_size)
        self.stages = block_stages(config)
        self.jitted: dict[int, Callable] = {}
        self.window = LossWindow(self.objective.terms)
        self.skips = Skips(config.max_skipped_steps)
        self.stopwatch, self.tokens = Stopwatch(), 0
        self.step = 0
        self.saved_step: int | None = None
        self.unsettled: tuple[StepMetrics, Batch] | None = None
        self.stopped = ""

    def _make_samples(self) -> Samples | None:
        config = self.config
        if not config.sample_every:
            return None
        model, mesh = self.objective.model, self.placement.mesh
        return Samples(self.folder.path, self.start.tokenizer, model, config.sample_prompts, config.sample_tokens, mesh)

    def describe(self) -> None:
        config, start = self.config, self.start
        trained, frozen = (count(table) for table in tables(self.objective))
        devices, processes = self.devices, jax.process_count()
        among = f"{len(devices)} × {devices[0].device_kind}" if len(devices) > 1 else devices[0].device_kind
        among += f" in {processes} processes" if processes > 1 else ""
        self.report(
            f"{config.objective}: {trained:,} parameters train, {frozen:,} are frozen; {config.dtype} on {among}, "
            f"{start.model.num_hidden_layers} layers {start.model.hybrid_override_pattern}"
        )
        held_out = 0 if start.validation is None else start.validation.tokens
        self.report(
            f"{config.batch_size * config.sequence_length:,} tokens a step ({config.batch_size} sequences of "
            f"{config.sequence_length}) of {start.training.tokens:,}, {held_out:,} more held out; "
            f"vocabulary {start.model.vocab_size:,}"
        )
        if self.validation is not None and self.validation.warning:
            self.report(self.validation.warning)

    @property
    def devices(self) -> list[jax.Device]:
        """That the run uses, of all processes."""
        mesh = self.placement.mesh
        return jax.devices()[:1] if mesh is None else list(mesh.devices.flat)

    def begin(self) -> None:
        """The first step of a new run, and what its workdir holds once."""
        config, folder = self.config, self.folder
        self.state, self.frozen = start_state(self.objective, self.optimizer, self.start.params, self.placement.mesh)
        self.start = self.start._replace(params=None)  # so that memory holds them once
        folder.create(self.start.model, self.frozen)
        if distributed.is_leader():
            with writing(folder.path):
                save_tokenizer(
                    *(self.start.tokenizer, folder.path, self.start.model.eos_token_ids[0]),
                    source=self.start.tokenizer_folder,
                )
        self.report(f"starting from {config.init_from or 'random weights'}")
        if config.two_towers and not config.init_from and config.variant.context == "frozen":
            self.report("warning: the context tower is random and frozen; give init_from a trained backbone")

    def resume(self) -> None:
        """The newest checkpoint."""
        state, frozen = abstract_state(self.objective, self.optimizer, self.placement.mesh)
        params, optimizer, self.frozen, run = self.folder.restore(state.params, state.optimizer, frozen)
        self.step = self.saved_step = self.folder.step
        step = self.placement.whole(jnp.int32(self.step))
        self.state = state.replace(step=step, params=params, optimizer=optimizer)
        self.data.set_state(run["data"])
        self.window = LossWindow(self.objective.terms, run["window"])
        self.skips.set_state(run["skips"])
        self.folder.write_settings(self.start.model)
        self.report(f"resuming at step {self.step} of {self.config.steps}")

    def go(self) -> None:
        """All steps that are left, or those until somebody wants to stop."""
        self.report(watch.memory_line(self.state.params, self.state.optimizer, self.frozen))
        with contextlib.ExitStack() as stack:
            saver = stack.enter_context(self.folder.saver(self.config.keep_checkpoints))
            self.writer = stack.enter_context(self._make_writer())
            stack.enter_context(self.profiler)
            self.stopwatch.restart()
            for stage in self.stages:
                # Asked before compiling, which takes long.
                if self.step < stage.stop and not self._is_to_stop(saver, self.agreement.now):
                    self._run_stage(stage, saver)
            self._finish(saver)
        if self.saved_step is not None:
            path = self.folder.path / CHECKPOINTS / str(self.saved_step)
            self.report(f"checkpoint of step {self.saved_step} in {path}")

    def _make_writer(self) -> contextlib.AbstractContextManager:
        if not distributed.is_leader():
            return contextlib.nullcontext()
        settings = dataclasses.asdict(self.config)
        return MetricsWriter(self.folder.path, self.step + 1, self.config.wandb_project, settings)

    def _run_stage(self, stage: BlockStage, saver: Saver) -> None:
        config = self.config
        with self.stopwatch.paused():
            make_one_step = self._compile(stage.block_size)
        validate = None if self.validation is None else self.validation.compiled(stage.block_size)
        while self.step < stage.stop and not self._is_to_stop(saver, self.agreement.exchange):
            batch = self.placement.batch(next(self.data))
            with self.stopwatch.paused():
                self.profiler.before(self.step + 1)
            self.state, metrics = make_one_step(self.state, self.frozen, *batch[1:])
            self._settle(stage)  # the step before, while the device is busy with this one
            self.step += 1
            self.tokens += config.batch_size * config.sequence_length
            self.unsettled = metrics, batch
            with self.stopwatch.paused():
                if said := self.profiler.after(self.step, metrics):
                    self.report(said)
            last = self.step == config.steps
            validating = validate is not None and (last or _due(self.step, config.validation_every))
            saving = last or _due(self.step, config.checkpoint_every)
            logging = last or validating or _due(self.step, config.log_every)
            if saving or logging:
                self._settle(stage)
            if logging:
                self._log(metrics, validate if validating else None)
            if self.samples and _due(self.step, config.sample_every):
                with self.stopwatch.paused():
                    params = merge(self.state.params, self.frozen)
                    self.samples.write(self.step, params, stage.block_size, self.report)
            if saving:
                with self.stopwatch.paused():
                    self._save(saver)
        self._settle(stage)

    def _is_to_stop(self, saver: Saver, agree: Callable[[int], int]) -> bool:
        """Whether to stop here, as all processes think. A failed save ends the run on all of them."""
        if self.stopped:
            return True
        wish = self.stop()
        verdict = agree(_SAVE_FAILED if saver.failed else _STOP if wish else _GO_ON)
        if verdict == _SAVE_FAILED:
            saver.raise_failure()
            raise SaveError("another process could not save; its message says why")
        if verdict == _STOP:
            self.stopped = wish or "another process"
        return verdict == _STOP

    def _save(self, saver: Saver) -> None:
        run = {"data": self.data.get_state(), "window": self.window.get_state(), "skips": self.skips.get_state()}
        saver.save(self.step, self.state.params, self.state.optimizer, run)
        self.saved_step = self.step

    def _finish(self, saver: Saver) -> None:
        """Returns when the last checkpoint is on the disk, for all processes."""
        if self.step != (self.saved_step or 0):
            self._save(saver)
        saver.wait()
        self.agreement.now(_GO_ON)

    def check(self) -> None:
        """Traces the step of every stage, so that settings that cannot be computed are met before anything is written.

        Tracing for the compilation finds its result. Where kernels are named, one that cannot run says so as well.

        Raises:
          ValueError: in one line.
        """
        weights = abstract_state(self.objective, self.optimizer, self.placement.mesh)
        for size in dict.fromkeys(stage.block_size for stage in self.stages):
            try:
                traced = self._trace(size, *weights)
                if self.config.kernels != Backends():
                    with self.placement.in_force():
                        traced.lower()
            except Exception as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                if isinstance(error, ValueError) and len(lines) == 1:
                    raise
                raise ValueError(
                    f"config: these settings give no step in blocks of {size}: {type(error).__name__}: {lines[0]}"
                ) from error

    def _trace(self, block_size: int, state: TrainState, frozen: Params) -> jax.stages.Traced:
        config = self.config
        if block_size not in self.jitted:
            step = make_step(config, self.objective, self.optimizer, block_size)
            where = None
            if self.placement.mesh is not None:
                where = jax.tree.map(lambda leaf: leaf.sharding, state), self.placement.everywhere
            self.jitted[block_size] = jax.jit(step, donate_argnums=0, out_shardings=where)
        shape = (config.batch_size, config.sequence_length)
        ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.placement.ids_sharding())
        documents = None
        if config.reset_at_documents:
            documents = Documents(ids, jax.ShapeDtypeStruct(shape, jnp.bool, sharding=ids.sharding))
        with self.placement.in_force():
            return self.jitted[block_size].trace(state, frozen, ids, self.placement.index, documents)

    def _compile(self, block_size: int) -> Callable[..., tuple[TrainState, StepMetrics]]:
        config, started = self.config, Stopwatch()
        traced = self._trace(block_size, self.state, self.frozen)
        with self.placement.in_force():
            compiled = traced.lower().compile()
        blocks = f" for blocks of {block_size}" if config.two_towers else ""
        needed = watch.temporaries(compiled)
        self.flops = flops.step_flops(config, self.start.model, block_size)
        self.report(
            f"compiled the step{blocks} in {started.seconds:.0f} s: {self.flops:.2e} FLOPs a step"
            + (f", {watch.readable_bytes(needed)} of temporaries on each device" if needed else "")
        )
        return compiled

    def _settle(self, stage: BlockStage) -> None:
        """Takes in what the last step reported. One step too many whose loss or gradient is not finite ends the run."""
        if self.unsettled is None:
            return
        (metrics, batch), self.unsettled = self.unsettled, None
        metrics = jax.device_get(metrics)
        too_many = self.skips.add(bool(metrics.skipped))
        if not metrics.skipped:
            self.window.add(metrics.losses)
            return
        what = f"step {self.step}: loss {metrics.loss}, gradient norm {metrics.grad_norm}: not finite"
        if not too_many:
            self.report(f"{what}; the step is left out ({self.skips.in_a_row} in a row)")
            return
        noise = functools.partial(NoiseKey, self.config.seed, self.step - 1)
        weights = self.state.params, self.frozen
        found = blame(self.objective, noise, stage.block_size, *weights, batch, self.placement)
        raise FloatingPointError(
            f"{what}, {self.skips.in_a_row} steps in a row (max_skipped_steps={self.config.max_skipped_steps}); "
            f"{found.text(self.start.tokenizer)}; no such step has reached the weights. Try a lower "
            f"learning_rate={self.config.learning_rate} or clip_norm={self.config.clip_norm}, or other data"
        )

    def _log(self, metrics: StepMetrics, validate: Callable[..., Losses] | None) -> None:
        """Writes a row, with the validation loss if there is a `validate`, and begins a new window."""
        config, seconds, tokens = self.config, self.stopwatch.seconds, self.tokens
        means = self.window.means()
        row = {
            "step": self.step,
            "loss": means.pop("loss"),
            "learning_rate": float(metrics.learning_rate),
            "grad_norm": finite(metrics.grad_norm),
            "tokens_per_second": tokens / seconds,
            "skipped_steps": self.skips.total,
            **means,
        }
        seconds_a_step = seconds * config.batch_size * config.sequence_length / tokens
        if peak := flops.peak_flops(config, self.devices):
            row["model_flops_utilization"] = self.flops / seconds_a_step / peak
        if validate is not None:
            with self.stopwatch.paused():
                found = self.validation.run(validate, self.state.params, self.frozen)
                row |= {f"validation_{name}": value for name, value in found.items()}
        if self.writer is not None:
            self.writer.write(row)
        shows_error = self.validation is None or self.validation.warning is None
        self.report(progress_line(row, config.steps, (config.steps - self.step) * seconds_a_step, shows_error))
        self.window = LossWindow(self.objective.terms)
        self.tokens = 0
        self.stopwatch.restart()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
