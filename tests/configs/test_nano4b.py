"""configs/nano4b.py: the published model, and meshes that divide it; moments in bfloat16, which its smallest needs."""

import gzip
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import ROOT
from twotower_jax.checkpoint import listing
from twotower_jax.mesh_check import check_fits
from twotower_jax.parameters import count, parameter_table
from twotower_jax.planning import least
from twotower_jax.sharding import make_mesh
from twotower_jax.train.config import base_config, freeze
from twotower_jax.train.loop import train
from twotower_jax.train.objectives import make_objective
from twotower_jax.train.step import abstract_state, initial_state, make_optimizer, make_step, split, tables
from twotower_jax.two_tower import Backbone

PARAMETERS = 3_973_556_832
MESHES = {"h200": 1, "h100": 1, "v5e-8": 8, "v6e-8": 8, "v5p-64": 64, "": 16}


def nano4b(hardware: str = ""):
    path = ROOT / "configs/nano4b.py"
    spec = importlib.util.spec_from_file_location("nano4b", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(hardware)


def test_it_is_the_published_model(data):
    path = data / "nano4b/backbone_tensors.json.gz"
    published = json.loads(gzip.decompress(path.read_bytes()))
    config = freeze(nano4b())
    table = parameter_table(Backbone(config.model_config(config.vocab_size)))
    ours = {str(name): list(p.tensor_shape) for p in table.values() for name in p.tensors.flat}
    assert ours == published["tensors"]
    assert count(table) == published["parameters"] == PARAMETERS


@pytest.mark.parametrize(("hardware", "devices"), MESHES.items())
def test_every_mesh_divides_model_and_batch(hardware, devices):
    """A part of the batch is one sequence a device, or where these are small one over several of them; the config
    without hardware takes the whole batch at once."""
    config = freeze(nano4b(hardware))
    shape = config.mesh.resolve(devices)
    model, rows = config.model_config(config.vocab_size), config.batch_size // config.accumulate
    for block_size in config.block_sizes:
        check_fits(shape, model, rows, config.sequence_length, block_size)
    assert not hardware or rows * shape.sequence * shape.tensor == devices
    assert config.batch_size == 64
    assert config.steps * config.batch_size * config.sequence_length == pytest.approx(10e9, rel=0.05)


def test_hardware_that_it_does_not_know():
    with pytest.raises(ValueError, match="nano4b.py:v9: there are h200, h100"):
        nano4b("v9")


# Moments in bfloat16.


def small(**changes):
    config = base_config(
        {
            "hidden_size": 32,
            "hybrid_override_pattern": "M-",
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 16,
            "intermediate_size": 64,
        }
    )
    config.update(vocab_size=16, steps=200, batch_size=16, sequence_length=32, learning_rate=1e-2, block_size=8)
    config.update(changes)
    return freeze(config)


def losses(config) -> np.ndarray:
    """The losses of all steps, on sequences whose tokens follow from the ones before them, with one draw in five."""
    objective = make_objective(config, config.model_config(16))
    optimizer = make_optimizer(config, tables(objective)[0])
    params = objective.start(None, jax.random.key(0))
    trained, frozen = split(objective, params)
    state, step = initial_state(optimizer, trained), jax.jit(make_step(config, objective, optimizer, 8))
    draw, found = np.random.default_rng(0), []
    follows = draw.permutation(16)
    for _ in range(config.steps):
        ids = [draw.integers(16, size=config.batch_size)]
        for _ in range(config.sequence_length - 1):
            free = draw.random(config.batch_size) < 0.2
            ids.append(np.where(free, draw.integers(16, size=config.batch_size), follows[ids[-1]]))
        state, metrics = step(state, frozen, np.stack(ids, 1).astype(np.int32))
        found.append(float(metrics.loss))
    return np.array(found)


@pytest.mark.whole
def test_moments_in_bfloat16_train_as_well():
    """The mean loss of the last 50 of 200 steps is within a thousandth of that with float32 moments."""
    exact, kept = (losses(small(moments_dtype=dtype))[-50:].mean() for dtype in ("float32", "bfloat16"))
    assert exact < 1.3  # It was 2.77 at the start; the entropy of a step is 1.06.
    assert abs(kept / exact - 1) < 1e-3
    assert kept != exact


def test_moments_are_stored_so_and_lie_where_their_parameters_do(step_config):
    config = step_config(**{"moments_dtype": "bfloat16", "mesh.fsdp": 8})
    objective = make_objective(config, config.model_config(40))
    optimizer = make_optimizer(config, tables(objective)[0])
    state, _ = abstract_state(objective, optimizer, make_mesh(config.mesh, jax.devices()))
    adam = state.optimizer[1][0]
    for moments in (adam.mu, adam.nu):
        for moment, parameter in zip(jax.tree.leaves(moments), jax.tree.leaves(state.params), strict=True):
            assert moment.dtype == jnp.bfloat16 and parameter.dtype == jnp.float32
            assert moment.shape == parameter.shape and moment.sharding == parameter.sharding
    assert adam.count.dtype == jnp.int32


@pytest.mark.whole
def test_a_run_with_moments_in_bfloat16_goes_on_as_if_never_stopped(train_config, tmp_path, compile_once):
    """And not with moments of another kind."""
    settings = {"pattern": "-", "steps": 6, "log_every": 1, "checkpoint_every": 0, "validation_fraction": 0.0}
    config = train_config(moments_dtype="bfloat16", **settings)
    whole = train(config, tmp_path / "whole", lambda line: None)
    asked = iter(["", "", "", ""])
    first = train(config, tmp_path / "parts", lambda line: None, stop=lambda: next(asked, "somebody"))
    assert 0 < first.step < 6
    rest = train(config, tmp_path / "parts", lambda line: None)
    for name in ("loss", "grad_norm"):
        assert rest.metrics[name] == whole.metrics[name]
    other = train_config(**settings)
    with pytest.raises(ValueError, match="moments_dtype 'bfloat16' -> 'absent'"):
        train(other, tmp_path / "parts", lambda line: None)


def test_moments_that_bfloat16_cannot_follow_are_refused():
    with pytest.raises(ValueError, match="cannot follow moments that change as slowly as with adam_betas=.0.9, 0.999"):
        small(moments_dtype="bfloat16", adam_betas=(0.9, 0.999))
    with pytest.raises(ValueError, match="moments_dtype='int8' is not one of"):
        small(moments_dtype="int8")


def test_a_dry_run_of_its_list(data):
    text = listing.dry_run(data / "nano4b/backbone_tensors.json.gz", "identity")
    assert f"{PARAMETERS:,} parameters; nothing missing, nothing left over" in text


@pytest.mark.whole
def test_the_least_that_it_takes():
    """The tables of docs/reports/nano4b.md; and by hand, of one H100: 4 bytes of weight and of gradient, 4 of two
    moments, 2 of the frozen tower, but for some vectors."""
    tables_of_docs = least.markdown(lambda name: freeze(nano4b(name)), rows=8, capacity=4096)
    assert tables_of_docs in (ROOT / "docs/reports/nano4b.md").read_text(encoding="utf-8")
    card, devices = least.TRAINING["h100"]
    plan = least.least_training(freeze(nano4b("h100")), card, devices)
    assert plan.total == pytest.approx((4 + 4 + 4 + 2) * PARAMETERS, rel=0.02)
    assert plan.tokens_per_second == pytest.approx(0.5 * 989e12 / (plan.flops / plan.tokens))
    eighth = least.least_training(freeze(nano4b("v6e-8")), *least.TRAINING["v6e-8"])
    assert eighth.mesh == {"fsdp": 8}
    assert eighth.total == pytest.approx((4 + 4 + 8 + 2) * PARAMETERS / 8, rel=0.02)
