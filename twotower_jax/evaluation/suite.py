"""lm_eval's tasks at every operating point: the same questions with the same examples, and each question's scores.

Tasks are found by name in `--include_path` and then among lm_eval's own. Reading all of those takes 13 s of the
processor, so only the folders that mention a name are read.
"""

import functools
import importlib.util
import pathlib
import random
import re
from typing import Any, NamedTuple

import numpy as np

from twotower_jax.evaluation.compare import Scores

# The seed of examples shown before a question, and of whatever else a task draws.
_SEED = 1234
# Lines of a task file that name a task, a group or a tag, alone or in a list.
_NAMING = re.compile(r"^\s*(?:(?:task|group|tag)\w*:|-)[^\n]{0,200}$", re.MULTILINE)
# Draws of the standard error of scores that are no means.
_DRAWS = 1000


class TaskScores(NamedTuple):
    """What one task got at one point.

    Attributes:
      metrics: by name: of a task's only filter the metric's own, else METRIC,FILTER.
      first: the metric that stands for the task.
      questions: how many.
      shots: examples before each question.
    """

    metrics: dict[str, Scores]
    first: str
    questions: int
    shots: int


class Task(NamedTuple):
    """A task of lm_eval, or several that count as one.

    Attributes:
      name: under which results stand.
      loaded: what `TaskManager.load` gives.
      first: the metric that stands for it; None for the first that the task names.
    """

    name: str
    loaded: dict[str, Any]
    first: str | None = None


def needs_lm_eval() -> None:
    """Says what to install, if lm_eval is not there.

    Raises:
      ValueError: then.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("the package 'lm_eval' is not installed; install it: pip install -e '.[eval]'")


@functools.cache
def _manager(folders: tuple[str, ...]) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=False)


@functools.cache
def _own_files() -> dict[str, str]:
    """What lm_eval's folders of tasks say of names: lines of their files that hold one."""
    import lm_eval.tasks

    root, found = pathlib.Path(lm_eval.tasks.__file__).parent, {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        texts = (file.read_text(encoding="utf-8", errors="replace") for file in folder.rglob("*yaml") if file.is_file())
        found[str(folder)] = "\n".join(line for text in texts for line in _NAMING.findall(text))
    return found


def _own_folders(name: str) -> list[str]:
    """lm_eval's folders of tasks that mention a name."""
    wanted = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
    return [folder for folder, text in _own_files().items() if wanted.search(text)]


def load_task(
    spec: str | dict[str, Any],
    *,
    include_path: str | None = None,
    shots: int | None = None,
    run_code: bool = False,
) -> dict[str, Any]:
    """A task, group or tag, or one's own as a dictionary of what lm_eval's files hold.

    Args:
      shots: examples before each question; None leaves what the task says.
      run_code: whether programs that the model writes may be run.

    Raises:
      ValueError: in one line, for a name that there is not, a data set that cannot be had, a package that is missing, a
        task file with a mistake, or programs that may not be run.
    """
    name = spec if isinstance(spec, str) else spec["task"]
    loaded = _load(spec, name, include_path)
    for task_name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) and not run_code:
            raise ValueError(
                f"task {task_name} runs programs that the model writes; allow it with --run_generated_code"
            )
        if task.get_config("num_fewshot") is None or shots is not None:
            task.set_config(key="num_fewshot", value=shots or 0)
    return loaded


def _load(spec: str | dict[str, Any], name: str, include_path: str | None) -> dict[str, Any]:
    if include_path is not None and not pathlib.Path(include_path).is_dir():
        raise ValueError(f"--include_path={include_path}: there is no such folder")
    ours = (include_path,) if include_path is not None else ()
    try:
        manager = _manager(ours)
        if isinstance(spec, str) and name not in manager.all_tasks and not name.endswith((".yaml", ".yml")):
            manager = _manager((*_own_folders(name), *ours))
            if name not in manager.all_tasks:
                where = f" in {include_path} and" if include_path is not None else ""
                raise ValueError(f"--tasks: there is no task {name!r}{where} in lm_eval {_version()}")
        return manager.load([spec])
    except ModuleNotFoundError as error:
        raise ValueError(f"task {name}: {_line(error)}") from None
    except ValueError as error:
        if str(error).startswith("--tasks"):
            raise
        raise ValueError(f"task {name}: {_line(error)}") from None
    except Exception as error:  # datasets, huggingface_hub, yaml and jinja raise many kinds here
        data = _missing_data(error)
        raise ValueError(f"task {name}: {data or f'{type(error).__name__}: {_line(error)}'}") from None


def _missing_data(error: Exception) -> str:
    """What to say of a data set that is neither on disk nor to be had, or "" if the error is another one."""
    chain, found = error, ""
    while chain is not None:
        kinds = {kind.__name__ for kind in type(chain).__mro__}
        if kinds & {"ConnectionError", "OfflineModeIsEnabled", "DatasetNotFoundError", "LocalEntryNotFoundError"}:
            named = re.search(r"'([\w.-]+/[\w.-]+)'|datasets/([\w.-]+/[\w.-]+)", str(chain))
            found = found or (next(filter(None, named.groups()), "") if named else "")
            if found or chain.__cause__ is None and chain.__context__ is None:
                which = f"its data set {found}" if found else "its data set"
                return f"{which} is not on disk and cannot be downloaded here ({_line(chain)})"
        if isinstance(chain, FileNotFoundError):
            return f"its data are not there: {_line(chain)}"
        chain = chain.__cause__ or chain.__context__
    return ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


def run_task(
    lm: Any, task: Task, *, limit: int | None = None, chat: bool = False, run_code: bool = False
) -> TaskScores:
    """Asks every question of a task.

    Args:
      lm: an lm_eval model.
      limit: at most so many questions of each of its parts.
      chat: put questions into the chat template.
    """
    from lm_eval.evaluator import evaluate

    for part in task.loaded["tasks"].values():
        part.set_fewshot_seed(_SEED)
    random.seed(_SEED)
    np.random.seed(_SEED)
    found = evaluate(
        lm=lm,
        task_dict=task.loaded,
        limit=limit,
        bootstrap_iters=_DRAWS,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        confirm_run_unsafe_code=run_code,
    )
    return _collect(task, found)


def _collect(task: Task, found: dict[str, Any]) -> TaskScores:
    """The scores of a task, those of all questions of its parts together."""
    better, filters, parts = {}, {}, list(task.loaded["tasks"])
    values: dict[tuple[str, str], dict[Any, Any]] = {}
    for part in parts:
        better |= found["higher_is_better"].get(part, {})
        for sample in found["samples"][part]:
            for metric in sample["metrics"]:
                filters.setdefault(metric, {})[sample["filter"]] = None
                values.setdefault((metric, sample["filter"]), {})[part, sample["doc_id"]] = sample[metric]
    alone = len({name for names in filters.values() for name in names}) == 1
    metrics = {}
    for metric, names in filters.items():
        for name in names:
            scores = _scores(task, found, metric, name, values[metric, name], better.get(metric, True))
            if scores is not None:
                metrics[metric if alone else f"{metric},{name}"] = scores
    if not metrics:
        raise ValueError(f"task {task.name}: none of its metrics is a number")
    first = task.first if task.first in metrics else next(iter(metrics))
    questions = len({place for of_metric in values.values() for place in of_metric})
    shots = max(int(part.get_config("num_fewshot") or 0) for part in task.loaded["tasks"].values())
    return TaskScores(metrics, first, questions, shots)


def _scores(
    task: Task, found: dict[str, Any], metric: str, name: str, values: dict[Any, Any], better: bool
) -> Scores | None:
    """A metric's value; with the questions' own values where it is their mean."""
    from lm_eval.api.metrics import mean

    tasks = task.loaded["tasks"]
    means = all(part.aggregation().get(metric, mean) is mean for part in tasks.values())
    numbers = list(values.values())
    if means and all(isinstance(value, bool | int | float | np.number) for value in numbers):
        return Scores.of([float(value) for value in numbers], higher_is_better=bool(better))
    if len(tasks) > 1:
        return None  # What lm_eval makes of the parts' is a matter of each group.
    told = found["results"][next(iter(tasks))]
    value, error = told.get(f"{metric},{name}"), told.get(f"{metric}_stderr,{name}")
    if not isinstance(value, int | float):
        return None
    error = float(error) if isinstance(error, int | float) else None
    return Scores(float(value), error, None, bool(better))
