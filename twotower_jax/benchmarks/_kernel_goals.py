"""What the kernels are to reach on an NVIDIA H200, and how far what was measured is from it."""

from collections.abc import Callable, Iterator
from typing import NamedTuple


class Measured(NamedTuple):
    """One form of one case.

    Attributes:
      case, form: names. seconds: the median. temporaries: bytes. bandwidth: fraction of that of copying.
    """

    case: str
    form: str
    seconds: float
    temporaries: int
    bandwidth: float


# Forms that are compared with: never what is meant by a kernel.
ONE_MATRIX = "products of one matrix, as large"
_BASELINES = ("reference", "stored_states", "dense", "ragged_dot", "mamba_ssm", ONE_MATRIX)


class _Goal(NamedTuple):
    """A goal for every case that `concerns`; `against`: how the name of the form to compare with begins, if any."""

    concerns: Callable[[str], bool]
    words: str
    against: str | None
    found: Callable[[Measured, Measured | None], float]
    wanted: float
    at_most: bool = False
    unit: str = "×"


def _faster(own: Measured, other: Measured) -> float:
    return other.seconds / own.seconds


def _many_rows(case: str) -> bool:
    return case.startswith("expert_mlp") and "experts" not in case


def _few_rows(case: str) -> bool:
    return case.startswith("expert_mlp") and "experts" in case


def _is(op: str) -> Callable[[str], bool]:
    return lambda case: case.split(",")[0] == op


_GOALS = (
    _Goal(_is("ssd"), "as fast as the Triton kernels of mamba_ssm", "mamba_ssm", _faster, 1.5),
    _Goal(_is("two_tower_ssd"), "as fast as with a state stored for each block", "stored_states", _faster, 2.0),
    _Goal(_many_rows, "as fast as jax.lax.ragged_dot", "ragged_dot", _faster, 20.0),
    _Goal(_many_rows, "of the speed of a dense product of as many operations", ONE_MATRIX, _faster, 0.6),
    _Goal(_many_rows, "of temporaries", None, lambda own, _: own.temporaries / 2**30, 0.5, True, "GiB"),
    _Goal(_few_rows, "of the bandwidth of copying, on the weights touched", None, lambda own, _: own.bandwidth, 0.7),
)


def goals(measured: list[Measured]) -> Iterator[str]:
    """Rows of a table: case, our fastest form, what it reaches, what is wanted, or what is missing to say so."""
    for case in dict.fromkeys(row.case for row in measured):
        rows = [row for row in measured if row.case == case]
        kernels = [row for row in rows if not row.form.startswith(_BASELINES)]
        if not kernels:
            continue
        own = min(kernels, key=lambda row: row.seconds)
        for goal in _GOALS:
            if goal.concerns(case):
                yield f"| {case} | {own.form} | {_reached(goal, own, rows)} |"


def _reached(goal: _Goal, own: Measured, rows: list[Measured]) -> str:
    wanted = f"{'at most' if goal.at_most else 'at least'} {goal.wanted:g} {goal.unit}"
    others = [row for row in rows if goal.against is not None and row.form.startswith(goal.against)]
    if goal.against is not None and not others:
        return f"{goal.words}: {goal.against} did not run here | {wanted}"
    other = min(others, key=lambda row: row.seconds, default=None)
    return f"{goal.found(own, other):.2f} {goal.unit} {goal.words} | {wanted}"
