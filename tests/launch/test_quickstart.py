"""`launch/quickstart.py` as a person runs it, cut short, from its own checkpoint."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import ROOT, run_command
from twotower_jax.data.opening import Data
from twotower_jax.data.packing import Packing
from twotower_jax.train.config import freeze, shipped
from twotower_jax.train.objectives import OBJECTIVES, Documents, NoiseKey

CHECKPOINT = ROOT / "configs" / "quickstart"


def test_it_trains_tunes_and_compares(tmp_path):
    command = ("quickstart", "--workdir=run", "--steps=1", "--questions=2", "--batches=1", "--tasks=letter")
    done = run_command(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    accuracy = summary["accuracy"]
    assert set(accuracy) == {"ar", "diffusion"} and all(0 <= value <= 1 for value in accuracy.values())
    assert summary["retained_quality"] == pytest.approx(accuracy["diffusion"] / accuracy["ar"])
    assert summary["tokens_per_evaluation"] > 1 and summary["speedup"] > 0 and summary["seconds"] > 0
    assert set(summary["tasks"]) == {"letter"} and summary["questions"] == 2
    for shown in ("evaluation 1: ", "questions together", "of AR's accuracy kept", "| letter"):
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


def test_its_objective_is_the_denoisers_for_half_of_the_work(random_params):
    config = shipped("quickstart")
    config.objective = "answers"
    config.model.update(hidden_size=32, hybrid_override_pattern="M*", mamba_num_heads=2, head_dim=16)
    config = freeze(config)
    answers, denoiser = (
        OBJECTIVES[name].make(config, config.model_config(config.vocab_size)) for name in ("answers", "denoiser")
    )
    data, size = Data(config.data), config.block_size
    tokenizer = data.tokenizer(config.vocab_size)
    windows, _ = data.windows(tokenizer, Packing(config.sequence_length, config.vocab_size, 0.01, 3, size))
    rows = [windows[i] for i in range(6)]
    ids, *documents = (jnp.asarray(np.stack([r[k] for r in rows])) for k in ("ids", "document_start", "counted"))
    assert len(set(documents[0][:, -1].tolist())) > 2  # Questions of several lengths.

    def loss(params, objective):
        noise = NoiseKey(0, 3, jnp.arange(len(ids)))
        losses = objective.losses(params, ids, jnp.ones(len(ids), bool), noise, size, Documents(*documents))
        total, count = losses["masked_loss"]
        return total / count

    params = random_params(answers.model)
    found, expected = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, o) for o in (answers, denoiser))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for name in ("denoiser_tower", "denoiser_head", "time"):
        for a, b in zip(*map(jax.tree.leaves, (found[1][name], expected[1][name])), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * float(jnp.abs(b).max() + 1e-3))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("sequence_length", 256, "sequence_length=256 must be two blocks, and block_size=64 half of it"),
        ("reset_at_documents", False, "needs reset_at_documents=True"),
        ("distillation.weight", 1.0, "take objective='denoiser'"),
        ("variant.context", "trained", "take objective='denoiser'"),
    ],
)
def test_its_objective_refuses_what_it_would_leave_out(name, value, said):
    config = shipped("quickstart")
    config.objective = "answers"
    config.update_from_flattened_dict({name: value})
    config = freeze(config)
    with pytest.raises(ValueError, match=said):
        OBJECTIVES["answers"].make(config, config.model_config(config.vocab_size))
