"""Tasks whose questions are made on the spot: prompts, and a function that says whether an answer is right."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from twotower_jax.data import tasks
from twotower_jax.evaluation.answering import Answerer, Asked
from twotower_jax.evaluation.compare import Scores
from twotower_jax.evaluation.suite import TaskScores


class Question(NamedTuple):
    """A question.

    Attributes:
      prompt: its text.
      right: whether an answer is right.
      max_new_tokens, stop: where an answer ends at the latest.
    """

    prompt: str
    right: Callable[[str], bool]
    max_new_tokens: int
    stop: tuple[str, ...] = ()


class MadeTask(NamedTuple):
    """A task: a name, and its questions given whoever answers, who knows how long texts are."""

    name: str
    make: Callable[[Answerer], Sequence[Question]]


def run_made(answerer: Answerer, task: MadeTask, limit: int | None = None) -> tuple[TaskScores, list[Asked]]:
    """The part of a task's questions that are answered rightly, as the metric `acc`; and what was asked."""
    questions = list(task.make(answerer))[:limit]
    asked = [
        Asked(tuple(answerer.encode(q.prompt)) or (answerer.prefix,), q.max_new_tokens, q.stop, temperature=0.0)
        for q in questions
    ]
    right = [float(q.right(a.text)) for q, a in zip(questions, answerer.generate(asked), strict=True)]
    return TaskScores({"acc": Scores.of(right)}, "acc", len(right), 0), asked


def generated_tasks(count: int, seed: int = 0) -> dict[str, MadeTask]:
    """The tasks of data/tasks.py, by name: questions of their test split, of which no model was trained on any."""

    def of(name: str) -> MadeTask:
        def make(answerer: Answerer) -> list[Question]:
            found = []
            for question in tasks.questions(name, "test", count, seed):
                right = functools.partial(tasks.check, name, question.prompt)
                # Room for an answer that is spelled in another way.
                longest = 2 * len(answerer.encode(question.answer)) + 8
                found.append(Question(question.prompt, right, longest))
            return found

        return MadeTask(name, make)

    return {name: of(name) for name in tasks.TASKS}
