"""Shares of a mixture that change over a run: as a file says them, and which source gives which row.

At the steps that any source names, the weights are divided by their sum; between them the shares are straight lines
over the steps, before the first and after the last they stay. All rows of a step are drawn with the shares of that
step. Everything is exact: whole numbers and fractions.
"""

import bisect
import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple


class Run(NamedTuple):
    """How long a run is: its steps, and its rows in each step, of all processes together."""

    steps: int
    batch_size: int


class Place(NamedTuple):
    """A place in a run: the number of a step, or with `relative` a share of all steps."""

    value: Fraction
    relative: bool

    def step(self, run: Run) -> int:
        """The number of the step, rounded down."""
        return int(self.value * run.steps if self.relative else self.value)


# A source's weight where it changes: at some places, in any order.
Course = tuple[tuple[Place, Fraction], ...]


def read_course(raw: Mapping[str, Any]) -> Course:
    """The weights of a source by the place from which they hold, `{"0": 0.7, "50%": 0.2}`.

    Raises:
      ValueError: saying what is wrong.
    """
    course = []
    for text, weight in raw.items():
        if re.fullmatch(r"[0-9]{1,12}", text):
            place = Place(Fraction(text), False)
        elif (found := re.fullmatch(r"([0-9]{1,3}(\.[0-9]{1,9})?)%", text)) and Fraction(found[1]) <= 100:
            place = Place(Fraction(found[1]) / 100, True)
        else:
            raise ValueError(f'{text!r} is neither a step, such as "1000", nor a part of the run, such as "50%"')
        if isinstance(weight, bool) or not isinstance(weight, int | Fraction) or weight < 0:
            raise ValueError(f"weight {weight!r} at {text} is not a number of 0 or more")
        course.append((place, Fraction(weight)))
    if not any(weight for _, weight in course):
        raise ValueError("its weights are never more than 0")
    return tuple(course)


class Schedule:
    """Which source gives which row, where shares change; see `mixture.Mixture` for what it promises.

    Of the rows before step t the k-th source should give C_k(t), and the sources from it on T_k(t): sums over steps of
    straight lines, known at every step; within a step both grow evenly. The first source takes row r whenever C_0
    passes a whole number there. Of the rows that it leaves, the m-th stands where T_1 is m, and the second source takes
    it whenever C_1 passes a whole number there; and so on.
    """

    def __init__(self, courses: Mapping[str, Course | Fraction], run: Run):
        """`courses`: of each source, in the order in which they take rows.

        Raises:
          ValueError: one names a step twice, or at some step no source has a weight.
        """
        self.batch_size = run.batch_size
        own = {name: _by_step(name, course, run) for name, course in courses.items()}
        self.steps = sorted({step for points in own.values() for step in points})
        weights = [[_at(points, step) for points in own.values()] for step in self.steps]
        for step, here in zip(self.steps, weights, strict=True):
            if not sum(here):
                raise ValueError(f"no source has a weight at step {step}")
        self.shares = [[weight / sum(here) for weight in here] for here in weights]
        # Whole numbers from here on, of 1 / _unit rows.
        lengths = [b - a for a, b in zip(self.steps, self.steps[1:], strict=False)]
        self._unit = math.lcm(*(2 * share.denominator for here in self.shares for share in here))
        self._unit *= math.lcm(1, *lengths)
        scaled = [[int(share * run.batch_size * self._unit) for share in here] for here in self.shares]
        # What each source, and the sources from each on, have given when each step of `steps` begins.
        self._own = [_Sum(self.steps, [here[k] for here in scaled]) for k in range(len(own))]
        self._tail = [_Sum(self.steps, [sum(here[k:]) for here in scaled]) for k in range(len(own))]

    def locate(self, row: int) -> tuple[int, int]:
        """The number of the source that gives a row, and how many rows it has given before."""
        for number in range(len(self._own) - 1):
            before = self._taken(number, row)
            if self._taken(number, row + 1) > before:
                return number, before
            row -= before
        return len(self._own) - 1, row

    def _taken(self, number: int, rows: int) -> int:
        """How many of the first `rows` rows that come to a source it takes."""
        own, tail, wanted = self._own[number], self._tail[number], rows * self._unit
        step = tail.step_of(wanted)
        if step is None:  # more rows than are meant to come, by rounding
            return own.before(self.steps[-1]) // self._unit
        passed, within = wanted - tail.before(step), tail.during(step)
        return (own.before(step) + passed * own.during(step) // within) // self._unit

    def identity(self) -> list[str]:
        """Each source's shares, by the step that they are of."""
        return [
            ", ".join(f"{here[k]} at {step}" for step, here in zip(self.steps, self.shares, strict=True))
            for k in range(len(self._own))
        ]


class _Sum:
    """The sum over steps of a number that is known at some and lies on straight lines between them."""

    def __init__(self, steps: list[int], values: list[int]):
        """`values` are divisible by twice the distance of any two neighbors among `steps`."""
        self._steps, self._values = steps, values
        self._sums = [values[0] * steps[0]]
        for i in range(1, len(steps)):
            self._sums.append(self._partial(i - 1, steps[i] - steps[i - 1]))

    def during(self, step: int) -> int:
        """The number at a step."""
        i = bisect.bisect_right(self._steps, step) - 1
        if i < 0 or i == len(self._steps) - 1:
            return self._values[max(i, 0)]
        first, last = self._values[i], self._values[i + 1]
        return first + (last - first) * (step - self._steps[i]) // (self._steps[i + 1] - self._steps[i])

    def before(self, step: int) -> int:
        """The sum over all steps before."""
        i = bisect.bisect_right(self._steps, step) - 1
        return self._values[0] * step if i < 0 else self._partial(i, step - self._steps[i])

    def step_of(self, wanted: int) -> int | None:
        """The last step before which the sum is `wanted` or less; None if it stays so for ever."""
        i = bisect.bisect_right(self._sums, wanted) - 1
        if i < 0:
            return wanted // self._values[0]
        if i == len(self._steps) - 1:
            return self._steps[i] + (wanted - self._sums[i]) // self._values[i] if self._values[i] else None
        low, high = self._steps[i], self._steps[i + 1]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.before(middle) <= wanted else (low, middle)
        return low

    def _partial(self, i: int, steps: int) -> int:
        """The sum up to some steps after the i-th of the known ones."""
        total = self._sums[i] + steps * self._values[i]
        if i + 1 < len(self._steps):
            slope = self._values[i + 1] - self._values[i]
            total += slope * steps * (steps - 1) // (2 * (self._steps[i + 1] - self._steps[i]))
        return total


def _by_step(name: str, course: Course | Fraction, run: Run) -> dict[int, Fraction]:
    if isinstance(course, Fraction):
        return {0: course}
    points: dict[int, Fraction] = {}
    for place, weight in course:
        if (step := place.step(run)) in points:
            raise ValueError(f"{name!r} has two weights at step {step} of a run of {run.steps} steps")
        points[step] = weight
    return points


def _at(points: Mapping[int, Fraction], step: int) -> Fraction:
    """The weight at a step, on straight lines between those that are given."""
    steps = sorted(points)
    i = bisect.bisect_right(steps, step) - 1
    if i < 0 or i == len(steps) - 1:
        return points[steps[max(i, 0)]]
    part = Fraction(step - steps[i], steps[i + 1] - steps[i])
    return points[steps[i]] * (1 - part) + points[steps[i + 1]] * part
