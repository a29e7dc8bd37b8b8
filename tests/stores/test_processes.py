"""Several processes in folders of their own, with nothing in common but the bucket."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
from config_files import config_file

import buckets
from helpers import ROOT
from twotower_jax.checkpoint.orbax_steps import committed_steps
from twotower_jax.paths import as_path
from workdirs import rows, state

SETTINGS = {"data": "text.txt", "steps": 4, "checkpoint_every": 2, "mesh.fsdp": -1}


class Processes:
    """So many processes of one device each, each in a folder of its own."""

    def __init__(self, top: pathlib.Path, count: int, workdir: str, *flags: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        self.folders, self._started = [top / f"{i}-of-{count}" for i in range(count)], []
        for i, folder in enumerate(self.folders):
            folder.mkdir(exist_ok=True)
            (folder / "config.py").write_text(config_file("M*", SETTINGS))
            (folder / "text.txt").write_text(
                "\n".join(" ".join(str((k + 3) * n) for n in range(30)) for k in range(40))
            )
            command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config=config.py", f"--workdir={workdir}"]
            command += [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={i}", *flags]
            pipe = subprocess.PIPE
            self._started.append(
                subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)
            )

    def wait(self) -> str:
        """What the first one says, when all have ended well."""
        try:
            said = [process.communicate(timeout=400) for process in self._started]
            assert [process.returncode for process in self._started] == [0] * len(said), said
            return said[0][0]
        finally:
            self.kill()

    def kill(self) -> list[tuple[str, str]]:
        """SIGKILL, to the process that trains before its parent: that would take it along. What they have said."""
        said = []
        for process in self._started:
            children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
            for child in children.read_text().split() if children.exists() else ():
                os.kill(int(child), signal.SIGKILL)
            process.kill()
            said.append(process.communicate())
        return said


@pytest.mark.whole
@pytest.mark.parametrize("count", [2, 4])
def test_nothing_shared_but_the_bucket(address, tmp_path, count):
    """A run that loses its last step makes it again, bit for bit; its parts lie with those of one array."""
    Processes(tmp_path, count, address).wait()
    expected, path = state(address, 4), as_path(address)
    assert committed_steps(path / "checkpoints") == [2, 4] and (path / "frozen" / "hashes.json").is_file()
    assert not any("process_" in name for name in path.sizes())
    logged = rows(address)
    (path / "checkpoints" / "4").remove_tree(first="hashes.json")
    said = Processes(tmp_path, count, address).wait()
    assert "resuming at step 2 of 4" in said and state(address, 4) == expected
    assert {row["step"]: row for row in rows(address)} == {row["step"]: row for row in logged}
    assert [list(folder.glob("gs*")) for folder in (tmp_path / f"{i}-of-{count}" for i in range(count))] == [[]] * count


@pytest.mark.whole
@pytest.mark.parametrize("lost", [False, True])
def test_killed_processes_go_on_from_their_disks(server, address, tmp_path, lost):
    """Killed while the store does not take their newest step; where one has lost its copy, from the store's."""
    reference = f"{address}-whole"
    Processes(tmp_path, 2, reference).wait()
    stuck = lambda method, path: 503 if method == "POST" and "/o?" in path and blocked() else None  # noqa: E731

    def blocked() -> bool:
        return all(list(folder.glob("copies/*/*/4*")) for folder in running.folders)

    faults = buckets.Faults(server, lambda method, path: None)
    with buckets.in_environment(STORAGE_EMULATOR_HOST=faults.url):
        running = Processes(tmp_path, 2, address, "--config.local_copy=copies")
        faults.rule = stuck
        end = time.monotonic() + 300
        while not all(list(folder.glob("copies/*/*/4")) for folder in running.folders) and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.2)
        said = running.kill()
    faults.stop()
    assert committed_steps(as_path(address) / "checkpoints") == [2], said
    if lost:
        (part,) = running.folders[1].glob("copies/*/1-of-2/4/hashes.json")
        part.unlink()
    said = Processes(tmp_path, 2, address, "--config.local_copy=copies").wait()
    assert f"resuming at step {2 if lost else 4} of 4" in said and ("local disks" in said) == (not lost)
    assert state(address, 4) == state(reference, 4)
    assert {row["step"]: row for row in rows(address)} == {row["step"]: row for row in rows(reference)}
