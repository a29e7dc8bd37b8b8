"""Kills training runs at seeded moments, starts them again, and looks for anything that was lost.

A small run is made once without interruption. The same run is then killed again and again (SIGKILL in a step, while a
checkpoint is written, while old ones are removed; SIGTERM at any of these) and started again each time. Whatever was a
whole checkpoint before has to be one afterwards, SIGTERM has to end the run with status 75 and a checkpoint of the last
step, and in the end every logged loss and every parameter has to be that of the uninterrupted run, to the bit.
"""

import collections
import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from absl import flags

from twotower_jax.checkpoint import orbax_steps, workdir
from twotower_jax.files import CheckpointError
from twotower_jax.parameters import Path, flatten
from twotower_jax.train.metrics import METRICS
from twotower_jax.train.stopping import STOPPED

STEP, SAVE, CLEAN_UP = "step", "save", "clean-up"
PHASES = (STEP, SAVE, CLEAN_UP)
# At least so many steps a start; the moment is drawn after them.
_STEPS_BETWEEN = (1, 6)
_PATIENCE = 1500.0  # seconds, on a machine that has other work

TRAIN = pathlib.Path(__file__).parents[3] / "launch" / "train.py"
_CONFIG = """
from twotower_jax.train.config import base_config


def get_config():
    config = base_config(
        {
            "hidden_size": 16,
            "hybrid_override_pattern": "M*-",
            "mamba_num_heads": 2,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "intermediate_size": 16,
        }
    )
    config.objective = "denoiser"
    config.data = "text"
    config.vocab_size = 265
    config.sequence_length = 32
    config.block_size = 8
    config.batch_size = 2
    config.log_every = 1
    config.checkpoint_every = 3
    config.learning_rate = 1e-2
    return config
"""


class Outcome(NamedTuple):
    """What became of one interruption.

    Attributes:
      signal, phase: what was sent, and during what; a process may have gone on to another phase meanwhile.
      status: how it exited; a negative number is that of the signal.
      left: whether a folder was left half written or half removed, so that the moment was well met.
      problem: what was lost, or "".
    """

    signal: str
    phase: str
    status: int
    left: bool
    problem: str


def define_flags(kills: int = 30, terms: int = 20) -> None:
    flags.DEFINE_integer("kills", kills, "SIGKILLs, in turn in each phase.", lower_bound=0)
    flags.DEFINE_integer("terms", terms, "SIGTERMs, in turn in each phase.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Draws the moments.")


def main(run: "type[Run] | None" = None) -> None:
    outcomes, start = [], time.monotonic()
    wanted, total = flags.FLAGS, flags.FLAGS.kills + flags.FLAGS.terms
    with tempfile.TemporaryDirectory() as scratch:
        for outcome in campaign(pathlib.Path(scratch), wanted.kills, wanted.terms, wanted.seed, run or Run):
            outcomes.append(outcome)
            seconds = time.monotonic() - start
            print(f"{len(outcomes)} of {total} and the end, {seconds:.0f} s: {outcome}", flush=True)
    print(table(outcomes))
    if any(outcome.problem for outcome in outcomes):
        raise SystemExit(1)


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as a Markdown table."""
    rows = collections.defaultdict(list)
    for outcome in outcomes:
        rows[outcome.signal, outcome.phase].append(outcome)
    lines = ["| interrupted by | during | times | exit statuses | left a folder half done | something lost |"]
    lines.append("|---|---|--:|---|--:|--:|")
    for (name, phase), found in sorted(rows.items()):
        statuses = collections.Counter(outcome.status for outcome in found)
        shown = ", ".join(f"{status} ({count}×)" for status, count in sorted(statuses.items()))
        left, lost = sum(outcome.left for outcome in found), sum(bool(outcome.problem) for outcome in found)
        lines.append(f"| {name} | {phase} | {len(found)} | {shown} | {left} | {lost} |")
    return "\n".join(lines)


def campaign(
    scratch: pathlib.Path, kills: int, terms: int, seed: int, kind: "type[Run] | None" = None
) -> Iterator[Outcome]:
    """Interrupts one run `kills` + `terms` times; the last outcome compares it with an uninterrupted one.

    Args:
      kind: of the run that is interrupted; by default one whose workdir is on the disk, as the other one's is.
    """
    kind = kind or Run
    rng = random.Random(seed)
    plan = [("SIGKILL", PHASES[i % 3]) for i in range(kills)] + [("SIGTERM", PHASES[i % 3]) for i in range(terms)]
    rng.shuffle(plan)
    # Enough steps to be interrupted in.
    steps = (len(plan) + 1) * (_STEPS_BETWEEN[1] + kind.more_steps)
    (scratch / "config.py").write_text(_CONFIG)
    (scratch / "text").mkdir()
    for i in range(12):
        (scratch / "text" / f"{i}.txt").write_text(f"Text number {i} says that {i} is {i}. " * 20)
    whole, broken = Run(scratch, "whole", steps), kind(scratch, "broken", steps)
    status = whole.start().wait(_PATIENCE)
    if status:
        raise RuntimeError(f"the run without interruption failed with status {status}; see {whole.log}")
    for name, phase in plan:
        yield broken.interrupt(name, phase, rng)
    status = broken.start().wait(_PATIENCE)
    problem = f"status {status}, see {broken.log}" if status else differences(whole.folder, broken.folder)
    yield Outcome("nothing", "last start, to the end", status, broken.half_done(), problem)


class Run:
    """A run of `launch/train.py` in a folder of its own.

    Attributes:
      pause: seconds between two looks at it.
      more_steps: that a start may make while a phase is waited for.
    """

    more_steps = 8

    pause = 0.0005

    def __init__(self, scratch: pathlib.Path, name: str, steps: int):
        self.folder, self.log = scratch / name, scratch / f"{name}.log"
        self._scratch, self._steps = scratch, steps

    def start(self, *arguments: str) -> subprocess.Popen:
        """Starts the command, with more flags."""
        command = [sys.executable, str(TRAIN), *self.arguments(), *arguments]
        with self.log.open("a") as log:
            return subprocess.Popen(
                command, cwd=self._scratch, env=self.environment(), stdout=log, stderr=subprocess.STDOUT
            )

    def arguments(self) -> list[str]:
        """The flags that make it this run."""
        return ["--config=config.py", f"--workdir={self.folder}", f"--config.steps={self._steps}"]

    def environment(self) -> dict[str, str]:
        """All starts share what the first one compiles."""
        return os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(self._scratch / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": "",  # one device, whatever the caller has
        }

    def interrupt(self, name: str, phase: str, rng: random.Random) -> Outcome:
        """Starts the run, goes on from its newest checkpoint, and sends it a signal at a drawn moment."""
        logged = self.last_logged()
        process = self.start()
        target = max(logged, self.newest() or 0) + rng.randint(*_STEPS_BETWEEN)
        delay = rng.uniform(0, 0.02)
        try:
            self._wait(process, lambda: self.last_logged() >= target)
            if phase != STEP:
                self._wait(process, lambda: self.is_in(phase))
                delay *= rng.random() ** 3  # what is to be met does not last
            time.sleep(delay)
            before, logged = self.newest(), self.last_logged()
            process.send_signal(signal.Signals[name])
            status = process.wait(_PATIENCE)
        finally:
            process.kill()
            process.wait()
        return Outcome(name, phase, status, self.half_done(), self._lost(name, status, before, logged))

    def is_in(self, phase: str) -> bool:
        """Whether a checkpoint is being written, or removed."""
        return any((".writing" if phase == SAVE else ".removed") in entry for entry in self._checkpoints())

    def newest(self) -> int | None:
        """The newest whole checkpoint."""
        return orbax_steps.latest_step(self.folder / workdir.CHECKPOINTS)

    def last_logged(self) -> int:
        rows = logged_rows(self.folder)
        return rows[-1]["step"] if rows else 0

    def half_done(self) -> bool:
        """Whether a checkpoint is being written or removed, or was when the process ended."""
        return any(not entry.isdecimal() for entry in self._checkpoints())

    def _checkpoints(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return os.listdir(self.folder / workdir.CHECKPOINTS)
        return []

    def _wait(self, process: subprocess.Popen, reached: Callable[[], bool]) -> None:
        end = time.monotonic() + _PATIENCE
        while not reached():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(
                    f"the run ended, or stood still, by itself (status {process.poll()}); see {self.log}"
                )
            time.sleep(self.pause)

    def _lost(self, name: str, status: int, before: int | None, logged: int) -> str:
        newest = self.newest()
        if before is not None and (newest is None or newest < before):
            return f"checkpoint {before} was whole; afterwards the newest is {newest}"
        if newest is not None:
            try:
                orbax_steps.verify(self.folder / workdir.CHECKPOINTS / str(newest))
                orbax_steps.verify(self.folder / workdir.FROZEN)
            except CheckpointError as error:
                return str(error)
        if name == "SIGTERM" and status != STOPPED:
            return f"SIGTERM ended in status {status}"
        if name == "SIGTERM" and (newest or 0) < logged:
            return f"SIGTERM at step {logged} left a checkpoint of step {newest}"
        return ""


def logged_rows(folder: pathlib.Path) -> list[dict]:
    """The whole rows of metrics.jsonl without what depends on the clock."""
    with contextlib.suppress(FileNotFoundError):
        lines = (folder / METRICS).read_text().split("\n")[:-1]
        return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines if line]
    return []


def differences(whole: pathlib.Path, broken: pathlib.Path) -> str:
    """What of an interrupted run, logged losses or final state, is not that of an uninterrupted one; "" for nothing."""
    expected = {row["step"]: row for row in logged_rows(whole)}
    found = logged_rows(broken)
    if missing := expected.keys() - {row["step"] for row in found}:
        return f"steps {sorted(missing)} were never logged"
    for row in found:
        if row != expected[row["step"]]:
            return f"step {row['step']} was logged as {row}, expected {expected[row['step']]}"
    step = str(max(expected))
    folders = [folder / workdir.CHECKPOINTS / step for folder in (whole, broken)]
    for tree in (workdir.PARAMS, workdir.OPTIMIZER):
        expected, found = (_arrays(folder / tree) for folder in folders)
        if expected.keys() != found.keys():
            return f"{tree}: other arrays"
        for path, array in expected.items():
            if not np.array_equal(array, found[path]):
                return f"{tree}: {'/'.join(path)} has other values"
    runs = [json.loads((folder / f"{workdir.RUN}.json").read_text()) for folder in folders]
    return "" if runs[0]["data"] == runs[1]["data"] else "the place in the data is another one"


def _arrays(folder: pathlib.Path) -> dict[Path, np.ndarray]:
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), orbax_steps.stored_arrays(folder))
    return {path: np.asarray(array) for path, array in flatten(orbax_steps.restore_arrays(folder, target)).items()}
