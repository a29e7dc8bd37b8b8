"""What tests of several files use: where things are, and the commands as a person runs them."""

import functools
import os
import pathlib
import subprocess
import sys
import tempfile

import warm

ROOT = pathlib.Path(__file__).parents[2]
DATA = ROOT / "tests" / "recorded"  # Recorded numbers and small checkpoints.


def run_command(
    script: str | pathlib.Path,
    *arguments: object,
    cwd: pathlib.Path | None = None,
    timeout: float = 240,
    input: str = "",
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Runs `launch/SCRIPT.py`, or the script of a path, to its end, with some variables of the environment set."""
    path = script if isinstance(script, pathlib.Path) else ROOT / "launch" / f"{script}.py"
    command = [str(path), *map(str, arguments)]
    # What a process reads while it starts and imports, it has to start for.
    new = {name for name, value in environment.items() if os.environ.get(name) != value}
    if any(name.startswith(("JAX_", "PYTHON")) for name in new):
        return subprocess.run(
            [sys.executable, *command],
            cwd=cwd,
            env=os.environ | environment,
            input=input,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        stdin.write(input.encode())
        stdin.seek(0)
        status = _server().run(
            command[0],
            command[1:],
            cwd=cwd or os.getcwd(),
            env=dict(os.environ | environment),
            stdin=stdin.fileno(),
            stdout=stdout.fileno(),
            stderr=stderr.fileno(),
            timeout=timeout,
        )
        said = []
        for stream in (stdout, stderr):
            stream.seek(0)
            said.append(stream.read().decode().replace("\r\n", "\n"))
        return subprocess.CompletedProcess(command, status, *said)


@functools.cache
def _server() -> warm.Server:
    return warm.Server()
