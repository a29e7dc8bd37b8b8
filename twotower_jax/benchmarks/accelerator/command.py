"""The command: which unit comes next, how long it may take, and what is noted of it. Nothing here imports JAX."""

import argparse
import contextlib
import json
import os
import pathlib
import select
import signal
import subprocess
import sys
import time
from typing import Any, NoReturn

from twotower_jax.benchmarks import accelerator
from twotower_jax.benchmarks.accelerator import report
from twotower_jax.benchmarks.accelerator.results import Results, unit_key

PARTS = ("errors", "speed", "passes", "train", "generate")
# By default: small ones on processors, which show that everything runs, else the published model's.
MODELS = ("tiny", "nano30b", "nano4b")
_USAGE, _INTERRUPTED = 2, 130
# For a process to import JAX, find its device, and say what there is to measure.
_STARTING = 180.0


def main(script: pathlib.Path, words: list[str]) -> int:
    """Runs the command.

    Args:
      script: launch/benchmark.py, which runs the worker too.
      words: the arguments after `accelerator`.

    Returns:
      The exit status.
    """
    options = _parse(words)
    if options.worker is not None:
        from twotower_jax.benchmarks.accelerator import worker

        worker.main(options.worker, options.model, options.parts)
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        return _measure(script, options)
    except KeyboardInterrupt:
        print("error: interrupted; what was done is kept, and the same command goes on", file=sys.stderr)
        return _INTERRUPTED
    except (ValueError, OSError) as error:
        about = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else error
        print(f"error: {about}", file=sys.stderr)
        return _USAGE


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(_USAGE)


def _parse(words: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="benchmark.py accelerator",
        description=accelerator.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--minutes", type=_minutes, default=8.0, help="After which it ends, compilation included.")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("runs/accelerator"), help="Folder of results and report."
    )
    parser.add_argument("--model", choices=MODELS, help="Whose shapes. Default: tiny on CPUs, nano30b elsewhere.")
    parser.add_argument("--parts", type=_parts, default=list(PARTS), help=f"Only some of {','.join(PARTS)}.")
    parser.add_argument("--only", default="", help="Only units with this text in their names, as --list shows them.")
    parser.add_argument("--list", action="store_true", help="Show what there is to do, and do nothing.")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return minutes


def _parts(text: str) -> list[str]:
    names = text.split(",")
    if unknown := sorted(set(names) - set(PARTS)):
        raise argparse.ArgumentTypeError(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return names


def _measure(script: pathlib.Path, options: argparse.Namespace) -> int:
    end = time.monotonic() + 60 * options.minutes
    options.output.mkdir(parents=True, exist_ok=True)
    results = Results(options.output / "results.json")
    words = [str(script), "accelerator", f"--parts={','.join(options.parts)}"]
    words += [f"--model={options.model}"] if options.model else []
    with Crew([sys.executable, *words], options.output, end) as crew:
        hello = crew.hello()
        units = [unit | {"number": number} for number, unit in enumerate(hello.pop("units"))]
        units = [unit for unit in units if options.only in unit_key(unit)]
        if not units:
            raise ValueError(f"--only={options.only}: no unit has that in its name; --list shows them")
        results.enter(hello)
        print(f"{hello['device']}, {report.versions(hello)}, shapes of {hello['model']}", flush=True)
        if options.list:
            for unit in units:
                state = {None: "done or given up", 0: "to do"}.get(results.tries(unit), "failed, to be tried again")
                print(f"{unit_key(unit)}: at most {unit['seconds']:.0f} s; {state}")
            return 0
        try:
            measure_all(crew, results, units, end)
        finally:
            (options.output / "report.md").write_text(report.text(results.everything["environments"][-1]), "utf-8")
    left = [unit for unit in units if results.tries(unit) is not None]
    failed = sum("error" in results.units.get(unit_key(unit), {}) for unit in units)
    print(f"{len(units) - len(left)} of {len(units)} units are done; {failed} failed; see {options.output}/report.md")
    if left:
        most = max(unit["seconds"] for unit in left)
        print(f"the same command goes on with {unit_key(left[0])}; every unit fits into {most / 60 + 1:.0f} minutes")
    return 0


def measure_all(crew: "Crew", results: Results, units: list[dict[str, Any]], end: float) -> None:
    """Units in their order, those that failed in an earlier call last, while there is as long as they may take."""
    waiting = sorted((tries, number) for number, unit in enumerate(units) if (tries := results.tries(unit)) is not None)
    while True:
        left = end - time.monotonic() - crew.needed_to_start
        found = next((one for one in waiting if units[one[1]]["seconds"] <= left), None)
        if found is None:
            return
        waiting.remove(found)
        unit = units[found[1]]
        results.begin(unit)
        start = time.monotonic()
        try:
            outcome = crew.ask(unit["number"], unit["seconds"])
        except KeyboardInterrupt:
            results.take_back(unit)
            raise
        took = time.monotonic() - start
        results.end(unit, took, **outcome)
        print(f"{unit_key(unit)}: {report.summary(unit['part'], outcome)} ({took:.1f} s)", flush=True)


class Crew:
    """The child that has the device: one at a time, another after one that hung or died."""

    def __init__(self, command: list[str], output: pathlib.Path, end: float):
        """A command that is given `--worker=DESCRIPTOR`, where its answers go, a JSON object a line.

        Args:
          output: folder of its log. end: by `time.monotonic`, when it is to be gone.
        """
        self.command, self.output, self.end = command, output, end
        self.process: subprocess.Popen | None = None
        self.started_in = 0.0

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_) -> None:
        self._kill()

    @property
    def needed_to_start(self) -> float:
        """Seconds before a unit can begin, as far as that is known."""
        return self.started_in if self.process is None else 0.0

    def hello(self) -> dict[str, Any]:
        """What a new child says of the device and of what there is to measure.

        Raises:
          ValueError: if it says nothing in time, or that it cannot.
        """
        start = time.monotonic()
        reading, writing = os.pipe()
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        # Kernels are for one device, and everything of it is ours.
        environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
        environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", str((self.output / "compiled").absolute()))
        environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        with open(self.output / "worker.log", "ab") as log:
            self.process = subprocess.Popen(
                [*self.command, f"--worker={writing}"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(writing,),
                env=environment,
                start_new_session=True,
            )
        os.close(writing)
        self.answers, self.unread = os.fdopen(reading, "rb", buffering=0), b""
        said = self._answer(_STARTING)
        self.started_in = time.monotonic() - start
        if "units" not in said:
            self._kill()
            raise ValueError(f"{said['error']}; see {self.output / 'worker.log'}")
        return said

    def ask(self, number: int, limit: float) -> dict[str, Any]:
        """What becomes of a unit within `limit` seconds, the start of another child not counted: result or error."""
        try:
            if self.process is None:
                self.hello()
            self.process.stdin.write(b"%d\n" % number)
            self.process.stdin.flush()
        except (ValueError, BrokenPipeError) as error:
            self._kill()
            return {"error": f"no process to measure it: {error}"}
        said = self._answer(limit)
        if said.pop("leaves", False):
            self._kill()
        return said

    def _answer(self, limit: float) -> dict[str, Any]:
        end = min(self.end, time.monotonic() + limit)
        while b"\n" not in self.unread:
            ready, _, _ = select.select([self.answers], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self._kill()
                return {"error": f"was ended: it took longer than {limit:g} s"}
            more = self.answers.read(65536)
            if not more:
                status = self.process.wait()
                self._kill()
                how = signal.Signals(-status).name if status < 0 else f"status {status}"
                return {"error": f"ended the process that measured it ({how})"}
            self.unread += more
        line, _, self.unread = self.unread.partition(b"\n")
        return json.loads(line)

    def _kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process.stdin.close()
            self.answers.close()
            self.process = None
