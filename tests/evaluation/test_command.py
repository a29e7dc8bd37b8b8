"""launch/evaluate.py as a person runs it."""

import json
import os

import pytest

from helpers import run_command
from twotower_jax.evaluation.compare import Scores, retained

POINTS = "ar,diffusion,diffusion:confidence_threshold=0.0"


def _run(**flags):
    given = {name: value for name, value in flags.items() if value is not None}
    return run_command("evaluate", *(f"--{name}={value}" for name, value in given.items()))


@pytest.mark.whole
def test_the_command_compares_points_on_the_same_questions_and_goes_on(tmp_path, checkpoint, task_files):
    out = tmp_path / "made" / "evaluation"
    flags = {"checkpoint": checkpoint, "include_path": task_files, "modes": POINTS, "output": out}
    flags |= {"tasks": "choose_here,write_here,key_value", "lengths": 24, "questions": 4, "rounds": 1, "block_size": 4}
    run = _run(**flags, speed_questions=4)
    assert run.returncode == 0, run.stderr
    assert sorted(os.listdir(out)) == ["answers.jsonl", "key_value.svg", "plot.svg", "results.json", "table.md"]
    assert run.stdout == (out / "table.md").read_text() + "\n"
    found = json.loads((out / "results.json").read_text())
    assert list(found["tasks"]) == ["choose_here", "write_here", "key_value_24"]
    chosen, points = found["tasks"]["choose_here"], POINTS.split(",")
    assert list(chosen) == points
    # Choices are scored by the context tower, so that all points have the same.
    assert all(values == {"acc": 0.5, "acc_stderr": pytest.approx(0.5 / 3**0.5)} for values in chosen.values())
    assert found["likelihood"] == dict.fromkeys(points, "context")
    assert found["tasks"]["write_here"]["ar"]["exact_match"] == 0.75
    first = [found["tasks"][task]["ar"][metric] for task, metric in found["first_metric"].items()]
    for point in points:
        second = [found["tasks"][task][point][metric] for task, metric in found["first_metric"].items()]
        pairs = [(Scores(a, None, None), Scores(b, None, None)) for a, b in zip(first, second, strict=True)]
        assert found["retained"][point] == pytest.approx(retained(pairs).fraction)
        assert found["speed"][point]["tokens_per_second"] > 0
    assert found["speed"]["ar"]["over_ar"] == 1.0
    # At threshold 0 a block is written at once, and then read.
    assert found["speed"][points[2]]["tokens_per_evaluation"] > 1.4 * found["speed"]["ar"]["tokens_per_evaluation"]
    assert found["differences"]["choose_here"]["diffusion"]["acc"]["difference"] == 0.0

    size = (out / "answers.jsonl").stat().st_size
    run = _run(**flags, speed_questions=0)
    assert run.returncode == 0, run.stderr
    assert "generation:" not in run.stderr and (out / "answers.jsonl").stat().st_size == size
    again = json.loads((out / "results.json").read_text())
    assert (again["tasks"], again["speed"]) == (found["tasks"], {})


@pytest.mark.whole(but=["flags1-", "flags6-"])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"tasks": "gsm8k"}, "task gsm8k: its data set openai/gsm8k is not on disk and cannot be downloaded here"),
        ({"tasks": "no_such_task"}, "--tasks: there is no task 'no_such_task' in lm_eval "),
        ({"tasks": "needle", "lengths": "1,x"}, "--lengths=1,x: not a list of whole numbers"),
        ({"tasks": ""}, "--tasks is empty; name a task"),
        ({"tasks": "needle", "modes": ""}, "--modes is empty; name a mode"),
        ({"tasks": "needle", "mode": "ar"}, "--mode changes nothing here: give --modes"),
        ({"tasks": "needle", "base_url": "http://127.0.0.1:1"}, "give either --checkpoint=DIR or --base_url=URL"),
        ({"tasks": "needle", "checkpoint": None}, "give either --checkpoint=DIR or --base_url=URL"),
        (
            {"tasks": "needle", "checkpoint": None, "base_url": "http://127.0.0.1:1", "adapter": "x"},
            "--adapter changes nothing with --base_url",
        ),
        (
            {"tasks": "needle", "checkpoint": None, "base_url": "http://127.0.0.1:1"},
            "--base_url: http://127.0.0.1:1/v1/models: ",
        ),
        ({"tasks": "x", "include_path": "/no/such"}, "--include_path=/no/such: there is no such folder"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(tmp_path, checkpoint, flags, said):
    run = _run(**{"checkpoint": checkpoint, "output": tmp_path / "out"} | flags)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert run.stderr.startswith(f"error: {said}")
    assert not (tmp_path / "out").exists()


def test_programs_of_a_model_run_only_if_that_is_allowed(tmp_path, checkpoint, task_files):
    task = json.loads((task_files / "write_here.yaml").read_text())
    (tmp_path / "program.yaml").write_text(json.dumps(task | {"task": "program_here", "unsafe_code": True}))
    flags = {"tasks": "program_here", "include_path": tmp_path, "checkpoint": checkpoint, "output": tmp_path / "out"}
    run = _run(**flags)
    assert run.returncode == 2
    assert (
        run.stderr
        == "error: task program_here runs programs that the model writes; allow it with --run_generated_code\n"
    )


@pytest.mark.whole
def test_tuning_takes_a_tasks_score_for_its_quality(tmp_path, checkpoint, task_files):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "tuning"
    prompts.write_text('{"ids": [7, 8, 9]}\n' * 4)
    flags = {"checkpoint": checkpoint, "prompts": prompts, "output": out, "rounds": 1, "max_new_tokens": 10}
    flags |= {"thresholds": "0.0,1.0", "steps": 4, "blocks": 4, "batch_size": 4}
    tasks = {"tasks": "write_here", "include_path": task_files, "min_retained": 0}
    run = run_command("tune", *(f"--{name}={value}" for name, value in (flags | tasks).items()))
    assert run.returncode == 0, run.stderr
    found = json.loads((out / "results.json").read_text())
    assert found["ar"]["quality"] == 0.75 and found["tasks"] == ["write_here"]
    fastest = max(found["points"], key=lambda point: point["tokens_per_second"])
    assert found["chosen"] == fastest and 0 <= fastest["quality"] <= 1
    assert ">quality<" in (out / "plot.svg").read_text() and "| score |" in run.stdout
    run = run_command("tune", *(f"--{name}={value}" for name, value in flags.items()), "--min_retained=0.5")
    assert (run.returncode, run.stderr) == (2, "error: --min_retained changes nothing without --tasks; leave it out\n")
