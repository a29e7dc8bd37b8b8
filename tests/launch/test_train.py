"""`launch/train.py` as a person runs it: from another folder, with wrong input, and again."""

import json
import pathlib

import pytest

from helpers import run_command

CONFIG = """
from twotower_jax.train.config import base_config


def get_config():
    config = base_config(
        {
            "hidden_size": 16,
            "hybrid_override_pattern": "M-",
            "mamba_num_heads": 2,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "intermediate_size": 16,
        }
    )
    config.data = "text"
    config.vocab_size = 265
    config.sequence_length = 32
    config.batch_size = 2
    config.steps = 3
    config.log_every = 1
    config.checkpoint_every = 1
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Where the commands run: a config and a folder of text."""
    folder = tmp_path_factory.mktemp("anywhere")
    (folder / "config.py").write_text(CONFIG)
    (folder / "text").mkdir()
    for i in range(12):
        (folder / "text" / f"{i}.txt").write_text(f"Text number {i} says that {i} is {i}. " * 20)
    return folder


def train(folder: pathlib.Path, *arguments: str) -> tuple[int, str, str]:
    done = run_command("train", *arguments, cwd=folder, XLA_FLAGS="")
    return done.returncode, done.stdout, done.stderr


REFUSED = [
    ((), "config"),
    (("--config=missing.py", "--workdir=w"), "missing.py"),
    (("--config=config.py",), "workdir"),
    (
        ("--config=config.py", "--workdir=w", "--config.mesh.no_such_field=1"),
        "--config.mesh.no_such_field: the configuration has no such",
    ),
    (("--config=config.py", "--workdir=w", "--config.steps=many"), "many"),
    (("--config=config.py", "--workdir=w", "--config.objective=both"), "objective='both'"),
    (("--config=config.py", "--workdir=w", "--config.data=nowhere"), "nowhere"),
    (("--config=config.py", "--workdir=w", "--config.init_from=nowhere"), "nowhere"),
    (
        ("--config=config.py", "--workdir=w", "--config.objective=denoiser", "--config.block_size=5"),
        "sequence_length=32 is not a multiple of the block size 5",
    ),
    (("--config=config.py", "--workdir=w", "--config.sequence_length=96000"), "sequence_length 96000"),
    (("--config=config.py", "--workdir=w", "--config.kernels.ssd=pallas_tpu"), "ssd cannot run as 'pallas_tpu'"),
    (("--config=config.py", "--workdir=config.py"), "config.py is a file"),
    (("--config=config.py", "--workdir=text"), "holds files but no config.json"),
    (("--config=config.py", "--workdir=w", "--profile_steps=5"), "profile_steps='5' is not FIRST:LAST"),
    (("--config=config.py", "--workdir=w", "--process_id=1"), "--num_processes and --process_id belong together"),
]


def test_bad_input_gets_one_line_and_leaves_nothing(folder):
    before = sorted(folder.rglob("*"))
    for arguments, message in REFUSED:
        status, _, err = train(folder, *arguments)
        assert status != 0, arguments
        assert err.startswith("error: ") and err.count("\n") == 1 and message in err, (arguments, err)
    assert [path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts] == before


def test_help_is_no_failure(folder):
    status, out, _ = train(folder, "--help")
    assert status == 0
    assert "--workdir" in out


def test_a_run_and_its_continuation(folder):
    # One layer, which compiles in a moment.
    arguments = ("--config=config.py", "--workdir=deep/run", "--config.model.hybrid_override_pattern=-")
    arguments += ("--config.learning_rate=0.01",)
    status, out, err = train(folder, *arguments)
    assert status == 0, err
    run = folder / "deep" / "run"
    assert {path.name for path in run.iterdir()} >= {"config.json", "tokenizer.json", "metrics.jsonl", "checkpoints"}
    assert "parameters train" in out and "step 3/3" in out and "tokens/s" in out and "left" in out
    assert "memory of each device:" in out and "FLOPs per step" in out and "tokens per step" in out
    assert json.loads((run / "config.json").read_text())["learning_rate"] == 0.01

    status, _, err = train(folder, *arguments, "--config.seed=1")
    assert status == 2 and "seed 0 -> 1" in err and err.count("\n") == 1
    status, out, err = train(folder, *arguments, "--config.steps=5", "--config.log_every=2")
    assert status == 0 and "resuming at step 3 of 5" in out, err
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second"} <= rows[0].keys()
    assert sorted(int(path.name) for path in (run / "checkpoints").iterdir()) == [4, 5]
