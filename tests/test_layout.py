"""How layers lie where nobody says it."""

import jax
import pytest

from twotower_jax import layout
from twotower_jax.checkpoint.load import load


@pytest.mark.parametrize("few", [True, False])
def test_layers_of_a_model_that_is_not_small_lie_one_by_one(data, monkeypatch, few):
    monkeypatch.setattr(layout, "_FEW", 10**9 if few else 1)
    model, params, _ = load(data / "tiny/checkpoint")
    assert model.context_tower.execution.scan_layers is few
    stretches = model.context_tower.stretches
    assert any(stretch.stacked for stretch in stretches) is few


def test_accelerators_stack_layers_unless_told(data, monkeypatch):
    monkeypatch.setattr(layout, "_FEW", 1)
    config = load(data / "tiny/checkpoint").model.config
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert layout.decoding(config).scan_layers
