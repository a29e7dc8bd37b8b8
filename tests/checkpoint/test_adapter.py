"""Adapters as files: PEFT's layout by hand, round trips, towers that they change, what is refused, bases."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from safetensors.numpy import load_file, save_file

from twotower_jax import command_line, lora
from twotower_jax.adapted import Adapted
from twotower_jax.checkpoint import adapter as adapters
from twotower_jax.checkpoint.convert import convert
from twotower_jax.checkpoint.export import export, export_adapter
from twotower_jax.checkpoint.fingerprint import fingerprint
from twotower_jax.checkpoint.load import contents, load, load_merged
from twotower_jax.files import CheckpointError
from twotower_jax.lora import Lora
from twotower_jax.parameters import bind, flatten, parameter_table, unflatten
from twotower_jax.quantization import METHODS
from twotower_jax.train.loop import train

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["in_proj", "q_proj"], "bias": "none"}
MODULES = {"backbone.layers.0.mixer.in_proj", "backbone.layers.1.mixer.q_proj", "backbone.layers.3.mixer.down_proj"}


@pytest.fixture(scope="module")
def two_towers(small_folder):
    return small_folder


@pytest.fixture(scope="module")
def backbone(small_folder, tmp_path_factory):
    """Its context tower alone."""
    folder = tmp_path_factory.mktemp("one") / "backbone"
    export(small_folder, folder, "context", 2**30)
    return folder


def tensors_of(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def write_peft(folder: pathlib.Path, base: pathlib.Path, modules=MODULES, **changes) -> dict[str, np.ndarray]:
    """What PEFT writes for a model of one tower, tensor by tensor; returns the updates by module, B · A · alpha / r."""
    folder.mkdir()
    rng, shapes = np.random.default_rng(0), {name: t.shape for name, t in tensors_of(base).items()}
    config = CONFIG | changes
    tensors, updates = {}, {}
    for module in sorted(modules):
        rows, columns = shapes[f"{module}.weight"]
        a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, columns), (rows, 2)))
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        scale = 3 / np.sqrt(2) if config.get("use_rslora") else 3 / 2
        updates[module] = scale * b.astype(np.float64) @ a
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return updates


def matrices(params, model) -> dict[str, np.ndarray]:
    """Every tensor of a model by its published name and in its orientation, updates added in float64."""
    found = {}
    for path, parameter in parameter_table(model).items():
        value = flatten(params)[path]
        if isinstance(value, Adapted):
            a, b = (np.asarray(v, np.float64) for v in (value.a, value.b))
            value = np.asarray(value.base, np.float64) + value.scale * a @ b
        for index, name in np.ndenumerate(parameter.tensors):
            found[str(name)] = np.asarray(parameter.to_tensor(np.asarray(value)[index]), np.float64)
    return found


# Which tower, on one or on two.
@pytest.mark.parametrize(
    "base, asked, changed",
    [
        ("backbone", None, ("context", "denoiser")),
        ("backbone", "denoiser", ("denoiser",)),
        ("two_towers", None, ("context",)),
        ("two_towers", "denoiser", ("denoiser",)),
        ("two_towers", "both", ("context", "denoiser")),
    ],
)
def test_files_of_a_backbone_change_the_towers_asked_for(request, tmp_path, backbone, base, asked, changed):
    updates = write_peft(tmp_path / "adapter", backbone, use_rslora=asked == "both")
    folder = request.getfixturevalue(base)
    plain, loaded = load(folder), load(folder, adapter=tmp_path / "adapter", adapter_tower=asked)
    before, after = matrices(plain.params, plain.model), matrices(loaded.params, loaded.model)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        tower, _, rest = name.partition("_tower.")
        update = updates.get(f"backbone.{rest.removesuffix('.weight')}", 0.0) if tower in changed else 0.0
        np.testing.assert_allclose(tensor, before[name] + update, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.whole
def test_merged_and_unmerged_agree_within_rounding_and_the_merged_folder_loads(tmp_path, backbone):
    """They differ by less than it changes that every adapted number goes to its neighbor: merged, it is rounded by up
    to half of that; unmerged, two products are added in its place."""
    write_peft(tmp_path / "adapter", backbone)
    ids = np.random.default_rng(0).integers(4, 500, (2, 24)).astype(np.int32)
    beside, merged = load(backbone, adapter=tmp_path / "adapter"), load_merged(backbone, tmp_path / "adapter")
    count = export(backbone, tmp_path / "out", "context", 2**30, merge=True, adapter=tmp_path / "adapter")
    again = load(tmp_path / "out")
    assert count == len(tensors_of(backbone)) and (tmp_path / "out" / "tokenizer.json").exists()
    logits_of = jax.jit(lambda params: bind(beside.model, params).context_logits(ids))
    logits = [logits_of(loaded.params) for loaded in (beside, merged, again, load(backbone))]
    size = float(jnp.max(jnp.abs(logits[0])))
    flat, rng = flatten(merged.params), np.random.default_rng(1)
    adapted = [path for path, value in flatten(beside.params).items() if isinstance(value, Adapted)]
    ends = np.float32([-np.inf, np.inf])
    nudged = [np.nextafter(np.asarray(flat[p]), rng.choice(ends, flat[p].shape)) for p in adapted]
    moved = logits_of(unflatten(flat | dict(zip(adapted, nudged, strict=True))))
    unit = float(jnp.max(jnp.abs(moved - logits[1])))
    assert 0 < unit < 1e-5 * size
    assert float(jnp.max(jnp.abs(logits[0] - logits[1]))) < 0.75 * unit
    np.testing.assert_array_equal(logits[1], logits[2])
    assert float(jnp.max(jnp.abs(logits[0] - logits[3]))) > 0.05 * size


# Workdirs and their files.


@pytest.fixture(scope="module")
def trained(train_config, tmp_path_factory):
    """A denoiser of an MLP and attention, and an adapter of it; folders."""
    folder = tmp_path_factory.mktemp("trained")
    config = train_config(pattern="-*", steps=1, objective="denoiser", validation_fraction=0.0)
    train(config, folder / "base", lambda line: None)
    config = dataclasses.replace(config, steps=2, init_from=str(folder / "base"), lora=Lora(rank=3, alpha=5.0))
    train(config, folder / "run", lambda line: None)
    return folder


def test_an_exported_adapter_is_read_back_to_the_bit(trained, tmp_path):
    held = adapters.from_workdir(trained / "run")
    assert export_adapter(trained / "run", tmp_path / "out", "both") == len(held.tensors) == 2 * (2 + 4)
    read = adapters.read(tmp_path / "out")
    assert read.tensors.keys() == held.tensors.keys() and read.base == held.base and read.scale == 5 / 3
    for name, tensor in held.tensors.items():
        np.testing.assert_array_equal(tensor, read.tensors[name])
    assert any(np.any(tensor) for name, tensor in held.tensors.items() if "lora_B" in name)
    # Name by name and shape by shape as PEFT has them.
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 5)
    assert config["twotower_jax"]["tower"] == "denoiser"
    name = "base_model.model.denoiser_tower.layers.1.mixer.q_proj.lora_"
    shapes = {name: t.shape for name, t in load_file(tmp_path / "out" / "adapter_model.safetensors").items()}
    assert shapes[f"{name}A.weight"] == (3, 24) and shapes[f"{name}B.weight"] == (24, 3)
    # The workdir and the base with these files are one model, and so is what --merge makes of either.
    whole, beside = load(trained / "run"), load(trained / "base", adapter=tmp_path / "out")
    for path, value in flatten(whole.params).items():
        for a, b in zip(
            *(map(np.asarray, v) for v in map(_arrays, (value, flatten(beside.params)[path]))), strict=True
        ):
            np.testing.assert_array_equal(a, b, err_msg=str(path))
    export(trained / "run", tmp_path / "merged", "both", 2**30, merge=True)
    export(trained / "base", tmp_path / "other", "both", 2**30, merge=True, adapter=tmp_path / "out")
    left, right = tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "other")
    assert left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)
    assert contents(trained / "run").config == contents(trained / "base").config


def _arrays(value):
    return [value.base, value.a, value.b] if isinstance(value, Adapted) else [value]


def test_one_tower_of_a_workdir_by_the_names_of_a_single_one(trained, tmp_path):
    export_adapter(trained / "run", tmp_path / "out", "denoiser")
    read = adapters.read(tmp_path / "out")
    assert read.of_backbone and read.tower == "denoiser" and set(read.base) == {"denoiser"}
    one, two = load(trained / "base", adapter=tmp_path / "out"), load(trained / "run")
    assert {path[0] for path, v in flatten(one.params).items() if isinstance(v, Adapted)} == {"denoiser_tower"}
    assert matrices(one.params, one.model).keys() == matrices(two.params, two.model).keys()
    with pytest.raises(ValueError, match="its adapter is only of another tower than --tower=context"):
        export_adapter(trained / "run", tmp_path / "context", "context")
    assert not (tmp_path / "context").exists()


def test_what_an_export_has_to_be_told(trained, tmp_path):
    out = tmp_path / "out"
    for call, message in [
        (lambda: export(trained / "run", out, "both", 2**30), "holds an adapter; give --adapter .*, or --merge"),
        (lambda: export(trained / "base", out, "both", 2**30, merge=True), "holds no adapter to merge; give one with"),
        (lambda: export_adapter(trained / "base", out, "both"), "is the workdir of a whole model, without an adapter"),
    ]:
        with pytest.raises(ValueError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value) and not out.exists()


def test_target_modules_name_the_adapted_modules_and_no_other():
    adapted = ["t.layers.0.mixer.up_proj", "t.layers.1.mixer.shared_experts.up_proj", "t.layers.2.mixer.q_proj"]
    others = {"t.layers.1.mixer.experts.0.up_proj", "t.layers.1.mixer.gate"}
    ends = adapters._endings(adapted, others)
    assert ends == ["mixer.up_proj", "q_proj", "shared_experts.up_proj"]

    def named(module):  # as PEFT's `check_target_module_exists` does for a list
        return any(module == end or module.endswith(f".{end}") for end in ends)

    assert all(map(named, adapted)) and not any(map(named, others))


# What is refused.


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA' is not LORA"),
        ({"r": 0}, "r=0 must be a whole number of at least 1"),
        ({"lora_alpha": -1}, "lora_alpha=-1 must be a positive number"),
        ({"use_dora": True}, "use_dora=True: DoRA would compute something else; refused"),
        ({"bias": "all"}, "bias='all': trained biases are refused"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern=.*: several ranks"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*: modules of its own"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' also changed the base"),
        (
            {"r": 3},
            "tensor 'context_tower.layers.0.mixer.in_proj.lora_A.weight' has shape .2, 16., .* must have .3, 16.",
        ),
    ],
)
def test_configurations_that_are_refused(tmp_path, backbone, changes, message):
    write_peft(tmp_path / "adapter", backbone, **changes)
    with pytest.raises(CheckpointError, match=message) as raised:
        load(backbone, adapter=tmp_path / "adapter")
    assert "\n" not in str(raised.value)


def test_files_that_are_refused(tmp_path, backbone, trained):
    folder = tmp_path / "adapter"
    with pytest.raises(ValueError, match="adapter: no such folder; an adapter is a folder with"):
        load(backbone, adapter=folder)
    write_peft(folder, backbone)
    path = folder / "adapter_model.safetensors"
    whole = load_file(path)

    def refused(tensors, message, **options):
        save_file(tensors, path)
        with pytest.raises((CheckpointError, ValueError), match=message) as raised:
            load(backbone, adapter=folder, **options)
        assert "\n" not in str(raised.value)

    first, *_ = sorted(whole)
    refused({n: t for n, t in whole.items() if n != first}, "lora_B.weight' and not .*lora_A.weight'")
    refused(whole | {"base_model.model.backbone.layers.0.mixer.in_proj.bias": whole[first]}, "is no tensor of base_mod")
    stranger = "base_model.model.backbone.layers.9.mixer.q_proj.lora_A.weight"
    refused(whole | {stranger: whole[first]}, "holds tensors that belong to no matrix of this model")
    refused({}, "holds no tensor")
    two = {name.replace("backbone.", "denoiser_tower."): tensor for name, tensor in whole.items()}
    refused(two, "names its towers itself; adapter_tower=both is for adapters of a backbone", adapter_tower="both")
    save_file(whole, path)
    with pytest.raises(ValueError, match="run: holds an adapter already; give its base, .*base, as the checkpoint"):
        load(trained / "run", adapter=folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="has no adapter_model.safetensors"):
        load(backbone, adapter=folder)


def test_an_adapter_of_another_base_is_refused(trained, tmp_path):
    export_adapter(trained / "run", tmp_path / "out", "both")
    other = tmp_path / "other"
    export(trained / "base", other, "both", 2**30)
    load(other, adapter=tmp_path / "out")  # the same base in another form
    (file,) = other.glob("*.safetensors")
    tensors = load_file(file)
    tensors["denoiser_tower.layers.1.mixer.q_proj.weight"] += np.float32(0.1)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="out: is the adapter of another base, .*base, and not of .*other"):
        load(other, adapter=tmp_path / "out")


# What tells bases apart.


def test_a_fingerprint_is_of_the_tower_whatever_its_form(tmp_path, two_towers, backbone):
    two, one = fingerprint(two_towers), fingerprint(backbone)
    assert two["context"] == one["context"] == one["denoiser"] != two["denoiser"]
    convert(two_towers, tmp_path / "two")
    convert(backbone, tmp_path / "one")
    assert fingerprint(tmp_path / "two") == two and fingerprint(tmp_path / "one") == one
    convert(two_towers, tmp_path / "quantized", quantize=METHODS["int8"])
    assert fingerprint(tmp_path / "quantized") is None
    shutil.copytree(backbone, tmp_path / "changed")
    (file,) = (tmp_path / "changed").glob("*.safetensors")
    tensors = load_file(file)
    tensors["backbone.layers.2.mixer.experts.1.up_proj.weight"] *= np.float32(1.01)
    save_file(tensors, file)
    assert fingerprint(tmp_path / "changed")["context"] != one["context"]


def test_a_flag_that_may_stand_alone():
    def value(*arguments):
        values = flags.FlagValues()
        flag = command_line._PathOrBool(command_line._PathParser(), flags.ArgumentSerializer(), "adapter", None, "help")
        values["adapter"] = flag
        values(["command", *arguments])
        return values.adapter

    assert value() is None and value("--adapter") is True and value("--noadapter") is None
    assert value("--adapter=some/folder") == "some/folder" and value("--adapter=./true") == "./true"
    assert lora.TARGETS.split(",")[0] == "q_proj"
