"""The paper's ablations in miniature: trains small models in many ways, asks them questions, and compares.

    python launch/study.py --workdir=runs/study --minutes=60
    python launch/study.py --workdir=runs/study --minutes=0 --report=study.md

Each call goes on where the one before it stopped, and ends after --minutes, at a signal, or when all cells of all
--parts have their --seeds. What is known stands in study.json of the workdir after each training and each way of
asking; --report makes tables and curves of it, and with --minutes=0 of what there is. docs/guide/evaluation.md says
what is compared, and twotower_jax/study/parts.py holds the cells.
"""

import environment  # noqa: F401, first: it says what is missing

# isort: split
import functools
import shlex
import sys
import time

from twotower_jax.train import stopping

stopping.listen()  # now, because the imports below take seconds

from absl import flags

from twotower_jax import command_line

_WORKDIR = command_line.DEFINE_path("workdir", None, "Where the runs go, and study.json.", required=True, local=True)
_PARTS = flags.DEFINE_list("parts", [], "What is asked, several with commas; default: all.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Of each cell.", lower_bound=1)
_MINUTES = flags.DEFINE_float("minutes", None, "After which it stops; 0 runs nothing.", lower_bound=0.0)
_REPORT = command_line.DEFINE_path("report", None, "A Markdown file for tables; curves go beside it.", local=True)

if __name__ == "__main__":
    command_line.read_flags()

from twotower_jax.checkpoint.orbax_steps import SaveError
from twotower_jax.paths import as_path
from twotower_jax.study.parts import default_study
from twotower_jax.study.report import write_report
from twotower_jax.study.results import Results
from twotower_jax.study.run import run

_TIME_IS_OVER = "the time is over"


def main() -> None:
    if _MINUTES.value == 0 and _REPORT.value is None:
        raise ValueError("--minutes=0 runs nothing: give --report=FILE too, or leave it out")
    study, workdir = default_study(), as_path(_WORKDIR.value)
    parts, seeds = study.choose(_PARTS.value) if _PARTS.value else study.parts, _SEEDS.value
    if _REPORT.value is not None and not as_path(_REPORT.value).parent.is_dir():
        raise ValueError(f"--report={_REPORT.value}: its folder does not exist")
    end = None if _MINUTES.value is None else time.monotonic() + 60 * _MINUTES.value

    def stop() -> str:
        over = end is not None and time.monotonic() >= end
        return stopping.requested() or (_TIME_IS_OVER if over else "")

    finished = False
    if _MINUTES.value != 0:
        finished = run(study, workdir, parts, seeds, functools.partial(print, flush=True), stop)
    if _REPORT.value is not None:
        command = f"python launch/study.py {shlex.join(f'--{name}={value}' for name, value in _said().items())}"
        write_report(Results.read(study, workdir), parts, seeds, as_path(_REPORT.value), command)
        print(f"the report is in {_REPORT.value}")
    if not finished and _MINUTES.value != 0:
        why = stopping.requested()
        print(f"stopped ({why or _TIME_IS_OVER}); the same command goes on", file=sys.stderr if why else sys.stdout)
        if why:
            sys.exit(stopping.STOPPED)


def _said() -> dict[str, object]:
    """The flags that decide what the report tells."""
    said = {"seeds": _SEEDS.value}
    return {"parts": ",".join(_PARTS.value)} | said if _PARTS.value else said


if __name__ == "__main__":
    command_line.run(main, statuses={FloatingPointError: command_line.DIVERGED, SaveError: command_line.NOT_SAVED})
