"""Stores in trouble: what passes is tried again, what stays is one line soon, and nothing is half-written."""

import json
import random
import subprocess
import sys
import time

import pytest

import buckets
from helpers import run_command
from twotower_jax.paths import as_path
from twotower_jax.stores import Changed, StoreError, lease, retrying

PASSING = (429, 503, 500, 502, 408, "reset", "lost", "cut", "less")


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.whole) for seed in range(1, 6))])
def test_what_passes_is_tried_again(server, address, seed):
    """A third of all requests fail, in every way; what is written and read is right, and written once."""
    rng = random.Random(seed)
    objects = {f"{number}": rng.randbytes(rng.randrange(1, 5000)) for number in range(12)}
    # With so many faults nine in a row come now and then, which is what fits into 15 seconds.
    with buckets.faulty(server, buckets.seeded(seed, 0.33, PASSING)) as faults, retrying.patient(120):
        for name, content in objects.items():
            (as_path(address) / name).create(content)
        assert as_path(address).sizes() == {name: len(content) for name, content in objects.items()}
        for name, content in objects.items():
            assert (as_path(address) / name).read_bytes() == content
            assert (as_path(address) / name).read(0, len(content)) == content
            with pytest.raises(Changed):
                (as_path(address) / name).create(b"another")
    assert sum(faults.met.values()) > 10


@pytest.mark.parametrize(
    "fault", [503, "hang", *(pytest.param(f, marks=pytest.mark.whole) for f in (429, "reset", "less"))]
)
def test_what_stays_is_said_soon(server, address, fault, monkeypatch):
    as_path(f"{address}/x").write_bytes(b"0123456789")
    monkeypatch.setattr(retrying, "_IMPATIENT_SECONDS", 2.0)
    monkeypatch.setattr(retrying._Patience, "seconds", 2.0)
    started = time.monotonic()
    with (
        buckets.faulty(server, lambda method, path: fault),
        pytest.raises(StoreError, match=f"{address}/x: .*given up"),
    ):
        as_path(f"{address}/x").read(0, 10)
    assert time.monotonic() - started < 12  # Without the limits of this test: 15.


@pytest.mark.parametrize(
    ("status", "said"), [(401, "credentials"), (403, "forbids"), pytest.param(507, "507", marks=pytest.mark.whole)]
)
def test_what_is_refused_is_not_tried_again(server, address, status, said):
    with buckets.faulty(server, lambda method, path: status) as faults, pytest.raises(StoreError, match=said):
        as_path(f"{address}/x").write_bytes(b"1")
    assert faults.met == {status: 1}


def holder(**changes: str) -> bytes:
    return json.dumps(lease._this_process() | {"owner": "another"} | changes).encode()


def test_one_writer_at_a_time(address, monkeypatch):
    monkeypatch.setattr(lease, "_RENEWED_EVERY", 0.1)
    monkeypatch.setattr(lease, "_LOOKED_AT_EVERY", 0.1)
    path = as_path(f"{address}/lease")
    with lease.held(path, "busy") as ours:
        with pytest.raises(ValueError, match=r"busy \(on .*, process"), lease.held(path, "busy"):
            pass
        # One that seems to run elsewhere is watched: it renews, so it lives.
        ours._owner["machine"] = "elsewhere"
        with pytest.raises(ValueError, match="busy"), lease.held(path, "busy"):
            pass
        ours.check()
    assert not path.exists()


def test_leases_of_dead_runs_are_taken_over(address, monkeypatch):
    monkeypatch.setattr(lease, "_LOOKED_AT_EVERY", 0.1)
    path = as_path(f"{address}/lease")
    path.create(holder(pid="999999999"))  # of this machine, and gone
    with lease.held(path, "busy"):
        pass
    path.create(holder(began="1"))  # whose number another process has now
    with lease.held(path, "busy"):
        pass
    path.create(holder(machine="elsewhere"))
    monkeypatch.setattr(lease, "SECONDS", 1.0)
    with lease.held(path, "busy"):
        pass


def test_a_holder_that_was_taken_for_dead_learns_of_it(address, monkeypatch):
    monkeypatch.setattr(lease, "_RENEWED_EVERY", 0.05)
    path = as_path(f"{address}/lease")
    with lease.held(path, "busy") as ours:
        path.write(holder())
        end = time.monotonic() + 20
        while not ours.lost and time.monotonic() < end:
            time.sleep(0.02)
        with pytest.raises(lease.LeaseLost):
            ours.check()
    assert path.read_bytes() == holder()  # It is not ours to remove.


def _train(workdir: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_command(
        "train", "--config=configs/tiny.py", f"--workdir={workdir}", "--config.steps=1", *flags, **environment
    )


@pytest.mark.parametrize(
    ("workdir", "fault", "said"),
    [
        ("gs://nowhere/run", None, "no such bucket"),
        ("gs://bucket/refused", 403, "forbids"),
        pytest.param("gs://bucket/full", 507, "507", marks=pytest.mark.whole),
        pytest.param("gs://bucket/silent", "hang", "given up", marks=pytest.mark.whole),
        pytest.param("gs://bucket/busy", 429, "429", marks=pytest.mark.whole),
        pytest.param("gs://b/run", None, "no name that a bucket can have", marks=pytest.mark.whole),
        pytest.param("hf://org/name", None, "only read", marks=pytest.mark.whole),
        pytest.param("gs://bucket/a//b", None, "empty name", marks=pytest.mark.whole),
    ],
)
def test_training_says_so_before_it_begins(server, workdir, fault, said):
    """In one line within 20 seconds, with nothing written."""
    rule = lambda method, path: fault if method == "POST" or fault == "hang" else None  # noqa: E731
    with buckets.faulty(server, rule):
        started = time.monotonic()
        run = _train(workdir)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and said in run.stderr, run.stderr
    assert "step " not in run.stdout and time.monotonic() - started < 40  # of which starting takes some
    if workdir.startswith("gs://bucket/") and "//b" not in workdir:
        assert not as_path(workdir).is_dir()


def test_missing_packages_are_named():
    code = "import sys; sys.modules['gcsfs'] = None; from twotower_jax.paths import as_path; as_path('gs://bucket/x').exists()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "gs:// needs the package gcsfs: python -m pip install 'twotower_jax[stores]'" in run.stderr


@pytest.mark.whole
def test_paths_of_this_machine_import_nothing():
    code = (
        "import sys; from twotower_jax.checkpoint import load; from twotower_jax.train import loop; "
        "assert not {'gcsfs', 's3fs', 'aiohttp', 'twotower_jax.stores.clients'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"JAX_PLATFORMS": "cpu"})
