"""Training: settings, schedules, the step, the objectives under every variant, runs and how they resume."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import random
import shutil

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from twotower_jax import parameters
from twotower_jax.checkpoint import load as checkpoint
from twotower_jax.checkpoint import orbax_steps, workdir
from twotower_jax.checkpoint.files import CheckpointError
from twotower_jax.config import Variant
from twotower_jax.data import load_tokenizer, pack_documents, read_documents
from twotower_jax.diffusion import LossSum, next_token_cross_entropy
from twotower_jax.parameters import bind, flatten, parameter_table, unflatten
from twotower_jax.tower import Execution
from twotower_jax.train.config import CHANGEABLE, TrainConfig, base_config, freeze
from twotower_jax.train.loop import train
from twotower_jax.train.metrics import METRICS, LossWindow, MetricsWriter, duration, last_row
from twotower_jax.train.objectives import Denoiser, NoiseKey, make_objective
from twotower_jax.train.placement import Placement
from twotower_jax.train.schedule import BlockStage, WarmupStableDecay, block_stages, learning_rate
from twotower_jax.train.skips import blame
from twotower_jax.train.start import make_start
from twotower_jax.train.step import (
    abstract_state,
    initial_state,
    make_optimizer,
    make_step,
    merge,
    split,
    tables,
    total_loss,
)
from twotower_jax.two_tower import TwoTower

MODEL = {
    "hidden_size": 24,
    "hybrid_override_pattern": "MEME*",
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
}
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory):
    """Runs of the same step share one quick compilation."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """Sentences that a small model learns fast."""
    draw = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [" ".join(draw.choice(words) for _ in range(60)) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def make_config(text):
    def make(**changes) -> TrainConfig:
        config = base_config(MODEL)
        config.update(
            {
                "data": text,
                "vocab_size": 270,
                "sequence_length": 32,
                "batch_size": 5,
                "block_size": 8,
                "steps": 12,
                "learning_rate": 2e-2,
                "validation_fraction": 0.1,
                "log_every": 5,
                "checkpoint_every": 4,
            }
        )
        config.update(changes)
        return freeze(config)

    return make


@pytest.fixture(scope="module")
def quiet():
    return lambda line: None


@pytest.fixture(scope="module")
def backbone_run(make_config, tmp_path_factory, quiet):
    """A short run of the autoregressive objective: settings, workdir, result."""
    config, folder = make_config(), tmp_path_factory.mktemp("backbone")
    return config, folder, train(config, folder, quiet)


@pytest.fixture(scope="module")
def denoiser_run(make_config, backbone_run, tmp_path_factory, quiet):
    """A short run of the denoiser objective on that backbone, in two block sizes."""
    config = make_config(
        objective="denoiser",
        init_from=str(backbone_run[1]),
        block_size=None,
        block_curriculum=((0.0, 16), (0.5, 4)),
        learning_rate=5e-3,
    )
    folder = tmp_path_factory.mktemp("denoiser")
    return config, folder, train(config, folder, quiet)


def rows(folder: pathlib.Path) -> list[dict]:
    """The rows of metrics.jsonl without what depends on the clock."""
    lines = (folder / METRICS).read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def same_bits(a, b) -> bool:
    a, b = flatten(a), flatten(b)
    return a.keys() == b.keys() and all(
        a[path].dtype == b[path].dtype and np.array_equal(np.asarray(a[path]), np.asarray(b[path])) for path in a
    )


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
        ({"sequence_length": 100, "block_size": 16}, "sequence_length=100 is not a multiple of the block size 16"),
        ({"block_size": 0}, "block_size=0"),
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
        ({"variant": {"context_loss": True}}, "context_loss=True with context='frozen'"),
        ({"variant": {"no_such_field": 3}}, "no_such_field"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    config = base_config(MODEL)
    config.update(changes)
    with pytest.raises(ValueError) as error:
        freeze(config)
    assert message in str(error.value)


def test_settings_of_a_wrong_type_are_refused():
    with pytest.raises(ValueError, match="steps must be int, found 1.5"):
        TrainConfig(model=MODEL, steps=1.5)
    with pytest.raises(TypeError):
        base_config(MODEL).steps = "many"


def test_base_config_holds_every_field_with_its_default():
    assert freeze(base_config(MODEL)) == TrainConfig(model=base_config(MODEL).model.to_dict())


def test_a_given_block_size_wins_over_the_curriculum(make_config):
    config = make_config(objective="denoiser", block_size=None, block_curriculum=((0.0, 32), (2 / 3, 16)))
    assert block_stages(config) == (BlockStage(0, 8, 32), BlockStage(8, 12, 16))
    assert block_stages(dataclasses.replace(config, block_size=4)) == (BlockStage(0, 12, 4),)


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


# Optimizer and step.


def test_decay_touches_only_what_the_table_says(make_config, random_params, quick_jit):
    config = make_config(objective="denoiser", learning_rate=0.5, weight_decay=0.1, warmup_fraction=0.0)
    objective = make_objective(config, config.model_config(20))
    trained, _ = split(objective, random_params(objective.model))
    table, frozen = tables(objective)
    optimizer = make_optimizer(config, table)
    zeros = jax.tree.map(np.zeros_like, trained)
    updates, _ = quick_jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(zeros, trained)
    for path, update in flatten(updates).items():
        factor = -0.5 * 0.1 if table[path].decay else 0.0
        np.testing.assert_allclose(update, factor * np.asarray(flatten(trained)[path]), rtol=1e-5, err_msg=str(path))
    spared = {path[-1] for path in table if not table[path].decay}
    assert spared == {"weight", "conv_bias", "bias", "A_log", "D", "dt_bias", "norm_weight", "tables"}
    assert all("norm" in path[-2] or path[-2] == "norm_f" for path in table if path[-1] == "weight" and
               not table[path].decay)  # fmt: skip
    assert {path[0] for path in frozen} == {"context_tower", "context_head", "denoiser_tower"}
    assert {path[-2:] for path in frozen if path[0] == "denoiser_tower"} == {("router", "bias")}


def test_frozen_parameters_are_stored_in_the_compute_dtype(make_config, random_params):
    config = make_config(objective="denoiser", dtype="bfloat16")
    objective = make_objective(config, config.model_config(20))
    trained, frozen = split(objective, random_params(objective.model))
    assert {v.dtype for v in flatten(trained).values()} == {jnp.dtype(jnp.float32)}
    table = parameter_table(objective.model)
    for path, array in flatten(frozen).items():
        assert array.dtype == (jnp.float32 if table[path].float32 else jnp.bfloat16), path
    state, abstract_frozen = abstract_state(objective, make_optimizer(config, tables(objective)[0]))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), frozen) == jax.tree.map(
        lambda a: (a.shape, a.dtype), abstract_frozen
    )
    made = jax.eval_shape(lambda p: initial_state(make_optimizer(config, tables(objective)[0]), p), trained)
    assert made == state


def test_the_step_is_adamw_on_the_clipped_gradient(make_config, random_params, quick_jit):
    config = make_config(clip_norm=0.01, warmup_fraction=0.0)
    config = dataclasses.replace(config, model=dict(config.model) | {"hybrid_override_pattern": "-"})
    objective = make_objective(config, config.model_config(20))
    trained, frozen = split(objective, random_params(objective.model))
    optimizer = make_optimizer(config, tables(objective)[0])
    ids = jax.random.randint(jax.random.key(1), (2, 8), 0, 20)
    step = quick_jit(make_step(config, objective, optimizer, 8))
    after, metrics = step(initial_state(optimizer, trained), frozen, ids)

    def loss(params):
        logits = bind(objective.model, merge(params, frozen)).logits(ids)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()

    value, gradients = jax.value_and_grad(loss)(trained)
    norm = optax.tree.norm(gradients)
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
    assert norm > 1 and metrics.learning_rate == jnp.float32(2e-2) and after.step == 1
    table = parameter_table(objective.model)
    for path, before in flatten(trained).items():
        clipped = flatten(gradients)[path] * (0.01 / norm)
        step = clipped / (jnp.abs(clipped) + 1e-8) + (0.1 if table[path].decay else 0.0) * before
        np.testing.assert_allclose(flatten(after.params)[path], before - 2e-2 * step, rtol=1e-3, atol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(make_config, random_params, quick_jit):
    config = make_config(warmup_fraction=0.5)
    config = dataclasses.replace(config, model=dict(config.model) | {"hybrid_override_pattern": "-"})
    objective = make_objective(config, config.model_config(20))
    trained, frozen = split(objective, random_params(objective.model))
    optimizer = make_optimizer(config, tables(objective)[0])
    # Token 19 breaks whatever row it is in.
    trained["tower"]["embeddings"] = trained["tower"]["embeddings"].at[19].set(jnp.inf)
    ids = jax.random.randint(jax.random.key(1), (6, 8), 0, 19)
    step = quick_jit(make_step(config, objective, optimizer, 8))
    before, metrics = step(initial_state(optimizer, trained), frozen, ids)
    assert not metrics.skipped
    broken = ids.at[2, 3].set(19).at[5, 0].set(19)
    after, metrics = step(before, frozen, broken)
    assert metrics.skipped and not jnp.isfinite(metrics.grad_norm) and after.step == before.step + 1 == 2
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    jax.tree.map(np.testing.assert_array_equal, before.optimizer, after.optimizer)
    # The schedule goes by the updates that were made: the next step has the rate of the one left out.
    _, again = step(after, frozen, ids)
    assert not again.skipped and again.learning_rate == metrics.learning_rate > 0

    noise = functools.partial(NoiseKey, config.seed, 1)
    placement = Placement(None, len(broken))
    batch = placement.batch({"ids": np.asarray(broken)})
    found = blame(objective, noise, 8, before.params, frozen, batch, placement)
    assert found.rows == [2, 5] and found.tokens[5].tolist() == broken[5].tolist()


# Variants.

TWO_LAYERS = MODEL | {"hybrid_override_pattern": "M*", "hidden_size": 16}
# What no gradient reaches although it trains: the last context layer feeds the denoiser by its keys and values alone.
UNREAD = {
    ("context_tower", "norm_f", "weight"),
    ("context_tower", "segment_0", "layer_1", "mixer", "q_proj", "weight"),
    ("context_tower", "segment_0", "layer_1", "mixer", "o_proj", "weight"),
}


@pytest.mark.parametrize(
    ("variant", "frozen", "unread"),
    [
        (Variant(), {"context_tower", "context_head"}, set()),
        (Variant(context="trained"), {"context_head"}, UNREAD),
        (Variant(context="trained", context_loss=True), set(), set()),
        (Variant(context="tied"), {"context_head"}, set()),
        (Variant(context="tied", context_loss=True, bidirectional_mamba=True), set(), set()),
        (Variant(time_conditioning=False), {"context_tower", "context_head"}, set()),
    ],
    ids=lambda value: "-".join(map(str, dataclasses.astuple(value))) if isinstance(value, Variant) else "",
)
def test_every_variant_trains_what_it_should(variant, frozen, unread, make_config, random_params, quick_jit):
    config = make_config(objective="denoiser", warmup_fraction=0.0)
    config = dataclasses.replace(config, variant=variant, model=TWO_LAYERS)
    objective = make_objective(config, config.model_config(20))
    trained, rest = split(objective, random_params(objective.model))
    tops = {path[0] for path in parameter_table(objective.model)}
    assert {path[0] for path in flatten(rest)} == frozen
    assert {path[0] for path in flatten(trained)} == tops - frozen
    assert ("time" in tops) == variant.time_conditioning and ("denoiser_tower" in tops) == (variant.context != "tied")

    ids = jax.random.randint(jax.random.key(1), (3, 16), 0, 20)
    noise = NoiseKey(0, 5, jnp.arange(3))

    def loss(params):
        losses = objective.losses(merge(params, rest), ids, jnp.ones(3, bool), noise, 4)
        return total_loss(objective, losses), losses

    loss_and_gradients = quick_jit(jax.value_and_grad(loss, has_aux=True))
    (value, losses), gradients = loss_and_gradients(trained)
    assert {path for path, g in flatten(gradients).items() if not np.any(g)} == unread
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert ("context_loss" in losses) == variant.context_loss
    np.testing.assert_allclose(value, sum(losses[term].mean for term in objective.terms), rtol=1e-6)
    for part in ("by_noise_level", "by_block_position"):
        np.testing.assert_allclose(losses[part].total.sum(), losses["masked_loss"].total, rtol=1e-5)
        assert losses[part].count.sum() == losses["masked_loss"].count

    # Against finite differences, along the gradient itself.
    norm = optax.tree.norm(gradients)

    def moved(distance):
        return loss_and_gradients(jax.tree.map(lambda p, g: p + distance / norm * g, trained, gradients))[0][0]

    slope = (moved(0.02) - moved(-0.02)) / 0.04
    np.testing.assert_allclose(slope, norm, rtol=2e-2)


def test_rows_of_padding_do_not_count(make_config, random_params, quick_jit):
    config = dataclasses.replace(make_config(objective="denoiser"), model=MODEL | {"hybrid_override_pattern": "-"})
    for name in ("denoiser", "autoregressive"):
        objective = make_objective(dataclasses.replace(config, objective=name), config.model_config(20))
        params = random_params(objective.model)
        ids = jax.random.randint(jax.random.key(1), (4, 16), 0, 20)

        def losses(params, ids, counted, objective=objective):
            return objective.losses(params, ids, counted, NoiseKey(1, 0, jnp.arange(len(ids))), 4)

        three = quick_jit(losses)(params, ids[:3], jnp.ones(3, bool))
        padded = quick_jit(losses)(params, ids, jnp.array([True, True, True, False]))
        for part in three:
            np.testing.assert_allclose(padded[part].total, three[part].total, rtol=1e-6)
            np.testing.assert_array_equal(padded[part].count, three[part].count)


# Runs.


def test_losses_fall(backbone_run, denoiser_run):
    for _, folder, result in (backbone_run, denoiser_run):
        table = rows(folder)
        assert [row["step"] for row in table] == [5, 10, 12] and result.step == 12
        assert result.metrics["loss"] == table[-1]["loss"] < table[0]["loss"] - 0.3
        assert 0 < result.metrics["validation_loss"] < table[0]["loss"]
        assert {"learning_rate", "grad_norm"} <= table[0].keys() and "tokens_per_second" in result.metrics
    last = denoiser_run[2].metrics
    assert len(last["loss_by_noise_level"]) == len(last["validation_loss_by_noise_level"]) == 10
    assert len(last["loss_by_block_position"]) == 4
    assert list((denoiser_run[1] / "tensorboard").iterdir())


def test_the_frozen_tower_is_untouched(backbone_run, denoiser_run):
    _, backbone = workdir.load(backbone_run[1])
    model, params = workdir.load(denoiser_run[1])
    assert model.variant == Variant()
    for name in ("context_tower", "context_head"):
        assert same_bits(params[name], backbone[name])
    started = flatten({name: backbone[name] for name in ("denoiser_tower", "denoiser_head")})
    buffers = {path for path, parameter in parameter_table(model).items() if not parameter.trainable}
    assert {path for path, array in started.items() if np.array_equal(array, flatten(params)[path])} == {
        path for path in buffers if path[0] == "denoiser_tower"
    }
    # Neither the frozen tower nor moments for it are in the step's checkpoint.
    step = denoiser_run[1] / workdir.CHECKPOINTS / "12"
    stored, moments = orbax_steps.stored_arrays(step / "params"), orbax_steps.stored_arrays(step / "optimizer")
    assert "context_tower" not in stored and "context_head" not in stored
    assert "context_tower" not in moments["1"]["0"]["mu"]
    assert (denoiser_run[1] / workdir.FROZEN).is_dir()


@pytest.mark.parametrize("name", ["backbone_run", "denoiser_run"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(name, request, tmp_path, quiet):
    config, folder, result = request.getfixturevalue(name)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / workdir.CHECKPOINTS / "12")
    assert orbax_steps.latest_step(copy / workdir.CHECKPOINTS) == 8
    lines = []
    again = train(config, copy, lines.append)
    assert any("resuming at step 8 of 12" in line for line in lines)
    assert rows(copy)[-2:] == rows(copy)[1:3] == rows(folder)[1:]
    assert {k: v for k, v in again.metrics.items() if k != "tokens_per_second"} == rows(folder)[-1]
    assert same_bits(workdir.load(copy)[1], workdir.load(folder)[1])
    start = make_start(config, workdir.Workdir(folder, dataclasses.asdict(config), CHANGEABLE))
    state, frozen = abstract_state(start.objective, make_optimizer(config, tables(start.objective)[0]))
    states = [
        workdir.Workdir(f, dataclasses.asdict(config), CHANGEABLE).restore(state.params, state.optimizer, frozen)
        for f in (folder, copy)
    ]
    for a, b in zip(jax.tree.leaves(states[0][:3]), jax.tree.leaves(states[1][:3]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert states[0][3] == states[1][3]
    assert states[0][3]["data"]["step"] == 12
    lines.clear()
    assert train(config, copy, lines.append).metrics["step"] == 12 and "nothing to do" in lines[-1]


def test_a_run_that_is_told_to_stop_saves_and_goes_on(backbone_run, tmp_path, quiet):
    config, folder, _ = backbone_run
    asked = iter([""] * 7 + ["SIGTERM"])
    result = train(config, tmp_path / "run", quiet, stop=lambda: next(asked))
    assert (result.step, result.stopped) == (6, "SIGTERM")
    assert orbax_steps.committed_steps(tmp_path / "run" / workdir.CHECKPOINTS) == [4, 6]
    # Before any step there is nothing to save, and nothing is lost either.
    assert train(config, tmp_path / "run", quiet, stop=lambda: "SIGINT").step == 6
    result = train(config, tmp_path / "run", quiet)
    assert (result.step, result.stopped) == (12, "")
    assert rows(tmp_path / "run") == rows(folder)
    assert same_bits(workdir.load(tmp_path / "run")[1], workdir.load(folder)[1])


def test_the_validation_loss_is_that_of_the_held_out_text(backbone_run, quick_jit):
    config, folder, result = backbone_run
    model, params = workdir.load(folder)
    _, held_out = pack_documents(
        read_documents(config.data),
        load_tokenizer(folder),
        sequence_length=32,
        vocab_size=model.config.vocab_size,
        validation_fraction=0.1,
        seed=0,
    )
    ids = jnp.asarray(held_out.windows)
    assert len(ids) % config.batch_size != 0, "the last batch is to hold padding"
    logits = quick_jit(lambda p: bind(model, p).context_logits(ids))(params)
    loss, _ = next_token_cross_entropy(logits, ids, jnp.ones(len(ids), bool))
    np.testing.assert_allclose(result.metrics["validation_loss"], float(loss), rtol=1e-5)


def test_a_workdir_belongs_to_one_run(backbone_run, text, tmp_path, quiet):
    config, folder, _ = backbone_run
    for change, message in [
        ({"seed": 1}, "seed 0 -> 1"),
        ({"learning_rate": 0.5}, "learning_rate 0.02 -> 0.5"),
        ({"batch_size": 4}, "batch_size 5 -> 4"),
        ({"objective": "denoiser"}, "objective 'autoregressive' -> 'denoiser'"),
        ({"variant": Variant(context="tied")}, "variant.context 'frozen' -> 'tied'"),
        ({"model": dict(config.model) | {"chunk_size": 8}}, "model.chunk_size 16 -> 8"),
    ]:
        with pytest.raises(ValueError, match="holds another run") as error:
            train(dataclasses.replace(config, **change), folder, quiet)
        assert message in str(error.value) and "only steps, log_every" in str(error.value)
    other = tmp_path / "other.jsonl"
    other.write_text(pathlib.Path(text).read_text().replace("alpha", "omega"))
    with pytest.raises(ValueError, match="different training data .* sha256"):
        train(dataclasses.replace(config, data=str(other), steps=13), folder, quiet)
    with pytest.raises(ValueError, match="is at step 12 already, beyond steps=3"):
        train(dataclasses.replace(config, steps=3), folder, quiet)
    settings = workdir.read_settings(folder)
    assert settings["steps"] == 12 and settings["model"]["vocab_size"] == 270


def test_folders_that_are_no_workdir_are_refused(make_config, tmp_path, quiet):
    config = make_config()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files but no config.json"):
        train(config, tmp_path, quiet)
    with pytest.raises(ValueError, match="is a file, not a folder"):
        train(config, tmp_path / "notes.txt" / "run", quiet)
    (tmp_path / "config.json").write_text('{"model_type": "nemotron_h"}')
    with pytest.raises(CheckpointError, match="not the settings of a training run"):
        train(config, tmp_path, quiet)
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        train(dataclasses.replace(config, data=str(missing)), tmp_path / "new", quiet)
    with pytest.raises(CheckpointError, match="no such folder"):
        train(dataclasses.replace(config, init_from=str(missing)), tmp_path / "new", quiet)
    assert not (tmp_path / "new").exists()


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(make_config, tmp_path, quiet):
    config = make_config(learning_rate=1e30, warmup_fraction=0.0, decay_fraction=0.0, checkpoint_every=1)
    config = dataclasses.replace(config, model=dict(config.model) | {"hybrid_override_pattern": "-"})
    config = dataclasses.replace(config, max_skipped_steps=2)
    lines = []
    with pytest.raises(FloatingPointError) as error:
        train(config, tmp_path / "run", lines.append)
    assert [line.split(":")[0] for line in lines if "left out" in line] == ["step 2", "step 3"]
    # The weights, and not some of the sequences, are to blame: the first eight rows would be named, there are five.
    assert "step 4: loss" in str(error.value) and "3 steps in a row (max_skipped_steps=2)" in str(error.value)
    assert "rows of the batch to blame: 0, 1, 2, 3, 4; row 0 begins" in str(error.value)
    assert orbax_steps.latest_step(tmp_path / "run" / workdir.CHECKPOINTS) == 3


# Checkpoints.


def test_only_the_newest_finished_checkpoints_stay_and_count(backbone_run, tmp_path):
    folder = backbone_run[1] / workdir.CHECKPOINTS
    assert sorted(p.name for p in folder.iterdir()) == ["12", "8"]
    shutil.copytree(folder, tmp_path / "steps")
    shutil.copytree(folder / "12", tmp_path / "steps" / "16.writing.orbax-checkpoint-tmp")
    shutil.copytree(folder / "12", tmp_path / "steps" / "4.removed")
    shutil.copytree(folder / "12", tmp_path / "steps" / "20")
    (tmp_path / "steps" / "20" / orbax_steps.HASHES).unlink()
    assert orbax_steps.latest_step(tmp_path / "steps") == 12
    orbax_steps.clean_up(tmp_path / "steps")
    assert sorted(p.name for p in (tmp_path / "steps").iterdir()) == ["12", "20", "8"]
    assert orbax_steps.latest_step(tmp_path / "nothing") is None


def test_arrays_of_another_kind_are_refused(tmp_path):
    arrays = {"a": {"w": jnp.ones((2, 3))}, "b": jnp.ones(4)}
    writer = orbax_steps.FolderWriter()
    writer.start(tmp_path / "folder", {"tree": arrays}, {})
    writer.wait()
    writer.close()
    arrays_folder = tmp_path / "folder" / "tree"
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    assert same_bits(orbax_steps.restore_arrays(arrays_folder, target), arrays)
    for wrong, message in [
        (target | {"b": jax.ShapeDtypeStruct((4,), jnp.bfloat16)}, "array b is float32"),
        (target | {"b": jax.ShapeDtypeStruct((5,), jnp.float32)}, "expected float32 [5]"),
        (target | {"c": target["b"]}, "array c is missing"),
        ({"a": target["a"]}, "array b is not of this model"),
    ]:
        with pytest.raises(CheckpointError) as error:
            orbax_steps.restore_arrays(arrays_folder, wrong)
        assert message in str(error.value)
    with pytest.raises(CheckpointError, match="no such folder"):
        orbax_steps.restore_arrays(tmp_path / "nothing", target)


def test_a_workdir_loads_as_any_variant_and_layout(backbone_run, denoiser_run, tmp_path, quick_jit):
    model, params, tokenizer = checkpoint.load(backbone_run[1])
    assert tokenizer == backbone_run[1] and load_tokenizer(tokenizer).get_vocab_size() == 270
    assert same_bits(params["context_tower"], params["denoiser_tower"])
    tied, tied_params = workdir.load(backbone_run[1], Variant(context="tied", context_loss=True))
    assert flatten(tied_params).keys() == parameter_table(tied).keys()

    model, params = workdir.load(denoiser_run[1])
    assert flatten(params).keys() == parameter_table(model).keys()
    untimed, without = workdir.load(denoiser_run[1], Variant(time_conditioning=False))
    assert untimed.time is None and "time" not in without
    with pytest.raises(CheckpointError, match="context='frozen', two towers, which cannot become one"):
        workdir.load(denoiser_run[1], Variant(context="tied"))

    laid_out, flat = workdir.load(denoiser_run[1], execution=Execution(scan_layers=False))
    assert {path: a.shape for path, a in flatten(flat).items()} == {
        path: parameter.shape for path, parameter in parameter_table(laid_out).items()
    }
    ids = jnp.arange(8).reshape(1, 8)
    stacked = quick_jit(lambda p: bind(model, p).context_logits(ids))(params)
    unrolled = quick_jit(lambda p: bind(laid_out, p).context_logits(ids))(flat)
    np.testing.assert_allclose(stacked, unrolled, rtol=1e-5, atol=1e-5)

    (tmp_path / workdir.CHECKPOINTS).mkdir()
    shutil.copy(denoiser_run[1] / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        workdir.load(tmp_path)


@pytest.mark.parametrize("objective", ["autoregressive", "denoiser"])
def test_a_run_starts_from_a_published_checkpoint(objective, make_config, data, tmp_path):
    config = make_config(objective=objective, init_from=str(data / "tiny" / "checkpoint"))
    start = make_start(config, workdir.Workdir(tmp_path / "new", dataclasses.asdict(config), CHANGEABLE))
    assert start.model.hybrid_override_pattern == "MEMEM*EMEMEM*EME" and start.model.vocab_size == 512
    assert start.training.windows.max() < start.tokenizer.get_vocab_size() <= 512
    _, published, _ = checkpoint.load(data / "tiny" / "checkpoint")
    if objective == "denoiser":
        assert same_bits(start.params, published)
    else:
        assert same_bits(start.params["tower"], published["context_tower"])
        assert same_bits(start.params["head"], published["context_head"])
    trained, frozen = split(start.objective, start.params)
    assert flatten(merge(trained, frozen)).keys() == parameter_table(start.objective.model).keys()


def test_a_fresh_denoiser_starts_with_both_towers_equal(make_config):
    objective = Denoiser(TwoTower(make_config().model_config(20)))
    params = objective.start(None, jax.random.key(0))
    assert same_bits(params["context_tower"], params["denoiser_tower"])
    trained, _ = split(objective, params)
    assert params["denoiser_tower"]["embeddings"] is not trained["denoiser_tower"]["embeddings"]


# Metrics.


def test_losses_of_several_batches_add_up_and_survive_a_checkpoint():
    def loss(total, count):
        return LossSum(np.float32(total), np.int32(count))

    window = LossWindow(("masked_loss", "context_loss"))
    bins = LossSum(np.array([1.0, 0.0], np.float32), np.array([2, 0], np.int32))
    window.add({"masked_loss": loss(6.0, 2), "context_loss": loss(1.0, 1), "by_noise_level": bins})
    window = LossWindow(("masked_loss", "context_loss"), json.loads(json.dumps(window.get_state())))
    window.add({"masked_loss": loss(2.0, 2), "context_loss": loss(2.0, 1), "by_noise_level": bins})
    assert window.means() == {
        "loss": 3.5,
        "masked_loss": 2.0,
        "context_loss": 1.5,
        "loss_by_noise_level": [0.5, None],
    }
    window.add({"by_noise_level": LossSum(np.ones(3), np.ones(3))})
    assert window.means()["loss_by_noise_level"] == [1.0, 1.0, 1.0]


def test_half_a_line_of_a_killed_run_is_cut_off(tmp_path):
    assert last_row(tmp_path) is None
    (tmp_path / METRICS).write_text('{"step": 1}\n{"st')
    with MetricsWriter(tmp_path, first_step=2) as writer:
        writer.write({"step": 2, "loss": 1.0, "bins": [0.5, None]})
    assert rows(tmp_path) == [{"step": 1}, {"step": 2, "loss": 1.0, "bins": [0.5, None]}]
    assert last_row(tmp_path)["step"] == 2


def test_durations_are_readable():
    assert [duration(s) for s in (0.4, 75, 8000)] == ["0:00", "1:15", "2:13:20"]


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
        config = config_file(path.stem)
        assert isinstance(config, ml_collections.ConfigDict)
        config.steps, config.block_size, config.variant.context = 50, 16, "tied"
        frozen = freeze(config)
        assert (frozen.steps, frozen.block_size, frozen.variant.context) == (50, 16, "tied")
        assert unflatten(flatten(frozen.model)) == frozen.model
        with pytest.raises(dataclasses.FrozenInstanceError):
            frozen.steps = 3
