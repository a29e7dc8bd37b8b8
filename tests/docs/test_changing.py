"""docs/guide/changing.md: its snippets, and its rows that no other file tests (an objective, an implementation)."""

import dataclasses
import json
import pathlib
import re
import runpy
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import ROOT
from twotower_jax import registry
from twotower_jax.checkpoint.listing import infer_config
from twotower_jax.checkpoint.load import load
from twotower_jax.diffusion import STRATEGIES, Draft, SamplingConfig
from twotower_jax.kernels import OPS, expert_mlp, ssd
from twotower_jax.kernels.experts import Weights
from twotower_jax.layers import registry as layer_kinds
from twotower_jax.parameters import bind, initialize, parameter_table
from twotower_jax.train.config import freeze
from twotower_jax.train.loop import train
from twotower_jax.train.metrics import METRICS
from twotower_jax.train.objectives import OBJECTIVES, Autoregressive, NoiseKey, make_objective
from twotower_jax.train.step import tables, total_loss
from twotower_jax.two_tower import Backbone

CONFIGS = ROOT / "configs"

pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(autouse=True)
def registered_here_alone(monkeypatch):
    for each in registry._ALL:
        monkeypatch.setattr(each, "_things", dict(each._things))
        monkeypatch.setattr(each, "_files", dict(each._files))
    for op in OPS.values():
        monkeypatch.setattr(op, "implementations", dict(op.implementations))
        monkeypatch.setattr(op, "_own", {})


@pytest.fixture
def small(train_config):
    """Makes the settings of a run of two steps with an objective."""

    def make(objective):
        config = train_config(objective=objective, steps=2, log_every=1)
        return dataclasses.replace(config, model=dict(config.model) | {"hybrid_override_pattern": "*-"})

    return make


def test_an_objective_of_ones_own_trains_loads_and_is_part_of_the_run(tmp_path, small):
    own = pathlib.Path(shutil.copy(CONFIGS / "example_objective.py", tmp_path / "mine.py"))
    assert freeze(runpy.run_path(str(own))["get_config"]()).objective == "certain"
    config = small("certain")
    train(config, tmp_path / "run", print)
    rows = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert len(rows) == 2 and all(np.isfinite(row["loss"]) for row in rows)
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["registered"]["objective"]["certain"].startswith("mine.py sha256:")
    assert registry.registered()["objective"] == settings["registered"]["objective"]
    model, params, _ = load(tmp_path / "run")
    ids = jnp.ones((1, 8), int)
    logits, _ = jax.jit(lambda params: bind(model, params).training_logits(ids, ids, jnp.ones(1), 8))(params)
    assert logits.shape[:2] == (1, 8)
    own.write_text(own.read_text() + "# changed\n")
    with pytest.raises(ValueError, match=r"registered.objective.certain 'mine.py sha256:"):
        train(config, tmp_path / "run", print)


@pytest.mark.whole
def test_its_loss_is_its_formula(small, random_params):
    runpy.run_path(str(CONFIGS / "example_objective.py"))
    config = small("certain")
    objective = make_objective(config, config.model_config(8))
    plain = make_objective(small("denoiser"), config.model_config(8))
    params = random_params(objective.model)
    ids = jnp.asarray(np.random.default_rng(0).integers(4, 8, (3, 32)), jnp.int32)
    noise = NoiseKey(0, 0, jnp.arange(3), 3)
    masked = np.random.default_rng(1).random((3, 32)) < 0.6
    examples = objective.examples(ids, jnp.ones(3, bool), noise, 8)
    examples = examples._replace(masked=jnp.asarray(masked), noisy=jnp.where(masked, 3, ids))

    @jax.jit
    def computed(params, examples):
        student = jax.nn.log_softmax(
            bind(objective.model, params).training_logits(ids, examples.noisy, examples.t, 8)[0]
        )
        losses = (each.losses_of(params, examples, 8, validating=True) for each in (objective, plain))
        return *losses, student

    losses, others, student = jax.tree.map(np.asarray, computed(params, examples))
    np.testing.assert_allclose(losses["masked_loss"].total, others["masked_loss"].total, rtol=1e-6)
    expected, right = np.zeros(3), 0
    for row, position in np.argwhere(masked):
        if student[row, position].argmax() == ids[row, position]:
            expected[row] -= np.exp(student[row, position]) @ student[row, position]
            right += 1
    assert 0 < right < masked.sum()
    np.testing.assert_allclose(losses["entropy_by_row"].total, expected, rtol=1e-5)
    np.testing.assert_allclose(losses["entropy"].total, expected.sum(), rtol=1e-5)
    assert losses["entropy"].count == objective.counts(examples)["entropy"] == masked.sum()
    total = losses["masked_loss"].mean + 0.5 * losses["entropy"].mean
    np.testing.assert_allclose(total_loss(objective, losses), total, rtol=1e-6)


def test_an_objective_without_a_denoiser_is_refused(small):
    @OBJECTIVES.register("mine")
    class Mine(Autoregressive):
        pass

    config = small("mine")
    with pytest.raises(ValueError, match="objective='mine': its model is a Backbone, and must be a TwoTower"):
        make_objective(config, config.model_config(40))


@pytest.fixture
def snippet(tmp_path):
    """Runs a section's Python of the page as a file of its own; what it defines."""

    def run(section):
        text = (ROOT / "docs/guide/changing.md").read_text(encoding="utf-8").split(f"\n## {section}\n")[1]
        file = tmp_path / "own.py"
        file.write_text(re.search(r"```python\n(.*?)```", text.split("\n## ")[0], re.DOTALL)[1])
        return runpy.run_path(str(file))

    return run


def settings_of(snippet):
    return freeze(snippet["get_config"]())


def test_the_layer_kind_of_the_page(snippet):
    layer_kinds.kinds()
    own = snippet("A layer kind")
    config = settings_of(own)
    model = Backbone(config.model_config(40))
    assert model.config.hybrid_override_pattern == "Mg*g"
    table = parameter_table(model)
    assert sum("gate" in path for path in table) == 2
    h = jax.jit(lambda: bind(model, initialize(table, jax.random.key(0))).tower.causal(jnp.arange(8)[None]))()
    assert h.shape == (1, 8, 128) and np.isfinite(h).all()
    tensors = {str(name): list(p.tensor_shape) for p in table.values() for name in p.tensors.flat}
    found = infer_config({name.removeprefix("backbone."): shape for name, shape in tensors.items()})
    assert found.hybrid_override_pattern == "Mg*g"


@pytest.mark.whole
def test_the_schedule_weight_and_times_of_the_page(snippet):
    process = settings_of(snippet("Noise schedule and weight")).diffusion.process
    t = np.float32([0.0, 0.5, 1.0])
    np.testing.assert_allclose(process.schedule.mask_probability(t), [0, 0.5, 1])
    np.testing.assert_allclose(process.schedule.rate(t), [0, 1.5, 0], atol=1e-6)
    np.testing.assert_array_equal(process.weight(t, t), t)
    process = settings_of(snippet("Times")).diffusion.process
    ids = jnp.full((64, 32), 5)
    drawn = process.corrupt(ids, seed=0, step=0, example_index=jnp.arange(64), mask_token_id=3, block_size=8)
    one, two = np.asarray(drawn.t)[:32], np.asarray(drawn.t)[32:]
    assert drawn.t.shape == (64,) and abs(np.mean(drawn.t) - 0.5) < 0.1 and not np.array_equal(one, two)
    assert np.std(drawn.t) < 0.25  # A uniform time has 0.289, the mean of two 0.204.


def test_the_strategy_of_the_page(snippet):
    snippet("A sampling strategy")
    logits = np.random.default_rng(0).standard_normal((1, 6, 9)).astype(np.float32)
    sampling = SamplingConfig(6, 6, "left_to_right", strategy_options={"tokens": 2})
    assert sampling.strategy == "left_to_right"
    own = STRATEGIES["left_to_right"](tokens=2)
    masked = jnp.array([False, True, True, False, True, True])
    draft = Draft(jnp.where(masked, 3, 5), masked, logits[0], jnp.full(6, 7), jnp.ones(6), None, 0, 6, 3)
    assert own.new_block(draft).tolist() == [5, 7, 7, 5, 3, 3]
    with pytest.raises(ValueError, match="tokens=0 must be between"):
        STRATEGIES["left_to_right"](tokens=0).check()


def test_the_objective_of_the_page(snippet):
    config = settings_of(snippet("An objective"))
    trained, frozen = tables(make_objective(config, config.model_config(40)))
    assert trained and all(path[0] == "denoiser_tower" and "mixer" in path for path in trained)
    assert any(path[0] == "denoiser_tower" for path in frozen)


def test_the_implementation_of_the_page(snippet):
    assert settings_of(snippet("An implementation of an op")).kernels.ssd == "recomputed"
    rng = np.random.default_rng(0)
    shapes = (1, 8, 2, 4), (1, 8, 2), (1, 8, 2), (1, 8, 1, 4), (1, 8, 1, 4)
    x, dt, log_decay, b, c = (rng.random(shape).astype(np.float32) for shape in shapes)
    arguments = x, dt, -log_decay, b, c

    def total(implementation):
        return jax.jit(jax.value_and_grad(lambda x: ssd(x, *arguments[1:], implementation=implementation)[0].sum()))

    for own, plain in zip(total("recomputed")(x), total("xla")(x), strict=True):
        np.testing.assert_allclose(own, plain, rtol=1e-5)


def test_the_backbone_of_the_page(snippet):
    config = settings_of(snippet("Another backbone of the family"))
    assert len(parameter_table(Backbone(config.model_config(512)))) > 10


@pytest.mark.whole
def test_an_implementation_of_ones_own_is_the_op():
    example = runpy.run_path(str(CONFIGS / "example_implementation.py"))
    assert freeze(example["get_config"]()).kernels.expert_mlp == "one_by_one"
    rng = np.random.default_rng(0)
    x, up, down = (rng.standard_normal(shape).astype(np.float32) for shape in [(6, 4), (5, 4, 3), (5, 3, 4)])
    indices = np.stack([rng.permutation(5)[:2] for _ in range(6)]).astype(np.int32)
    gates, weights = rng.random((6, 2)).astype(np.float32), Weights(jnp.asarray(up), jnp.asarray(down))
    own = expert_mlp(x, indices, gates, weights, implementation="one_by_one")
    np.testing.assert_allclose(own, expert_mlp(x, indices, gates, weights), rtol=1e-5, atol=1e-5)
    # What the package has stays what it is, and nothing chooses what was added.
    with pytest.raises(ValueError, match="expert_mlp has an implementation 'xla' already"):
        OPS["expert_mlp"].register("xla", example["expert_mlp"])
    assert OPS["expert_mlp"].choose(x, indices, gates, weights).implementation == "xla"
