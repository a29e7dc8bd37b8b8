"""What a run tells of itself: rows of metrics.jsonl and lines for the person watching."""

import contextlib
from collections.abc import Callable

from twotower_jax.train.config import TrainConfig
from twotower_jax.train.metrics import MetricsWriter, Row, Stopwatch, finite, progress_line
from twotower_jax.train.step import StepMetrics


class Log:
    """Counts the tokens and the time since its last row, and writes the next one.

    Args:
      writer: of rows; None on processes that write none.
      peak: FLOP/s of all devices of the run; None where it is not known.
      shows_error: whether validation has a standard error worth printing.
    """

    def __init__(
        self,
        config: TrainConfig,
        writer: MetricsWriter | None,
        report: Callable[[str], None],
        *,
        peak: float | None,
        shows_error: bool,
    ):
        self._config, self._writer, self._report = config, writer, report
        self._peak, self._shows_error = peak, shows_error
        self._tokens_per_step = config.batch_size * config.sequence_length
        self._stopwatch, self._tokens = Stopwatch(), 0

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Time that is not training's: compiling, validating, saving."""
        return self._stopwatch.paused()

    def count_step(self) -> None:
        """One more step has been made."""
        self._tokens += self._tokens_per_step

    def write(
        self,
        step: int,
        means: Row,
        metrics: StepMetrics,
        skipped: int,
        step_flops: float,
        validate: Callable[[], Row] | None = None,
    ) -> None:
        """Writes a row, with the validation losses if there is a `validate`, and begins to count anew.

        Args:
          means: of the losses since the last row. metrics: of the last step. skipped: steps left out in all.
          step_flops: multiplications and additions of one step.
        """
        seconds, steps = self._stopwatch.seconds, self._config.steps
        row = {
            "step": step,
            "loss": means.pop("loss"),
            "learning_rate": float(metrics.learning_rate),
            "grad_norm": finite(metrics.grad_norm),
            "tokens_per_second": self._tokens / seconds,
            "skipped_steps": skipped,
            **means,
        }
        seconds_per_step = seconds * self._tokens_per_step / self._tokens
        if self._peak:
            row["model_flops_utilization"] = step_flops / seconds_per_step / self._peak
        if validate is not None:
            with self.paused():
                row |= {f"validation_{name}": value for name, value in validate().items()}
        if self._writer is not None:
            self._writer.write(row)
        self._report(progress_line(row, steps, (steps - step) * seconds_per_step, self._shows_error))
        self._tokens = 0
        self._stopwatch.restart()
