"""`launch/quickstart.py` as a person runs it, cut short, from its own checkpoint."""

import json

import pytest

from helpers import ROOT, run_command

CHECKPOINT = ROOT / "configs" / "quickstart"


def test_it_trains_tunes_and_compares(tmp_path):
    command = ("quickstart", "--workdir=run", "--steps=1", "--questions=2", "--batches=1", "--tasks=spell")
    done = run_command(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    accuracy = summary["accuracy"]
    assert set(accuracy) == {"ar", "diffusion"} and all(0 <= value <= 1 for value in accuracy.values())
    assert summary["retained_quality"] == pytest.approx(accuracy["diffusion"] / accuracy["ar"])
    assert summary["tokens_per_evaluation"] > 1 and summary["speedup"] > 0 and summary["seconds"] > 0
    assert set(summary["tasks"]) == {"spell"} and summary["questions"] == 2
    for shown in ("evaluation 1: ", "questions together", "of AR's accuracy kept", "| spell"):
        assert shown in done.stdout
    # The checkpoint knows its tasks, wherever the command is run.
    assert accuracy["ar"] >= 0.8


def test_the_checkpoint_is_small_and_says_how_it_was_made():
    files = [file for file in CHECKPOINT.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8 * 2**20
    made = json.loads((CHECKPOINT / "made.json").read_text())
    assert made["commands"] and made["seconds"] > 0 and made["retained_quality"] > 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data=python", "--steps=0"], "steps=0 must be at least 1"),
        (["--data=python", "--tasks=spell"], "--tasks changes nothing with --data=python"),
        (["--tasks="], "--tasks is empty; choose among letter, "),
        (["--tasks=nope"], "there is no task 'nope'"),
        (["--blocks=16,x"], "--blocks=16,x: not a list of whole numbers"),
        (["--batches=0"], "--batches=0: must be at least 1"),
    ],
)
def test_what_cannot_be_asked_is_said_before_training(tmp_path, flags, said):
    done = run_command("quickstart", "--workdir=run", *flags, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "run").exists()
