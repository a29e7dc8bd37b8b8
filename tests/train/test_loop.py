"""Runs: what they write, how they resume, what they refuse, what their checkpoints hold."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower_jax.checkpoint import load as checkpoint
from twotower_jax.checkpoint import orbax_steps, workdir, workdir_model
from twotower_jax.config import Variant
from twotower_jax.data import load_tokenizer, pack_documents, read_documents
from twotower_jax.diffusion import masked_loss_sum, next_tokens, token_log_probabilities
from twotower_jax.execution import Execution
from twotower_jax.files import CheckpointError
from twotower_jax.kernels import Backends
from twotower_jax.parameters import bind, flatten, parameter_table
from twotower_jax.train import programs
from twotower_jax.train.loop import train
from twotower_jax.train.metrics import METRICS
from twotower_jax.train.objectives import Denoiser
from twotower_jax.train.setup import look
from twotower_jax.train.start import make_start
from twotower_jax.train.step import (
    abstract_state,
    make_optimizer,
    merge,
    split,
    tables,
)
from twotower_jax.two_tower import TwoTower

pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def quiet():
    return lambda line: None


@pytest.fixture(scope="module")
def layers(train_config, pytestconfig):
    """Makes settings of a model of two layers, one of which has a router; of all kinds for `--whole`."""
    return train_config if pytestconfig.getoption("whole") else functools.partial(train_config, pattern="ME")


@pytest.fixture(scope="module")
def backbone_run(layers, tmp_path_factory, quiet):
    """A short run of the autoregressive objective: settings, workdir, result."""
    config, folder = layers(), tmp_path_factory.mktemp("backbone")
    return config, folder, train(config, folder, quiet)


@pytest.fixture(scope="module")
def denoiser_run(layers, backbone_run, tmp_path_factory, quiet):
    """A short run of the denoiser objective on that backbone, in two block sizes."""
    config = layers(
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


def test_losses_fall(backbone_run, denoiser_run):
    for _, folder, result in (backbone_run, denoiser_run):
        table = rows(folder)
        assert [row["step"] for row in table] == [5, 10, 12] and result.step == 12
        assert result.metrics["loss"] == table[-1]["loss"] < table[0]["loss"] - 0.3
        assert 0 < result.metrics["validation_loss"] < table[0]["loss"]
        assert 0 < result.metrics["validation_loss_stderr"] < 0.2 * result.metrics["validation_loss"]
        assert {"learning_rate", "grad_norm"} <= table[0].keys() and "tokens_per_second" in result.metrics
    last = denoiser_run[2].metrics
    assert len(last["loss_by_noise_level"]) == len(last["validation_loss_by_noise_level"]) == 10
    assert len(last["loss_by_block_position"]) == 4
    assert list((denoiser_run[1] / "tensorboard").iterdir())


def test_the_frozen_tower_is_untouched(backbone_run, denoiser_run):
    _, backbone = workdir_model.load(backbone_run[1])
    model, params = workdir_model.load(denoiser_run[1])
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


@pytest.mark.whole(but=["denoiser"])
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
    assert same_bits(workdir_model.load(copy)[1], workdir_model.load(folder)[1])
    start = make_start(config, look(config, folder))
    state, frozen = abstract_state(start.objective, make_optimizer(config, tables(start.objective)[0]))
    states = [look(config, f).restore(state.weights, state.optimizer, frozen) for f in (folder, copy)]
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
    assert same_bits(workdir_model.load(tmp_path / "run")[1], workdir_model.load(folder)[1])


@pytest.mark.whole
def test_the_validation_loss_is_that_of_the_held_out_text(backbone_run):
    config, folder, result = backbone_run
    model, params = workdir_model.load(folder)
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
    logits = jax.jit(lambda p: bind(model, p).context_logits(ids))(params)
    targets, counted = next_tokens(ids, jnp.ones(len(ids), bool))
    loss = masked_loss_sum(token_log_probabilities(logits, targets), counted).mean
    np.testing.assert_allclose(result.metrics["validation_loss"], float(loss), rtol=1e-5)


def test_a_workdir_belongs_to_one_run(backbone_run, train_text, tmp_path, quiet):
    config, folder, _ = backbone_run
    for change, message in [
        ({"seed": 1}, "seed 0 -> 1"),
        ({"learning_rate": 0.5}, "learning_rate 0.02 -> 0.5"),
        ({"batch_size": 4}, "batch_size 5 -> 4"),
        ({"objective": "denoiser"}, "objective 'autoregressive' -> 'denoiser'"),
        ({"model": dict(config.model) | {"chunk_size": 8}}, "model.chunk_size 16 -> 8"),
    ]:
        with pytest.raises(ValueError, match="holds another run") as error:
            train(dataclasses.replace(config, **change), folder, quiet)
        assert message in str(error.value) and "only steps, log_every" in str(error.value)
    other = tmp_path / "other.jsonl"
    other.write_text(pathlib.Path(train_text).read_text().replace("alpha", "omega"))
    with pytest.raises(ValueError, match="different training data .* sha256"):
        train(dataclasses.replace(config, data=str(other), steps=13), folder, quiet)
    with pytest.raises(ValueError, match="is at step 12 already, beyond steps=3"):
        train(dataclasses.replace(config, steps=3), folder, quiet)
    settings = workdir.read_settings(folder)
    assert settings["steps"] == 12 and settings["model"]["vocab_size"] == 270


def test_folders_that_are_no_workdir_are_refused(train_config, tmp_path, quiet):
    config = train_config()
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
    with pytest.raises(ValueError, match="no such folder"):
        train(dataclasses.replace(config, init_from=str(missing)), tmp_path / "new", quiet)
    assert not (tmp_path / "new").exists()


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(train_config, tmp_path, quiet):
    config = train_config(learning_rate=1e30, warmup_fraction=0.0, decay_fraction=0.0, checkpoint_every=1)
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


@pytest.mark.parametrize("kernels", [Backends(), Backends(ssd="xla")])
def test_a_stage_that_cannot_be_traced_is_met_before_anything_is_written(kernels, train_config, tmp_path, monkeypatch):
    curriculum = ((0.0, 16), (0.5, 4))
    config = train_config(objective="denoiser", block_size=None, block_curriculum=curriculum)
    config = dataclasses.replace(config, kernels=kernels, model=dict(config.model) | {"hybrid_override_pattern": "-"})
    make_step = programs.make_step

    no_step = "config: these settings give no step in blocks of 4"
    for error, message in [
        (TypeError("shapes (3,) and (4,)\nand more"), f"{no_step}: TypeError: shapes (3,) and (4,)"),
        (ZeroDivisionError(), f"{no_step}: ZeroDivisionError: ZeroDivisionError"),
        (ValueError("of our own"), "of our own"),
    ]:

        def make(config, objective, optimizer, block_size, error=error):
            def fails(*_):
                raise error

            return fails if block_size == 4 else make_step(config, objective, optimizer, block_size)

        monkeypatch.setattr(programs, "make_step", make)
        with pytest.raises(ValueError) as caught:
            train(config, tmp_path / "new", lambda line: None)
        assert str(caught.value) == message
    assert not (tmp_path / "new").exists()


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


@pytest.mark.whole
def test_a_workdir_loads_as_any_variant_and_layout(backbone_run, denoiser_run, tmp_path):
    model, params, tokenizer = checkpoint.load(backbone_run[1])
    assert tokenizer == backbone_run[1] and load_tokenizer(tokenizer).get_vocab_size() == 270
    assert same_bits(params["context_tower"], params["denoiser_tower"])
    tied, tied_params = workdir_model.load(backbone_run[1], Variant(context="tied", context_loss=True))
    assert flatten(tied_params).keys() == parameter_table(tied).keys()

    model, params = workdir_model.load(denoiser_run[1])
    assert flatten(params).keys() == parameter_table(model).keys()
    untimed, without = workdir_model.load(denoiser_run[1], Variant(time_conditioning=False))
    assert untimed.time is None and "time" not in without
    with pytest.raises(CheckpointError, match="context='frozen', two towers, which cannot become one"):
        workdir_model.load(denoiser_run[1], Variant(context="tied"))

    laid_out, flat = workdir_model.load(denoiser_run[1], execution=Execution(scan_layers=False))
    assert {path: a.shape for path, a in flatten(flat).items()} == {
        path: parameter.shape for path, parameter in parameter_table(laid_out).items()
    }
    ids = jnp.arange(8).reshape(1, 8)
    stacked = jax.jit(lambda p: bind(model, p).context_logits(ids))(params)
    unrolled = jax.jit(lambda p: bind(laid_out, p).context_logits(ids))(flat)
    np.testing.assert_allclose(stacked, unrolled, rtol=1e-5, atol=1e-5)

    (tmp_path / workdir.CHECKPOINTS).mkdir()
    shutil.copy(denoiser_run[1] / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        workdir_model.load(tmp_path)


@pytest.mark.whole
@pytest.mark.parametrize("objective", ["autoregressive", "denoiser"])
def test_a_run_starts_from_a_published_checkpoint(objective, train_config, data, tmp_path):
    config = train_config(objective=objective, init_from=str(data / "tiny" / "checkpoint"))
    start = make_start(config, look(config, tmp_path / "new"))
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


def test_a_fresh_denoiser_starts_with_both_towers_equal(train_config):
    objective = Denoiser(TwoTower(train_config().model_config(20)))
    params = objective.start(None, jax.random.key(0))
    assert same_bits(params["context_tower"], params["denoiser_tower"])
    trained, _ = split(objective, params)
    assert params["denoiser_tower"]["embeddings"] is not trained["denoiser_tower"]["embeddings"]
