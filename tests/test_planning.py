"""twotower_jax/planning: the real step compiled for devices that need not be there; here they are virtual CPUs."""

import math
import subprocess
import sys

import jax
import pytest

from twotower_jax.parameters import parameter_table
from twotower_jax.planning import hardware, report, serving
from twotower_jax.planning.hardware import Hardware
from twotower_jax.planning.plan import find_forbidden, plan_step
from twotower_jax.sharding import MeshShape
from twotower_jax.train.objectives import make_objective
from twotower_jax.train.step import tables
from twotower_jax.two_tower import TwoTower


@pytest.fixture(scope="module")
def plan(step_config):
    config = step_config(**{"mesh.fsdp": 8, "vocab_size": 40})
    return plan_step(config, Hardware("cpu:8", jax.devices(), 8, 2**30, 1e12))


def test_bytes_by_kind(plan, step_config):
    """Matrices with a side of D = 16 in eighths, all else whole; the optimizer has two moments a weight, two counts."""
    trained, frozen = tables(make_objective(step_config(), step_config().model_config(40)))

    def on_a_device(table):
        eighths = {path: 8 if len(p.tensor_shape) > 1 and 16 in p.tensor_shape else 1 for path, p in table.items()}
        return sum(4 * math.prod(p.shape) // eighths[path] for path, p in table.items())

    assert plan.mesh == {"fsdp": 8}
    assert plan.weights == on_a_device(trained) + on_a_device(frozen)
    assert plan.optimizer == 2 * on_a_device(trained) + 2 * 4
    assert 0 < plan.activations < plan.memory
    assert plan.fits
    assert not plan._replace(memory=int(1.05 * plan.total)).fits
    assert plan._replace(memory=int(1.12 * plan.total)).fits


def test_nothing_that_is_ruled_out(plan):
    assert not any(gate.found for gate in plan.gates)


def test_the_report_says_it_all(plan):
    text = report.describe(plan)
    for part in ("cpu:8: 8 chips, 8 devices, mesh fsdp 8", f"{plan.parameters:,} parameters", "fits", "chip-hours"):
        assert part in text
    assert "DOES NOT FIT" in report.describe(plan._replace(memory=plan.total))
    assert report.as_json(plan)["fits"] is True


def test_what_is_ruled_out_is_found(step_config):
    """States of 8 heads × 4 × 8 for each of the 64 blocks of 4 tokens; 256 tokens times 8 experts of width 24."""
    config = step_config()
    model = config.model_config(40)
    states, dense = find_forbidden(
        "a = f32[64,8,4,8]{3,2,1,0} b = f32[32,8,4,8] c = bf16[256,192] d = f32[256,24] e = s32[900,900]",
        config,
        model,
        4,
        MeshShape(),
    )
    assert states.found == ["f32[64,8,4,8]"]
    assert dense.found == ["bf16[256,192]"]


def test_serving_on_one_device(step_config):
    """Weights in bfloat16, and caches of two Mamba layers and one with keys."""
    model = step_config().model_config(40)
    hardware = Hardware("cpu", jax.devices(), 8, 2**30, 1e12)
    plan = serving.plan_serving(model, hardware, batch=2, capacity=64, block_size=4)
    table = parameter_table(TwoTower(model))
    assert plan.weights == sum(math.prod(p.shape) * (4 if p.float32 else 2) for p in table.values())
    keys, convolution, state = 2 * 2 * 64 * 2 * 4 * 2, 2 * 4 * (32 + 2 * 4 * 8) * 2, 2 * 8 * 4 * 8 * 4
    assert plan.cache == keys + 2 * (convolution + state) + 2 * 4
    assert len(plan.functions) == 3 and plan.fits
    assert not plan._replace(memory=plan.total).fits
    assert "fits" in serving.describe(plan)


@pytest.mark.parametrize("name", ["v9:1", "v5p", "v5p:", "v5p:2x-1", "v5p:axb", "h200"])
def test_a_topology_that_means_nothing(name):
    with pytest.raises(ValueError, match="give a generation and a shape"):
        hardware.find(name)


def test_the_command_refuses_in_one_line():
    command = [sys.executable, "launch/compile.py", "--config=configs/tiny.py", "--topology=v9:1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: topology 'v9:1'") and done.stderr.count("\n") == 1
