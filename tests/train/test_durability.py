"""Runs that are killed or told to stop, run out of disk, read flipped bits, lose a process: nothing goes unsaid."""

import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from campaigns import kills
from helpers import ROOT
from twotower_jax.checkpoint import orbax_steps, workdir, workdir_model
from twotower_jax.files import CheckpointError

MESHES = ROOT / "tests/support/restore_on_meshes.py"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> pathlib.Path:
    """Where the runs are; `broken` was interrupted several times and then ended well."""
    scratch = tmp_path_factory.mktemp("runs")
    outcomes = list(kills.campaign(scratch, kills=3, terms=1, seed=0))
    assert [outcome.problem for outcome in outcomes] == [""] * 5
    ends = [("SIGKILL", -9)] * 3 + [("SIGTERM", 75), ("nothing", 0)]
    assert sorted((outcome.signal, outcome.status) for outcome in outcomes) == ends
    return scratch


def copy_of(scratch: pathlib.Path, name: str, more_steps: int) -> kills.Run:
    """A copy of the finished run, which is to go on for some steps."""
    shutil.copytree(scratch / "broken", scratch / name)
    steps = orbax_steps.latest_step(scratch / name / workdir.CHECKPOINTS)
    return kills.Run(scratch, name, steps + more_steps)


def ended(process: subprocess.Popen, run: kills.Run) -> tuple[int, str]:
    """Exit status, and the last line said."""
    return process.wait(300), run.log.read_text().splitlines()[-1]


@pytest.mark.whole
def test_an_interrupted_run_is_the_uninterrupted_one(scratch):
    # The fixture has compared them; this says that the comparison can tell.
    assert kills.differences(scratch / "whole", scratch / "broken") == ""
    other = scratch / "other"
    shutil.copytree(scratch / "broken", other)
    metrics = other / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"grad_norm": 1', '"grad_norm": 2', 1))
    assert "was logged as" in kills.differences(scratch / "whole", other)


@pytest.mark.whole
def test_a_disk_that_is_full_is_loud_and_costs_nothing(scratch):
    run = copy_of(scratch, "full", 6)
    before = run.newest()
    (run.folder / "metrics.jsonl").write_text("")
    process = run.start()
    # Less than the largest file of a checkpoint, more than all others.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (15_000, 15_000))
    status, said = ended(process, run)
    assert status == 6 and said.startswith("error: ") and "could not be written" in said, said
    assert "Traceback" not in run.log.read_text()
    assert run.newest() == before
    orbax_steps.verify(run.folder / "checkpoints" / str(before))


@pytest.mark.whole
def test_flipped_bits_are_named_and_the_way_out_with_them(scratch):
    run = copy_of(scratch, "flipped", 2)
    newest = run.folder / "checkpoints" / str(run.newest())
    earlier = orbax_steps.committed_steps(newest.parent)[-2]
    file = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    status, said = ended(run.start(), run)
    assert status == 3 and str(file.relative_to(newest)) in said, said
    assert f"to go on from step {earlier}, remove {newest}" in said
    shutil.rmtree(newest)
    assert run.newest() == earlier
    workdir_model.load(run.folder)

    frozen = max((f for f in (run.folder / "frozen").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    frozen.write_bytes(frozen.read_bytes()[:-1])
    with pytest.raises(CheckpointError) as error:
        workdir_model.load(run.folder)
    assert str(frozen.relative_to(run.folder / "frozen")) in str(error.value)
    (run.folder / "frozen" / orbax_steps.HASHES).unlink()
    with pytest.raises(CheckpointError, match=orbax_steps.HASHES):
        workdir_model.load(run.folder)


def test_two_runs_cannot_share_a_workdir(tmp_path):
    settings = {"objective": "denoiser", "variant": {}, "model": {}}
    first, second = (workdir.Workdir(tmp_path / "run", settings, ()) for _ in range(2))
    with first.locked(), pytest.raises(ValueError, match="another run is training in it"), second.locked():
        pass
    with second.locked():
        pass


def wait_for(process: subprocess.Popen, reached) -> None:
    end = time.monotonic() + 300
    while not reached():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.whole
def test_two_processes_stop_together_and_notice_a_loss(scratch):
    steps = orbax_steps.latest_step(scratch / "whole" / "checkpoints")

    def start() -> tuple[list[subprocess.Popen], list[kills.Run]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        runs, processes = [], []
        for i in range(2):
            run = kills.Run(scratch, "two", steps)
            run.log = scratch / f"two-{i}.log"
            flags = (f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}")
            processes.append(run.start(*flags))
            runs.append(run)
        return processes, runs

    def interrupted(number: int) -> tuple[list[int], list[str]]:
        processes, runs = start()
        try:
            before = runs[0].newest() or 0
            wait_for(processes[0], lambda: (runs[0].newest() or 0) > before)
            processes[1].send_signal(number)
            results = [ended(process, run) for process, run in zip(processes, runs, strict=True)]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [status for status, _ in results], [said for _, said in results]

    statuses, said = interrupted(signal.SIGTERM)
    assert statuses == [75, 75], said
    run = kills.Run(scratch, "two", steps)
    assert f"stopped by SIGTERM at step {run.newest()};" in said[1] and "stopped by another process" in said[0]
    # The same rows and noise as one process has, and so the same losses, but for the order of sums.
    alone = {row["step"]: row["loss"] for row in kills.logged_rows(scratch / "whole")[:3]}
    together = {row["step"]: row["loss"] for row in kills.logged_rows(scratch / "two")[:3]}
    assert together == pytest.approx(alone, rel=1e-4)

    begun = time.monotonic()
    statuses, said = interrupted(signal.SIGKILL)
    assert statuses == [4, -9] and said[0].startswith("error: "), said
    assert time.monotonic() - begun < 200
    # What two processes saved, one goes on from.
    before = run.newest()
    orbax_steps.verify(scratch / "two" / "checkpoints" / str(before))
    process = kills.Run(scratch, "two", before + 1).start()
    assert process.wait(300) == 0
    assert run.newest() == before + 1


def test_a_checkpoint_restores_onto_any_mesh_with_exact_values(tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, str(MESHES), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"saved on {saved}, restored on {restored}: exact" for saved in (1, 4) for restored in (1, 2, 8)
    ]
