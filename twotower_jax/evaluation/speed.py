"""Tokens per second of every operating point, on the same questions and in the same run.

A first round compiles and is not timed; of the others, which go through all points in turn, the median counts.
"""

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from twotower_jax.evaluation.answering import Answerer, Asked
from twotower_jax.generation.timing import in_turns


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
      report: gets a line after each run.
    """
    ways = [functools.partial(point.run, asked) for point in points.values()]
    found = {}
    for name, (given, seconds) in zip(points, in_turns(ways, rounds, lambda m: report(f"speed: {m}")), strict=True):
        tokens, evaluations = (sum(getattr(a, what) for a in given) for what in ("tokens", "evaluations"))
        found[name] = Speed(tokens / statistics.median(seconds), tokens / max(1, evaluations))
    return found
