"""Several processes with a mesh across them give the run that one process gives."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
from config_files import config_file

from helpers import ROOT

SETTINGS = {
    "data": "text",
    "steps": 2,
    "learning_rate": 1e-2,
    "validation_fraction": 0.3,
    "reset_at_documents": True,
    "remat": "layer",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("processes")
    (out / "config.py").write_text(config_file("ME*", SETTINGS))
    (out / "text").mkdir()
    for i in range(24):
        (out / "text" / f"{i}.txt").write_text(" ".join(str((i + 3) * n * n) for n in range(20 + 5 * i)))
    rows = ({"prompt": f"{i} {i * i} ", "response": str(i + 7) * (1 + i % 2)} for i in range(64))
    (out / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def run(folder: pathlib.Path, name: str, processes: int, *flags: str) -> tuple[list[dict], list[dict]]:
    """Trains with so many processes of one device each; returns the rows of metrics.jsonl and of samples.jsonl."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    started = []
    for i in range(processes):
        command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config=config.py", f"--workdir={name}", *flags]
        if processes > 1:
            command += [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}", f"--process_id={i}"]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True))
    try:
        for process in started:
            _, said = process.communicate(timeout=400)
            assert process.returncode == 0, said[-2000:]
    finally:
        for process in started:
            process.kill()
    files = (folder / name / f"{what}.jsonl" for what in ("metrics", "samples"))
    texts = (file.read_text() if file.exists() else "" for file in files)
    metrics, samples = ([json.loads(line) for line in text.splitlines()] for text in texts)
    return metrics, samples


# Rows divided between the processes; then rows, experts, and the positions of a row.
FEW = ("--config.model.hybrid_override_pattern=*",)
SAMPLED = ("--config.sample_every=2", "--config.sample_prompts=('64 125', '3')", "--config.sample_tokens=16")


@pytest.mark.whole(but=["two"])
@pytest.mark.parametrize(
    ("processes", "mesh", "flags"),
    [(2, ("fsdp=-1",), FEW), (2, ("fsdp=-1",), SAMPLED), (4, ("sequence=2", "expert=2"), SAMPLED)],
    ids=["two", "of all", "four"],
)
def test_several_processes_are_one_run(folder, processes, mesh, flags):
    name = f"{processes}-{len(flags)}"
    rows, samples = run(folder, name, processes, *(f"--config.mesh.{axis}" for axis in mesh), *flags)
    expected_rows, expected_samples = run(folder, f"alone-{name}", 1, *flags)
    assert len(rows) == len(expected_rows) == 2 and "validation_loss" in expected_rows[-1]
    assert samples == expected_samples and len(samples) == (2 if flags == SAMPLED else 0)
    for found, expected in zip(rows, expected_rows, strict=True):
        assert found.keys() == expected.keys()
        for field in {"loss", "grad_norm", "validation_loss"} & expected.keys():
            assert found[field] == pytest.approx(expected[field], rel=2e-5), (field, found["step"])


@pytest.mark.whole
def test_several_processes_learn_from_conversations_as_one(folder):
    """Each reads its rows of every batch; the held-out answers are asked by all."""
    flags = "--config.data=talks.jsonl", "--config.sample_answers=2", *SAMPLED
    expected_rows, expected_samples = run(folder, "talks-alone", 1, *flags)
    rows, samples = run(folder, "talks", 2, *flags, "--config.mesh.fsdp=-1")
    assert samples == expected_samples and len(rows) == len(expected_rows) == 2
    for found, expected in zip(rows, expected_rows, strict=True):
        assert found.keys() == expected.keys()
        for field in {"loss", "grad_norm", "validation_loss"} & expected.keys():
            assert found[field] == pytest.approx(expected[field], rel=2e-5), (field, found["step"])
        for field in {"loss_by_turn", "validation_loss_by_turn"} & expected.keys():
            (one, *rest), (other, *others) = found[field], expected[field]
            assert one == pytest.approx(other, rel=2e-5) and rest == others == [None] * 7
    for name in ("exact_answers", "tokens_per_evaluation"):
        assert rows[-1][f"validation_{name}"] == expected_rows[-1][f"validation_{name}"]
