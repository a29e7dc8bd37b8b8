"""`peft` itself beside ours: an adapter exported for a single tower gives the same logits there. The extra `parity`."""

import importlib.util
import subprocess
import sys

import jax
import numpy as np
import pytest

from helpers import DATA
from twotower_jax.checkpoint.export import export_adapter
from twotower_jax.checkpoint.load import load
from twotower_jax.lora import Lora
from twotower_jax.parameters import bind
from twotower_jax.train.loop import train

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft")),
    reason="needs the parity extra",
)
# What is said of an adapter whose names do not fit is a warning there, and must be none here.
CODE = """
import sys, warnings
import numpy as np, torch, transformers
from peft import PeftModel

base, adapter, ids, output = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
ids = torch.from_numpy(np.load(ids))
with torch.no_grad(), warnings.catch_warnings():
    plain = model(ids, use_cache=False).logits.numpy()
    warnings.simplefilter("error")
    adapted = PeftModel.from_pretrained(model, adapter)(ids, use_cache=False).logits.numpy()
np.savez(output, plain=plain, adapted=adapted)
"""


@pytest.mark.parametrize("kind", ["moe", "dense", "latent"])
def test_peft_computes_the_same(train_config, tmp_path, kind):
    base, run, adapter = DATA / "family" / kind, tmp_path / "run", tmp_path / "adapter"
    changes = {"init_from": str(base), "steps": 2, "learning_rate": 0.05, "lora": Lora(rank=3, alpha=24.0)}
    train(train_config(pattern="-", validation_fraction=0.0, **changes), run, lambda line: None)
    assert export_adapter(run, adapter, "both") > 0
    ids = np.random.default_rng(0).integers(4, 300, (2, 24))
    np.save(tmp_path / "ids.npy", ids)
    names = base, adapter, tmp_path / "ids.npy", tmp_path / "logits.npz"
    subprocess.run([sys.executable, "-c", CODE, *map(str, names)], check=True, timeout=240, cwd=tmp_path)
    theirs = np.load(tmp_path / "logits.npz")
    for name, folder in (("plain", None), ("adapted", adapter)):
        loaded = load(base, adapter=folder)
        ours = jax.jit(lambda params, model=loaded.model: bind(model, params).context_logits(ids))(loaded.params)
        np.testing.assert_allclose(ours, theirs[name], rtol=0, atol=2e-4)  # As of this family without an adapter.
    assert np.abs(theirs["adapted"] - theirs["plain"]).max() > 0.1
