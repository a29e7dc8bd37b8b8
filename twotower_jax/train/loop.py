"""A training run, from its first batch to its last checkpoint."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from twotower_jax.checkpoint.orbax_steps import SaveError
from twotower_jax.checkpoint.workdir import CHECKPOINTS, Saver
from twotower_jax.data import TrainingData, save_tokenizer
from twotower_jax.parameters import Params
from twotower_jax.paths import in_store
from twotower_jax.train import distributed, flops, watch
from twotower_jax.train.config import TrainConfig
from twotower_jax.train.log import Log
from twotower_jax.train.metrics import METRICS, LossWindow, MetricsWriter, Row, import_wandb, last_row, writing
from twotower_jax.train.objectives import Losses, NoiseKey
from twotower_jax.train.placement import Batch
from twotower_jax.train.programs import Step
from twotower_jax.train.samples import SAMPLES
from twotower_jax.train.schedule import BlockStage
from twotower_jax.train.setup import Report, Setup, look, make_setup, settled
from twotower_jax.train.skips import Skips, blame
from twotower_jax.train.step import StepMetrics, TrainState, abstract_state, merge, start_state

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
    notes: Sequence[str] = (),
) -> TrainResult:
    """Trains, or goes on from the newest checkpoint in `workdir`.

    An interrupted run goes on as if nothing had happened: parameters, losses and batches are the same to the bit.

    Args:
      config: checked settings; see `freeze`.
      workdir: new, empty, or of this same run.
      report: is given each line about the run's progress, on the first process.
      stop: is asked at every step; anything but "" saves and ends the run, on all processes if on one.
      profile: steps to trace.
      notes: warnings about the settings, for the report.

    Raises:
      ValueError, OSError: for settings, text, checkpoint or workdir that cannot be used; nothing has been written.
      FloatingPointError: if more than `max_skipped_steps` steps in a row have a loss or gradient that is not finite.
      SaveError: if a checkpoint or the metrics cannot be written; the checkpoints before are whole.
      ProcessLost: if another process of the run does not answer any more.
    """
    config = settled(config, workdir)
    folder = look(config, workdir)
    if config.wandb_project:
        import_wandb(config.wandb_project)
    report = report if distributed.is_leader() else _say_nothing
    setup = make_setup(config, folder, report)
    with distributed.noticing_loss():
        distributed.barrier("before anything is written")
    with distributed.noticing_loss(), setup.folder.locked():
        distributed.barrier("the workdir is this run's")
        now = look(config, workdir)
        if (now.step, now.model) != (setup.folder.step, setup.folder.model):
            # Another run of this workdir was there meanwhile, and has left it.
            del setup  # so that memory holds the first parameters once
            setup = make_setup(config, now, report)
        setup.describe()
        for note in notes:
            report(f"warning: {note}")
        run, setup = begin(setup) if setup.folder.step is None else resume(setup)
        if run.step == config.steps == run.saved_step:
            report(f"step {run.step} is already made; nothing to do")
            return TrainResult(run.step, last_row(setup.folder.path) or {})
        report(watch.memory_line(run.state.weights, run.state.optimizer, run.frozen))
        with contextlib.ExitStack() as stack:
            stack.enter_context(setup.folder.logging(METRICS, SAMPLES))
            saver = stack.enter_context(setup.folder.saver(config.keep_checkpoints))
            log = stack.enter_context(_open_log(setup, run.step + 1))
            profiler = stack.enter_context(watch.Profiler(_placed(profile, setup.folder.logs)))
            ending = Ending(stop, saver)
            for stage in setup.stages:
                # Asked before compiling, which takes long.
                if run.step < stage.stop and not ending.is_now():
                    train_stage(setup, run, stage, log, saver, profiler, ending)
            finish(run, saver, ending)
        if run.saved_step is not None:
            report(f"checkpoint of step {run.saved_step} in {setup.folder.path / CHECKPOINTS / str(run.saved_step)}")
        return TrainResult(run.step, last_row(setup.folder.path) or {}, ending.signal)


@dataclasses.dataclass
class Run:
    """What changes while a run runs, and goes into its checkpoints.

    Attributes:
      step: steps made so far.
      state: trained parameters and moments. frozen: the other parameters.
      data: the batches to come. window: the losses since the last row of metrics. skips: the steps left out.
      saved_step: of the newest checkpoint.
    """

    step: int
    state: TrainState
    frozen: Params
    data: TrainingData
    window: LossWindow
    skips: Skips
    saved_step: int | None = None

    def save(self, saver: Saver) -> None:
        """Hands a checkpoint to the saver."""
        rest = {"data": self.data.get_state(), "window": self.window.get_state(), "skips": self.skips.get_state()}
        saver.save(self.step, self.state.weights, self.state.optimizer, rest)
        self.saved_step = self.step


def begin(setup: Setup) -> tuple[Run, Setup]:
    """A new run before its first step, with what its workdir holds once; and the setup without the first parameters, so
    that memory holds them once."""
    config, folder, start = setup.config, setup.folder, setup.start
    state, frozen = start_state(setup.objective, setup.optimizer, start.params, setup.placement.mesh)
    # What an adapter is of lies where it came from, and is not written once more.
    folder.create(start.model, {} if start.base else frozen)
    if start.base:
        folder.write_base(start.base)
    if distributed.is_leader():
        with writing(folder.path):
            roles = {"end_token": start.model.eos_token_ids[0], "source": start.tokenizer_folder}
            save_tokenizer(start.tokenizer, folder.path, **roles)
    setup.report(f"starting from {config.init_from or 'random weights'}")
    if config.two_towers and not config.init_from and config.variant.context == "frozen":
        setup.report("warning: the context tower is random and frozen; give init_from a trained backbone")
    run = Run(0, state, frozen, setup.data(), LossWindow(setup.objective.weights), Skips(config.max_skipped_steps))
    return run, dataclasses.replace(setup, start=start._replace(params=None))


def resume(setup: Setup) -> tuple[Run, Setup]:
    """The run as its newest checkpoint has it, and the setup."""
    config, folder, placement = setup.config, setup.folder, setup.placement
    state, frozen = abstract_state(setup.objective, setup.optimizer, placement.mesh)
    own = {} if setup.start.base else frozen
    weights, optimizer, frozen, rest = folder.restore(state.weights, state.optimizer, own)
    state = state.with_weights(weights).replace(step=placement.whole(jnp.int32(folder.step)), optimizer=optimizer)
    if setup.start.base:
        _, frozen = start_state(setup.objective, setup.optimizer, setup.start.params, placement.mesh)
        setup = dataclasses.replace(setup, start=setup.start._replace(params=None))
    data, skips = setup.data(), Skips(config.max_skipped_steps)
    data.set_state(rest["data"])
    skips.set_state(rest["skips"])
    folder.write_settings(setup.start.model)
    where = " from the copies on local disks" if folder.from_copy else ""
    setup.report(f"resuming at step {folder.step} of {config.steps}{where}")
    window = LossWindow(setup.objective.weights, rest["window"])
    return Run(folder.step, state, frozen, data, window, skips, saved_step=folder.stored_step), setup


def train_stage(
    setup: Setup,
    run: Run,
    stage: BlockStage,
    log: Log,
    saver: Saver,
    profiler: watch.Profiler,
    ending: "Ending",
) -> None:
    """The steps of a stage that are left, or those until somebody wants to stop."""
    config = setup.config
    with log.paused():
        make_one_step, step_flops = _compile(setup, stage)
    validation = setup.validation
    validate = None if validation is None else validation.compiled(stage.block_size)
    made: tuple[StepMetrics, Batch] | None = None
    while run.step < stage.stop and not ending.is_at_hand():
        batch = setup.placement.batch(next(run.data))
        with log.paused():
            profiler.before(run.step + 1)
        run.state, metrics = make_one_step(run.state, run.frozen, *batch[1:])
        _take_in(setup, run, stage, made)  # the step before, while the device is busy with this one
        run.step, made = run.step + 1, (metrics, batch)
        log.count_step()
        with log.paused():
            if said := profiler.after(run.step, metrics):
                setup.report(said)
        last = run.step == config.steps
        validating = validate is not None and (last or _due(run.step, config.validation_every))
        saving = last or _due(run.step, config.checkpoint_every)
        logging = last or validating or _due(run.step, config.log_every)
        if saving or logging:
            made = _take_in(setup, run, stage, made)
        if logging:
            passes = functools.partial(_validate, setup, run, stage, validate) if validating else None
            log.write(run.step, run.window.means(), metrics, run.skips.total, step_flops, passes)
            run.window = LossWindow(setup.objective.weights)
        if setup.samples and _due(run.step, config.sample_every):
            with log.paused():
                params = setup.objective.model_params(merge(run.state.weights, run.frozen))
                setup.samples.write(run.step, params, stage.block_size, setup.report)
        if saving:
            with log.paused():
                run.save(saver)
    _take_in(setup, run, stage, made)


def finish(run: Run, saver: Saver, ending: "Ending") -> None:
    """Returns when the last checkpoint is on the disk, for all processes."""
    if run.step != (run.saved_step or 0):
        run.save(saver)
    saver.wait()
    ending.agree()


class Ending:
    """Whether a run is to end before its last step, as all of its processes think.

    Attributes:
      signal: why it ends; "" as long as it does not.

    Raises (all methods):
      SaveError: if a save has failed, on whichever process.
    """

    def __init__(self, stop: Callable[[], str], saver: Saver):
        self._stop, self._saver = stop, saver
        self._agreement = distributed.Agreement()
        self.signal = ""

    def is_now(self) -> bool:
        """Asks all processes and waits for their answers."""
        return self._ask(self._agreement.now)

    def is_at_hand(self) -> bool:
        """Asks all processes; with several of them the answers come at the next step."""
        return self._ask(self._agreement.exchange)

    def agree(self) -> None:
        """Waits until every process has come here."""
        self._agreement.now(_GO_ON)

    def _ask(self, agree: Callable[[int], int]) -> bool:
        if self.signal:
            return True
        wish = self._stop()
        verdict = agree(_SAVE_FAILED if self._saver.failed else _STOP if wish else _GO_ON)
        if verdict == _SAVE_FAILED:
            self._saver.raise_failure()
            raise SaveError("another process could not save; its message says why")
        if verdict == _STOP:
            self.signal = wish or "another process"
        return verdict == _STOP


def _placed(profile: watch.Profile | None, logs: pathlib.Path) -> watch.Profile | None:
    """A profile for a workdir in a store, which grows where its logs do."""
    if profile is None or not in_store(profile.folder):
        return profile
    return profile._replace(folder=logs / profile.folder.name)


@contextlib.contextmanager
def _open_log(setup: Setup, first_step: int):
    """A `Log` whose rows the first process writes."""
    config, validation = setup.config, setup.validation
    writer = contextlib.nullcontext()
    if distributed.is_leader():
        settings = dataclasses.asdict(config)
        writer = MetricsWriter(setup.folder.logs, first_step, config.wandb_project, settings)
    with writer as write:
        peak = flops.peak_flops(config, setup.devices)
        shows_error = validation is None or validation.warning is None
        yield Log(config, write, setup.report, peak=peak, shows_error=shows_error)


def _compile(setup: Setup, stage: BlockStage) -> tuple[Step, float]:
    """The step of a stage, and its FLOPs."""
    config, compiled = setup.config, setup.programs.compile(stage.block_size)
    blocks = f" for blocks of {stage.block_size}" if config.two_towers else ""
    needed = compiled.temporaries
    step_flops = flops.step_flops(config, setup.start.model, stage.block_size)
    setup.report(
        f"compiled the step{blocks} in {compiled.seconds:.0f} s: {step_flops:.2e} FLOPs per step"
        + (f", {watch.readable_bytes(needed)} of temporaries on each device" if needed else "")
    )
    return compiled.step, step_flops


def _take_in(setup: Setup, run: Run, stage: BlockStage, made: tuple[StepMetrics, Batch] | None) -> None:
    """Adds what step `run.step` reported to the losses. One step too many whose loss or gradient is not finite ends the
    run.

    Raises:
      FloatingPointError: with the rows of the batch that are to blame.
    """
    if made is None:
        return
    metrics, batch = jax.device_get(made[0]), made[1]
    too_many = run.skips.add(bool(metrics.skipped))
    if not metrics.skipped:
        run.window.add(metrics.losses)
        return
    what = f"step {run.step}: loss {metrics.loss}, gradient norm {metrics.grad_norm}: not finite"
    if not too_many:
        setup.report(f"{what}; the step is left out ({run.skips.in_a_row} in a row)")
        return
    config = setup.config
    noise = functools.partial(NoiseKey, config.seed, run.step - 1)
    weights = run.state.weights, run.frozen
    found = blame(setup.objective, noise, stage.block_size, *weights, batch, setup.placement)
    raise FloatingPointError(
        f"{what}, {run.skips.in_a_row} steps in a row (max_skipped_steps={config.max_skipped_steps}); "
        f"{found.text(setup.start.tokenizer)}; no such step has reached the weights. Try a lower "
        f"learning_rate={config.learning_rate} or clip_norm={config.clip_norm}, or other data"
    )


def _validate(setup: Setup, run: Run, stage: BlockStage, validate: Callable[..., Losses]) -> Row:
    """What validation tells of the weights, and the loss of their average where one is kept; and answers, if asked."""
    row = setup.validation.run(validate, run.state.weights, run.frozen)
    if (average := run.state.average) is not None:
        row["average_loss"] = setup.validation.run(validate, average, run.frozen)["loss"]
    if setup.answers is not None:
        row |= setup.answers.measure(merge(run.state.weights, run.frozen), stage.block_size, setup.report)
    return row


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
