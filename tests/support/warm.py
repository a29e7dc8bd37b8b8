"""A process that has imported what the commands import, and forks for each command that a test runs.

Importing takes seconds of the processor, a command often less than one. The forked process is the command's own: its
arguments, folder, environment, output, signals and exit status. What it cannot have anew are the settings that Python
and JAX read while they start, so that `run_command` starts a real one for those; so does every test of starting itself.

    python warm.py FD      FD: one end of a socket; see `Server` for the other
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import warnings
from typing import NoReturn

_MOST = 2**17  # Bytes of a request.
# Not the modules that define flags for whoever imports them.
_MODULES = (
    "grain",
    "optax",
    "orbax.checkpoint",
    "ml_collections.config_flags",
    "tensorboardX",
    "twotower_jax.command_line",
    "twotower_jax.certify",
    "twotower_jax.checkpoint.export",
    "twotower_jax.checkpoint.hub",
    "twotower_jax.checkpoint.inspection",
    "twotower_jax.data.chat",
    "twotower_jax.data.prepare",
    "twotower_jax.generation.placement",
    "twotower_jax.generation.quality",
    "twotower_jax.generation.tune",
    "twotower_jax.generation.watch",
    "twotower_jax.train.loop",
    "twotower_jax.visualize.page",
    "twotower_jax.visualize.tradeoff",
)


def _import_for(script: str) -> None:
    """lm_eval, which takes longer than all the rest, once a command that needs it is asked for."""
    if os.path.basename(script) == "evaluate.py" and "lm_eval" not in sys.modules:
        from twotower_jax.evaluation.environment import settle_environment

        settle_environment()
        __import__("twotower_jax.evaluation.table")
        gc.freeze()


class Server:
    """The process, started with the environment of this one; it ends with this one."""

    def __init__(self):
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Its memory is what commands begin with; an import that warns is no concern of theirs.
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(other.fileno())], pass_fds=[other.fileno()], stdin=subprocess.DEVNULL
        )
        other.close()

    def run(self, script: str, arguments: list[str], *, cwd, env, stdin, stdout, stderr, timeout: float) -> int:
        """The exit status of a command, negative for a signal; the streams are file descriptors.

        Raises:
          TimeoutError: after `timeout` seconds; the command is killed.
        """
        process = self.begin(script, arguments, cwd=cwd, env=env, stdin=stdin, stdout=stdout, stderr=stderr)
        try:
            return self.end(timeout)
        except TimeoutError:
            os.kill(process, signal.SIGKILL)
            self.end(None)
            raise

    def begin(self, script: str, arguments: list[str], *, cwd, env, stdin, stdout, stderr) -> int:
        """Starts a command, the only one until its `end`; its process."""
        request = {"script": script, "arguments": arguments, "cwd": str(cwd), "env": env}
        socket.send_fds(self._socket, [json.dumps(request).encode()], [stdin, stdout, stderr])
        return int(self._socket.recv(_MOST))

    def end(self, timeout: float | None) -> int:
        """The exit status of the command that was begun; TimeoutError if it runs for longer."""
        self._socket.settimeout(timeout)
        try:
            return os.waitstatus_to_exitcode(int(self._socket.recv(_MOST)))
        finally:
            self._socket.settimeout(None)


def _serve(connection: socket.socket) -> tuple[str, list[str]]:
    """Returns in the processes that are to run a command: its script and arguments."""
    while True:
        content, fds, _, _ = socket.recv_fds(connection, _MOST, 3)
        if not content:
            os._exit(0)
        request = json.loads(content)
        _import_for(request["script"])
        with warnings.catch_warnings():
            # Libraries have a thread or two that only wait; no backend of JAX is there yet.
            warnings.simplefilter("ignore", DeprecationWarning)
            process = os.fork()
        if process == 0:
            connection.close()
            for target, fd in enumerate(fds):
                os.dup2(fd, target)
                os.close(fd)
            os.chdir(request["cwd"])
            os.environ.clear()
            os.environ.update(request["env"])
            return request["script"], request["arguments"]
        for fd in fds:
            os.close(fd)
        connection.send(str(process).encode())
        connection.send(str(os.waitpid(process, 0)[1]).encode())


def _run(script: str) -> int:
    """Runs a file as `python FILE` does; the exit status."""
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _end(status: int) -> NoReturn:
    """Ends as Python does, threads and exit functions first, but for taking apart all that was imported: that takes
    longer than most commands."""
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        status = 120
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(status & 0xFF)


if __name__ == "__main__":
    for module in _MODULES:
        __import__(module)
    # As in conftest.py: what was imported stays, and no command looks through it for garbage.
    gc.set_threshold(50_000, 20, 20)
    gc.collect()
    gc.freeze()
    script, arguments = _serve(socket.socket(fileno=int(sys.argv[1])))
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(script)
    _end(_run(script))
