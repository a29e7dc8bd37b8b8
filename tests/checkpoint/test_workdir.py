"""Workdirs against odd names, other runs and file systems that lack something; what else is said instead of lost."""

import dataclasses
import errno
import json
import os
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from twotower_jax import atomic
from twotower_jax.checkpoint import huggingface, orbax_steps, workdir, workdir_model
from twotower_jax.checkpoint.convert import convert
from twotower_jax.checkpoint.export import check_expressible, export, remarks
from twotower_jax.config import Variant
from twotower_jax.data.tokenizer import load_tokenizer
from twotower_jax.files import CheckpointError, some
from twotower_jax.generation.trained import untrained_denoiser
from twotower_jax.train import loop
from twotower_jax.two_tower import TwoTower

TREE = {"a": {"b": jnp.arange(6.0)}}
SETTINGS = {"objective": "denoiser", "variant": dataclasses.asdict(Variant()), "model": {}}


def write(folder: pathlib.Path) -> None:
    writer = orbax_steps.FolderWriter()
    writer.start(folder, {"params": TREE}, {})
    try:
        writer.wait()
    finally:
        writer.close()


@pytest.mark.parametrize(
    "name",
    ["sp ace", "naïve", "h#sh", "p%20c", "co:lon", "new\nline", "{b}", "~t", "-dash", "a,b", "quo\"te'", "$X", "]"],
)
def test_a_workdir_of_any_other_name_is_read_back(tmp_path, name):
    orbax_steps.check_path(tmp_path / name)
    write(tmp_path / name / "1")
    orbax_steps.verify(tmp_path / name / "1")
    found = orbax_steps.restore_arrays(tmp_path / name / "1" / "params", TREE)
    np.testing.assert_array_equal(found["a"]["b"], TREE["a"]["b"])


@pytest.mark.parametrize("name", ["x[1]", "a*b", "q?x", "back\\slash", "half\udc80", "gs:/x", "[1]/run"])
def test_names_that_could_not_be_read_back_are_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(ValueError, match="arrays cannot be stored under a path with .*; choose another name"):
        workdir.Workdir(tmp_path / name, SETTINGS, ())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["back\\slash", "half\udc80"])
def test_a_conversion_to_such_a_name_is_refused_as_well(data, tmp_path, name):
    with pytest.raises(ValueError, match="arrays cannot be stored"):
        convert(data / "tiny/checkpoint", tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_its_manifest_is_not_committed(tmp_path):
    # What Orbax does with a path that it takes for a pattern.
    with pytest.raises(orbax_steps.SaveError, match="params/manifest.ocdbt was not written"):
        write(tmp_path / "x[1]" / "7")
    assert orbax_steps.latest_step(tmp_path / "x[1]") is None


@pytest.mark.parametrize("call", ["flock", "fsync"])
def test_a_file_system_that_lacks_something_is_named_with_a_remedy(tmp_path, monkeypatch, call):
    def lacking(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(atomic.fcntl if call == "flock" else atomic.os, call, lacking)
    message = f"its file system cannot .*{call}: Function not implemented.; choose a folder on another one"
    with (
        pytest.raises(ValueError, match=f"{tmp_path / 'run'}: {message}"),
        workdir.Workdir(tmp_path / "run", SETTINGS, ()).locked(),
    ):
        pytest.fail("it began")
    with pytest.raises(ValueError, match=message), atomic.new_folder(tmp_path / "out"):
        pytest.fail("it began")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("compile_once")
def test_a_run_that_waited_goes_on_from_what_the_other_one_left(train_config, tmp_path, monkeypatch):
    config, folder, said = (
        train_config(pattern="-", steps=3, checkpoint_every=0, validation_fraction=0.0),
        tmp_path / "run",
        [],
    )
    make_setup = loop.make_setup

    def slow_start(*arguments):
        """Reads all that a new run needs; meanwhile another run of the workdir begins and ends."""
        start = make_setup(*arguments)
        monkeypatch.setattr(loop, "make_setup", make_setup)
        loop.train(dataclasses.replace(config, steps=2), folder, said.append)
        return start

    monkeypatch.setattr(loop, "make_setup", slow_start)
    result = loop.train(config, folder, said.append)
    assert result.step == 3 and "resuming at step 2 of 3" in said
    assert sum("starting from random weights" in line for line in said) == 1
    loop.train(config, tmp_path / "alone", said.append)
    params = [workdir_model.load(path)[1] for path in (folder, tmp_path / "alone")]
    flat = [workdir.flatten(tree) for tree in params]
    assert all(np.array_equal(flat[0][path], flat[1][path]) for path in flat[1])


# Exports.


@pytest.mark.parametrize("tower", ["both", "denoiser", "context"])
def test_a_bidirectional_denoiser_is_not_exported_as_one_that_scans_forward(small_config, tower):
    model = TwoTower(small_config("ME*"), Variant(bidirectional_mamba=True))
    if tower == "context":
        return check_expressible(model, tower)
    with pytest.raises(ValueError, match="bidirectional_mamba=True: the published code scans"):
        check_expressible(model, tower)


@pytest.mark.parametrize(
    "variant",
    [
        Variant(),
        Variant(context="trained", context_loss=True),
        Variant(context="tied"),
        Variant(time_conditioning=False),
    ],
)
def test_other_variants_are_exported(small_config, variant):
    check_expressible(TwoTower(small_config("ME*"), variant), "both")


def test_a_model_without_shared_experts_is_not_exported_as_one_with(small_config):
    changes = {"n_shared_experts": 0, "moe_shared_expert_intermediate_size": 0}
    with pytest.raises(ValueError, match="n_shared_experts=0"):
        check_expressible(TwoTower(small_config("ME", **changes)), "both")
    check_expressible(TwoTower(small_config("M*", **changes)), "both")


def test_what_a_user_of_the_export_has_to_know_is_said(small_config):
    model = TwoTower(small_config("M*", mask_token_id=9))
    assert remarks(TwoTower(small_config("M*")), "denoiser", "both") == []
    assert "mask_token_id=9" in remarks(model, "denoiser", "both")[0]
    assert "the denoiser never trained" in remarks(model, "autoregressive", "denoiser")[0]
    assert remarks(model, "autoregressive", "context") == []


# Folders that are something else than what is asked for.


@pytest.mark.parametrize(
    ("name", "content", "untrained"),
    [
        ("config.json", {"objective": "autoregressive"}, True),
        ("config.json", {"objective": "denoiser"}, False),
        ("config.json", {"architectures": ["NemotronHForCausalLM"]}, True),
        ("config.json", {"architectures": ["NemotronHTwoTowerForCausalLM"]}, False),
        ("conversion.json", {"kind": "single_tower"}, True),
        ("conversion.json", {"kind": "two_tower"}, False),
        ("other.json", {}, False),
    ],
)
def test_a_denoiser_that_never_trained_is_known(tmp_path, name, content, untrained):
    (tmp_path / name).write_text(json.dumps(content))
    assert untrained_denoiser(tmp_path) == untrained


def test_a_workdir_is_no_source_of_a_conversion(data, tmp_path):
    run = workdir.Workdir(tmp_path / "run", SETTINGS, ())
    (tmp_path / "run").mkdir()
    run.write_settings(huggingface.read_config(data / "tiny/checkpoint"))
    with pytest.raises(CheckpointError, match="is a training workdir and no model's folder"):
        convert(tmp_path / "run", tmp_path / "out")


def rename(folder: pathlib.Path, change) -> None:
    """Gives the tensors of a folder other names, in its files and its index."""
    index = folder / huggingface.INDEX
    if index.exists():
        places = json.loads(index.read_text())
        places["weight_map"] = {change(name): file for name, file in places["weight_map"].items()}
        index.write_text(json.dumps(places))
    for file in folder.glob("*.safetensors"):
        blob = file.read_bytes()
        start = 8 + int.from_bytes(blob[:8], "little")
        header = {k if k == "__metadata__" else change(k): v for k, v in json.loads(blob[8:start]).items()}
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + blob[start:])


def test_names_as_transformers_saves_them_are_understood(backbone_folder, tmp_path):
    folder = shutil.copytree(backbone_folder, tmp_path / "model")
    rename(folder, lambda name: name.replace("backbone.", "model.", 1))
    found, expected = huggingface.open_folder(folder), huggingface.open_folder(backbone_folder)
    assert found.tensors.keys() == expected.tensors.keys() and found.single_tower
    assert huggingface.today_name("model.context_tower.norm_f.weight") == "context_tower.norm_f.weight"


def test_names_of_another_program_are_said_in_a_short_line(backbone_folder, tmp_path):
    folder = shutil.copytree(backbone_folder, tmp_path / "model")
    rename(folder, lambda name: f"transformer.{name}")
    with pytest.raises(CheckpointError, match="none of its .* tensors has a name of this model: 'transf") as refusal:
        huggingface.load(folder)
    assert len(str(refusal.value)) < 400
    assert some(["a", "b", "c"]) == "a, b, c" and some(list("abcdef")) == "a, b, c and 3 more"


def test_a_tokenizer_that_is_not_read_is_mentioned(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a folder that holds"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(FileNotFoundError, match="tokenizer.model .SentencePiece. is not read; make a tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.whole
@pytest.mark.usefixtures("compile_once")
def test_a_run_with_a_bidirectional_denoiser_is_not_exported(train_config, tmp_path):
    variant = {"context": "trained", "bidirectional_mamba": True}
    config = train_config(pattern="M", objective="denoiser", steps=1, variant=variant, validation_fraction=0.0)
    loop.train(config, tmp_path / "run", lambda line: None)
    with pytest.raises(ValueError, match="bidirectional_mamba"):
        export(tmp_path / "run", tmp_path / "out", "both", 10**9)
    assert os.listdir(tmp_path) == ["run"]
    export(tmp_path / "run", tmp_path / "out", "context", 10**9)
