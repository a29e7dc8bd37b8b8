"""Trains and asks what a study does not know yet, in pieces: whatever stops it, the same call goes on."""

import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from twotower_jax.atomic import locked_folder
from twotower_jax.checkpoint.load import load
from twotower_jax.data import encode, load_tokenizer
from twotower_jax.data.tasks import questions
from twotower_jax.execution import Execution
from twotower_jax.generation.answers import Examinee, Marks, TaskPrompt, answered, ask
from twotower_jax.outputs import output_folder
from twotower_jax.reinforce.questions import Question
from twotower_jax.reinforce.rewards import Answer, words
from twotower_jax.study.cells import Cell, Part, Study, TrainingRun, points_of, runs_of
from twotower_jax.study.results import Results, answer_key, asked_run
from twotower_jax.train.loop import train

Report = Callable[[str], None]

_TOGETHER = 16  # Questions that are answered together, where speed is not measured.
_ROUNDS = 3  # Timed passes over all questions.


def run(
    study: Study,
    workdir: pathlib.Path,
    parts: Sequence[Part],
    seeds: int,
    report: Report,
    stop: Callable[[], str] = lambda: "",
) -> bool:
    """Runs the cells of some parts that are not finished: a part after the other, and in it a seed after the other.

    Args:
      workdir: new, empty, or of this study. Runs lie in it by their keys.
      stop: is asked at every step of training and between ways to ask; anything but "" ends it.

    Returns:
      whether all cells are finished.

    Raises:
      ValueError: for a workdir of something else, or that another process writes in; and as `train` and `answered`.
    """
    Results.read(study, workdir)  # Before anything is written.
    with output_folder(workdir), locked_folder(workdir, f"{workdir}: another process runs this study"):
        results = Results.read(study, workdir)
        results.write()  # A workdir that is one of a study, whatever happens from here on.
        for part in parts:
            for seed in range(seeds):
                for cell in part.cells:
                    if results.is_finished(part, cell, seed):
                        continue
                    report(f"\n== {part.name}: {cell.name}, seed {seed}\n")
                    if not _run_cell(results, part, cell, seed, report, stop):
                        return False
    return True


def _run_cell(results: Results, part: Part, cell: Cell, seed: int, report: Report, stop: Callable[[], str]) -> bool:
    """Whether it is finished now."""
    for training in runs_of(results.study, cell, seed):
        if results.metrics(training) is None and not _train(results, training, report, stop):
            return False
    missing = [way for way in cell.ways if results.answers(part, cell, seed, way) is None]
    # What is timed in turns is asked at one go.
    for ways in [cell.ways] if part.timed else [(way,) for way in missing]:
        if stop():
            return False
        asked = asked_run(results.study, part, cell, seed, ways[0])
        found = _ask(results, part, cell, asked, ways)
        answers = results.known(asked)["answers"]
        for way, values in found.items():
            answers[answer_key(part, cell, way)] = values
            report(f"{way}: {values['accuracy']:.1%} right")
        results.write()
    return True


def _train(results: Results, run: TrainingRun, report: Report, stop: Callable[[], str]) -> bool:
    """Whether it is trained now."""
    if stop():
        return False
    workdir, known, started = results.path.parent, results.known(run), time.monotonic()
    config = run.config(results.study, workdir)
    result = train(config, workdir / run.key, report, stop=stop)
    known["seconds"] = round(known["seconds"] + time.monotonic() - started, 1)
    if finished := result.step == config.steps:
        metrics = result.metrics
        known["metrics"] = {
            "loss": metrics["loss"],
            # Without what a run minimizes beside it.
            "validation_loss": metrics.get("validation_masked_loss", metrics["validation_loss"]),
            "tokens": config.steps * config.batch_size * config.sequence_length,
        }
    results.write()
    return finished


def _ask(results: Results, part: Part, cell: Cell, run: TrainingRun, ways: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What comes of asking a run in some ways."""
    study, started = results.study, time.monotonic()
    who = _examinee(results.path.parent / run.key)
    asked = ask(who.tokenizer, study.tasks, "test", study.questions)
    right = _right_answers(study)
    # A longer answer than the longest right one, with its end token, is wrong.
    longest = 1 + max(map(len, encode(who.tokenizer, list(right.values()))))
    size = run.config(study, results.path.parent).block_sizes[-1]
    points = [p for p in points_of(cell, size, longest, 1 if part.timed else _TOGETHER) if p.name in ways]
    settings = {point.name: point.settings for point in points}
    found = {}
    for way, marks in answered(who, asked, settings, rounds=_ROUNDS if part.timed else 0).items():
        found[way] = {
            "accuracy": marks.accuracy,
            "words": _words(who, right, asked, marks),
            "tokens_per_evaluation": marks.tokens_per_evaluation,
            "accepted": _accepted(marks),
            "tokens_per_second": marks.tokens_per_second if part.timed else None,
            "questions": len(asked),
            "seconds": round((time.monotonic() - started) / len(ways), 1),
        }
    return found


@functools.lru_cache(maxsize=1)
def _examinee(trained: pathlib.Path) -> Examinee:
    loaded = load(trained, execution=Execution(scan_layers=False))
    return Examinee(loaded.model, loaded.params, load_tokenizer(loaded.tokenizer_folder))


def _right_answers(study: Study) -> dict[tuple[str, str], str]:
    """By task and prompt."""
    asked = {task: questions(task, "test", study.questions) for task in study.tasks}
    return {(task, question.prompt): question.answer for task, found in asked.items() for question in found}


def _words(who: Examinee, right: dict[tuple[str, str], str], asked: Sequence[TaskPrompt], marks: Marks) -> float:
    """The mean share of an answer's words that stand at their places."""
    shares = []
    for question, result in zip(asked, marks.results, strict=True):
        wanted = Question(question.prompt, right[question.task, question.prompt], question.task)
        shares.append(words(Answer(wanted, who.tokenizer.decode(result.tokens), result.tokens)))
    return sum(shares) / len(shares)


def _accepted(marks: Marks) -> float | None:
    """Mean number of drafted tokens kept per block; None in other modes than speculative."""
    if marks.results[0].accepted_draft_tokens is None:
        return None
    return sum(r.accepted_draft_tokens for r in marks.results) / sum(r.blocks for r in marks.results)
