"""How many rows a call waits for: the simulation against what can be said by hand, and what follows from it."""

import numpy as np
import pytest

from twotower_jax.generation.quorum import Quorum, best_part, part_of, simulate


def test_rows_that_are_equally_fast_gain_nothing():
    """A block of each row for five evaluations and one pass; alone, a row never waits."""
    for quorum in (1, 3, 8):
        assert simulate([5], 8, quorum, 0.5) == pytest.approx(1 / 5.5)
    assert simulate([2, 4], 1, 1, 1.0, 400) == pytest.approx(1 / 4, rel=0.05)
    assert best_part([5], 8) == 1.0


def test_two_rows_of_two_speeds():
    """Together: the larger of two numbers is 4 once in four times, else 8."""
    every = simulate([4, 8], 2, 2, 1.0, 400)
    assert every == pytest.approx(1 / (0.25 * 5 + 0.75 * 9), rel=0.05)
    # A pass for nearly every block, of which a row takes 6 evaluations and sees two passes, its own and another's.
    assert 1 / 8 <= simulate([4, 8], 2, 1, 1.0, 400) < 1 / 7


def test_where_rows_differ_few_are_waited_for_and_else_all():
    draw = np.random.default_rng(0)
    wide, narrow = draw.integers(1, 10, 256), draw.integers(14, 16, 256)
    for rows in (8, 64):
        assert best_part(wide, rows) == 3 / 8
        assert best_part(narrow, rows) == 1.0


def test_a_quorum_begins_with_all_and_learns():
    quorum = Quorum()
    assert [quorum.of(alive) for alive in (1, 2, 8)] == [1, 2, 8]
    for count in np.random.default_rng(0).integers(1, 10, 40).tolist():
        quorum.add(count)
    assert [quorum.of(alive) for alive in (8, 64, 1)] == [3, 24, 1]
    for _ in range(4000):
        quorum.add(7)
    assert quorum.of(8) == 8


def test_parts_of_rows():
    assert [part_of(3 / 8, alive) for alive in (1, 2, 3, 4, 8, 16)] == [1, 1, 2, 2, 3, 6]
