"""A parent for each process of a run of several, so that it ends with a clear line whatever ends it.

When a process of the run is lost, JAX's runtime aborts the others from a thread of its own, where no Python runs. The
parent sees that, says so, and turns it into an exit status. It passes signals on, and they die together.

Imports nothing heavy: the parent is to cost nothing.
"""

import ctypes
import os
import signal
import subprocess
import sys

from twotower_jax.train import stopping

# Exit status where another process of the run is lost.
PROCESS_LOST = 4

_MARK = "TWOTOWER_SUPERVISOR"
_PR_SET_PDEATHSIG = 1


def supervise() -> None:
    """Runs this command again as a child, waits for it and exits; in the child it returns."""
    parent = os.environ.pop(_MARK, "")
    if parent:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):  # it was gone before
            os._exit(PROCESS_LOST)
        return
    child: subprocess.Popen | None = None

    def forward(number: int, _) -> None:
        if child is not None:
            child.send_signal(number)

    stopping.handle(forward)
    # A session of its own: what a terminal sends to all reaches the child once, from here.
    command, environment = [sys.executable, *sys.orig_argv[1:]], os.environ | {_MARK: str(os.getpid())}
    child = subprocess.Popen(command, env=environment, start_new_session=True)
    status = child.wait()
    if status == -signal.SIGABRT:
        print(
            "error: JAX's runtime aborted this process, as it does when another process of the run is lost (its own "
            "message is above); run all of them again to go on from the newest checkpoint",
            file=sys.stderr,
        )
        status = PROCESS_LOST
    sys.exit(status if status >= 0 else 128 - status)
