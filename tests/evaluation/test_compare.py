"""Differences and retained quality, operating points, programs within limits, tasks made on the spot, and the plots."""

import math
import random
import socket
import xml.etree.ElementTree
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from twotower_jax.data import tasks
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.evaluation import paper
from twotower_jax.evaluation.answering import Answer, check_likelihood
from twotower_jax.evaluation.compare import Scores, paired, retained
from twotower_jax.evaluation.long_context import long_tasks
from twotower_jax.evaluation.points import parse_points
from twotower_jax.evaluation.report import Evaluation
from twotower_jax.evaluation.running import run_program, without_network
from twotower_jax.evaluation.speed import Speed
from twotower_jax.evaluation.suite import TaskScores
from twotower_jax.evaluation.table import evaluate, find_tasks
from twotower_jax.generation.settings import Settings


def test_paired_differences_are_those_of_a_paired_t_test():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 2, 40).astype(float)
    second = np.where(rng.random(40) < 0.2, 1 - first, first)
    found = paired(Scores.of(first), Scores.of(second))
    test = stats.ttest_rel(second, first)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert found.difference == pytest.approx((second - first).mean())
    assert (found.more, found.less) == (((first == 0) & (second == 1)).sum(), ((first == 1) & (second == 0)).sum())
    assert Scores.of(first).standard_error == pytest.approx(stats.sem(first))
    assert paired(Scores.of([1.0]), Scores.of([0.0]))[:3] == (-1.0, None, None)
    assert paired(Scores(1.0, None, None), Scores.of([1.0])) is None
    with pytest.raises(ValueError, match="not the same ones"):
        paired(Scores.of([1.0, 0.0]), Scores.of([1.0]))


def test_retained_quality_is_the_papers_and_its_interval_holds_as_often_as_it_says():
    tasks = [(Scores(line.ar, None, None), Scores(line.two_tower, None, None)) for line in paper.TASKS]
    assert len(tasks) == 11
    assert round(100 * retained(tasks).fraction, 1) == round(100 * paper.published_retained(), 1) == 98.7
    rng, held = np.random.default_rng(1), 0
    for _ in range(300):
        drawn = []
        for level in (0.9, 0.6):
            first = (rng.random(200) < level).astype(float)
            lost = rng.random(200) < 0.1
            drawn.append((Scores.of(first), Scores.of(np.where(lost, 0.0, first))))
        found = retained(drawn)
        held += found.low <= 0.9 <= found.high
    assert 0.91 <= held / 300 <= 0.98
    assert retained([]) is None
    assert retained([(Scores.of([0.0, 0.0]), Scores.of([1.0, 0.0]))]) is None


def test_points_say_what_differs_from_the_flags():
    base = Settings(sampling=SamplingConfig(block_size=8, steps_per_block=8, confidence_threshold=0.7), seed=5)
    texts = "ar,diffusion,diffusion:block_size=4,diffusion:strategy=factor:factor=1.5,speculative:tolerance=0.1"
    points = parse_points(texts.split(","), base)
    assert [point.mode for point in points] == ["ar", "diffusion", "diffusion", "diffusion", "speculative"]
    assert points[1].settings.sampling == base.sampling and points[1].given == {}
    fourth = points[2].settings.sampling
    assert (fourth.block_size, fourth.steps_per_block, fourth.confidence_threshold) == (4, 4, 0.7)
    factor = points[3]
    assert factor.settings.sampling.strategy_options == (("factor", 1.5),)
    assert factor.given == {"strategy": "factor", "strategy_options": {"factor": 1.5}}
    assert (points[4].settings.tolerance, points[4].settings.seed) == (0.1, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "there is no mode 'fast'"),
        ("diffusion:confidence_threshold", "expected MODE:SETTING=VALUE"),
        ("diffusion:confidence_threshold=2", "must be between 0 and 1"),
        ("diffusion:knob=1", "changes nothing with strategy='confidence'"),
        ("diffusion:block_size=x", "block_size='x' is no int"),
        ("ar:block_size=4", "block_size changes nothing in mode 'ar'"),
        ("ar:knob=4", "knob: there is no such setting"),
        ("diffusion:tolerance=0.1", "tolerance=0.1 changes nothing"),
        ("ar,ar", "'ar' is given twice"),
        ("", "there is no mode ''"),
    ],
)
def test_points_that_are_none_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_points(text.split(","), Settings())


def test_a_likelihood_fits_its_point():
    check_likelihood("blockwise", Settings())
    posterior = SamplingConfig(strategy="posterior")
    check_likelihood("blockwise", Settings(mode="ar", sampling=posterior))
    with pytest.raises(ValueError, match="not posterior"):
        check_likelihood("blockwise", Settings(sampling=posterior))
    with pytest.raises(ValueError, match="not one of context, bound, blockwise"):
        check_likelihood("exact", Settings())


def test_programs_run_within_limits():
    assert run_program("assert sum(range(4)) == 6") == (True, "")
    assert run_program("assert 1 == 2, 'so\\nit is'") == (False, "it is")
    assert run_program("import time\nwhile True: time.sleep(1)", seconds=1) == (False, "timed out")
    assert "MemoryError" in run_program("x = bytearray(3 << 30)", memory_gb=0.5).reason
    assert not run_program("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)").passed
    # What it starts ends with it, and a folder of its own is all that it finds.
    assert run_program(
        "import os\nassert os.listdir('.') == ['program.py']\nassert 'PYTHONPATH' not in os.environ"
    ).passed
    if without_network():
        program = "import socket\nsocket.create_connection(('127.0.0.1', {}), 2)"
        with socket.create_server(("127.0.0.1", 0)) as listener:
            assert "Error" in run_program(program.format(listener.getsockname()[1])).reason


class Words:
    """An answerer to whom every word is a token, and who remembers what the last one says of them."""

    prefix = 1

    def encode(self, text):
        return text.split()


@pytest.mark.parametrize("kind", ["needle", "key_value"])
def test_long_contexts_are_as_long_as_asked_and_hold_the_answer(kind):
    (short, long) = long_tasks(kind, [40, 120], 5)
    assert (short.name, long.name) == (f"{kind}_40", f"{kind}_120")
    places = []
    for task, length in ((short, 40), (long, 120)):
        for question in task.make(Words()):
            words = question.prompt.split()
            assert length - 8 < len(words) <= length
            wanted = question.prompt.rsplit(" The number of ", 1) if kind == "needle" else None
            key = wanted[1].split()[0] if wanted else words[-1]
            text = f"The number of {key} is " if kind == "needle" else f"{key} "
            value = question.prompt.split(text)[1].split()[0].rstrip(".")
            assert question.right(f" {value}.") and question.right(f" {value} and more")
            assert not question.right("") and not question.right(f" {int(value) + 1}")
            places.append(question.prompt.index(f"{text}{value}") / len(question.prompt))
        # From the beginning to the end.
        assert places[-5] < 0.1 and places[-1] > 0.6
        assert places[-5:] == sorted(places[-5:])
    assert [q.prompt for q in long.make(Words())] == [q.prompt for q in long_tasks(kind, [120], 5)[0].make(Words())]
    with pytest.raises(ValueError, match="--lengths=1: is too short"):
        long_tasks(kind, [1], 1)[0].make(Words())


class Solver(Words):
    """Who solves every second question."""

    likelihood, label = "context", None

    def __init__(self):
        self.generated = Counter()

    def generate(self, asked):
        texts = [" ".join(one.prompt) for one in asked]
        solved = [tasks.TASKS[text.partition(":")[0]].solve(text) for text in texts]
        return [Answer(text if i % 2 else "no", 1, 1) for i, text in enumerate(solved)]


def test_generated_tasks_are_checked_by_their_own_rules():
    found = find_tasks(["tasks"], count=6)
    assert [task.name for task in found] == list(tasks.TASKS)
    assert find_tasks(["sort", "key_value"], lengths=[20, 30], count=2)[1].name == "key_value_20"
    done = evaluate(
        found[:4], {"ar": Solver(), "diffusion": Solver()}, ar="ar", folder=None, limit=4, speed_questions=0
    )
    for scores in done.tasks.values():
        assert (scores["ar"].metrics["acc"].value, scores["ar"].questions) == (0.5, 4)
    assert done.results()["retained"]["diffusion"] == 1.0
    with pytest.raises(ValueError, match="'sort' is given twice"):
        find_tasks(["sort", "tasks"])


def _task(right: list[float], metric: str = "acc", better: bool = True) -> TaskScores:
    return TaskScores({metric: Scores.of(right, better)}, metric, len(right), 2)


def test_a_report_counts_each_task_once_and_those_that_are_better_the_higher():
    draw = random.Random(0)
    first, second = ([float(draw.random() < part) for _ in range(50)] for part in (0.8, 0.5))
    tasks = {
        "needle_64": {"ar": _task(first), "diffusion": _task(second)},
        "needle_128": {"ar": _task(second), "diffusion": _task(second)},
        "words": {"ar": _task([3.0, 4.0], "perplexity", False), "diffusion": _task([4.0, 4.0], "perplexity", False)},
    }
    speed = {"ar": Speed(100.0, 1.0), "diffusion": Speed(250.0, 2.0)}
    kinds = {"ar": "context", "diffusion": "bound"}
    done = Evaluation(tasks, ["ar", "diffusion"], "ar", kinds, speed, {"diffusion": 3.0})
    found = done.results()
    means = [sum(values) / 50 for values in (first, second)]
    assert found["retained"] == {"ar": 1.0, "diffusion": pytest.approx(2 * means[1] / sum(means))}
    assert found["speed"]["diffusion"] == {"tokens_per_second": 250.0, "tokens_per_evaluation": 3.0, "over_ar": 2.5}
    assert found["tasks"]["words"]["ar"] == {"perplexity": 3.5, "perplexity_stderr": 0.5}
    assert found["differences"]["needle_64"]["diffusion"]["acc"]["difference"] == pytest.approx(means[1] - means[0])
    assert "| words | perplexity |" in done.markdown() and "| needle_64 | **acc** |" in done.markdown()
    assert math.isclose(done.quality("ar"), sum(means) / 2)
    for picture, circles in ((done.plot(), 4), (done.length_plot("needle"), 6)):
        tags = [element.tag.rpartition("}")[2] for element in xml.etree.ElementTree.fromstring(picture).iter()]
        assert tags.count("circle") == circles
    assert done.length_plot("key_value") is None
    alone = Evaluation({"words": {"mock_ar": _task([1.0])}}, ["mock_ar"], None, {"mock_ar": "context"})
    assert alone.results()["retained"] == {} and "retained" not in alone.markdown()
    xml.etree.ElementTree.fromstring(alone.plot())
