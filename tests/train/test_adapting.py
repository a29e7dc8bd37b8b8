"""An adapter that trains: what it is of, its step against a literal one, on meshes, in parts, over a resume."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower_jax import lora
from twotower_jax.adapted import Adapted
from twotower_jax.checkpoint.load import load
from twotower_jax.checkpoint.quantizing import quantize_params
from twotower_jax.files import CheckpointError
from twotower_jax.kernels.numerics.quantized import Quantized, as_array
from twotower_jax.layers.common import matmul
from twotower_jax.parameters import flatten, parameter_table, unflatten
from twotower_jax.quantization import METHODS
from twotower_jax.sharding import MeshShape, batch_sharding, make_mesh
from twotower_jax.train.config import check_given
from twotower_jax.train.loop import train
from twotower_jax.train.objectives import NoiseKey, make_objective
from twotower_jax.train.step import make_optimizer, make_step, merge, split, start_state, tables
from twotower_jax.two_tower import TwoTower

BLOCK = 4
PATTERN = "model.hybrid_override_pattern"
SETTINGS = {"lora.rank": 4, "lora.alpha": 8.0, "init_from": "somewhere", PATTERN: "--*", "model.intermediate_size": 16}


def make(config, random_params, seed=0):
    """The objective of a config, and parameters of which every one matters, an adapter's B too."""
    objective = make_objective(config, config.model_config(40))
    flat = flatten(random_params(objective.model))
    rng = np.random.default_rng(seed)
    for path, p in getattr(objective, "adapter", {}).items():
        # Updates of a tenth of their matrices: doubled, these would amplify rounding.
        size = 0.1 if path[-1] == lora.B else 1.0
        flat[path] = jnp.asarray(size * rng.standard_normal(p.shape) / np.sqrt(p.shape[-2]), jnp.float32)
    return objective, unflatten(flat)


def loss_of(objective, params, ids, step=3, seed=0):
    losses = objective.losses(params, ids, jnp.ones(len(ids), bool), NoiseKey(seed, step, jnp.arange(len(ids))), BLOCK)
    return sum(losses[term].mean for term in objective.terms)


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(4, 40, (8, 32)).astype(np.int32)


# What an adapter is of.


def test_the_default_is_of_every_projection_of_the_trained_tower_and_of_no_expert(small_config):
    model = TwoTower(small_config("M*E-ME", moe_latent_size=6))
    table = lora.adapter_table({p: v for p, v in parameter_table(model).items() if p[0] == "denoiser_tower"}, 2)
    names = {str(name).split(".", 3)[3] for part in table.values() for name in part.tensors.flat}
    modules = ("in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj",
               "shared_experts.up_proj", "shared_experts.down_proj")  # fmt: skip
    assert names == {f"mixer.{m}.lora_{side}.weight" for m in modules for side in "AB"}
    a, b = (next(p for path, p in table.items() if path[-2:] == ("q_proj", side)) for side in ("lora_a", "lora_b"))
    assert (a.shape, a.tensor_shape, a.axes) == ((16, 2), (2, 16), ("embed", None))
    assert (b.shape, b.tensor_shape, b.axes) == ((2, 24), (24, 2), (None, "heads"))


@pytest.mark.parametrize(
    "targets, message",
    [
        ("lm_head", "lora.targets: lm_head matches nothing that an adapter can change here; there are .*in_proj.*"),
        ("q_proj,up,gate", "lora.targets: up, gate match nothing"),
        ("experts.0.up_proj", "experts.0.up_proj matches nothing"),
        ("layers.0.mixer.in_proj", "names context_tower.layers.0.mixer.in_proj and not .*layers.2.mixer.in_proj, and"),
    ],
)
def test_patterns_that_cannot_be(small_config, targets, message):
    table = parameter_table(TwoTower(small_config("M*M*E-")))
    with pytest.raises(ValueError, match=message) as raised:
        lora.adapter_table(table, 2, targets.split(","))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora.rank": -1}, "lora.rank=-1 must not be negative"),
        ({"lora.rank": 4, "lora.alpha": 0.0}, "lora.alpha=0.0 must be positive"),
        ({"lora.rank": 4, "lora.dropout": 1.0}, "lora.dropout=1.0 must be at least 0 and less than 1"),
        ({"lora.rank": 4, "lora.base": "int3"}, "lora.base='int3' is not one of float32, bfloat16, int8, int4"),
        ({"lora.rank": 4, "lora.targets": "q_proj,"}, "lora.targets='q_proj,' holds an empty pattern"),
        ({"lora.rank": 1000}, "lora.rank=1000 is more than the matrix of .* has"),
    ],
)
def test_settings_that_cannot_be(step_config, changes, message):
    with pytest.raises(ValueError, match=message):
        config = step_config(**changes)
        make_objective(config, config.model_config(40))


def test_no_rank_and_routers_that_move_are_refused(step_config):
    with pytest.raises(ValueError, match="lora.rank=0 is no adapter: give at least 1"):
        check_given(step_config(), ["lora.rank"])
    config = step_config(**{"lora.rank": 2, "router_bias_rate": 1e-3, PATTERN: "*E"})
    with pytest.raises(ValueError, match="router_bias_rate=0.001 moves biases of the base.*leave it out, or train"):
        make_objective(config, config.model_config(40))


# Its product and its step.


@pytest.mark.parametrize("base", ["float32", "int8", "int4"])
def test_the_product_and_its_gradients_are_those_of_the_matrix_that_it_stands_for(base):
    """By hand in float64; the gradient by x also beside a quantized matrix, of which there is none itself."""
    rng = np.random.default_rng(0)
    x, w, a, b = (rng.standard_normal(shape) for shape in ((3, 5, 64), (64, 12), (64, 2), (2, 12)))
    x, a, b = (jnp.asarray(v, jnp.float32) for v in (x, a, b))
    matrix = jnp.asarray(w, jnp.float32)
    if base != "float32":
        from twotower_jax.kernels.numerics.quantized import quantize

        matrix = quantize(matrix, int(base[3:]), 64)
    weight = rng.standard_normal((3, 5, 12))

    def f(x, a, b):
        return jnp.sum(matmul(x, Adapted(matrix, a, b, None, 0.5)) * weight)

    found = jax.value_and_grad(f, (0, 1, 2))(x, a, b)
    x, a, b, w = (np.asarray(v, np.float64) for v in (x, a, b, as_array(matrix, jnp.float32)))
    whole = w + 0.5 * a @ b
    outer = np.einsum("ijk,ijl->kl", x, weight)
    expected = np.sum(x @ whole * weight), (weight @ whole.T, 0.5 * outer @ b.T, 0.5 * a.T @ outer)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=2e-5, atol=2e-5), found, expected)


@pytest.mark.parametrize("objective", ["denoiser", "autoregressive"])
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_is_the_merged_model(
    step_config, random_params, ids, objective
):
    plain = step_config(**{name: value for name, value in SETTINGS.items() if "model" in name}, objective=objective)
    config = step_config(objective=objective, **SETTINGS)
    adapting, params = make(config, random_params)
    inner = make_objective(plain, plain.model_config(40))
    started = adapting.start(lora.split(params)[1], jax.random.key(0)) if objective == "denoiser" else None
    run = jax.jit(loss_of, static_argnums=0)
    if started is not None:
        assert run(adapting, started, ids) == run(inner, lora.split(params)[1], ids)
    merged = lora.merged(adapting.model_params(params))
    np.testing.assert_allclose(run(adapting, params, ids), run(inner, merged, ids), rtol=2e-6)
    assert run(adapting, params, ids) != run(inner, lora.split(params)[1], ids)


def test_what_trains_is_the_adapter_alone(step_config, random_params, ids):
    config = step_config(**SETTINGS)
    objective, params = make(config, random_params)
    trained, frozen = tables(objective)
    assert trained.keys() == objective.adapter.keys() and frozen.keys() == parameter_table(objective.model).keys()
    assert {path[0] for path in trained} == {"denoiser_tower"}
    trains_both = step_config(**SETTINGS, **{"variant.context": "trained"})
    assert {path[0] for path in make(trains_both, random_params)[0].adapter} == {"context_tower", "denoiser_tower"}
    optimizer = make_optimizer(config, trained)
    state, base = start_state(objective, optimizer, params)
    assert sum(v.size for v in jax.tree.leaves(state.optimizer) if v.ndim) == 2 * sum(
        v.size for v in jax.tree.leaves(state.params)
    )
    step = jax.jit(make_step(config, objective, optimizer, BLOCK))
    losses = []
    for _ in range(6):
        state, metrics = step(state.replace(step=jnp.int32(0)), base, ids)  # the same noise each time
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.05, losses


def steps(config, random_params, ids, params=None):
    """Two steps: the state, the last metrics, and the optimizer's state after the first."""
    objective, drawn = make(config, random_params)
    optimizer = make_optimizer(config, tables(objective)[0])
    mesh = make_mesh(config.mesh) if config.mesh != MeshShape() else None

    def run():
        state, frozen = start_state(objective, optimizer, drawn if params is None else params(objective, drawn), mesh)
        step = jax.jit(make_step(config, objective, optimizer, BLOCK))
        batch = ids if mesh is None else jax.device_put(ids, batch_sharding(mesh))
        first, _ = step(state, frozen, batch)
        return *step(first, frozen, batch), first.optimizer

    if mesh is None:
        return run()
    with jax.set_mesh(mesh):
        return run()


DROPPED = SETTINGS | {"lora.dropout": 0.25, PATTERN: "MM-*"}


@pytest.fixture(scope="module")
def alone(step_config, random_params, ids):
    return steps(step_config(**DROPPED), random_params, ids)


@pytest.mark.whole
@pytest.mark.parametrize(
    "changes",
    [{"mesh.fsdp": 2, "mesh.sequence": 2, "mesh.tensor": 2}, {"accumulate": 4}],
    ids=str,
)
def test_two_steps_are_those_of_one_device(step_config, random_params, ids, alone, changes):
    """With dropout, whose draws belong to the rows and not to the devices."""
    _, metrics, first = steps(step_config(**DROPPED, **changes), random_params, ids)
    np.testing.assert_allclose(metrics.loss, alone[1].loss, rtol=3e-6)
    np.testing.assert_allclose(metrics.grad_norm, alone[1].grad_norm, rtol=1e-5)
    # The first moments, which are the gradients and their squares: AdamW then divides small ones by their own size.
    for array, expected in zip(*map(jax.tree.leaves, (first, alone[2])), strict=True):
        other = np.asarray(expected, np.float64)
        assert np.linalg.norm(np.asarray(array, np.float64) - other) <= 1e-5 * np.linalg.norm(other)


@pytest.mark.whole
def test_dropout_belongs_to_seed_step_layer_and_row(step_config, random_params, ids):
    config = step_config(**DROPPED)
    objective, params = make(config, random_params)

    def keys(seed, step, rows):
        examples = objective.examples(ids[rows], jnp.ones(len(rows), bool), NoiseKey(seed, step, jnp.asarray(rows)), 4)
        return np.asarray(examples.dropout)

    first = keys(0, 3, [0, 1, 2, 3])
    np.testing.assert_array_equal(first[[2, 0]], keys(0, 3, [2, 0]))
    assert len({tuple(k) for k in np.concatenate([first, keys(1, 3, [0, 1]), keys(0, 4, [0, 1])])}) == 8
    of_layers = lora.Dropout(0.25, jnp.asarray(first), objective.adapter)
    a = [path for path in objective.adapter if path[-1] == "lora_a"]
    found = np.concatenate([np.asarray(of_layers.keys_of(path)).reshape(-1, 2) for path in a])
    assert len({tuple(k) for k in found}) == len(found)
    x = jnp.ones((4, 32, 16))
    seen = Adapted(jnp.zeros((16, 3)), jnp.zeros((16, 2)), jnp.zeros((2, 3)), jnp.asarray(first), 1.0, 0.25).seen(x)
    assert set(np.unique(seen)) == {0.0, np.float32(1 / 0.75)} and abs(float(jnp.mean(seen == 0)) - 0.25) < 0.03
    assert objective.for_validation().examples(ids, jnp.ones(8, bool), NoiseKey(0, 3, jnp.arange(8)), 4).dropout is None


# Quantized bases.


def quantized(method):
    def made(objective, params):
        adapter, base = lora.split(params)
        base = quantize_params(parameter_table(objective.model), base, METHODS[method])
        return unflatten(flatten(base) | flatten(adapter))

    return made


@pytest.mark.whole
@pytest.mark.parametrize("method", ["int8", "int4"])
def test_a_quantized_base_has_the_gradients_of_its_numbers(step_config, random_params, ids, method):
    """Those of a base of float32 that holds what the quantized one stands for, also through the routed experts."""
    config = step_config(**SETTINGS | {"lora.base": method, PATTERN: "E*"})
    objective, params = make(config, random_params)
    params = quantized(method)(objective, params)
    whole = unflatten(
        {p: as_array(v, jnp.float32) if isinstance(v, Quantized) else v for p, v in flatten(params).items()}
    )
    gradient = jax.jit(jax.value_and_grad(lambda adapter, base: loss_of(objective, merge(adapter, base), ids)))
    plain, _ = make(step_config(**SETTINGS | {PATTERN: "E*"}), random_params)
    value, found = gradient(*split(objective, params))
    wanted, expected = gradient(*split(plain, whole))
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for path, g in flatten(found).items():
        e = np.asarray(flatten(expected)[path], np.float64)
        assert np.linalg.norm(np.asarray(g, np.float64) - e) <= 1e-4 * np.linalg.norm(e), path


@pytest.mark.whole
def test_a_quantized_base_on_a_mesh(step_config, random_params, ids):
    settings = SETTINGS | {"lora.base": "int8", PATTERN: "E*"}
    one, metrics, _ = steps(step_config(**settings), random_params, ids, quantized("int8"))
    changes = {"mesh.fsdp": 2, "mesh.expert": 4}
    several, on_mesh, _ = steps(step_config(**settings, **changes), random_params, ids, quantized("int8"))
    np.testing.assert_allclose(on_mesh.loss, metrics.loss, rtol=3e-6)
    for path, array in flatten(several.params).items():
        other = np.asarray(flatten(one.params)[path], np.float64)
        assert np.linalg.norm(np.asarray(array, np.float64) - other) <= 2e-5 * np.linalg.norm(other), path


# Runs.


@pytest.fixture(scope="module")
def backbone(train_config, tmp_path_factory):
    """A workdir of a backbone of one MLP."""
    folder = tmp_path_factory.mktemp("base") / "backbone"
    train(train_config(pattern="-", steps=2), folder, lambda line: None)
    return folder


def run_config(train_config, base, **changes):
    settings = {"rank": 2, "alpha": 4.0, "dropout": 0.1} | changes.pop("lora", {})
    config = train_config(pattern="-", init_from=str(base), steps=4, checkpoint_every=2, **changes)
    return dataclasses.replace(config, lora=lora.Lora(**settings))


@pytest.mark.whole
def test_a_resumed_run_is_the_same_to_the_bit(train_config, backbone, tmp_path, compile_once):
    config = run_config(train_config, backbone)
    train(config, tmp_path / "whole", lambda line: None)
    asked = iter([""] * 3 + ["SIGTERM"] * 9)
    stopped = train(config, tmp_path / "parts", lambda line: None, stop=lambda: next(asked))
    assert 0 < stopped.step < 4 and stopped.stopped
    train(config, tmp_path / "parts", lambda line: None)
    assert not (tmp_path / "whole" / "frozen").exists()
    runs = [load(tmp_path / name) for name in ("whole", "parts")]
    found = [flatten(loaded.params) for loaded in runs]
    adapted = [path for path, value in found[0].items() if isinstance(value, Adapted)]
    assert len(adapted) == 4, adapted  # both towers', of the backbone that they start from
    for path, value in found[0].items():
        jax.tree.map(np.testing.assert_array_equal, value, found[1][path])
    rows = [
        list(map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines()))
        for name in ("whole", "parts")
    ]
    assert rows[0][-1]["validation_loss"] == rows[1][-1]["validation_loss"]


def test_another_base_is_refused(train_config, backbone, tmp_path, compile_once):
    base = tmp_path / "base"
    import shutil

    shutil.copytree(backbone, base)
    config = run_config(train_config, base)
    train(dataclasses.replace(config, steps=2), tmp_path / "run", lambda line: None)
    shutil.rmtree(base)
    with pytest.raises(ValueError, match="its base is not at .*base any more; put it back, or export"):
        load(tmp_path / "run")
    train(train_config(pattern="-", steps=2, seed=5), base, lambda line: None)
    with pytest.raises(ValueError, match="workdir .*run: its adapter is of another base than the one now in init_from"):
        train(config, tmp_path / "run", lambda line: None)
    with pytest.raises(ValueError, match="run: is the adapter of another base, .*, and not of"):
        load(tmp_path / "run")
    with pytest.raises(ValueError, match="holds another run .*lora.rank 2 -> 3"):
        train(run_config(train_config, base, lora={"rank": 3}), tmp_path / "run", lambda line: None)


def test_what_an_adapter_cannot_start_from(train_config, backbone, tmp_path, compile_once):
    config = run_config(train_config, backbone)
    train(dataclasses.replace(config, steps=2), tmp_path / "run", lambda line: None)
    for other, message in [
        (dataclasses.replace(config, init_from=""), "lora.rank=2 needs init_from, a checkpoint to adapt"),
        (dataclasses.replace(config, init_from=str(tmp_path / "run")), "holds an adapter and not a whole model"),
        (dataclasses.replace(config, init_from=str(tmp_path / "none")), "none: no such folder"),
    ]:
        with pytest.raises((ValueError, CheckpointError), match=message):
            train(other, tmp_path / "new", lambda line: None)
        assert not (tmp_path / "new").exists()
