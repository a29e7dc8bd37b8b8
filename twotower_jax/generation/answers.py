"""Questions with exact answers (data/tasks.py), answered: how many are right, and how fast that was.

Modes are compared on the same questions, in turns (timing.py). A first pass of each compiles and is not timed.
"""

import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tokenizers import Tokenizer

from twotower_jax.data import encode
from twotower_jax.data.tasks import check, questions
from twotower_jax.generation.engine import generate
from twotower_jax.generation.settings import Result, Settings
from twotower_jax.generation.timing import in_turns
from twotower_jax.parameters import Params
from twotower_jax.two_tower import TwoTower


class TaskPrompt(NamedTuple):
    """A question of a task, and its prompt's tokens."""

    task: str
    prompt: str
    ids: list[int]


class Examinee(NamedTuple):
    """Who answers."""

    model: TwoTower
    params: Params
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class Marks:
    """What came of some questions in one way to generate.

    Attributes:
      results: one for each question, in order. right: which of them are.
      seconds: of each timed pass over all of them.
      parts: where tasks were timed apart, what came of each.
    """

    asked: Sequence[TaskPrompt]
    results: list[Result]
    right: list[bool]
    seconds: list[float]
    parts: "Mapping[str, Marks]" = dataclasses.field(default_factory=dict)

    @classmethod
    def joined(cls, of_tasks: "Sequence[Marks]") -> "Marks":
        """What came of some tasks, each answered and timed by itself, as one."""
        lists = (
            [item for marks in of_tasks for item in getattr(marks, name)] for name in ("asked", "results", "right")
        )
        seconds = [sum(turn) for turn in zip(*(marks.seconds for marks in of_tasks), strict=True)]
        return cls(*lists, seconds, {marks.asked[0].task: marks for marks in of_tasks})

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)

    @property
    def tokens(self) -> int:
        """New ones, end tokens included."""
        return sum(len(result.tokens) for result in self.results)

    @property
    def tokens_per_second(self) -> float:
        """By the clock, of the median pass; reading the questions counts."""
        return self.tokens / statistics.median(self.seconds)

    @property
    def tokens_per_evaluation(self) -> float | None:
        """New tokens over evaluations of the denoiser; None where it made none."""
        evaluations = sum(result.denoiser_evaluations for result in self.results)
        return self.tokens / evaluations if evaluations else None

    def of(self, task: str) -> "Marks":
        """Those of one task, without times unless it was timed by itself."""
        if task in self.parts:
            return self.parts[task]
        rows = [i for i, asked in enumerate(self.asked) if asked.task == task]
        return Marks([self.asked[i] for i in rows], [self.results[i] for i in rows], [self.right[i] for i in rows], [])


def ask(tokenizer: Tokenizer, tasks: Sequence[str], split: str, count: int, seed: int = 0) -> list[TaskPrompt]:
    """`count` questions of each task, one task after the other in turns."""
    of_tasks = [[(task, q.prompt) for q in questions(task, split, count, seed)] for task in tasks]
    rows = [row for turn in zip(*of_tasks, strict=True) for row in turn]
    ids = encode(tokenizer, [prompt for _, prompt in rows])
    return [TaskPrompt(task, prompt, own.tolist()) for (task, prompt), own in zip(rows, ids, strict=True)]


def is_right(who: Examinee, question: TaskPrompt, result: Result) -> bool:
    """Whether an answer is right; one that does not end is not."""
    text = who.tokenizer.decode(result.tokens[:-1])
    return result.finish_reason == "eos" and check(question.task, question.prompt, text)


def answered(
    who: Examinee, asked: Sequence[TaskPrompt], ways: Mapping[str, Settings], rounds: int = 3
) -> dict[str, Marks]:
    """The questions answered in each way, and timed `rounds` times in turns.

    Raises:
      FloatingPointError: if the model's logits are not finite.
    """
    prompts = [question.ids for question in asked]

    def results_of(settings: Settings) -> list[Result]:
        return list(generate(who.model, who.params, prompts, settings))

    timed = in_turns([functools.partial(results_of, settings) for settings in ways.values()], rounds)
    return {
        name: Marks(asked, results, [is_right(who, *pair) for pair in zip(asked, results, strict=True)], seconds)
        for name, (results, seconds) in zip(ways, timed, strict=True)
    }


def fastest(ar: Marks, ways: Mapping[str, Marks], retained: float) -> str:
    """The name of the way with most tokens per second among those that keep this part of AR's accuracy; where none
    does, among those that keep all but a fiftieth of the most that any keeps."""
    most = max(answers.accuracy for answers in ways.values())
    least = retained * ar.accuracy if most >= retained * ar.accuracy else 0.98 * most
    return max(
        (name for name, answers in ways.items() if answers.accuracy >= least),
        key=lambda name: ways[name].tokens_per_second,
    )
