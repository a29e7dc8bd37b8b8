"""twotower_jax/checkpoint/huggingface.py: every tensor of a published folder arrives where it belongs, or none does.

Hostile files have tests of their own (test_hostile.py); here each kind of contradiction is met once.
"""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from twotower_jax.checkpoint.huggingface import load, open_folder
from twotower_jax.config import Variant
from twotower_jax.execution import Execution
from twotower_jax.files import CheckpointError
from twotower_jax.parameters import flatten

INDEX = "model.safetensors.index.json"
DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16}


def read(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors, read anew from the format's definition."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        blob = file.read_bytes()
        start = 8 + int.from_bytes(blob[:8], "little")
        for name, entry in json.loads(blob[8:start]).items():
            if name != "__metadata__":
                content = blob[slice(*(start + o for o in entry["data_offsets"]))]
                tensors[name] = np.frombuffer(content, DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def rewrite(folder: pathlib.Path, change) -> None:
    """Changes the tensors of a folder {name: array}, now in one file without an index."""
    tensors = read(folder)
    change(tensors)
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink(missing_ok=True)
    header, offset = {}, 0
    for name, array in tensors.items():
        dtype = "F32" if array.dtype == np.float32 else "BF16"
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    content = b"".join(array.tobytes() for array in tensors.values())
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content)


@pytest.fixture
def folder(data, tmp_path) -> pathlib.Path:
    """A two-tower folder to be changed."""
    return shutil.copytree(data / "tiny/checkpoint", tmp_path / "folder")


@pytest.fixture
def single(backbone_folder, tmp_path) -> pathlib.Path:
    """A single-tower folder to be changed."""
    return shutil.copytree(backbone_folder, tmp_path / "single")


def assert_equal(found, expected):
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(found), expected)


@pytest.mark.parametrize("name", ["tiny", "tiny_bf16"])
def test_every_tensor_in_its_place(data, name):
    raw = read(data / name / "checkpoint")
    model, params = load(data / name / "checkpoint")
    places = []
    for i, stretch in enumerate(model.context_tower.stretches):
        for repeat in range(stretch.repeats):
            for j in range(len(stretch.unit)):
                places.append((f"segment_{i}", f"layer_{j}", repeat if stretch.repeats > 1 else None))
    assert any(repeat for *_, repeat in places)  # Some layers are stacked.
    flat = flatten(params)
    for tower in ("context_tower", "denoiser_tower"):
        assert_equal(flat.pop((tower, "embeddings")), raw[f"{tower}.embeddings.weight"])
        assert_equal(flat.pop((tower, "norm_f", "weight")), raw[f"{tower}.norm_f.weight"])
        for layer, kind in enumerate("MEMEM*EMEMEM*EME"):
            segment, position, repeat = places[layer]

            def ours(*path, start=(tower, segment, position), repeat=repeat):
                array = flat[*start, *path]
                return array if repeat is None else array[repeat]

            def theirs(name, start=f"{tower}.layers.{layer}."):
                return raw[start + name]

            assert_equal(ours("norm", "weight"), theirs("norm.weight"))
            if kind == "M":
                assert_equal(ours("mixer", "conv_weight"), theirs("mixer.conv1d.weight")[:, 0].T)
                assert_equal(ours("mixer", "conv_bias"), theirs("mixer.conv1d.bias"))
                assert_equal(ours("mixer", "norm_weight"), theirs("mixer.norm.weight"))
                for one in ("A_log", "D", "dt_bias"):
                    assert_equal(ours("mixer", one), theirs(f"mixer.{one}"))
            elif kind == "E":
                assert_equal(ours("mixer", "router", "weight"), theirs("mixer.gate.weight").T)
                assert_equal(ours("mixer", "router", "bias"), theirs("mixer.gate.e_score_correction_bias"))
                for e in range(16):
                    for one in ("up", "down"):
                        assert_equal(ours("mixer", one)[e], theirs(f"mixer.experts.{e}.{one}_proj.weight").T)
            projections = {
                "M": ("in_proj", "out_proj"),
                "*": ("q_proj", "k_proj", "v_proj", "o_proj"),
                "E": ("shared_experts.up_proj", "shared_experts.down_proj"),
            }[kind]
            for one in projections:
                assert_equal(ours("mixer", *one.split("."), "weight"), theirs(f"mixer.{one}.weight").T)
    assert_equal(params["context_head"]["weight"], raw["context_lm_head.weight"].T)
    assert_equal(params["denoiser_head"]["weight"], raw["lm_head.weight"].T)
    for one in ("weight", "bias"):
        assert_equal(params["time"]["mlp_0"][one], raw[f"t_embedder.mlp.0.{one}"].T)
        assert_equal(params["time"]["mlp_2"][one], raw[f"t_embedder.mlp.2.{one}"].T)
        assert_equal(params["time"]["block"][one], raw[f"t_block.1.{one}"].T)
    for layer in range(16):
        assert_equal(params["time"]["tables"][layer], raw[f"scale_shift_tables.{layer}"])
    assert sum(array.size for array in flatten(params).values()) == sum(array.size for array in raw.values())


def test_layer_by_layer(data):
    """The other layout of parameters: one array per layer."""
    raw = read(data / "tiny/checkpoint")
    _, params = load(data / "tiny/checkpoint", execution=Execution(scan_layers=False))
    found = params["denoiser_tower"]["segment_12"]["layer_0"]["mixer"]["k_proj"]["weight"]
    assert_equal(found, raw["denoiser_tower.layers.12.mixer.k_proj.weight"].T)


def test_a_backbone_becomes_both_towers(data, backbone_folder):
    _, both = load(data / "tiny/checkpoint")
    model, params = load(backbone_folder)
    for tower in ("context_tower", "denoiser_tower"):
        jax.tree.map(np.testing.assert_array_equal, params[tower], both["context_tower"])
    for head in ("context_head", "denoiser_head"):
        np.testing.assert_array_equal(params[head]["weight"], both["context_head"]["weight"])
    # One copy in memory.
    assert params["context_tower"]["embeddings"] is params["denoiser_tower"]["embeddings"]
    # A time conditioning that changes nothing.
    assert not np.any(params["time"]["block"]["weight"]) and not np.any(params["time"]["block"]["bias"])
    np.testing.assert_array_equal(params["time"]["tables"][:, 2], 1)
    np.testing.assert_array_equal(params["time"]["tables"][:, :2], 0)


def test_a_backbone_as_tied_towers_without_time(backbone_folder):
    _, params = load(backbone_folder, Variant(context="tied", time_conditioning=False))
    assert sorted(params) == ["context_head", "context_tower", "denoiser_head"]


def test_dtypes_stay_as_stored(data, backbone_folder_bf16):
    for path, array in flatten(load(backbone_folder_bf16)[1]["context_tower"]).items():
        kept = path[-1] in ("A_log", "D", "dt_bias") or path[-2:] == ("router", "bias")
        assert array.dtype == (jnp.float32 if kept else jnp.bfloat16), path


def test_older_names(folder):
    expected = load(folder)[1]

    def rename(tensors):
        for tower in ("context_tower", "denoiser_tower"):
            tensors[f"{tower}.embedding.weight"] = tensors.pop(f"{tower}.embeddings.weight")

    rewrite(folder, rename)
    jax.tree.map(np.testing.assert_array_equal, load(folder)[1], expected)


def test_a_folder_of_one_file(folder):
    expected = load(folder)[1]
    rewrite(folder, lambda tensors: None)
    jax.tree.map(np.testing.assert_array_equal, load(folder)[1], expected)
    assert not open_folder(folder).single_tower


def refusal(path, *args) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path, *args)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


NAME = "context_tower.layers.1.mixer.experts.5.up_proj.weight"


def missing(tensors):
    del tensors[NAME]


def extra(tensors):
    tensors["context_tower.layers.16.norm.weight"] = np.zeros(64, np.float32)


def both(tensors):
    tensors["context_tower.layers.1.mixer.experts.16.up_proj.weight"] = tensors.pop(NAME)


def transposed(tensors):
    tensors[NAME] = tensors[NAME].T.copy()


def one_dimension_more(tensors):
    tensors[NAME] = tensors[NAME][None]


def of_another_dtype(tensors):
    tensors[NAME] = tensors[NAME].astype(ml_dtypes.bfloat16)


def under_both_names(tensors):
    tensors["context_tower.embedding.weight"] = tensors["context_tower.embeddings.weight"]


@pytest.mark.parametrize(
    "change, message",
    [
        (missing, f"1 missing: {NAME}"),
        (extra, "1 not of this model: context_tower.layers.16.norm.weight"),
        (both, f"1 missing: {NAME}; 1 not of this model: context_tower.layers.1.mixer.experts.16.up_proj.weight"),
        (transposed, f"model.safetensors: tensor '{NAME}' has shape [64, 32], the model's is [32, 64]"),
        (one_dimension_more, f"tensor '{NAME}' has shape [1, 32, 64], the model's is [32, 64]"),
        (of_another_dtype, f"model.safetensors: '{NAME}' is bfloat16, "),
        (under_both_names, "tensor 'context_tower.embeddings.weight' stands in model.safetensors as well"),
    ],
)
def test_tensors_that_do_not_fit(folder, change, message):
    rewrite(folder, change)
    assert message in refusal(folder)


def test_a_backbone_without_its_head(single):
    rewrite(single, lambda tensors: tensors.pop("lm_head.weight"))
    assert "1 missing: lm_head.weight" in refusal(single)


def test_one_tower_of_two_is_no_backbone(folder):
    def drop(tensors):
        for name in [name for name in tensors if name.startswith("denoiser_tower.")]:
            del tensors[name]

    rewrite(folder, drop)
    assert "missing: denoiser_tower.embeddings.weight" in refusal(folder)


def test_an_index_that_contradicts_a_file(folder):
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"][NAME]
    other = next(name for name in index["weight_map"].values() if name != file)
    index["weight_map"][NAME] = other
    (folder / INDEX).write_text(json.dumps(index))
    assert f"{file}: holds '{NAME}', which the index places in {other}" in refusal(folder)


def test_an_index_that_leaves_the_folder(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][NAME] = "../folder/model-00001-of-00003.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    assert f"places '{NAME}' in '../folder/model-00001-of-00003.safetensors'" in refusal(folder)


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder; give a Hugging Face folder"):
        load(tmp_path / "nowhere")
    assert "config.json: no such file" in refusal(tmp_path)


def edit_header(path, change):
    blob = path.read_bytes()
    start = 8 + int.from_bytes(blob[:8], "little")
    text = change(json.loads(blob[8:start]))
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + blob[start:])


def shifted(by):
    def change(header):
        entry = header["backbone.layers.3.norm.weight"]
        entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]
        return json.dumps(header)

    return change


def twice(header):
    return json.dumps(header)[:-1] + ', "lm_head.weight": ' + json.dumps(header["lm_head.weight"]) + "}"


@pytest.mark.parametrize(
    "change, message",
    [
        (shifted(-4), "tensor 'backbone.layers.3.norm.weight' overlaps the tensor before it"),
        (shifted(4), "tensor 'backbone.layers.3.norm.weight' leaves a hole before it"),
        (twice, "key 'lm_head.weight' stands twice"),
        (lambda header: "{" + " " * 100, "the header is not valid JSON"),
    ],
)
def test_a_header_that_is_no_description_of_its_file(single, change, message):
    edit_header(single / "model.safetensors", change)
    found = refusal(single)
    assert "model.safetensors: " in found and message in found


@pytest.mark.parametrize("size", [4, 1000, 2_000_000])
def test_cut_off(single, size):
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "model.safetensors: " in refusal(single)


def test_a_huge_header(single):
    file = single / "model.safetensors"
    file.write_bytes((2**62).to_bytes(8, "little") + file.read_bytes()[8:])
    assert f"the header claims {2**62} bytes" in refusal(single)


def test_variants_of_a_two_tower_folder(data):
    """Without time conditioning its tensors are left out; two different towers cannot become one."""
    folder = data / "tiny_bf16/checkpoint"
    _, whole = load(folder)
    _, timeless = load(folder, Variant(time_conditioning=False))
    assert set(whole) - set(timeless) == {"time"}
    for path, array in flatten(timeless).items():
        np.testing.assert_array_equal(array, flatten(whole)[path])
    with pytest.raises(ValueError, match="context='tied' needs a checkpoint of one tower"):
        load(folder, Variant(context="tied"))
