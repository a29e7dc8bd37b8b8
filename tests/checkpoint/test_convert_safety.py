"""Converting beyond the bytes: nothing half-made is ever left, misuse is named, the Hub's files are known, dry runs."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from campaigns import campaign
from helpers import ROOT, run_command
from twotower_jax.atomic import new_folder
from twotower_jax.checkpoint import arrays, hub, listing, manifest
from twotower_jax.checkpoint.convert import convert
from twotower_jax.files import CheckpointError

RELEASE = {"two_tower": (12_544, 63_185_902_848), "backbone": (6_243, 31_577_940_288)}


@pytest.fixture(scope="module")
def source(data) -> pathlib.Path:
    return data / "tiny_bf16/checkpoint"


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("converted") / "out"
    convert(source, folder)
    return folder


def content(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# Whole or not at all.


def test_the_same_bytes_again(source, converted, tmp_path):
    convert(source, tmp_path / "again")
    assert content(tmp_path / "again") == content(converted)


def test_existing_output_is_left_alone(source, tmp_path):
    (tmp_path / "out").mkdir()
    out = run_command("convert", f"--source={source}", f"--output={tmp_path / 'out'}")
    assert (out.returncode, out.stderr) == (
        2, f"error: {tmp_path / 'out'}: exists already; choose another output or remove it\n"
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == [tmp_path / "out"] and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("output, message", [("no/such", "no such folder"), ("file/out", "no such folder")])
def test_output_in_no_folder(output, message, source, tmp_path):
    (tmp_path / "file").touch()
    out = run_command("convert", f"--source={source}", f"--output={tmp_path / output}")
    assert out.returncode == 2 and message in out.stderr and out.stderr.count("\n") == 1


def test_read_only_output(source, tmp_path):
    """Mounted read-only where that can be done; else a folder without permission, where that means anything."""
    parent = tmp_path / "parent"
    parent.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", parent], capture_output=True).returncode == 0
    if not mounted and os.geteuid() == 0:
        parent = pathlib.Path("/proc/sys")  # Nobody makes a folder here.
    elif not mounted:
        parent.chmod(0o500)
    try:
        out = run_command("convert", f"--source={source}", f"--output={parent / 'out'}")
        assert out.returncode == 2 and out.stderr.count("\n") == 1 and str(parent) in out.stderr
        assert not (parent / "out").exists()
    finally:
        if mounted:
            subprocess.run(["umount", parent], check=True)
        elif parent.parent == tmp_path:
            parent.chmod(0o700)


def test_full_disk(source, tmp_path):
    """Every file is limited to 20 kB, as if the disk were full there."""
    limited = ["sh", "-c", 'ulimit -f 40 && exec "$@"', "sh", sys.executable, ROOT / "launch/convert.py"]
    flags = [f"--source={source}", f"--output={tmp_path / 'out'}"]
    out = subprocess.run([*limited, *flags], capture_output=True, text=True, timeout=60)
    assert out.returncode == 2 and "File too large" in out.stderr and "params/" in out.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to mount a small disk")
def test_no_space_left(source, tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        out = run_command("convert", f"--source={source}", f"--output={tmp_path / 'out'}")
        assert out.returncode == 2 and "No space left on device" in out.stderr
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_killed_at_any_point(source, converted, tmp_path):
    """Killed after the n-th file: nothing under the final name, the source as it was, and a rerun gives the same."""
    before, folder = content(source), tmp_path / "folder"
    folder.mkdir()
    for files in (1, 160, 400, 845):
        code = f"""
import os, pathlib
from twotower_jax.checkpoint import convert, manifest
count = 0
def write_file(path, pieces, write=manifest.write_file):
    global count
    count += 1
    if count == {files}:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(next(iter(pieces))[:5])
        os.kill(os.getpid(), 9)
    return write(path, pieces)
convert.write_file = write_file
convert.convert(pathlib.Path({str(source)!r}), pathlib.Path({str(folder / "out")!r}))
"""
        script = tmp_path / "killed.py"
        script.write_text(code)
        assert run_command(script).returncode == -9
        assert [entry.name for entry in folder.iterdir()] == [".out.partial"]
    convert(source, folder / "out")
    assert [entry.name for entry in folder.iterdir()] == ["out"]
    assert content(folder / "out") == content(converted)
    assert content(source) == before


def test_two_at_once(tmp_path):
    again = new_folder(tmp_path / "out")
    with new_folder(tmp_path / "out"), pytest.raises(ValueError, match="another process is writing it"):
        again.__enter__()
    assert (tmp_path / "out").is_dir()


def test_verify_finds_what_was_written_wrongly(source, tmp_path, monkeypatch):
    pieces = arrays.chunk_bytes
    monkeypatch.setattr(arrays, "chunk_bytes", lambda parameter, tensor: pieces(parameter, tensor * 0))
    with pytest.raises(CheckpointError, match="differs from tensor"):
        convert(source, tmp_path / "out", verify=True)
    assert not list(tmp_path.iterdir())


# The Hub.


def test_a_hub_id(source, tmp_path, monkeypatch):
    """What the Hub's client puts into its cache, links and all, with the commit and the hashes that it knows."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in source.iterdir():
        blob = repository / "blobs" / manifest.digest_file(file).sha256
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    asked = {}

    def download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = hub.resolve("some/model", "main")
    assert (asked["repo_id"], asked["revision"]) == ("some/model", "main")
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked["allow_patterns"])
    assert found == hub.Source(snapshot, "some/model", commit) == hub.resolve(str(snapshot))
    hashes = hub.recorded_hashes(snapshot)
    assert len(hashes) == 3
    result = convert(snapshot, tmp_path / "out", name=found.name, revision=found.revision, expected=hashes)
    assert (result.source, result.revision) == ("some/model", commit)
    blob = repository / "blobs" / hashes["model-00002-of-00003.safetensors"]
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match="00002-of-00003.safetensors: its content has changed"):
        convert(snapshot, tmp_path / "again", expected=hashes)


def test_recorded_hashes_of_a_downloaded_folder(tmp_path):
    note = tmp_path / ".cache/huggingface/download/model.safetensors.metadata"
    note.parent.mkdir(parents=True)
    note.write_text("commit\n" + "a" * 64 + "\n1.0\n")
    (tmp_path / "model.safetensors").touch()
    assert hub.recorded_hashes(tmp_path) == {"model.safetensors": "a" * 64}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--source=nowhere", "--output=x"], "nowhere: no such folder"),
        (["--source=."], "--output is missing"),
        (["--source=.", "--output=x", "--revision=main"], "--revision=main goes with a Hub id"),
        (["--source=.", "--output=x", "--time_init=other"], "time_init"),
        (["--source=.", "--output=x", "--sha256=README.md"], "README.md: "),
    ],
)
def test_misuse(flags, message, tmp_path):
    (tmp_path / "README.md").write_text("hello\n")
    out = run_command("convert", *flags, cwd=tmp_path)
    assert out.returncode == 2 and message in out.stderr and out.stderr.count("\n") == 1


# Without reading data.


@pytest.mark.parametrize("name", ["two_tower", "backbone"])
def test_dry_run_of_the_release(name, data):
    text = listing.dry_run(data / f"nano30b/{name}_tensors.json.gz", "identity")
    count, total = RELEASE[name]
    assert f"source: {count:,} tensors, {total:,} parameters; nothing missing, nothing left over" in text
    assert "result: 12,544 tensors, 63,185,902,848 parameters" in text


def test_dry_run_of_a_folder(backbone_folder):
    out = run_command("convert", "--dry_run", f"--source={backbone_folder}")
    assert "source: 335 tensors" in out.stdout and "context_tower/embeddings [512, 64] <- 1 × [512, 64]" in out.stdout
    assert out.returncode == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("lm_head.weight"), "1 missing: lm_head.weight"),
        (lambda t: t.update(x=[1]), "1 not of this model: x"),
        (lambda t: t.update({"lm_head.weight": [512, 63]}), "'lm_head.weight' has shape [512, 63]"),
        (lambda t: t.update({"lm_head.weight": "x"}), "'lm_head.weight' has shape 'x'"),
        (lambda t: t.clear(), "is not {"),
        (lambda t: t.pop("backbone.embeddings.weight"), "not those of a tower"),
    ],
)
def test_dry_run_of_a_wrong_list(change, message, backbone_folder, tmp_path):
    shapes = {name: shape for name, (_, shape, _) in campaign.naive_read(backbone_folder / "model.safetensors").items()}
    change(shapes)
    (tmp_path / "list.json").write_text(json.dumps({"tensors": shapes}))
    with pytest.raises(CheckpointError) as error:
        listing.dry_run(tmp_path / "list.json", "identity")
    assert message in str(error.value) and str(tmp_path / "list.json") in str(error.value)
