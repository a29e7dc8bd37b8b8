"""Programs that a model wrote, run within limits: a process of its own, so much time and memory, no network where the
system lets a process do without one (a network namespace of its own, Linux).

This keeps mistakes from doing harm. It is no prison: a program that means harm may read files and write where its user
may. Evaluate models that you do not trust in a container or a virtual machine.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from typing import NamedTuple

# In the new process, before the program: limits, a network of its own, and then the program takes its place.
_BEGIN = """
import os, resource, sys
seconds, bytes_, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
def limit(what, value):
    try:
        resource.setrlimit(what, (value, value))
    except (ValueError, OSError):
        pass
try:
    os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET)
except (AttributeError, OSError):
    if sys.argv[4] == "1":
        print("no network namespace", file=sys.stderr)
        sys.exit(97)
limit(resource.RLIMIT_CPU, seconds)
limit(resource.RLIMIT_AS, bytes_)
limit(resource.RLIMIT_FSIZE, 16 << 20)
limit(resource.RLIMIT_CORE, 0)
os.execv(sys.executable, [sys.executable, "-I", path])
"""
_NO_NETWORK = 97


class Outcome(NamedTuple):
    """How a program ended: `passed` if with status 0; else `reason` says "timed out" or the last line of its error."""

    passed: bool
    reason: str


def run_program(source: str, *, seconds: int = 10, memory_gb: float = 1.0, need_no_network: bool = False) -> Outcome:
    """Runs a Python program in an empty folder of its own.

    Args:
      seconds: of the clock and of the processor.
      memory_gb: of address space, in GB of 10⁹ bytes.
      need_no_network: fail where the system cannot take the network away, instead of running with it.
    """
    with tempfile.TemporaryDirectory(prefix="program-") as folder:
        path = os.path.join(folder, "program.py")
        with open(path, "w", encoding="utf-8", errors="replace") as file:
            file.write(source)
        arguments = [str(seconds), str(int(memory_gb * 1e9)), path, str(int(need_no_network))]
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _BEGIN, *arguments],
            cwd=folder,
            env={"PATH": os.environ.get("PATH", ""), "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            _, error = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, "timed out")
        finally:
            # It, and whatever it has started.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stderr.close()
    if process.returncode == -signal.SIGXCPU:
        return Outcome(False, "timed out")
    lines = error.decode(errors="replace").strip().splitlines()
    if process.returncode == 0:
        return Outcome(True, "")
    return Outcome(False, lines[-1] if lines else f"status {process.returncode}")


def without_network() -> bool:
    """Whether programs run without a network here."""
    return run_program("", need_no_network=True).passed
