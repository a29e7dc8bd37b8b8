"""Broken and hostile checkpoints: each is refused in one line that names file and tensor, or loaded exactly."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from campaigns import campaign
from campaigns._mutations import CONVERTED, HUGGING_FACE
from helpers import ROOT, run_command
from twotower_jax.checkpoint import huggingface, load, manifest, store
from twotower_jax.checkpoint.convert import convert
from twotower_jax.checkpoint.safetensors_file import MAX_HEADER_BYTES, read_header
from twotower_jax.files import CheckpointError

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def folder(data, tmp_path) -> pathlib.Path:
    """A two-tower folder to be broken."""
    return shutil.copytree(data / "tiny_bf16/checkpoint", tmp_path / "folder")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("whole") / "converted"
    convert(data / "tiny_bf16/checkpoint", folder)
    return folder


@pytest.fixture
def converted(whole, tmp_path) -> pathlib.Path:
    """A converted checkpoint to be broken."""
    return shutil.copytree(whole, tmp_path / "converted")


def refusal(folder: pathlib.Path) -> str:
    """The one line with which a conversion is refused, without leaving anything."""
    output = folder.parent / "output"
    with pytest.raises(CheckpointError) as caught:
        convert(folder, output)
    assert not output.exists() and not list(folder.parent.glob(".*.partial"))
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message
    return message


def split(path: pathlib.Path) -> tuple[dict, bytes]:
    blob = path.read_bytes()
    end = 8 + int.from_bytes(blob[:8], "little")
    return json.loads(blob[8:end]), blob[end:]


def join(path: pathlib.Path, header: dict | str, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def rewrite_header(path: pathlib.Path, change) -> None:
    header, data = split(path)
    header = change(header) or header
    join(path, header, data)


# Files.


@pytest.mark.parametrize(
    "size, message", [(0, "0 bytes are too few"), (5, "too few"), (100, "claims"), (500_000, "but the file has 500000")]
)
def test_truncated(size, message, folder):
    os.truncate(folder / SHARD, size)
    assert SHARD in (found := refusal(folder)) and message in found


def test_padded(folder):
    with (folder / SHARD).open("ab") as file:
        file.write(b"\0")
    assert "cut off or padded?" in refusal(folder)


def test_missing_file(folder):
    (folder / SHARD).unlink()
    assert f"{SHARD}: cannot be read (No such file or directory)" in refusal(folder)


def test_duplicated_file(folder):
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / SHARD)
    assert "which the index places in model-00001-of-00003.safetensors" in refusal(folder)


def test_renamed_file(folder):
    (folder / SHARD).rename(folder / "model-2.safetensors")
    assert SHARD in refusal(folder)


@pytest.mark.parametrize("target", ["/dev/zero", "/etc/hostname", "../elsewhere.safetensors", SHARD])
def test_links(target, folder):
    shutil.copy(folder / SHARD, folder.parent / "elsewhere.safetensors")
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to(target)
    message = refusal(folder)
    assert SHARD in message and ("outside the checkpoint's folder" in message or target == SHARD)


def test_a_link_within_the_folder_is_fine(folder):
    (folder / SHARD).rename(folder / "data")
    (folder / SHARD).symlink_to("data")
    huggingface.load(folder)


@pytest.mark.parametrize("name", [SHARD, "config.json", "model.safetensors.index.json", "tokenizer.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_no_file_at_all(name, make, folder):
    """A pipe would be waited for forever."""
    (folder / name).unlink()
    make(folder / name)
    assert f"{name}: " in refusal(folder)


def test_pickles_and_code_are_never_run(folder, monkeypatch):
    monkeypatch.chdir(folder)
    HUGGING_FACE["pickles and code"](folder, type("Always", (), {"random": lambda self: 0.0})())
    message = refusal(folder)
    assert "holds neither" in message
    assert "pytorch_model.bin is a pickle, which can run code and is never read" in message
    assert not (folder / "executed").exists()


def test_code_is_not_carried_over(folder):
    (folder / "modeling_nemotron_h.py").write_text("raise SystemExit")
    convert(folder, folder.parent / "output")
    assert not list((folder.parent / "output").rglob("*.py"))


# Headers.


NAME = "denoiser_tower.layers.0.mixer.in_proj.weight"


def change_entry(**changes):
    def change(header):
        name = NAME if NAME in header else sorted(set(header) - {"__metadata__"})[0]
        header[name] |= changes

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (change_entry(dtype="F32"), "does not fill its"),
        (change_entry(dtype="I16"), "has dtype 'I16'; known are F32, BF16, F16"),
        (change_entry(dtype=["F32"]), "has dtype ['F32']"),
        (change_entry(shape=[1, 2]), "does not fill its"),
        (change_entry(shape=[-1]), "has shape [-1]"),
        (change_entry(shape=[2**62, 4]), "has shape"),
        (change_entry(shape="x"), "has shape 'x'"),
        (change_entry(data_offsets=[0, 10**12]), "does not fill its"),
        (change_entry(data_offsets=[0]), "has data_offsets [0]"),
        (change_entry(data_offsets=[0.0, 1.0]), "has data_offsets [0.0, 1.0]"),
        (change_entry(more=1), "is not described by dtype, shape and data_offsets"),
        (lambda header: header.update(x=None), "'x' is not described"),
        (lambda header: header.update(__metadata__=3), "__metadata__ is not an object of strings"),
        (lambda header: json.dumps(header)[:-1] + ', "a": 1, "a": 2}', "key 'a' stands twice"),
        (lambda header: "[" * 100_000, "not valid JSON"),
        (lambda header: "[]", "not a JSON object"),
        (lambda header: "9" * 10_000, "not valid JSON"),
        (lambda header: json.dumps(header) + "x", "not valid JSON"),
    ],
)
def test_headers(change, message, folder):
    rewrite_header(folder / SHARD, change)
    assert SHARD in (found := refusal(folder)) and message in found


@pytest.mark.parametrize("shift, message", [(-2, "overlaps the tensor before it"), (2, "leaves a hole before it")])
def test_overlaps_and_holes(shift, message, folder):
    def change(header):
        entries = sorted((entry["data_offsets"], name) for name, entry in header.items() if name != "__metadata__")
        (start, stop), name = entries[5]
        header[name]["data_offsets"] = [start + shift, stop + shift]

    rewrite_header(folder / SHARD, change)
    assert message in refusal(folder)


@pytest.mark.parametrize("size", [2**64 - 1, 2**63, MAX_HEADER_BYTES + 1, 10**6 * 2])
def test_header_length(size, folder):
    blob = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(size.to_bytes(8, "little") + blob[8:])
    assert f"the header claims {size} bytes" in refusal(folder)


def test_a_million_entries(folder):
    """60 MB of header are refused unread; what is allowed at most is read."""

    def entries(count):
        return "{" + ",".join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(count)) + "}"

    join(folder / SHARD, entries(1_000_000), b"")
    assert "the header claims" in refusal(folder)
    count = MAX_HEADER_BYTES // 60
    join(folder / SHARD, entries(count), b"")
    assert len(read_header(folder / SHARD)) == count


def test_wrong_shape_of_the_right_size(folder):
    file = huggingface.open_folder(folder).tensors[NAME].file

    def change(header):
        header[NAME]["shape"] = header[NAME]["shape"][::-1]

    rewrite_header(file, change)
    assert f"{file}: tensor '{NAME}' has shape [64, 328], the model's is [328, 64]" in refusal(folder)


def test_relabelled_dtype(folder):
    """One tensor in another dtype of the same size."""
    file = huggingface.open_folder(folder).tensors[NAME].file
    rewrite_header(file, lambda header: header[NAME].update(dtype="F16"))
    assert f"{file}: tensor '{NAME}' is float16, 635 others are bfloat16" in refusal(folder)


def test_a_stack_of_two_dtypes(folder):
    name = "context_tower.layers.2.mixer.norm.weight"  # One array with that of layer 9.
    file = huggingface.open_folder(folder).tensors[name].file
    header, data = split(file)
    start, stop = header[name]["data_offsets"]
    data = data[:start] + 2 * data[start:stop] + data[stop:]
    for entry in header.values():
        if "data_offsets" in entry:
            entry["data_offsets"] = [o + (stop - start) * (o >= stop) for o in entry["data_offsets"]]
    header[name] |= {"dtype": "F32", "data_offsets": [start, start + 2 * (stop - start)]}
    join(file, header, data)
    message = refusal(folder)
    assert "layers.9.mixer.norm.weight' is bfloat16" in message and f"{name!r} of the same stack is float32" in message


# Tensors.


def test_missing_and_extra_tensors_are_counted_and_some_named(folder):
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    gone = [name for name in places if ".A_log" in name]
    for file in folder.glob("*.safetensors"):
        header, data = split(file)
        for name in sorted(set(header) & set(gone)):
            header[f"renamed.{name}"] = header.pop(name)
        join(file, header, data)
    index.write_text(json.dumps({"weight_map": {f"renamed.{k}" if k in gone else k: v for k, v in places.items()}}))
    message = refusal(folder)
    assert f"{len(gone)} missing: " in message and f"{len(gone)} not of this model: " in message
    assert sum(message.count(name) == 2 for name in gone) == 3 < len(gone)
    assert message.count(f"and {len(gone) - 3} more") == 2


# Index and configuration.


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "/etc/passwd", "x.py", "a/b.safetensors", "", 3, None, "\0.safetensors"]
)
def test_index_entries_that_leave_the_folder(place, folder):
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"][NAME] = place
    index.write_text(json.dumps(raw))
    shutil.copy(folder / SHARD, folder.parent / "outside.safetensors")
    assert folder.name in refusal(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', "[" * 100_000, '{"weight_map": {"a": 1, "a": 2}}']
)
def test_bad_index(text, folder):
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json: " in refusal(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": "64"}, "hidden_size must be int"),
        ({"hidden_size": -1}, "hidden_size=-1 must be positive"),
        ({"hybrid_override_pattern": "MXE"}, "holds ['X']"),
        ({"hybrid_override_pattern": "M" * 10**6, "num_hidden_layers": 10**6}, "1000000 layers; 256 is the limit"),
        ({"n_routed_experts": 10**6}, "more than 65536 experts, the limit"),
        ({"n_routed_experts": 10**12}, "n_routed_experts=1000000000000 must be less than 2**31"),
        ({"num_hidden_layers": 3}, "num_hidden_layers=3"),
        ({"vocab_size": 10**9}, "has shape"),
        ({"vocab_size": 10**18}, "vocab_size=1000000000000000000 must be less than 2**31"),
        ({"vocab_size": None}, "'vocab_size' is missing"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ],
)
def test_bad_config(change, message, folder):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert message in refusal(folder)


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, '{"a"', "\0"])
def test_config_that_is_none(text, folder):
    (folder / "config.json").write_text(text)
    assert "config.json: " in refusal(folder)


# Converted checkpoints.


def bend(converted: pathlib.Path, change) -> None:
    file = converted / manifest.NAME
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.pop("files"), "is not an object with the fields"),
        (lambda m: m.update(version=2), "has a version other than 1"),
        (lambda m: m.update(kind="x"), "has kind 'x'"),
        (lambda m: m.update(parameters=3), "counts 3 parameters"),
        (lambda m: m.update(segments=[["ME", 8]]), "its arrays are laid out as [['ME', 8]]"),
        (lambda m: m["files"].update({"../x": {"size": 0, "sha256": ""}}), "lists '../x', which is outside"),
        (lambda m: m["files"].update(x=3), "gives 'x' no size and sha256"),
        (lambda m: m["files"].pop("params/_METADATA"), "does not list 1 files: params/_METADATA"),
        (lambda m: m["files"]["config.json"].update(size=7), "config.json: has 1315 bytes, recorded were 7"),
        (lambda m: m["files"].update({"gone": {"size": 0, "sha256": ""}}), "gone: cannot be read"),
    ],
)
def test_bad_manifest(change, message, converted):
    bend(converted, change)
    with pytest.raises(CheckpointError) as caught:
        load.load(converted)
    assert message in str(caught.value) and str(converted) in str(caught.value)


def test_unverified_arrays_of_another_shape(converted):
    """Whoever asks not to compare hashes still gets no array of a wrong shape or kind."""
    file = next((converted / "params").glob("*/zarr.json"))
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(raw | {"shape": [2 * n for n in raw["shape"]]}))
    with pytest.raises(CheckpointError, match="has shape"):
        store.load(converted, verify=False)
    file.write_text("{}")
    with pytest.raises(CheckpointError, match=str(file.parent)):
        store.load(converted, verify=False)
    file.unlink()
    with pytest.raises(CheckpointError, match=str(file.parent)):
        store.load(converted, verify=False)


# The commands, and the campaign.


@pytest.mark.parametrize("script", ["convert", "export", "inspect_checkpoint"])
def test_exit_status(script, folder):
    os.truncate(folder / SHARD, 1000)
    flag = "source" if script == "convert" else "checkpoint"
    flags = [f"--{flag}={folder}"] + ([f"--output={folder.parent / 'out'}"] if script != "inspect_checkpoint" else [])
    out = run_command(script, *flags)
    assert out.returncode == 3 and out.stdout == ""
    assert out.stderr.startswith(f"error: {folder / SHARD}: ") and out.stderr.count("\n") == 1
    assert not (folder.parent / "out").exists()


@pytest.mark.whole(but=["[1]"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_slice_of_the_campaign(times):
    kinds = 2 * len(HUGGING_FACE) + 2 + len(CONVERTED)
    outcomes = list(campaign.run(times * kinds, seed=0))
    bad = [outcome for outcome in outcomes if outcome.verdict not in (campaign.REFUSED, campaign.EXACT)]
    assert not bad
    assert len({(outcome.target, outcome.mutation) for outcome in outcomes}) == kinds
    assert campaign.table(outcomes).count("\n") == kinds + 2


def test_a_campaign_needs_the_tests(tmp_path):
    """Which an installation without the repository lacks."""
    for name in ("environment.py", "benchmark.py"):
        shutil.copy(ROOT / "launch" / name, tmp_path)
    script = str(tmp_path / "benchmark.py")
    out = subprocess.run([sys.executable, script, "kills"], capture_output=True, text=True, timeout=60)
    assert (out.returncode, out.stdout) == (2, "")
    assert out.stderr.startswith("error: kills needs the repository's tests") and out.stderr.count("\n") == 1


def test_random_bytes_as_a_checkpoint(tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(20):
        (tmp_path / "model.safetensors").write_bytes(rng.bytes(int(rng.integers(1, 5000))))
        with pytest.raises(CheckpointError, match="model.safetensors"):
            read_header(tmp_path / "model.safetensors")
