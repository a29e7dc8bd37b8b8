"""`peft` itself beside ours: an adapter written for a single tower gives the same logits there. The extra `parity`."""

import importlib.util
import subprocess
import sys

import jax
import numpy as np
import pytest

from helpers import DATA
from twotower_jax.checkpoint import adapter as adapters
from twotower_jax.checkpoint import config_file
from twotower_jax.checkpoint.fingerprint import fingerprint
from twotower_jax.checkpoint.load import load
from twotower_jax.lora import TARGETS, Lora, adapter_table
from twotower_jax.parameters import bind, parameter_table
from twotower_jax.two_tower import Backbone

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft")),
    reason="needs the parity extra",
)
# What is said of an adapter whose names do not fit is a warning there, and must be none here. The one about our own
# field of the configuration, which it leaves out, there is.
CODE = """
import sys, warnings
import numpy as np, torch, transformers
from peft import PeftModel

base, adapter, ids, output = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
ids = torch.from_numpy(np.load(ids))
with torch.no_grad(), warnings.catch_warnings():
    plain = model(ids, use_cache=False).logits.numpy()
    warnings.simplefilter("error", UserWarning)
    warnings.filterwarnings("ignore", "Unexpected keyword arguments .'twotower_jax'. for class LoraConfig")
    adapted = PeftModel.from_pretrained(model, adapter)(ids, use_cache=False).logits.numpy()
np.savez(output, plain=plain, adapted=adapted)
"""


@pytest.mark.parametrize("kind", ["moe", "dense", "latent"])
def test_peft_computes_the_same(kind, tmp_path):
    base, folder = DATA / "family" / kind, tmp_path / "adapter"
    table = parameter_table(Backbone(config_file.read_config(base)))
    # It refuses out_proj of a Mamba-based model.
    targets = ",".join(target for target in TARGETS.split(",") if target != "out_proj")
    settings, rng = Lora(rank=3, alpha=24.0, targets=targets), np.random.default_rng(0)
    tensors = {
        str(name): (0.05 * rng.standard_normal(parameter.tensor_shape)).astype(np.float32)
        for parameter in adapter_table(table, settings.rank, settings.patterns).values()
        for name in parameter.tensors.flat
    }
    held = adapters.Adapter(base, settings, settings.scale, tensors, fingerprint(base), str(base))
    assert adapters.write(held, folder, adapters.modules_of(table)) == len(tensors)
    ids = rng.integers(4, 300, (2, 24))
    np.save(tmp_path / "ids.npy", ids)
    names = base, folder, tmp_path / "ids.npy", tmp_path / "logits.npz"
    subprocess.run([sys.executable, "-c", CODE, *map(str, names)], check=True, timeout=240, cwd=tmp_path)
    theirs = np.load(tmp_path / "logits.npz")
    for name, adapter in (("plain", None), ("adapted", folder)):
        loaded = load(base, adapter=adapter)
        ours = jax.jit(lambda params, model=loaded.model: bind(model, params).context_logits(ids))(loaded.params)
        np.testing.assert_allclose(ours, theirs[name], rtol=0, atol=2e-4)  # As of this family without an adapter.
    assert np.abs(theirs["adapted"] - theirs["plain"]).max() > 1
