"""Addresses in place of paths: what is read from a store is what a folder of this machine gives."""

import json
import os
import pathlib
import random

import numpy as np
import pytest

import buckets
from helpers import run_command
from twotower_jax import command_line, outputs
from twotower_jax.atomic import new_folder
from twotower_jax.checkpoint import fingerprint, load, manifest
from twotower_jax.checkpoint.convert import convert
from twotower_jax.checkpoint.export import export
from twotower_jax.data import load_tokenizer
from twotower_jax.data.megatron import MegatronDocuments
from twotower_jax.data.prepare import Settings, prepare
from twotower_jax.data.prepared import TRAIN, open_prepared, verify
from twotower_jax.data.tokenizer import train_tokenizer
from twotower_jax.files import CheckpointError
from twotower_jax.jsonl import read_rows, row_writer
from twotower_jax.paths import as_path
from twotower_jax.stores import Changed, cache
from twotower_jax.stores.path import StorePath
from workdirs import same


def test_local_paths_stay_what_they_are(tmp_path):
    for text in ("a/b", "/a", "gs:/a", "~x", ""):
        assert type(as_path(text)) is type(pathlib.Path(text)) and as_path(text) == pathlib.Path(text)
    assert as_path(tmp_path) is not None and isinstance(as_path(tmp_path), pathlib.PurePath)


def test_flags_for_paths_of_this_machine_refuse_addresses():
    """In place of making a folder called gs:."""
    assert command_line._PathParser().parse("gs://bucket/x") == "gs://bucket/x"
    with pytest.raises(ValueError, match="gs://bucket/x is an address"):
        command_line._LocalPathParser().parse("gs://bucket/x")


def test_names():
    path = as_path("gs://bucket/a/b.tar.gz")
    assert str(path.parent / "c" / "d.txt") == "gs://bucket/a/c/d.txt"
    assert (path.name, path.suffix, path.stem) == ("b.tar.gz", ".gz", "b.tar")
    assert str(path.with_suffix(".zst")) == "gs://bucket/a/b.tar.zst"
    assert [str(p) for p in path.parents] == ["gs://bucket/a", "gs://bucket"]
    assert path.relative_to(as_path("gs://bucket")) == "a/b.tar.gz" and as_path(path) is path
    assert as_path("hf://org/name@main/x").parent == as_path("hf://org/name@main")
    assert as_path("hf://datasets/org/name/x/y").name == "y"
    with pytest.raises(TypeError):
        os.path.exists(path) or os.fspath(path)


@pytest.mark.parametrize("text", ["gs://", "gs://a b/c", "gs://bucket//a", "gs://bucket/../a", "s3://b", "hf://org"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ValueError, match=text.split(":")[0]):
        as_path(text)


@pytest.mark.parametrize("name", ["é ü %20 #1?&=+", "a" * 300, "quote'\"[x]*"])
def test_objects(address, name):
    path = as_path(address) / name / "file"
    assert not path.exists() and not path.parent.is_dir()
    path.create(b"one")
    version = path.info().version
    with pytest.raises(Changed):
        path.create(b"two")
    path.write(b"three", version)
    with pytest.raises(Changed):
        path.write(b"four", version)
    assert path.read_bytes() == b"three" and path.is_file() and not path.is_dir()
    assert path.parent.is_dir() and not path.parent.is_file() and list(path.parent.iterdir()) == [path]
    assert path.parent.sizes() == {"file": 5}
    path.unlink()
    path.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="file"):
        path.unlink()


def test_files_are_read_anywhere(address):
    content, path = random.Random(0).randbytes(9 << 20), as_path(address)
    path.write_bytes(content)
    with path.open("rb") as file:
        assert file.read(10) == content[:10] and file.read(5 << 20) == content[10 : 10 + (5 << 20)]
        file.seek(-7, 2)
        assert file.read() == content[-7:] and file.read(1) == b""
        file.seek(4)
        pieces = iter(lambda: file.read(1 << 20), b"")
        assert b"".join(pieces) == content[4:]
    assert path.read_bytes() == content and path.read(3, 3) == b""


def test_outputs_are_whole_or_not_at_all(address):
    path = as_path(f"{address}/rows.jsonl")
    with row_writer(str(path)) as write:
        write({"a": "é"})
        assert not path.exists()
    assert read_rows(str(path)) == [{"a": "é"}]
    with pytest.raises(KeyError), row_writer(str(path)) as write:
        write({"a": 2})
        raise KeyError
    assert read_rows(str(path)) == [{"a": "é"}] and list(path.parent.iterdir()) == [path]
    with pytest.raises(ValueError, match="only read"), outputs.output_file("hf://org/name/x"):
        pass


def test_folders_for_results(address):
    """The work has a folder of this machine; what it makes is in the store at the end, or as far as it came."""
    store = as_path(f"{address}/results")
    with pytest.raises(KeyError), outputs.output_folder(str(store), "answers.jsonl") as folder:
        (folder / "answers.jsonl").write_text('{"a": 1}\n{"b"')
        (folder / ".table.md.partial").write_text("half")
        raise KeyError
    assert (store / "answers.jsonl").read_text() == '{"a": 1}\n'  # Whole rows.
    with outputs.output_folder(str(store), "answers.jsonl", "other.jsonl") as again:
        assert again != folder and (again / "answers.jsonl").read_text() == '{"a": 1}\n'
        outputs.write_file(again / "table.md", "| a |")
    assert sorted(path.name for path in store.iterdir()) == ["answers.jsonl", "table.md"]
    assert (store / "table.md").read_text() == "| a |"


@pytest.fixture(scope="module")
def folders(backbone_folder, tmp_path_factory) -> dict[str, pathlib.Path]:
    """A Hugging Face folder and what is made of it, here and in the bucket, by kind."""
    top = tmp_path_factory.mktemp("folders")
    convert(backbone_folder, top / "converted")
    found = {"source": backbone_folder, "converted": top / "converted"}
    for name, folder in found.items():
        buckets.upload(folder, f"gs://{buckets.BUCKET}/{name}")
    return found


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.whole
@pytest.mark.parametrize("kind", ["source", "converted"])
def test_checkpoints_are_read(folders, kind, quantize):
    url = f"gs://{buckets.BUCKET}/{kind}"
    here, there = (load.load(path, quantize=quantize) for path in (folders[kind], url))
    assert same(here.params, there.params) and here.model.config == there.model.config
    assert fingerprint.fingerprint(as_path(url)) == fingerprint.fingerprint(folders[kind])
    assert load.contents(url) == load.contents(folders[kind])


@pytest.mark.whole
def test_conversion_and_export_within_a_store(folders, address, tmp_path):
    """No copy of the model on this machine, and the very same files."""
    made = convert(as_path(f"gs://{buckets.BUCKET}/source"), as_path(f"{address}/out"), verify=True)
    assert made.files == manifest.read(folders["converted"]).files
    assert as_path(f"{address}/out").sizes().keys() == {*made.files, manifest.NAME}
    assert not cache.folder().exists()
    with pytest.raises(ValueError, match="exists already"):
        convert(folders["source"], as_path(f"{address}/out"))
    export(as_path(f"{address}/out"), as_path(f"{address}/hf"), "context", 1 << 30)
    export(folders["converted"], tmp_path / "hf", "context", 1 << 30)
    for file in (tmp_path / "hf").iterdir():
        assert as_path(f"{address}/hf/{file.name}").read_bytes() == file.read_bytes()


def test_folders_are_whole_or_not_at_all(address, monkeypatch):
    out = as_path(f"{address}/out")
    with pytest.raises(KeyError), new_folder(out) as folder:
        manifest.write_file(folder / "a", (b"1", b"2"))
        assert out.sizes().keys() == {"a", ".writing"}
        with pytest.raises(ValueError, match="another process is writing it"), new_folder(out):
            pass
        raise KeyError
    assert not out.is_dir()
    # What a killed process has left goes when the next one begins.
    (out / "params" / "left").write_bytes(b"x")
    (out / ".writing").write_bytes(json.dumps({"owner": "gone"}).encode())
    monkeypatch.setattr("twotower_jax.stores.lease.SECONDS", 0.01)
    with new_folder(out) as folder:
        manifest.write_file(folder / "a", (b"3",))
    assert out.sizes() == {"a": 1}
    with pytest.raises(ValueError, match="exists already"), new_folder(out):
        pass


@pytest.mark.parametrize("change", ["flip", *(pytest.param(c, marks=pytest.mark.whole) for c in ("cut", "remove"))])
def test_changed_chunks_are_found(folders, change):
    url = f"gs://{buckets.BUCKET}/converted"
    name = next(name for name in sorted(as_path(url).sizes()) if "/c." in name)
    path = as_path(url) / name
    whole = path.read_bytes()
    content = bytearray(whole)
    content[3] ^= 1
    if change == "remove":
        path.unlink()
    else:
        path.write_bytes(content if change == "flip" else whole[:-1])
    with pytest.raises(CheckpointError, match=f"{name}: .*(recorded|cannot be read)"):
        load.load(url)
    path.write_bytes(whole)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("prepared")
    texts = [f"{'word ' * (i % 7)}number {i}" for i in range(60)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([str(folder / "a.jsonl")], folder / "set", train_tokenizer(texts, 300), Settings(), quiet=True)
    buckets.upload(folder / "set", f"gs://{buckets.BUCKET}/set")
    return folder / "set"


def test_prepared_data_are_read(prepared, monkeypatch):
    url = f"gs://{buckets.BUCKET}/set"
    here, there = (open_prepared(path, TRAIN) for path in (prepared, url))
    np.testing.assert_array_equal(here.read(0, here.tokens), there.read(0, there.tokens))
    np.testing.assert_array_equal(here.lengths(0, here.count), there.lengths(0, there.count))
    assert here.identity() == there.identity()
    assert load_tokenizer(url).to_str() == load_tokenizer(prepared).to_str()
    monkeypatch.setenv(cache.VARIABLE, "0.000001")
    with pytest.raises(ValueError, match="--cache_gb"):
        open_prepared(url, TRAIN)


def test_megatron_sets_are_read(address, tmp_path):
    lengths, data = np.array([2, 3], "<i4"), np.arange(5, dtype="<u2")
    index = b"MMIDIDX\0\0" + b"".join(
        np.array(values, kind).tobytes()
        for values, kind in (
            *((1, "<u8"), (8, "<u1"), (2, "<u8"), (3, "<u8")),
            *((lengths, "<i4"), ((0, 4), "<i8"), ((0, 1, 2), "<i8")),
        )
    )
    (as_path(f"{address}/set.bin")).write_bytes(data.tobytes())
    (as_path(f"{address}/set.idx")).write_bytes(index)
    found = MegatronDocuments(f"{address}/set")
    np.testing.assert_array_equal(found.read(0, 5), data)
    np.testing.assert_array_equal(found.lengths(0, 2), lengths)


def test_the_cache_stays_within_its_limit(address, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_in_use", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for number in range(4):
        as_path(f"{address}/{number}").write_bytes(bytes([number]) * 1000)
    monkeypatch.setenv(cache.VARIABLE, "0.0000025")
    for number in range(4):
        copy = cache.local(StorePath(f"{address}/{number}"))
        assert copy.read_bytes() == bytes([number]) * 1000
        for descriptor in cache._in_use.values():
            os.close(descriptor)
        cache._in_use.clear()
        assert sum(f.stat().st_size for f in cache.folder().rglob("*") if f.is_file()) <= 2500
    monkeypatch.setenv(cache.VARIABLE, "0.0000005")
    with pytest.raises(ValueError, match="--cache_gb"):
        cache.local(StorePath(f"{address}/0"))


@pytest.mark.whole
def test_commands_read_and_write_addresses(folders, address):
    as_path(f"{address}/in.jsonl").write_text(json.dumps({"ids": [3, 4, 5]}) + "\n")
    flags = [f"--checkpoint=gs://{buckets.BUCKET}/converted", f"--prompts={address}/in.jsonl", "--max_new_tokens=2"]
    run = run_command("generate", *flags, "--mode=ar", "--seed=1", f"--output={address}/out.jsonl", "--ignore_eos")
    assert run.returncode == 0, run.stderr
    (row,) = read_rows(f"{address}/out.jsonl")
    assert row["prompt_ids"] == [3, 4, 5] and len(row["tokens"]) == 2
    as_path(f"{address}/text.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(40)))
    made = f"--output={address}/set", f"--tokenizer=gs://{buckets.BUCKET}/converted"
    run = run_command("prepare", f"--input={address}/text.jsonl", *made)
    assert run.returncode == 0 and verify(f"{address}/set").total(TRAIN, "documents") == 40, run.stderr
    run = run_command("generate", *flags, "--mode=ar", f"--checkpoint=gs://{buckets.BUCKET}/nothing")
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "no such folder" in run.stderr
