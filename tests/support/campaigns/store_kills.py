"""As kills.py, of a run in a store (gs:// of a server that this command starts), which is compared with one on a disk.

What is half done shows there as a step without its hashes.json. Starts are forked from a process that has imported what
a run does, because of some tens of kills importing would take nearly all of the time.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
from unittest import mock

import warm

import buckets
from campaigns import kills
from campaigns.kills import SAVE, Run
from twotower_jax.checkpoint import orbax_steps, workdir
from twotower_jax.paths import as_path


def define_flags() -> None:
    kills.define_flags(25, 5)


def main() -> None:
    with buckets.gs():
        kills.main(StoreRun)


class StoreRun(Run):
    """A run of `launch/train.py` in a workdir of the bucket."""

    pause = 0.003
    _server: warm.Server | None = None

    def __init__(self, scratch: pathlib.Path, name: str, steps: int):
        super().__init__(scratch, name, steps)
        self.folder = as_path(f"gs://{buckets.BUCKET}/{scratch.name}/{name}")

    def start(self, *arguments: str) -> "_Forked":
        if StoreRun._server is None:
            with mock.patch.dict(os.environ, self.environment()):
                StoreRun._server = warm.Server()
        return _Forked(StoreRun._server, [*self.arguments(), *arguments], self)

    def half_done(self) -> bool:
        return any(not whole for _, whole in self._steps_there())

    def is_in(self, phase: str) -> bool:
        steps = self._steps_there()
        newest = max((step for step, whole in steps if whole), default=0)
        return any(not whole and (step > newest) == (phase == SAVE) for step, whole in steps)

    def _steps_there(self) -> list[tuple[int, bool]]:
        """Each step of which anything is there, and whether it is whole."""
        names = (self.folder / workdir.CHECKPOINTS).sizes()
        steps = {name.split("/")[0] for name in names}
        return [(int(step), f"{step}/{orbax_steps.HASHES}" in names) for step in steps]


class _Forked:
    """A command begun by a `warm.Server`, with what of a `subprocess.Popen` a campaign uses."""

    def __init__(self, server: warm.Server, arguments: list[str], run: StoreRun):
        self._server, self._status = server, None
        with run.log.open("a") as log, open(os.devnull) as null:
            self._process = server.begin(
                str(kills.TRAIN), arguments, cwd=str(run._scratch), env=run.environment(),
                stdin=null.fileno(), stdout=log.fileno(), stderr=log.fileno(),
            )  # fmt: skip

    def poll(self) -> int | None:
        if self._status is None:
            with contextlib.suppress(TimeoutError):
                self._status = self._server.end(0.001)
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        if self._status is None:
            try:
                self._status = self._server.end(timeout)
            except TimeoutError:
                raise subprocess.TimeoutExpired("train.py", timeout) from None
        return self._status

    def send_signal(self, number: int) -> None:
        os.kill(self._process, number)

    def kill(self) -> None:
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)
