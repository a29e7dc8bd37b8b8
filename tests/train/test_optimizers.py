"""Optimizers by name, the average of the weights, the gradient's noise scale."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from twotower_jax.checkpoint import orbax_steps, workdir
from twotower_jax.checkpoint.load import load
from twotower_jax.parameters import bind, flatten
from twotower_jax.sharding import MeshShape, batch_sharding, make_mesh
from twotower_jax.train.loop import train
from twotower_jax.train.metrics import METRICS, LossWindow
from twotower_jax.train.objectives import make_objective
from twotower_jax.train.optimizers import OPTIMIZERS, averaged, is_hidden_matrix
from twotower_jax.train.step import make_optimizer, make_step, noise_scale, split, start_state, tables

pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.mark.whole
def test_muon_turns_hidden_matrices_and_leaves_the_rest_to_adamw(step_config, random_params):
    config = step_config(optimizer="muon", objective="autoregressive", warmup_fraction=0.0, clip_norm=1e9)
    objective = make_objective(config, config.model_config(40))
    table, params = tables(objective)[0], split(objective, random_params(objective.model))[0]
    gradients = jax.tree.map(lambda p: jnp.sin(37 * p), params)

    def updates(name):
        optimizer = OPTIMIZERS[name](config, table)
        return flatten(jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(gradients, params))

    muon, adamw, rate = updates("muon"), updates("adamw"), config.learning_rate
    turned = {path for path, parameter in table.items() if is_hidden_matrix(parameter)}
    assert {path[-2:] for path in turned} >= {("in_proj", "weight"), ("q_proj", "weight"), ("router", "weight")}
    assert {path[-1] for path in turned} == {"weight", "up", "down"} and ("head", "weight") not in turned
    for path, update in muon.items():
        if path not in turned:
            np.testing.assert_array_equal(update, adamw[path], err_msg=str(path))
            continue
        # Each matrix by itself, however many lie in one array: all of its directions count about the same.
        moved = np.asarray(update, np.float64) / -rate - config.weight_decay * np.asarray(flatten(params)[path])
        values = np.linalg.svd(moved, compute_uv=False) / (0.2 * np.sqrt(max(update.shape[-2:])))
        assert values.min() > 0.3 and values.max() < 1.3, path
        # And they are those of the gradient.
        u, _, v = np.linalg.svd(np.asarray(flatten(gradients)[path], np.float64), full_matrices=False)
        assert np.all(np.einsum("...ij,...ij->...", u @ v, moved) > 0), path


def test_the_average_is_that_of_the_weights_after_each_step():
    optimizer = averaged(0.5, optax.sgd(0.25))
    params = {"w": jnp.array([1.0, -2.0])}
    state, average = optimizer.init(params), np.array([1.0, -2.0])
    for step in range(6):
        updates, state = optimizer.update({"w": jnp.array([1.0, step])}, state, params)
        params = optax.apply_updates(params, updates)
        kept = min(0.5, (1 + step) / (10 + step))
        average = kept * average + (1 - kept) * np.asarray(params["w"])
        np.testing.assert_allclose(state.average["w"], average, rtol=1e-6)
    assert state.count == 6


@pytest.fixture(scope="module")
def run(train_config, tmp_path_factory):
    """Four steps with everything: settings and workdir."""
    config = train_config(
        pattern="E-",
        steps=4,
        checkpoint_every=2,
        log_every=2,
        optimizer="muon",
        ema_decay=0.5,
        moments_dtype="bfloat16",
    )
    folder = tmp_path_factory.mktemp("run")
    train(config, folder, lambda line: None)
    return config, folder


def rows(folder):
    lines = (folder / METRICS).read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def stored(folder, tree):
    return flatten(orbax_steps.restore_arrays(folder / tree, jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), orbax_steps.stored_arrays(folder / tree))))  # fmt: skip


@pytest.mark.whole
def test_a_run_with_an_average_goes_on_to_the_bit(run, tmp_path):
    config, folder = run
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / workdir.CHECKPOINTS / "4")
    train(config, copy, lambda line: None)
    assert rows(copy)[-1] == rows(folder)[-1]
    for tree in ("params", "optimizer", "average"):
        a, b = (stored(f / workdir.CHECKPOINTS / "4", tree) for f in (folder, copy))
        assert a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


@pytest.mark.whole
def test_what_loads_the_run_takes_the_average(run):
    config, folder = run
    last = folder / workdir.CHECKPOINTS / "4"
    average, params = stored(last, "average"), stored(last, "params")
    loaded = flatten(load(folder).params["context_tower"])
    bias = ("segment_0", "layer_0", "mixer", "router", "bias")
    assert {path for path in loaded if ("tower", *path) not in average} == {bias}
    for path, array in loaded.items():
        np.testing.assert_array_equal(array, params[("tower", *path)] if path == bias else average[("tower", *path)])
    assert all(v.dtype == np.float32 for v in average.values()) and np.any(params[("tower", *bias)])
    row = rows(folder)[-1]
    assert row["validation_average_loss"] > 0 and row["validation_average_loss"] != row["validation_loss"]


@pytest.mark.whole
def test_muon_and_the_average_on_a_mesh_are_those_of_one_device(step_config, random_params):
    config = step_config(
        **{"objective": "autoregressive", "model.hybrid_override_pattern": "*E", "optimizer": "muon", "ema_decay": 0.5}
    )
    objective = make_objective(config, config.model_config(40))
    optimizer = make_optimizer(config, tables(objective)[0])
    ids = np.random.default_rng(0).integers(4, 40, (8, 32)).astype(np.int32)

    def run(mesh=None):
        state, frozen = start_state(objective, optimizer, random_params(objective.model), mesh)
        step = jax.jit(make_step(config, objective, optimizer, 4))
        rows = ids if mesh is None else jax.device_put(ids, batch_sharding(mesh))
        for _ in range(2):
            state, _ = step(state, frozen, rows)
        return state

    mesh = make_mesh(MeshShape(fsdp=8))
    one = run()
    with jax.set_mesh(mesh):
        many = run(mesh)
    for found, expected in ((many.params, one.params), (many.average, one.average)):
        for path, array in flatten(found).items():
            np.testing.assert_allclose(array, flatten(expected)[path], rtol=1e-3, atol=2e-5, err_msg=str(path))
    matrix = ("head", "weight")
    assert flatten(many.average)[matrix].sharding == flatten(many.params)[matrix].sharding


@pytest.mark.whole
def test_the_noise_scale_is_its_formula(step_config, random_params):
    config = step_config(
        **{
            "objective": "autoregressive",
            "model.hybrid_override_pattern": "-",
            "model.intermediate_size": 12,
            "accumulate": 4,
            "gradient_noise_scale": True,
        }
    )
    objective = make_objective(config, config.model_config(40))
    optimizer = make_optimizer(config, tables(objective)[0])
    state, frozen = start_state(objective, optimizer, random_params(objective.model))
    ids = jax.random.randint(jax.random.key(1), (8, 32), 4, 40)
    metrics = jax.jit(make_step(config, objective, optimizer, 4))(state, frozen, ids)[1]

    @jax.jit
    def gradient(rows):
        def loss(params):
            logits = bind(objective.model, params).logits(rows)
            return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], rows[:, 1:]).mean()

        return jax.flatten_util.ravel_pytree(jax.grad(loss)(state.params))[0]

    parts = np.stack([gradient(ids[part::4]) for part in range(4)]).astype(np.float64)
    small, big = np.mean(np.sum(parts**2, axis=1)), np.sum(parts.mean(axis=0) ** 2)
    # Appendix A.1: batches of 2 and of 8 sequences.
    squared, trace = (8 * big - 2 * small) / 6, (small - big) / (1 / 2 - 1 / 8)
    found = metrics.losses["gradient_noise_scale"]
    np.testing.assert_allclose((found.total, found.count), (trace, squared), rtol=1e-4)
    window = LossWindow({"next_token_loss": 1.0})
    window.add({"gradient_noise_scale": found})
    np.testing.assert_allclose(window.means()["gradient_noise_scale"], trace / squared, rtol=1e-4)


def test_the_noise_scale_is_that_of_known_noise():
    """For gradients G + noise, tr Σ / |G|² = 10 · 4 / 20."""
    rng, total = np.random.default_rng(0), np.zeros(2)
    for _ in range(4000):
        parts = np.sqrt(2) + 2 / np.sqrt(4) * rng.standard_normal((4, 10))  # Each the mean of 4 sequences of 16.
        whole, shares = np.sum(parts.mean(axis=0) ** 2), np.sum((parts / 4) ** 2)
        total += noise_scale(whole, shares, 16, 4)
    np.testing.assert_allclose(total[0] / total[1], 2.0, rtol=0.03)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer='sgd' is not one of adamw, muon"),
        (
            {"gradient_noise_scale": True},
            "gradient_noise_scale=True compares parts of a batch, of which accumulate=1 makes one",
        ),
        ({"ema_decay": 1.0}, "ema_decay=1.0 must be at least 0 and less than 1"),
    ],
)
def test_optimizers_that_make_no_sense_are_refused(changes, message, step_config):
    with pytest.raises(ValueError, match=message):
        step_config(**changes)
