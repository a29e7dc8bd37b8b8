"""The child that has the device: says what there is to measure, then measures what it is told to, one after the other.

Answers go, a JSON object a line, to a descriptor of their own, since libraries print what they like. The standard
output and error are a log.
"""

import contextlib
import ctypes
import json
import os
import pathlib
import platform
import signal
import sys
import traceback
from typing import Any

import twotower_jax
from twotower_jax.benchmarks.accelerator import bare
from twotower_jax.benchmarks.accelerator.results import digest

_LONGEST_LINE = 300
_PDEATHSIG = 1  # An option of prctl.


def main(descriptor: int, model: str | None, parts: list[str]) -> None:
    """Until standard input ends: a line with a number asks for that unit."""
    with contextlib.suppress(OSError, AttributeError):  # Linux: not to outlive a parent that was killed.
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    bare.install()
    with os.fdopen(descriptor, "w", encoding="utf-8") as answers:

        def say(answer: dict[str, Any]) -> None:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()

        try:
            from twotower_jax.benchmarks._one_thread import use_one_thread

            use_one_thread()
            from twotower_jax.benchmarks.accelerator import units

            scale = units.scale(model)
            found = units.plan(parts, scale)
            say(_environment(scale.name) | {"units": [_described(unit) for unit in found]})
        except Exception as error:  # Whatever it is, the parent says it in one line.
            traceback.print_exc()
            say({"error": said(error)})
            return
        for line in sys.stdin:
            unit = found[int(line)]
            print(f"--- {unit.part}: {unit.name}", flush=True)
            try:
                say({"result": unit.run()})
            except Exception as error:  # What one unit raises is its result.
                traceback.print_exc()
                say({"error": said(error), "leaves": _broken()})


def said(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:_LONGEST_LINE]


def _environment(model: str) -> dict[str, Any]:
    """What results are kept apart by."""
    import flax
    import jax
    import jaxlib
    import numpy

    device = jax.devices()[0]
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "flax": flax.__version__}
    versions |= {"numpy": numpy.__version__, "python": platform.python_version()}
    versions |= {"twotower_jax": twotower_jax.__version__}
    runtime = " ".join(device.client.platform_version.split())
    return {"device": device.device_kind, "runtime": runtime, "model": model, "versions": versions}


def _described(unit) -> dict[str, Any]:
    root = pathlib.Path(twotower_jax.__file__).parents[1]
    if not (root / "kernels").is_dir():  # Installed: kernels/ lies in the package.
        root = root / "twotower_jax"
    names = [name for name in unit.sources if (root / name).exists()] or [""]
    return {
        "part": unit.part,
        "name": unit.name,
        "parameters": json.loads(json.dumps(unit.parameters)),
        "seconds": unit.seconds,
        "sources": digest(root, names),
    }


def _broken() -> bool:
    """Whether the device no longer computes, as after a kernel's bad access."""
    import jax.numpy as jnp

    try:
        return float(jnp.arange(8.0).sum()) != 28.0
    except Exception:
        traceback.print_exc()
        return True
