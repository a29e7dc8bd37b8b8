"""What an answer is worth: functions of an `Answer`, by name.

    @REWARDS.register("short")
    def short(answer):
        return 1.0 / (1 + len(answer.tokens))

A file of one's own that holds this, given as --register, makes --reward=short known.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import NamedTuple

from twotower_jax.data import tasks
from twotower_jax.registry import Registry
from twotower_jax.reinforce.questions import Question


class Answer(NamedTuple):
    """What the model said.

    Attributes:
      question: what was asked.
      text: of the tokens, special ones left out.
      tokens: ids, cut after the first end token.
    """

    question: Question
    text: str
    tokens: list[int]


REWARDS = Registry("reward", Callable)


@REWARDS.register("exact")
def exact(answer: Answer) -> float:
    """1 for a right answer, as its task reads it or, of a file, for the text that is wanted but for space around it."""
    question = answer.question
    if question.task is not None:
        return float(tasks.check(question.task, question.prompt, answer.text))
    return float(answer.text.strip() == question.answer.strip())


@REWARDS.register("words")
def words(answer: Answer) -> float:
    """The share of the words wanted that stand at their places, of the longer of both texts: 1 for all and no more."""
    wanted, said = answer.question.answer.split(), answer.text.split()
    return sum(a == b for a, b in zip(wanted, said, strict=False)) / max(len(wanted), len(said), 1)


def rewards_of(name: str, answers: Sequence[Answer]) -> list[float]:
    """The reward of each answer.

    Raises:
      ValueError: for an unknown name, or a function that fails or gives no finite number.
    """
    reward, found = REWARDS[name], []
    for answer in answers:
        try:
            value = reward(answer)
        except Exception as error:  # the user's own code may raise anything
            raise ValueError(f"reward {name!r}: {type(error).__name__}: {error}") from error
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ValueError(f"reward {name!r} gave {value!r}, and must give a finite number")
        found.append(float(value))
    return found
