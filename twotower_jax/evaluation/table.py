"""An evaluation from its tasks' names to its results: every task at every point, and then the speeds."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from twotower_jax.evaluation import code, long_context, made, paper, speed, suite
from twotower_jax.evaluation.answering import Answerer, Asked
from twotower_jax.evaluation.made import MadeTask, run_made
from twotower_jax.evaluation.report import Evaluation
from twotower_jax.evaluation.suite import Task, TaskScores

AnyTask = Task | MadeTask

# New tokens of each question where speeds are measured and no task asks for a text.
_NEW_TOKENS = 32


def find_tasks(
    names: Sequence[str],
    *,
    include_path: str | None = None,
    shots: int | None = None,
    run_code: bool = False,
    lengths: Sequence[int] = (),
    count: int = 100,
    seed: int = 0,
) -> list[AnyTask]:
    """The tasks of `--tasks`, in order.

    Args:
      names: `paper` for the eleven of paper.py, or one of them with its shots as PAPER/NAME; `tasks` for all of
        data/tasks.py, or one of them by name; `needle` and `key_value`; those of code.py; anything else is lm_eval's.
      include_path, shots, run_code: of lm_eval's, see `suite.load_task`.
      lengths, count, seed: of those made on the spot: tokens of a context, questions, and what they are drawn from.

    Raises:
      ValueError: in one line, for a name that there is not, or what cannot be had.
    """
    if not names:
        raise ValueError("--tasks is empty; name a task, several with commas")
    found: list[AnyTask] = []
    generated = made.generated_tasks(count, seed)
    for name in names:
        if name in long_context.KINDS:
            found += long_context.long_tasks(name, lengths, count, seed)
        elif name == "tasks":
            found += generated.values()
        elif name in generated and not _is_local(name, include_path):
            found.append(generated[name])
        elif name == "paper":
            found += [_paper_task(line, run_code) for line in paper.TASKS]
        elif name.startswith("paper/"):
            if (line := paper.BY_NAME.get(name.removeprefix("paper/"))) is None:
                raise ValueError(f"--tasks: {name!r}: the paper's are {', '.join(paper.BY_NAME)}")
            found.append(_paper_task(line, run_code))
        else:
            suite.needs_lm_eval()
            spec = code.TASKS[name]() if name in code.TASKS and not _is_local(name, include_path) else name
            loaded = suite.load_task(spec, include_path=include_path, shots=shots, run_code=run_code)
            found.append(Task(name, loaded))
    repeated = [task.name for task in found if [other.name for other in found].count(task.name) > 1]
    if repeated:
        raise ValueError(f"--tasks: {repeated[0]!r} is given twice")
    return found


def _is_local(name: str, include_path: str | None) -> bool:
    """Whether a folder of the user's has a file of that name."""
    return include_path is not None and any(pathlib.Path(include_path).rglob(f"{name}.yaml"))


def _paper_task(line: paper.PaperTask, run_code: bool) -> Task:
    suite.needs_lm_eval()
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for part in line.parts:
        for kind, entries in suite.load_task(part, shots=line.shots, run_code=run_code).items():
            loaded[kind] |= entries
    return Task(line.name, loaded, line.metric)


def evaluate(
    tasks: Sequence[AnyTask],
    answerers: Mapping[str, Answerer],
    *,
    ar: str | None,
    folder: pathlib.Path | None,
    limit: int | None = None,
    chat: bool = False,
    run_code: bool = False,
    max_new_tokens: int = 256,
    max_length: int | None = None,
    speed_questions: int = 16,
    rounds: int = 3,
    report: Callable[[str], None] = lambda message: None,
) -> Evaluation:
    """Asks every question at every point.

    Args:
      answerers: by the point's name. ar: the name of AR's, if there is one.
      folder: of the chat template.
      limit: at most so many questions of each task, or of each part of one.
      max_new_tokens: of questions that do not say it. max_length: tokens of a question at most, see `lm.TwoTowerLM`.
      speed_questions, rounds: how many of the questions are asked how often to measure speeds; 0 questions for none.
      report: gets a line after each task and point.
    """
    found: dict[str, dict[str, TaskScores]] = {}
    asked: list[Asked] = []
    contexts: list[tuple[int, ...]] = []
    lms = {}
    if any(isinstance(task, Task) for task in tasks):
        from twotower_jax.evaluation.lm import TwoTowerLM

        options = {"max_gen_toks": max_new_tokens, "max_length": max_length}
        lms = {point: TwoTowerLM.of(answerer, folder, **options) for point, answerer in answerers.items()}
    for task in tasks:
        for number, (point, answerer) in enumerate(answerers.items()):
            if answerer.label is not None:
                answerer.label = f"{task.name}, {point}"
            if isinstance(task, MadeTask):
                scores, questions = run_made(answerer, task, limit)
            else:
                lm = lms[point]
                lm.asked, lm.contexts = [], []
                scores = suite.run_task(lm, task, limit=limit, chat=chat, run_code=run_code)
                questions = lm.asked
                contexts += lm.contexts if number == 0 else []
            asked += questions if number == 0 else []
            found.setdefault(task.name, {})[point] = scores
            value = scores.metrics[scores.first]
            report(f"{task.name}, {point}: {scores.first} {value.value:.4f} of {scores.questions} questions")
    done = Evaluation(found, list(answerers), ar, {point: one.likelihood for point, one in answerers.items()})
    for point, answerer in answerers.items():
        if answerer.generated["evaluations"]:
            done.generated[point] = answerer.generated["tokens"] / answerer.generated["evaluations"]
    if speed_questions:
        timed = _spread(asked, speed_questions) or [
            Asked(context, _NEW_TOKENS, ignore_end=True) for context in _spread(contexts, speed_questions)
        ]
        done.speed = speed.measure(answerers, timed, rounds, report)
        done.about["speed_questions"] = len(timed)
    return done


def _spread(values: Sequence, count: int) -> list:
    """At most `count` of them, evenly spread."""
    if len(values) <= count:
        return list(values)
    return [values[i * len(values) // count] for i in range(count)]
