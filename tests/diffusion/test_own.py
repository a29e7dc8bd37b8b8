"""What a user registers: the examples of configs/ at tiny size, and their place in a run's identity."""

import dataclasses
import json
import pathlib
import runpy
import shutil

import numpy as np
import pytest

from helpers import ROOT
from twotower_jax import registry
from twotower_jax.diffusion import SCHEDULES, WEIGHTS, SamplingConfig
from twotower_jax.generation import Settings, generate
from twotower_jax.registry import run_file
from twotower_jax.train.config import DiffusionConfig, freeze, shipped
from twotower_jax.train.loop import train
from twotower_jax.two_tower import TwoTower

CONFIGS = ROOT / "configs"


@pytest.fixture(autouse=True)
def registries_of_their_own(monkeypatch):
    """What a test registers is gone after it, and what others registered is not there."""
    for each in registry._ALL:
        ours = {name for name, files in each._files.items() if registry._is_shipped(files[0])}
        monkeypatch.setattr(each, "_things", {k: v for k, v in each._things.items() if k in ours})
        monkeypatch.setattr(each, "_files", {k: v for k, v in each._files.items() if k in ours})


def test_a_run_with_its_own_schedule_goes_on_only_with_the_same_source(tmp_path, monkeypatch, train_config):
    monkeypatch.chdir(tmp_path)
    own = pathlib.Path(shutil.copy(CONFIGS / "example_schedule.py", tmp_path / "mine.py"))
    config = freeze(runpy.run_path(str(own))["get_config"]())
    assert config.diffusion == DiffusionConfig(schedule="power", weight="root")
    small = train_config(objective="denoiser", steps=2, validation_fraction=0.0)
    model = dict(small.model) | {"hybrid_override_pattern": "-"}
    config = dataclasses.replace(small, model=model, diffusion=config.diffusion)
    lines = []
    train(config, tmp_path / "run", lines.append)
    named = json.loads((tmp_path / "run" / "config.json").read_text())["registered"]
    assert named["schedule"]["power"].startswith("mine.py sha256:") and "root" in named["weight"]
    train(config, tmp_path / "run", lines.append)
    assert lines[-1] == "step 2 is already made; nothing to do"
    own.write_text(own.read_text() + "# changed\n")
    with pytest.raises(ValueError, match="registered.schedule.power 'mine.py sha256:.*' -> 'mine.py sha256:"):
        train(config, tmp_path / "run", lines.append)


def test_the_example_is_its_formulas():
    runpy.run_path(str(CONFIGS / "example_schedule.py"))
    t = np.float32([0.25, 1.0])
    level = SCHEDULES["power"].mask_probability(t)
    np.testing.assert_allclose(level, [0.0625, 1.0])
    np.testing.assert_allclose(SCHEDULES["power"].rate(t), [0.5, 2.0])
    np.testing.assert_allclose(WEIGHTS["root"](t, level), [4.0, 1.0], rtol=1e-6)


def test_a_strategy_of_ones_own_generates(small_config, random_params):
    run_file(CONFIGS / "example_strategy.py")
    # A recurrence tells masked positions apart; where all are alike, all lead by the same margin.
    model = TwoTower(small_config("M-"))
    params = random_params(model)
    evaluations = []
    for least in (0.0, 1.0):
        sampling = SamplingConfig(4, 4, "margin", strategy_options={"least_margin": least})
        settings = Settings(max_new_tokens=4, sampling=sampling, batch_size=1, ignore_eos=True)
        (result,) = generate(model, params, [[5, 6]], settings)
        assert model.config.mask_token_id not in result.tokens
        evaluations.append(result.denoiser_evaluations)
    assert evaluations == [1, 4]


def test_names_belong_to_the_file_that_registered_them(tmp_path):
    file = tmp_path / "again.py"
    file.write_text("from twotower_jax.diffusion import SCHEDULES\nSCHEDULES.register('cosine', SCHEDULES['linear'])\n")
    with pytest.raises(ValueError, match="again.py: ValueError: schedule 'cosine' is registered already"):
        run_file(file)
    with pytest.raises(ValueError, match="there is no such file"):
        run_file(tmp_path / "absent.py")
    with pytest.raises(ValueError, match="there is no config 'huge'; there are .*tiny"):
        shipped("huge")
