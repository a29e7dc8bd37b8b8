"""This program against transformers (extra `parity`): the same weights, the same tokens, float32, on a CPU.

    python launch/benchmark.py peers
    python launch/benchmark.py peers --models=a --parts=ar1,ar8
    python launch/benchmark.py peers --layouts=flat,stacked

Backbones with random weights are written in the published layout (_peer_models.py) and loaded by both. Each part runs
in a process of its own, both programs in turns and on one core: what counts is the median over turns of the ratio
of processor seconds, which other work on the machine changes less than the clock. What both computed is compared.

    forward    logits of 1 × 512 tokens
    gradient   forward and backward, 2 × 512 tokens, all weights
    ar1, ar8   the most probable next tokens one after another after prompts of 32, prompts included, 1 row and 8
    memory     the most that a process holds while it computes that gradient again, weights included
    blocks     a denoiser evaluation of 16 tokens in steps of AR, by the clock on two threads: how many tokens an
               evaluation has to commit until diffusion is the faster one

`loaded` is the layout of layers that `load()` chooses, `flat` one by one, `stacked` repeated ones scanned.
"""

import contextlib
import ctypes
import importlib.metadata
import multiprocessing
import os
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from twotower_jax.benchmarks._one_thread import use_one_core
from twotower_jax.benchmarks._peer_models import BLOCK, MODELS, Ours, Theirs, Work, write_backbone

# Each piece of work that both do: a method, rows and tokens, and what it is called.
_TIMED = {
    "forward": ("forward", 1, 512, "forward 1×512"),
    "gradient": ("gradient", 2, 512, "forward and backward 2×512"),
    "ar1": ("continuation", 1, 32, "AR, 32 tokens, batch 1"),
    "ar8": ("continuation", 8, 32, "AR, 32 tokens, batch 8"),
}
_PARTS = (*_TIMED, "memory", "blocks")
_LAYOUTS = {"loaded": None, "flat": False, "stacked": True}


def define_flags() -> None:
    flags.DEFINE_list("models", list(MODELS), "Of these.")
    flags.DEFINE_list("parts", list(_PARTS), "Of these.")
    flags.DEFINE_list("layouts", ["loaded"], f"Of {', '.join(_LAYOUTS)}.")
    flags.DEFINE_integer("turns", 5, "How often each piece of work is timed.", lower_bound=1)


def main() -> None:
    values = flags.FLAGS
    for name, known in (("models", MODELS), ("parts", _PARTS), ("layouts", _LAYOUTS)):
        if unknown := sorted(set(values[name].value) - set(known)):
            raise ValueError(f"--{name}: there is no {unknown[0]!r}; there are {', '.join(known)}")
    print(f"jax {jax.__version__}, {_versions()}, {os.cpu_count()} CPUs, median of {values.turns} turns\n")
    print("| model | work | layers | ours | theirs | theirs / ours | compared |")
    print("|---|---|---|--:|--:|--:|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for model in values.models:
            folder = pathlib.Path(scratch) / model
            _apart(_write, model, folder)
            for layout in values.layouts:
                for part in values.parts:
                    work, *columns = _apart(_measure, part, folder, _LAYOUTS[layout], values.turns)
                    print(f"| {model} | {work} | {layout} | {' | '.join(columns)} |", flush=True)


def _versions() -> str:
    """What it is measured against.

    Raises:
      ValueError: if that is not installed.
    """
    try:
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    except importlib.metadata.PackageNotFoundError as error:
        command = "pip install torch transformers"
        raise ValueError(f"{error.name} is not installed, with which this compares: {command}") from None


def _apart(function: Callable, *arguments: Any) -> Any:
    """What a function returns in a process of its own."""
    queue = (context := multiprocessing.get_context("spawn")).SimpleQueue()
    process = context.Process(target=_told, args=(queue, function, arguments))
    process.start()
    process.join()
    if process.exitcode:
        raise ValueError(f"{function.__name__.strip('_')}{arguments} ended with status {process.exitcode}")
    return queue.get()


def _told(queue: Any, function: Callable, arguments: Sequence[Any]) -> None:
    queue.put(function(*arguments))


def _write(model: str, folder: pathlib.Path) -> None:
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        write_backbone(MODELS[model], folder)


def _measure(part: str, folder: pathlib.Path, scan_layers: bool | None, turns: int) -> tuple[str, ...]:
    """A row of the table, without model and layout."""
    if part == "memory":
        ours, theirs = (_apart(_peak, folder, scan_layers, own) for own in (True, False))
        peaks = (f"{size / 1e9:.2f} GB" for size in (ours, theirs))
        return f"{_TIMED['gradient'][-1]}, peak", *peaks, f"{theirs / ours:.2f}", ""
    if part == "blocks":
        seconds, _ = _in_turns(Ours(folder, scan_layers).evaluation(), time.perf_counter, 4 * turns)
        evaluation, step = map(min, seconds)
        times = f"{evaluation * 1e3:.2f} ms, of AR {step * 1e3:.2f} ms"
        return f"evaluation of {BLOCK} tokens", times, "", "", f"{evaluation / step:.2f} steps of AR"
    use_one_core()
    method, rows, length, name = _TIMED[part]
    works = [getattr(one, method)(rows, length) for one in (Ours(folder, scan_layers), Theirs(folder))]
    seconds, found = _in_turns(works, time.process_time, turns)
    times = (f"{statistics.median(of_one):.3f} s" for of_one in seconds)
    ratio = statistics.median(theirs / ours for ours, theirs in zip(*seconds, strict=True))
    return name, *times, f"{ratio:.2f}", _compared(*found)


def _in_turns(works: Sequence[Work], clock: Callable[[], float], turns: int) -> tuple[list[list[float]], list]:
    """Seconds of each piece of work in each turn after a first one, and what each has returned."""
    found, seconds = [work() for work in works], [[] for _ in works]
    for _ in range(turns):
        for work, of_work in zip(works, seconds, strict=True):
            start = clock()
            work()
            of_work.append(clock() - start)
    return seconds, found


def _compared(ours: np.ndarray, theirs: np.ndarray) -> str:
    if ours.dtype.kind == "i":
        return f"{np.mean(ours == theirs):.0%} of the tokens the same"
    return f"at most {np.max(np.abs(ours - theirs)):.1g} apart, of values to {np.max(np.abs(theirs)):.2g}"


def _peak(folder: pathlib.Path, scan_layers: bool | None, own: bool) -> int:
    """Bytes that this process holds at most while it computes the gradient once more, weights included."""
    use_one_core()
    method, rows, length, _ = _TIMED["gradient"]
    work = getattr(Ours(folder, scan_layers) if own else Theirs(folder), method)(rows, length)
    work()
    ctypes.CDLL(None).malloc_trim(0)  # What compiling took is no part of it.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    work()
    return int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
