"""Scores and what can be said of their differences.

Two ways to generate are compared on the same questions: the difference of each question's scores has a mean and a
standard error of its own, which is mostly less than that of either (Miller 2024, arXiv 2411.00640). Intervals are
Student's t for the mean.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

_LEVEL = 0.95


class Scores(NamedTuple):
    """A metric over a task's questions.

    Attributes:
      value: of all of them. standard_error: its own; None if not known.
      questions: each one's value, if `value` is their mean.
      higher_is_better: whether it is.
    """

    value: float
    standard_error: float | None
    questions: tuple[float, ...] | None
    higher_is_better: bool = True

    @classmethod
    def of(cls, questions: Sequence[float], higher_is_better: bool = True) -> "Scores":
        """The mean of the questions' values. One question has no standard error."""
        values = np.asarray(questions, np.float64)
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
        return cls(float(values.mean()), error, tuple(values.tolist()), higher_is_better)


class Paired(NamedTuple):
    """The mean difference of two scores of the same questions, and its 95 % interval.

    Attributes:
      low, high: None where there is only one question.
      more, less: questions with more in the second, and with less.
    """

    difference: float
    low: float | None
    high: float | None
    more: int
    less: int


def paired(first: Scores, second: Scores) -> Paired | None:
    """second − first; None where the values of the questions are not known.

    Raises:
      ValueError: if these are other questions.
    """
    if first.questions is None or second.questions is None:
        return None
    if len(first.questions) != len(second.questions):
        raise ValueError(f"{len(first.questions)} and {len(second.questions)} questions are not the same ones")
    differences = np.asarray(second.questions) - np.asarray(first.questions)
    low, high = _interval(float(differences.mean()), differences)
    return Paired(float(differences.mean()), low, high, int((differences > 0).sum()), int((differences < 0).sum()))


class Retained(NamedTuple):
    """The part of AR's quality that another point keeps, and its 95 % interval."""

    fraction: float
    low: float | None
    high: float | None


def retained(pairs: Sequence[tuple[Scores, Scores]]) -> Retained | None:
    """As the published table has it: the mean of the second scores over the mean of the first, each task counting once.

    The interval is that of the ratio to first order (the delta method), tasks being independent of each other and each
    one's questions paired.

    Args:
      pairs: of each task AR's scores and the other point's; higher is better in all of them.

    Returns:
      None without tasks, or where AR has nothing to keep.
    """
    first, second = (sum(pair[i].value for pair in pairs) for i in (0, 1))
    if not pairs or first <= 0:
        return None
    ratio, variance = second / first, 0.0
    for a, b in pairs:
        if a.questions is None or b.questions is None or len(a.questions) < 2:
            return Retained(ratio, None, None)
        residuals = np.asarray(b.questions) - ratio * np.asarray(a.questions)
        variance += float(residuals.var(ddof=1)) / len(residuals)
    half = float(stats.norm.ppf((1 + _LEVEL) / 2)) * math.sqrt(variance) / first
    return Retained(ratio, ratio - half, ratio + half)


def _interval(mean: float, values: np.ndarray) -> tuple[float | None, float | None]:
    if len(values) < 2:
        return None, None
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + _LEVEL) / 2, len(values) - 1)) * error
    return mean - half, mean + half
