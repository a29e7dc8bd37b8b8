"""Questions with known answers, in the order in which a run asks them."""

import itertools
import pathlib
import random
from collections.abc import Sequence
from typing import NamedTuple

from twotower_jax.data import tasks
from twotower_jax.jsonl import read_rows
from twotower_jax.texts import check_text


class Question(NamedTuple):
    """What is asked.

    Attributes:
      prompt, answer: texts; the answer that is wanted follows the prompt.
      task: the name of one of `data.tasks`, which checks answers; None for a question of a file.
    """

    prompt: str
    answer: str
    task: str | None = None


def from_tasks(names: Sequence[str], count: int, seed: int) -> list[Question]:
    """Questions of the tasks' training splits, all tasks alike often; a smaller count gives the first of them.

    Raises:
      ValueError: for a task that there is not.
    """
    for name in names:
        if name not in tasks.TASKS:
            raise ValueError(f"there is no task {name!r}; choose one of {', '.join(tasks.TASKS)}")
    asked = itertools.islice(tasks.stream(seed, 0, "train", tuple(names)), count)
    # A prompt begins with the name of its task.
    return [Question(prompt, answer, prompt.partition(":")[0]) for prompt, answer in asked]


def all_of_file(path: str | pathlib.Path) -> list[Question]:
    """Rows {"prompt", "response"} of a JSON Lines file, in their order.

    Raises:
      ValueError: naming the file and the row, for one that is none; OSError if the file cannot be read.
    """
    rows = []
    for number, row in enumerate(read_rows(path), 1):
        texts = row.get("prompt"), row.get("response")
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f'{path}, row {number}: expected "prompt" and "response", texts that are not empty')
        rows.append(Question(*(check_text(text, f"{path}, row {number}") for text in texts)))
    return rows


def from_file(path: str | pathlib.Path, count: int, seed: int) -> list[Question]:
    """The rows of a file, shuffled anew each time that all have been asked.

    Raises:
      ValueError, OSError: as `all_of_file`.
    """
    rows = all_of_file(path)
    draw, asked = random.Random(seed), []
    while len(asked) < count:
        asked += draw.sample(rows, len(rows))
    return asked[:count]
