"""Mixtures whose weights change over a run: row by row against sums that are added up literally."""

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower_jax.data import PackedSequences, TrainingData, train_tokenizer
from twotower_jax.data.mixture import Mixture, read_mixture
from twotower_jax.data.mixture_schedule import Place, Run, Schedule, read_course
from twotower_jax.data.opening import Data, Packing


def step(number):
    return Place(Fraction(number), False)


def literal_shares(courses, run):
    """The shares at every step of a run: weights on lines, divided by their sum at the named steps, on lines again."""

    def line(points, at):
        before = max((p for p in points if p[0] <= at), default=min(points))
        after = min((p for p in points if p[0] >= at), default=max(points))
        if before[0] >= after[0]:
            return before[1]
        return before[1] + (after[1] - before[1]) * Fraction(at - before[0], after[0] - before[0])

    own = {
        name: [(0, course)] if isinstance(course, Fraction) else [(place.step(run), weight) for place, weight in course]
        for name, course in courses.items()
    }
    named = sorted({at for points in own.values() for at, _ in points})
    shares = {}
    for name, points in own.items():
        fixed = [(at, line(points, at) / sum(line(other, at) for other in own.values())) for at in named]
        shares[name] = [line(fixed, at) for at in range(run.steps)]
    return shares


def check(courses, run):
    """Every source's rows come one after the other, and after any number of rows are as many as its shares add up to,
    give or take less than the number of sources."""
    schedule, shares = Schedule(courses, run), literal_shares(courses, run)
    wanted, given_rows = dict.fromkeys(courses, Fraction(0)), dict.fromkeys(courses, 0)
    names = list(courses)
    for row in range(run.steps * run.batch_size):
        number, before = schedule.locate(row)
        assert before == given_rows[names[number]]
        given_rows[names[number]] += 1
        for name in names:
            wanted[name] += shares[name][row // run.batch_size]
            assert abs(given_rows[name] - wanted[name]) < max(2, len(names))
    return given_rows, wanted


weight = st.fractions(0, 5, max_denominator=12)
course = st.dictionaries(st.integers(0, 14), weight, min_size=1, max_size=4).filter(lambda points: any(points.values()))
courses = st.lists(st.one_of(st.fractions(Fraction(1, 9), 3, max_denominator=9), course), min_size=1, max_size=4)


@given(courses, st.integers(1, 5), st.integers(1, 16))
def test_rows_follow_the_shares(drawn, batch_size, steps):
    found = {
        f"s{i}": c if isinstance(c, Fraction) else tuple((step(at), w) for at, w in c.items())
        for i, c in enumerate(drawn)
    }
    try:
        Schedule(found, Run(steps, batch_size))
    except ValueError as error:
        assert "no source has a weight at step" in str(error)
        return
    check(found, Run(steps, batch_size))


def test_counts_of_a_long_run():
    """One source fades out, one comes in, one stays: exact sums, counted."""
    found = {
        "code": read_course({"25%": 1, "75%": 3}),
        "old": read_course({"0": 3, "50%": 0}),
        "books": Fraction(1),
    }
    given_rows, wanted = check(found, Run(200, 24))
    assert sum(given_rows.values()) == 4800 and sum(wanted.values()) == 4800
    assert all(abs(given_rows[name] - wanted[name]) < 1 for name in found)
    schedule = Schedule(found, Run(200, 24))
    assert {schedule.locate(row)[0] for row in range(110 * 24, 4800)} == {0, 2}  # of "old" nothing is left


def test_shares_that_stay_are_those_of_a_mixture_without_a_schedule():
    weights = {"a": Fraction(5), "b": Fraction(3), "c": Fraction(2, 7)}
    windows = {name: PackedSequences(np.arange(40), 4, 100) for name in weights}
    plain = Mixture(windows, weights)
    constant = Schedule({name: ((step(3), w), (step(9), w)) for name, w in weights.items()}, Run(20, 6))
    rows = [*range(500), *range(10**14, 10**14 + 200)]
    assert [constant.locate(row) for row in rows] == [plain.locate(row) for row in rows]


def test_any_row_is_found_at_once():
    found = {"a": read_course({"0": 1, "1000000": 9}), "b": Fraction(1), "c": read_course({"10%": 0, "90%": 2})}
    schedule = Schedule(found, Run(2_000_000, 4096))
    for row in (10**9 // 2, 10**9, 7 * 10**9, 10**12):
        near = {}
        for number, before in map(schedule.locate, range(row, row + 300)):
            assert before == near.get(number, before)
            near[number] = before + 1
        assert len(near) > 1


def write(folder, **weights):
    entries = {name: {"path": f"{name}.txt", "weight": weight} for name, weight in weights.items()}
    for name in weights:
        (folder / f"{name}.txt").write_text(f"{name} " * 300)
    (folder / "mixture.json").write_text(json.dumps(entries))
    return folder / "mixture.json"


def open_data(file, run=Run(40, 4)):  # noqa: B008 (frozen)
    tokenizer = train_tokenizer(["a b c " * 20], 300)
    return Data(str(file)).windows(tokenizer, Packing(8, 300, 0.0, 0, None), run)[0]


def test_training_goes_on_to_the_bit_and_not_on_another_course(tmp_path):
    file = write(tmp_path, a={"0": 1, "50%": 0.1}, b={"20": 0, "30": 2.5}, c=0.5)
    assert read_mixture(file)["b"].weight == ((step(20), 0), (step(30), Fraction(5, 2)))
    mixture = open_data(file)
    data = TrainingData(mixture, batch_size=4, seed=1)
    whole = [next(data)["ids"] for _ in range(40)]
    state = json.loads(json.dumps(TrainingData(mixture, batch_size=4, seed=1).get_state()))
    for first in (0, 7, 20, 29, 39):
        for process in range(2):
            again = TrainingData(open_data(file), batch_size=4, seed=1, process_index=process, process_count=2)
            again.set_state(state | {"step": first})
            np.testing.assert_array_equal(next(again)["ids"], whole[first][2 * process :][:2])
    longer = TrainingData(open_data(file, Run(80, 4)), batch_size=4, seed=1)
    with pytest.raises(ValueError, match=r"a\.shares 2/3 at 0, 1/6 at 20, .* -> 2/3 at 0, "):
        longer.set_state(state)
    with pytest.raises(ValueError, match="the mixture's weights change by steps of 4 rows, not 8"):
        TrainingData(mixture, batch_size=8, seed=1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": {}}, "'a': its weights are never more than 0"),
        ({"a": {"0": 0, "9": 0}}, "'a': its weights are never more than 0"),
        ({"a": {"0": -1, "9": 1}}, "'a': weight -1 at 0 is not a number of 0 or more"),
        ({"a": {"0": "1"}}, "'a': weight '1' at 0 is not a number"),
        ({"a": {"0": True}}, "'a': weight True at 0 is not a number"),
        ({"a": {"-1": 1}}, "'a': '-1' is neither a step, such as \"1000\", nor a part of the run"),
        ({"a": {"1e3": 1}}, "'a': '1e3' is neither a step"),
        ({"a": {"101%": 1}}, "'a': '101%' is neither a step"),
        ({"a": {"20": 1, "50%": 2}}, "'a' has two weights at step 20 of a run of 40 steps"),
        ({"a": {"0": 1, "9": 0}, "b": {"9": 0, "20": 1}}, "no source has a weight at step 9"),
    ],
)
def test_courses_that_cannot_be_are_refused_in_a_line(tmp_path, weights, message):
    with pytest.raises(ValueError) as error:
        open_data(write(tmp_path, **weights))
    assert message in str(error.value) and str(error.value).startswith(f"{tmp_path}/mixture.json: ")
    assert "\n" not in str(error.value)


def test_a_course_needs_a_run(tmp_path):
    with pytest.raises(ValueError, match="mixture.json: its weights change over a run, and this is none"):
        open_data(write(tmp_path, a={"0": 1}), None)
