"""Tokens per second of every operating point, on the same questions and in the same run.

A first round compiles and is not timed; then rounds go through all points in turn, so that a machine that slows down
slows all of them, and the median of each counts.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from twotower_jax.evaluation.answering import Answerer, Asked


class Speed(NamedTuple):
    """By the clock, and by passes of either tower."""

    tokens_per_second: float
    tokens_per_evaluation: float


def measure(
    points: Mapping[str, Answerer],
    asked: Sequence[Asked],
    rounds: int = 3,
    report: Callable[[str], None] = lambda message: None,
) -> dict[str, Speed]:
    """The speed of each point on these questions, all of which it answers in each round.

    Args:
      report: gets a line after each round.
    """
    answers = {name: point.run(asked) for name, point in points.items()}
    report("speed: compiled")
    seconds: dict[str, list[float]] = {name: [] for name in points}
    for number in range(rounds):
        for name, point in points.items():
            start = time.perf_counter()
            point.run(asked)
            seconds[name].append(time.perf_counter() - start)
        report(f"speed: round {number + 1} of {rounds}")
    found = {}
    for name, given in answers.items():
        tokens, evaluations = (sum(getattr(a, what) for a in given) for what in ("tokens", "evaluations"))
        found[name] = Speed(tokens / statistics.median(seconds[name]), tokens / max(1, evaluations))
    return found
