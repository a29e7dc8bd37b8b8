"""Conversion both ways: bit for bit, on any mesh, whole or not at all."""

import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from campaigns import campaign
from helpers import run_command
from twotower_jax import parameters
from twotower_jax.checkpoint import arrays, huggingface, inspection, load, manifest, store, workdir
from twotower_jax.checkpoint.convert import convert
from twotower_jax.checkpoint.export import export, model_tensors, write_folder
from twotower_jax.config import Variant
from twotower_jax.execution import Execution
from twotower_jax.files import CheckpointError
from twotower_jax.parameters import bind, parameter_table
from twotower_jax.two_tower import TwoTower


@pytest.fixture(scope="module")
def sources(data, backbone_folder, backbone_folder_bf16) -> dict[str, pathlib.Path]:
    return {
        "two_tower": data / "tiny/checkpoint",
        "two_tower_bf16": data / "tiny_bf16/checkpoint",
        "backbone": backbone_folder,
        "backbone_bf16": backbone_folder_bf16,
    }


@pytest.fixture(scope="module")
def converted(sources, tmp_path_factory) -> dict[str, pathlib.Path]:
    folder = tmp_path_factory.mktemp("converted")
    for name, source in sources.items():
        convert(source, folder / name)
    return {name: folder / name for name in sources}


def tensors(folder: pathlib.Path) -> dict[str, tuple]:
    """What the simplest of readers finds in a Hugging Face folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= campaign.naive_read(file)
    return found


def content(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_same(first: parameters.Params, second: parameters.Params) -> None:
    first, second = parameters.flatten(first), parameters.flatten(second)
    assert first.keys() == second.keys()
    for path in first:
        assert (first[path].dtype, first[path].shape) == (second[path].dtype, second[path].shape), path
        assert np.asarray(first[path]).tobytes() == np.asarray(second[path]).tobytes(), path


# In, and back.


@pytest.mark.whole(but=["True", "False-backbone_bf16"])
@pytest.mark.parametrize("name", ["two_tower", "two_tower_bf16", "backbone", "backbone_bf16"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_loads_what_the_source_holds(name, scan_layers, sources, converted):
    execution = Execution(scan_layers=scan_layers)
    model, params = load.load(converted[name], execution=execution)[:2]
    assert model.config == huggingface.open_folder(sources[name]).config
    assert_same(params, huggingface.load(sources[name], execution=execution)[1])


@pytest.mark.parametrize("name", ["two_tower", "two_tower_bf16"])
def test_two_towers_come_back_bit_for_bit(name, sources, converted, tmp_path):
    assert export(converted[name], tmp_path / "back", "both", 10**6) == 692
    assert tensors(tmp_path / "back") == tensors(sources[name])
    files = list((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size <= 10**6 for file in files)
    huggingface.load(tmp_path / "back")  # The index is right as well.
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (sources[name] / file).read_bytes()


@pytest.mark.parametrize("tower", ["context", "denoiser"])
def test_a_backbone_comes_back_from_either_tower(tower, sources, converted, tmp_path):
    export(converted["backbone_bf16"], tmp_path / "back", tower, 5 * 10**9)
    assert tensors(tmp_path / "back") == tensors(sources["backbone_bf16"])
    assert json.loads((tmp_path / "back/config.json").read_text())["architectures"] == ["NemotronHForCausalLM"]


def test_one_tower_of_two(sources, converted, tmp_path):
    export(converted["two_tower"], tmp_path / "back", "denoiser", 5 * 10**9)
    source = tensors(sources["two_tower"])
    expected = {name.replace("denoiser_tower", "backbone"): tensor for name, tensor in source.items()
                if name.startswith("denoiser_tower.") or name == "lm_head.weight"}  # fmt: skip
    assert tensors(tmp_path / "back") == expected


def test_a_tensor_larger_than_a_shard_gets_its_own(converted, tmp_path):
    export(converted["two_tower"], tmp_path / "back", "context", 1000)
    assert len(tensors(tmp_path / "back")) == 335


@pytest.mark.parametrize("time_init", ["identity", "reference"])
def test_time_conditioning_of_a_backbone(time_init, sources, tmp_path):
    result = convert(sources["backbone"], tmp_path / "out", time_init=time_init)
    assert (result.kind, result.time_init, result.tensors) == ("single_tower", time_init, 692)
    time = store.load(tmp_path / "out")[1]["time"]
    assert not np.any(time["block"]["weight"]) and not np.any(time["block"]["bias"])
    tables = np.asarray(time["tables"])
    if time_init == "identity":
        assert (tables == np.array([0, 0, 1], np.float32)[:, None]).all()
    else:
        assert abs(tables.std() * 64**0.5 - 1) < 0.1


@pytest.mark.whole
def test_a_converted_backbone_denoises_as_it_reads(small_config, random_params, tmp_path):
    """With the identity conditioning the denoiser is the backbone, whatever t is: a block of one token, causal."""
    model = TwoTower(small_config("M*EM*E-"))
    config = json.dumps(model.config.to_hf()).encode()
    write_folder(tmp_path / "two", model_tensors(model, random_params(model)), {"config.json": config}, 10**9)
    export(tmp_path / "two", tmp_path / "one", "context", 10**9)
    convert(tmp_path / "one", tmp_path / "out")
    model, params = store.load(tmp_path / "out")
    ids = np.arange(2 * 8, dtype=np.int32).reshape(2, 8)

    @jax.jit
    def both(params, ids):
        bound = bind(model, params)
        _, cache = bound.prefill(ids[:, :7], np.full(2, 7, np.int32), 8)
        return bound.context_logits(ids)[:, -1:], bound.denoise(ids[:, 7:], np.array([0.1, 0.9], np.float32), cache)

    expected, found = both(params, ids)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_other_variants(converted):
    plain = store.load(converted["backbone"], Variant(time_conditioning=False))[1]
    assert "time" not in plain
    tied = store.load(converted["backbone"], Variant(context="tied"))[1]
    assert "denoiser_tower" not in tied
    with pytest.raises(ValueError, match="needs a checkpoint made from one tower"):
        store.load(converted["two_tower"], Variant(context="tied"))


def test_a_tied_model_without_time_exports_as_two_towers(converted, tmp_path):
    model, params = store.load(converted["backbone"], Variant(context="tied", time_conditioning=False))
    config = json.dumps(model.config.to_hf()).encode()
    write_folder(tmp_path / "back", model_tensors(model, params), {"config.json": config}, 10**9)
    assert len(tensors(tmp_path / "back")) == 692
    assert_same(huggingface.load(tmp_path / "back")[1]["denoiser_tower"], params["context_tower"])


@pytest.fixture(scope="module")
def trained(converted, sources, tmp_path_factory) -> pathlib.Path:
    """A workdir as training writes it: the context frozen in bfloat16, the rest in float32."""
    model, params = store.load(converted["two_tower_bf16"])
    path = tmp_path_factory.mktemp("workdir") / "run"
    settings = {"objective": "denoiser", "variant": dataclasses.asdict(Variant()), "model": {}}
    run = workdir.Workdir(path, settings, ())
    frozen = {name: params.pop(name) for name in ("context_tower", "context_head")}
    run.create(model.config, frozen)
    with run.saver(1) as saver:
        saver.save(3, jax.tree.map(lambda a: a.astype(np.float32), params), {"count": np.zeros(1)}, {})
    shutil.copy(sources["two_tower_bf16"] / "tokenizer.json", path)
    return path


def test_a_trained_workdir_exports(trained, sources, tmp_path):
    export(trained, tmp_path / "back", "both", 10**6)
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["architectures"] == ["NemotronHTwoTowerForCausalLM"] and config["hidden_size"] == 64
    assert (tmp_path / "back/tokenizer.json").exists()
    source, found = tensors(sources["two_tower_bf16"]), tensors(tmp_path / "back")
    assert source.keys() == found.keys()
    for name, (dtype, shape, bits) in found.items():
        if name.startswith("context_"):
            assert (dtype, shape, bits) == source[name]
        else:
            assert dtype == "float32" and shape == source[name][1]
    name = "lm_head.weight"
    expected = np.frombuffer(source[name][2], ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(np.frombuffer(found[name][2], np.float32), expected)


def test_inspect_a_workdir(trained):
    text = inspection.text(inspection.describe(trained), contents=True)
    assert "newest step: 3" in text and "parameters: 1,709,936" in text
    assert "frozen: context_head/weight bfloat16 [64, 512]" in text and "denoiser_head/weight float32" in text


def test_old_names(sources, tmp_path):
    """Files of older code say `embedding`."""
    shutil.copytree(sources["backbone"], tmp_path / "old")
    file = tmp_path / "old/model.safetensors"
    blob = file.read_bytes()
    assert blob.count(b"backbone.embeddings.weight") == 1
    end = 8 + int.from_bytes(blob[:8], "little")
    header = blob[8:end].replace(b"backbone.embeddings.weight", b"backbone.embedding.weight")
    file.write_bytes(len(header).to_bytes(8, "little") + header + blob[end:])
    convert(tmp_path / "old", tmp_path / "out", verify=True)
    assert_same(store.load(tmp_path / "out")[1], huggingface.load(sources["backbone"])[1])


# The checkpoint folder.


def test_plain_orbax_restores_it(converted):
    model, params = store.load(converted["two_tower_bf16"])
    with ocp.StandardCheckpointer() as checkpointer:
        target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), params)
        assert_same(checkpointer.restore(converted["two_tower_bf16"] / "params", target), params)


@pytest.mark.whole
def test_restores_onto_any_mesh(converted):
    """On eight devices, by Orbax and by our own reader, each device with its share and nothing else."""
    code = f"""
import jax, numpy as np, orbax.checkpoint as ocp
from safetensors.numpy import load_file, save_file

from twotower_jax import certify, parameters
from twotower_jax.checkpoint import store
path = {str(converted["two_tower_bf16"])!r}
mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
def sharding(parameter):
    spec = ["fsdp" if axis == "embed" else "data" if axis == "experts" else None for axis in parameter.axes]
    return jax.NamedSharding(mesh, jax.P(*spec))
model, params = store.load(path, sharding=sharding)
whole = parameters.flatten(store.load(path)[1])
table = parameters.parameter_table(model)
target = parameters.unflatten({{p: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding(table[p]))
                               for p, a in whole.items()}})
with ocp.StandardCheckpointer() as checkpointer:
    orbax = parameters.flatten(checkpointer.restore(path + "/params", target))
for path, array in parameters.flatten(params).items():
    for found in (array, orbax[path]):
        assert found.sharding == sharding(table[path]) and found.dtype == whole[path].dtype
        assert np.asarray(found).tobytes() == np.asarray(whole[path]).tobytes()
experts = parameters.flatten(params)["context_tower", "segment_0", "layer_1", "mixer", "up"]
assert experts.addressable_shards[0].data.size * 8 == experts.size
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=environment, timeout=120)


@pytest.mark.whole
def test_two_processes_restore_and_check_it_together(converted, tmp_path):
    """Each reads and hashes its share; a broken file that one of them finds is an error of both."""
    code = """
import sys, jax
number, port, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, number)
from twotower_jax.checkpoint import store
from twotower_jax.files import CheckpointError
mesh = jax.make_mesh((2,), ("fsdp",))
def sharding(parameter):
    return jax.NamedSharding(mesh, jax.P(*("fsdp" if axis == "embed" else None for axis in parameter.axes)))
try:
    params = store.load(path, sharding=sharding)[1]
    print([shard.data.shape for shard in params["context_tower"]["embeddings"].addressable_shards])
except CheckpointError as error:
    print(error)
"""

    def both(folder: pathlib.Path) -> list[str]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        command = [sys.executable, "-c", code]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        processes = [
            subprocess.Popen([*command, str(number), port, folder], stdout=subprocess.PIPE, env=environment, text=True)
            for number in range(2)
        ]
        return [process.communicate(timeout=120)[0].splitlines()[-1] for process in processes]

    assert both(converted["two_tower"]) == ["[(512, 32)]"] * 2
    shutil.copytree(converted["two_tower"], tmp_path / "broken")
    with (tmp_path / "broken/params/context_head.weight/c.0.0").open("r+b") as file:
        file.write(b"X")
    first, second = sorted(both(tmp_path / "broken"), key=len)
    assert "found a broken file" in first and "c.0.0: its content is not what was recorded" in second


def test_large_tensors_are_cut_into_parts(data, tmp_path):
    """Rows of a tensor can be read without the rest; Zarr sees the bytes that were written."""
    config = huggingface.open_folder(data / "tiny/checkpoint").config
    table = parameter_table(TwoTower(config))
    path, parameter = next((p, v) for p, v in table.items() if p[-1] == "up" and v.tensors.ndim == 2)
    parameter = parameters.Parameter(**vars(parameter) | {"shape": (2, 16, 1536, 1000)})
    dtype = np.dtype(ml_dtypes.bfloat16)
    for name, text in arrays.metadata({path: parameter}, {path: dtype}).items():
        manifest.write_file(tmp_path / name, [text.encode()])
    values = np.random.default_rng(0).integers(0, 1 << 16, (1000, 1536), dtype=np.uint16).view(dtype)
    manifest.write_file(tmp_path / arrays.chunk_name(parameter, (1, 7)), arrays.chunk_bytes(parameter, values))
    view = arrays.open_array(tmp_path, path)
    assert view.chunk_layout.read_chunk.shape == (1, 1, 384, 1000)
    assert view[1, 7].read().result().tobytes() == values.T.tobytes()
    assert view[1, 7, 700:900].read().result().tobytes() == values.T[700:900].tobytes()
    again = np.fromfile(tmp_path / arrays.chunk_name(parameter, (1, 7)), np.uint8)
    assert arrays.chunk_tensor(tmp_path, again, parameter, dtype).tobytes() == values.tobytes()


def test_the_manifest_knows_every_file(sources, converted):
    folder = converted["two_tower_bf16"]
    listed = manifest.read(folder)
    assert set(listed.files) | {manifest.NAME} == set(content(folder))
    assert set(listed.source_files) == {file.name for file in sources["two_tower_bf16"].iterdir()}
    assert (listed.parameters, listed.tensors) == (1_709_936, 692)
    assert listed.dtypes == {"bfloat16": 636, "float32": 56}
    manifest.verify(folder, listed.files, listed.files)
    manifest.verify(sources["two_tower_bf16"], listed.source_files, listed.source_files)


def test_a_flipped_bit_is_found_unless_told_not_to_look(converted, tmp_path):
    shutil.copytree(converted["two_tower"], tmp_path / "flipped")
    file = next((tmp_path / "flipped/params").rglob("c.0.0.0.0"))
    blob = bytearray(file.read_bytes())
    blob[100] ^= 1
    file.write_bytes(blob)
    with pytest.raises(CheckpointError, match="c.0.0.0.0: its content is not what was recorded"):
        store.load(tmp_path / "flipped")
    with pytest.raises(CheckpointError, match="c.0.0.0.0: its content is not what was recorded"):
        export(tmp_path / "flipped", tmp_path / "back", "both", 10**9)
    assert not (tmp_path / "back").exists()
    store.load(tmp_path / "flipped", verify=False)


@pytest.mark.parametrize("name", ["two_tower", "converted"])
def test_inspect(name, data, converted):
    folder = data / "tiny/checkpoint" if name == "two_tower" else converted["two_tower"]
    out = run_command("inspect_checkpoint", f"--checkpoint={folder}", "--json")
    description = json.loads(out.stdout)
    assert description["parameters"] == 1_709_936
    assert description["dtypes"] == {"float32": description["arrays"]}
    text = inspection.text(description, contents=True)
    assert "parameters: 1,709,936" in text and "MEMEM*EMEMEM*EME" in text
