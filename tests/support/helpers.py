"""What tests of several files use: where things are, and the commands as a person runs them."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
DATA = ROOT / "tests" / "recorded"  # Recorded numbers and small checkpoints.


def run_command(script: str, *arguments: object, cwd: pathlib.Path | None = None, **environment: str):
    """Runs `launch/SCRIPT.py` to its end, with some variables of the environment set."""
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / f"{script}.py"), *map(str, arguments)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
