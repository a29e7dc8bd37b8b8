"""The comparison with transformers: what both programs are given, and what is said of what they computed."""

import dataclasses

import numpy as np
import pytest
from absl import flags

from twotower_jax import randomness
from twotower_jax.benchmarks import _peer_models, peers
from twotower_jax.checkpoint.load import load
from twotower_jax.execution import Execution
from twotower_jax.parameters import count, flatten, initialize, parameter_table
from twotower_jax.two_tower import Backbone


@pytest.mark.parametrize("name, millions", [("a", 22.7), ("b", 124.0)])
def test_sizes(name, millions):
    assert round(count(parameter_table(Backbone(_peer_models.MODELS[name]))) / 1e6, 1) == millions


@pytest.mark.whole
def test_the_folder_holds_the_weights(tmp_path, capsys):
    """Every array, bit for bit, in both towers, so that whoever reads the layout computes with the same."""
    small = {"vocab_size": 32, "hidden_size": 16, "moe_intermediate_size": 8, "moe_shared_expert_intermediate_size": 8}
    config = dataclasses.replace(_peer_models.MODELS["a"], hybrid_override_pattern="ME*", **small)
    _peer_models.write_backbone(config, tmp_path / "folder")
    flat = Execution(scan_layers=False)
    params = load(tmp_path / "folder", execution=flat).params
    expected = flatten(initialize(parameter_table(Backbone(config, flat)), randomness.key(0)))
    for path, array in expected.items():
        tower = "context_tower" if path[0] == "tower" else "context_head"
        np.testing.assert_array_equal(flatten(params)[tower, *path[1:]], array)


def test_what_is_said_of_results():
    assert peers._compared(np.array([[1, 2, 3, 4]]), np.array([[1, 2, 3, 5]])) == "75% of the tokens the same"
    assert peers._compared(np.array([1.0, 2.0]), np.array([1.0, 2.5])) == "at most 0.5 apart, of values to 2.5"


def test_what_is_not_there_is_named(monkeypatch):
    holder = flags.FlagValues()
    flags.DEFINE_list("models", ["a", "c"], "", flag_values=holder)
    holder.mark_as_parsed()
    monkeypatch.setattr(flags, "FLAGS", holder)
    with pytest.raises(ValueError, match="--models: there is no 'c'; there are a, b"):
        peers.main()
    monkeypatch.setattr(peers.importlib.metadata, "version", _missing)
    with pytest.raises(ValueError, match="torch is not installed"):
        peers._versions()


def _missing(name):
    raise peers.importlib.metadata.PackageNotFoundError(name)
