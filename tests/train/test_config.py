"""The settings of a run: what is refused, the schedules that they stand for, the files of configs/."""

import dataclasses
import importlib.util
import re
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from absl import flags
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import config_flags

from helpers import ROOT
from twotower_jax import command_line, parameters
from twotower_jax.config import Variant
from twotower_jax.kernels import Backends
from twotower_jax.parameters import flatten, parameter_table, unflatten
from twotower_jax.shares import ceil_share
from twotower_jax.train.config import TrainConfig, base_config, check_given, freeze
from twotower_jax.train.objectives import make_objective
from twotower_jax.train.schedule import BlockStage, WarmupStableDecay, block_stages, learning_rate
from twotower_jax.train.step import (
    abstract_state,
    make_optimizer,
    make_step,
    tables,
)

CONFIGS = ROOT / "configs"
MODEL = {
    "hidden_size": 24,
    "hybrid_override_pattern": "M*",
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
}


def config_file(name: str):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


# Settings.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "diffusion"}, "objective='diffusion' is not one of autoregressive, denoiser"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"steps": 0}, "steps=0"),
        ({"seed": -1}, "seed=-1"),
        ({"steps": 2**31}, "steps=2147483648 must be less than 2**31"),
        ({"block_curriculum": ((0.0, 2**31),)}, "block size 2147483648 must be at least 1 and less than 2**31"),
        ({"mesh": {"data": 2**31}}, "mesh.data=2147483648 must be less than 2**31"),
        ({"model": {"hidden_size": 2**31}}, "hidden_size=2147483648 must be less than 2**31"),
        ({"mesh": {"data": None}}, "mesh.data must be int, found None"),
        ({"variant": {"time_conditioning": None}}, "variant.time_conditioning must be bool, found None"),
        ({"sequence_length": 100, "block_size": 16}, "sequence_length=100 is not a multiple of the block size 16"),
        ({"block_size": 0}, "block_size=0"),
        (
            {"block_size": 16, "block_curriculum": ((0.0, 8),)},
            "block_size=16 and block_curriculum=((0.0, 8),) contradict",
        ),
        # The published curriculum too, where somebody gives it.
        ({"block_size": 16, "block_curriculum": TrainConfig.block_curriculum}, "leave one out, or set it to None"),
        ({"accumulate": 3, "batch_size": 4}, "accumulate=3 does not divide batch_size=4"),
        ({"variant": {"context": "tied"}}, "changes nothing with objective='autoregressive'"),
        ({"sample_prompts": ("a",)}, "change nothing with sample_every=0"),
        ({"model": {"conv_kernel": 1}}, "conv_kernel=1 must be at least 2"),
        (
            {"reset_at_documents": True, "sequence_length": 144, "block_curriculum": ((0.0, 48), (0.5, 32))},
            "sequence_length=144 is not a multiple of the block size 32",
        ),
        ({"objective": "denoiser", "sequence_length": 80}, "sequence_length=80 is not a multiple of the block size 32"),
        ({"block_curriculum": ((0.5, 16),)}, "must start at fraction 0"),
        ({"block_curriculum": ((0.0, 16), (0.7, 8), (0.6, 4))}, "increasing"),
        ({"block_curriculum": (16, 8)}, "16 is not a pair"),
        ({"warmup_fraction": 0.6, "decay_fraction": 0.6}, "warmup_fraction=0.6 and decay_fraction=0.6 overlap"),
        ({"learning_rate": 1e-7}, "final_learning_rate=1e-06 must lie between 0 and learning_rate=1e-07"),
        ({"adam_betas": (0.9, 1.0)}, "adam_betas=(0.9, 1.0)"),
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
        ({"weight_decay": float("nan")}, "weight_decay=nan"),
        ({"model": {"n_groups": 3}}, "n_groups=3 does not divide mamba_num_heads=4"),
        ({"model": {"no_such_field": 3}}, "model has no field 'no_such_field'"),
        ({"no_such_field": 3}, "there is no field 'no_such_field'"),
        ({"objective": "denoiser", "variant": {"context_loss": True}}, "context_loss=True with context='frozen'"),
        ({"variant": {"no_such_field": 3}}, "no_such_field"),
        ({"diffusion": {"schedule": "sigmoid"}}, "schedule='sigmoid' is unknown: choose one of linear, cosine"),
        ({"diffusion": {"weight": "heavy"}}, "weight='heavy' is unknown: choose one of flat, elbo, bounded_elbo"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    config = base_config(MODEL)
    config.update(changes)
    with pytest.raises(ValueError) as error:
        freeze(config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_tokens": 7}, "sample_tokens=7 changes nothing with sample_every=0"),
        ({"decay_fraction": 0.0, "final_learning_rate": 1e-5}, "final_learning_rate=1e-05 changes nothing with decay_"),
        ({"validation_fraction": 0.0, "validation_every": 5}, "validation_every=5 changes nothing with validation_"),
        ({"diffusion.schedule": "cosine"}, "diffusion.schedule='cosine' changes nothing with objective='autoreg"),
    ],
)
def test_what_is_given_for_a_run_must_change_it(changes, message):
    """In a config file it may stand for other runs."""
    config = base_config(MODEL)
    config.update_from_flattened_dict(changes)
    frozen = freeze(config)
    assert check_given(frozen, ["steps", "model.n_groups"]) == []
    with pytest.raises(ValueError, match=f"^config: {message}.*; leave it out$"):
        check_given(frozen, ["steps", *changes])


def test_settings_that_say_what_holds_anyway_are_accepted():
    config = base_config(MODEL)
    config.update(decay_fraction=0.0, final_learning_rate=1e-4, block_size=8)
    given = ["final_learning_rate", "sample_tokens", "validation_every", "diffusion.weight", "block_size"]
    assert check_given(freeze(config), given) == []
    config.init_from = "somewhere"
    (line,) = check_given(freeze(config), [*given, "model.hidden_size", "vocab_size"])
    assert line.startswith("--config.model.hidden_size, --config.vocab_size: not looked at, for with init_from")


def test_settings_of_a_wrong_type_are_refused():
    with pytest.raises(ValueError, match="steps must be int, found 1.5"):
        TrainConfig(model=MODEL, steps=1.5)
    with pytest.raises(TypeError):
        base_config(MODEL).steps = "many"


def test_base_config_holds_every_field_with_its_default():
    assert freeze(base_config(MODEL)) == TrainConfig(model=base_config(MODEL).model.to_dict())


def test_a_block_size_or_a_curriculum_gives_the_stages(train_config):
    config = train_config(objective="denoiser", block_size=None, block_curriculum=((0.0, 32), (2 / 3, 16)))
    assert block_stages(config) == (BlockStage(0, 8, 32), BlockStage(8, 12, 16))
    assert block_stages(train_config(objective="denoiser", block_size=4)) == (BlockStage(0, 12, 4),)


@given(st.integers(1, 99), st.integers(1, 10_000))
def test_borders_are_what_a_person_computes(hundredths, steps):
    fraction = hundredths / 100
    exact = hundredths * steps // 100
    settings = {"objective": "denoiser", "block_curriculum": ((0.0, 32), (fraction, 16)), "warmup_fraction": fraction}
    config = base_config(MODEL)
    config.update(settings | {"steps": steps, "decay_fraction": 0.0})
    frozen = freeze(config)
    assert [stage.start for stage in block_stages(frozen)] == [0, exact]
    assert learning_rate(frozen).warmup_steps == exact
    assert ceil_share(fraction, steps) == -(-hundredths * steps // 100)


def test_warmup_stable_decay():
    schedule = WarmupStableDecay(peak=1.0, final=0.1, steps=20, warmup_steps=4, decay_steps=10)
    expected = [0.25, 0.5, 0.75] + [1.0] * 7 + [1.0 - 0.09 * i for i in range(1, 11)]
    got = [float(jax.jit(schedule)(step)) for step in range(20)]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert WarmupStableDecay(1.0, 0.1, 5, 0, 0)(3) == 1.0
    with pytest.raises(ValueError, match="warmup_steps=3 and decay_steps=3 do not fit into steps=5"):
        WarmupStableDecay(1.0, 0.1, 5, 3, 3)


def test_the_published_schedule_ends_at_its_final_rate():
    schedule = learning_rate(freeze(config_file("nano30b")))
    assert schedule(500_000) == jnp.float32(1e-4)
    np.testing.assert_allclose(float(schedule(999_999)), 1e-6, rtol=1e-4)


# The configs.


def test_the_published_model_traces_and_the_small_one_is_small():
    config = freeze(config_file("nano30b"))
    assert config.objective == "denoiser" and config.dtype == "bfloat16"
    assert [stage.block_size for stage in block_stages(config)] == [32, 16]
    objective = make_objective(config, config.model_config(config.vocab_size))
    ours, frozen = map(parameters.count, tables(objective))
    assert (ours, ours + frozen) == (31_607_959_616, 63_185_902_848)
    optimizer = make_optimizer(config, tables(objective)[0])
    state, rest = abstract_state(objective, optimizer)
    ids = jax.ShapeDtypeStruct((1, config.sequence_length), jnp.int32)
    after, metrics = jax.eval_shape(make_step(config, objective, optimizer, 16), state, rest, ids)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    assert metrics.loss.shape == () and metrics.loss.dtype == jnp.float32

    config = freeze(config_file("small100m"))
    objective = make_objective(config, config.model_config(config.vocab_size))
    assert parameters.count(parameter_table(objective.model)) == 99_124_272


def test_every_config_is_mutable_until_frozen():
    for path in CONFIGS.glob("*.py"):
        if "def get_config" not in path.read_text(encoding="utf-8"):
            continue  # It registers something and is no run.
        config = config_file(path.stem)
        assert isinstance(config, ml_collections.ConfigDict)
        config.steps, config.block_size, config.variant.context = 50, 16, "tied"
        config.objective = "denoiser"
        frozen = freeze(config)
        assert (frozen.steps, frozen.block_size, frozen.variant.context) == (50, 16, "tied")
        assert unflatten(flatten(frozen.model)) == frozen.model
        with pytest.raises(dataclasses.FrozenInstanceError):
            frozen.steps = 3


# The research variants, each one override.


@pytest.mark.filterwarnings("ignore:the load_module")
def test_the_overrides_of_the_docs_give_the_variants(monkeypatch):
    """Every line of the table in docs/guide/training.md, as flags of a command."""
    lines = re.findall(
        r"\| `(--config\.variant\.[^`]*)` \|", (ROOT / "docs" / "guide" / "training.md").read_text(encoding="utf-8")
    )
    found = []
    for line in lines:
        values = flags.FlagValues()
        config = config_flags.DEFINE_config_file("config", flag_values=values)
        command = ["train.py", f"--config={CONFIGS / 'tiny.py'}", "--config.objective=denoiser", *line.split()]
        monkeypatch.setattr(sys, "argv", command)
        values(command)
        found.append(freeze(config.value).variant)
    assert found == [
        Variant(context="trained"),
        Variant(context="tied"),
        Variant(context="tied", context_loss=True),
        Variant(bidirectional_mamba=True),
        Variant(time_conditioning=False),
    ]


@pytest.mark.filterwarnings("ignore:the load_module")
def test_every_field_that_may_be_none_can_be_given_as_none(monkeypatch, tmp_path, capsys):
    file = tmp_path / "config.py"
    kernels = [field.name for field in dataclasses.fields(Backends)]
    file.write_text(
        f"from twotower_jax.train.config import base_config\ndef get_config():\n    config = base_config({MODEL})\n"
        "    config.block_size = 8\n"
        + "".join(f"    config.kernels.{name} = 'xla'\n" for name in kernels)
        + "    return config\n"
    )

    def given(*words):
        monkeypatch.setattr(command_line.flags, "FLAGS", flags.FlagValues())
        flags.DEFINE_integer("verbosity", 0, "As absl's own.", flag_values=command_line.flags.FLAGS)
        config = config_flags.DEFINE_config_file("config", flag_values=command_line.flags.FLAGS)
        command = ["train.py", f"--config={file}", *words]
        monkeypatch.setattr(sys, "argv", command)
        assert command_line._parse(command) == ["train.py"]
        return config.value

    set_to_none = ["block_size", "block_curriculum", *(f"kernels.{name}" for name in kernels)]
    frozen = freeze(given("--config.steps=7", *(f"--config.{name}=None" for name in set_to_none)))
    assert (frozen.block_size, frozen.kernels, frozen.steps) == (None, Backends(), 7)
    assert frozen.block_curriculum == ((0.0, 32), (2 / 3, 16))
    assert freeze(given("--config.block_size=None", "--config.block_curriculum=((0.0,8),)")).block_sizes == [8]
    assert freeze(given()).kernels != Backends() and freeze(given()).block_size == 8
    for unknown in ("no_such", "mesh.no_such", "no.such"):
        with pytest.raises(SystemExit):
            given(f"--config.{unknown}=None")
        assert capsys.readouterr().err.startswith(f"error: --config.{unknown}: the configuration has no such field")
    for field in dataclasses.fields(TrainConfig):
        parts = ("model", "variant", "diffusion", "distillation", "lora", "kernels", "mesh")
        if field.name in ("block_size", "block_curriculum", *parts) or field.type == float | None:
            continue
        with pytest.raises(ValueError, match=f"{field.name} must be .*, found None"):
            freeze(given(f"--config.{field.name}=None"))
