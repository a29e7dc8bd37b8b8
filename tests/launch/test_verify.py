"""`launch/verify.py`: numbers against recorded ones; and an exported tower in transformers."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers import run_command
from twotower_jax import certify
from twotower_jax.checkpoint.convert import convert
from twotower_jax.checkpoint.export import export
from twotower_jax.files import CheckpointError


@pytest.mark.whole
def test_certified(data, tmp_path):
    """With a part of what is recorded: compiling all of it takes a minute. `test_reference.py` has the rest."""
    recorded = load_file(data / "tiny_bf16/expected.safetensors")
    kept = {name: array for name, array in recorded.items() if not name.startswith("train.")}
    save_file(kept, tmp_path / "expected.safetensors")
    case = json.loads((data / "tiny_bf16/generation.json").read_text())["cases"][0]
    case = {"prompt": case["prompt"], "mask_diffusion": case["mask_diffusion"][:1]}
    (tmp_path / "generation.json").write_text(json.dumps({"cases": [case]}))
    source = data / "tiny_bf16/checkpoint"
    convert(source, tmp_path / "converted")
    flags = [f"--source={source}", f"--checkpoint={tmp_path / 'converted'}", f"--expected={tmp_path}"]
    out = run_command("verify", *flags)
    assert out.returncode == 0, out.stderr
    lines = out.stdout.splitlines()
    assert "was converted from these very 8 files" in lines[0]
    assert sum(line.startswith("context.hidden.") for line in lines) == 17
    evaluations = case["mask_diffusion"][0]["denoiser_evaluations"]
    assert f"48 of 48 tokens, {evaluations} of {evaluations} evaluations" in out.stdout
    assert "agrees with the recorded numbers" in lines[-1]


def test_the_worst_gradient_counts():
    ones = np.ones(4, np.float32)
    drift = certify._gradient_drift({"a": ones, "b": 2 * ones, "c": ones}, {"a": ones, "b": 2.02 * ones})
    assert drift.name == "gradients of 2 tensors"
    assert drift.difference == pytest.approx(0.02 / 2.02, rel=1e-5)
    for recorded in {"d": ones}, {"a": np.ones(5, np.float32)}:
        with pytest.raises(CheckpointError, match="is none of the model's"):
            certify._gradient_drift({"a": ones}, recorded)


def test_a_drift_is_reported():
    drifts = [certify.Drift("a", 1e-4, 0.5), certify.Drift("b", 1e-3, 10.0), certify.Drift("c", float("nan"), 1.0)]
    assert [drift.within(2e-4) for drift in drifts] == [True, True, False]
    report = certify.Report(drifts[:2], [certify.Agreement("case", 3, 4, 5, 5)])
    assert not report.holds(2e-4) and "3 of 4 tokens, 5 of 5 evaluations  <- differs" in report.text(2e-4)
    assert certify.Report(drifts[:2], []).holds(2e-4) and not certify.Report(drifts, []).holds(2e-4)


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers")), reason="needs the parity extra"
)
def test_transformers_loads_an_exported_tower(data, tmp_path):
    """Names, shapes and numbers. Its clamp of dt at `time_step_min`, unknown to the published code, is off."""
    export(data / "tiny/checkpoint", tmp_path / "context", "context", 10**6)
    code = f"""
import numpy as np, torch, transformers
from safetensors.numpy import load_file
expected = load_file({str(data / "tiny/expected.safetensors")!r})
model, info = transformers.AutoModelForCausalLM.from_pretrained(
    {str(tmp_path / "context")!r}, dtype=torch.float32, output_loading_info=True, time_step_min=1e-30)
assert not info["missing_keys"] and not info["unexpected_keys"], info
with torch.no_grad():
    logits = model(torch.from_numpy(expected["context.ids"]), use_cache=False).logits.numpy()
print(np.abs(logits - expected["context.logits"]).max())
assert np.abs(logits - expected["context.logits"]).max() < 2e-4
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=tmp_path)
