"""What a run tells: losses summed between log lines, `metrics.jsonl`, TensorBoard files, W&B, the progress line."""

import contextlib
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from twotower_jax.checkpoint.orbax_steps import SaveError
from twotower_jax.diffusion import LossSum

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"

Row = dict[str, Any]


class LossWindow:
    """Losses summed over several batches: of the steps since the last log line, or of a validation pass.

    Its state goes into a checkpoint, so that the first log line after a resume is that of an uninterrupted run.
    """

    def __init__(self, weights: Mapping[str, float], state: Mapping[str, Any] | None = None):
        """`weights` are those of the losses that add up to the one that is minimized; `state` is what `get_state`
        returned."""
        self._weights = dict(weights)
        self._sums = {name: [np.asarray(v, np.float64) for v in sums] for name, sums in (state or {}).items()}

    def add(self, losses: Mapping[str, LossSum]) -> None:
        """Adds a batch. Sums of another shape than before (positions of a block of another size) begin anew."""
        for name, (total, count) in losses.items():
            new = [np.asarray(total, np.float64), np.asarray(count, np.float64)]
            old = self._sums.get(name)
            same = old is not None and old[0].shape == new[0].shape
            self._sums[name] = [a + b for a, b in zip(old, new, strict=True)] if same else new

    def get_state(self) -> dict[str, list]:
        """JSON-able."""
        return {name: [v.tolist() for v in sums] for name, sums in self._sums.items()}

    def means(self) -> Row:
        """`loss`, its terms where there are several, and lists of losses by bin; None where it is not a finite number.

        That is so in a bin without tokens, and of all losses before the first batch.
        """
        means = {name: _mean(*sums) for name, sums in self._sums.items()}
        terms = [means.get(term) for term in self._weights]
        total = None if None in terms else sum(w * v for w, v in zip(self._weights.values(), terms, strict=True))
        row = {"loss": total}
        shown = set(means) if len(self._weights) > 1 else set(means) - set(self._weights)
        return row | {f"loss_{name}" if name.startswith("by_") else name: means[name] for name in sorted(shown)}


def _mean(total: np.ndarray, count: np.ndarray) -> Any:
    means = np.where(count > 0, total / np.where(count > 0, count, 1), np.nan)
    return [finite(v) for v in means] if means.ndim else finite(means)


class Stopwatch:
    """Time that training takes, without the pauses for compiling, validating and saving."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._start += time.monotonic() - start


class MetricsWriter:
    """Appends rows to `metrics.jsonl`, to TensorBoard files and, if asked to, to Weights & Biases.

    Everything is written when `write` returns, so that a full disk is met there and not in somebody's thread.
    """

    def __init__(self, workdir: pathlib.Path, first_step: int, wandb_project: str = "", settings: Row | None = None):
        """`settings` are those that Weights & Biases shows.

        Raises:
          SaveError: if the files cannot be written.
        """
        self._wandb = _start_wandb(workdir, wandb_project, settings or {}) if wandb_project else None
        with writing(workdir / METRICS):
            self._file = open_lines(workdir / METRICS)
            (workdir / TENSORBOARD).mkdir(exist_ok=True)
            self._board = EventsWriter(str(workdir / TENSORBOARD / "events"))
            # Steps that are logged again after a resume replace those of before.
            self._board.write_event(
                Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START))
            )

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        with contextlib.suppress(*(() if kind is None else (OSError,))):
            self._file.close()
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def write(self, row: Row) -> None:
        """Writes a row with `step` in it; a list becomes a scalar for each of its places.

        Raises:
          SaveError: if it cannot be written.
        """
        scalars = {}
        for name, value in row.items():
            parts = {f"{name}/{i:02d}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
            scalars |= {part: scalar for part, scalar in parts.items() if part != "step" and scalar is not None}
        with writing(pathlib.Path(self._file.name)):
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
            values = [Summary.Value(tag=part, simple_value=scalar) for part, scalar in scalars.items()]
            self._board.write_event(Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values)))
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log(scalars, step=row["step"])


def open_lines(path: pathlib.Path) -> TextIO:
    """A file of lines to append to. Half a line, as a killed process may have left it, is cut off."""
    if path.exists():
        whole = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(whole.rfind(b"\n") + 1)
    return path.open("a", encoding="utf-8")


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Makes what goes wrong in writing a SaveError."""
    try:
        yield
    except OSError as error:
        raise SaveError(f"{path}: could not be written: {error}") from error


def import_wandb(project: str) -> Any:
    """The package that logging to `project` needs.

    Raises:
      ValueError: if it is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise ValueError(
            f"wandb_project={project!r} needs the package wandb: python -m pip install wandb, or leave the field out"
        ) from None
    return wandb


def _start_wandb(workdir: pathlib.Path, project: str, settings: Row) -> Any:
    wandb = import_wandb(project)
    # The same run again after a resume.
    path = workdir.absolute()
    run_id = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    return wandb.init(project=project, name=path.name, id=run_id, resume="allow", dir=str(path), config=settings)


def last_row(workdir: pathlib.Path) -> Row | None:
    """The newest row of a workdir's metrics; None if there is none."""
    try:
        lines = (workdir / METRICS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    return json.loads(lines[-1]) if lines else None


def finite(number: Any) -> float | None:
    """A number as JSON knows it: None for one that is not finite."""
    return float(number) if math.isfinite(number) else None


def progress_line(row: Row, steps: int, seconds_left: float, shows_error: bool = True) -> str:
    """One readable line; `shows_error` says whether the standard error of the validation is worth printing."""
    parts = [
        f"step {row['step']:>{len(str(steps))}}/{steps}",
        f"loss {_shown(row['loss'], '.4f')}",
        f"lr {row['learning_rate']:.2e}",
        f"grad norm {_shown(row['grad_norm'], '.3f')}",
        f"{row['tokens_per_second']:,.0f} tokens/s",
    ]
    if "validation_loss" in row:
        error = row.get("validation_loss_stderr") if shows_error else None
        parts.insert(
            2, f"validation {_shown(row['validation_loss'], '.4f')}" + ("" if error is None else f" ± {error:.4f}")
        )
    if row.get("validation_exact_answers") is not None:
        per_evaluation = f"{row['validation_tokens_per_evaluation']:.2f} tokens/evaluation"
        parts.insert(3, f"{row['validation_exact_answers']:.0%} exact answers, {per_evaluation}")
    if "model_flops_utilization" in row:
        parts.append(f"MFU {row['model_flops_utilization']:.1%}")
    if row["skipped_steps"]:
        parts.append(f"{row['skipped_steps']} skipped")
    if row["step"] < steps:
        parts.append(f"{duration(seconds_left)} left")
    return "  ".join(parts)


def _shown(number: float | None, form: str) -> str:
    return "not finite" if number is None else f"{number:{form}}"


def duration(seconds: float) -> str:
    """
    >>> duration(75), duration(8000)
    ('1:15', '2:13:20')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
