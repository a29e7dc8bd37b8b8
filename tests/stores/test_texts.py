"""Text in a store: prepare.py reads it as it comes and writes what it makes there, byte for byte as on this machine."""

import gzip
import io
import json
import tarfile

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

import buckets
from twotower_jax.data import prepare as module
from twotower_jax.data import read_documents, train_tokenizer
from twotower_jax.data.documents import DataError
from twotower_jax.data.inputs import divide, find_files, read_rows, text_files
from twotower_jax.data.opening import Data, Packing
from twotower_jax.data.prepare import Settings, prepare
from twotower_jax.data.prepared import read_manifest, verify
from twotower_jax.paths import as_path
from twotower_jax.stores.path import StorePath

TEXTS = [f"text {i} " + "word " * (i % 17) for i in range(120)]
SETTINGS = Settings(validation_fraction=0.1, shard_size=600)


def lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of files of all kinds, with a copy in it, here and at gs://bucket/corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "deep").mkdir()
    (folder / "a.jsonl").write_bytes(lines(TEXTS[:40]))
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(lines(TEXTS[40:60])))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS[60:90]}), folder / "c.parquet", row_group_size=7)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in [("x.txt", TEXTS[90].encode()), ("y.jsonl", lines(TEXTS[91:])), ("z.png", b"png")]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    (folder / "deep" / "d.tar.gz").write_bytes(gzip.compress(buffer.getvalue()))
    (folder / "e.txt").write_text(TEXTS[3])
    (folder / "notes.md").write_text("no")
    (folder / "settings.json").write_text('{"n": 3}')
    (folder / ".hidden.txt").write_text("no")
    buckets.upload(folder, f"gs://{buckets.BUCKET}/corpus")
    return folder


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory):
    """The corpus prepared here."""
    output = tmp_path_factory.mktemp("reference") / "out"
    prepare([str(corpus)], output, train_tokenizer(TEXTS, 300), SETTINGS, quiet=True)
    return output


CORPUS = f"gs://{buckets.BUCKET}/corpus"


def test_the_same_documents_are_read(corpus):
    said = []
    files = text_files(CORPUS, said.append)
    assert [file.path for file in files] == [file.path.replace(str(corpus), CORPUS) for file in text_files(corpus)]
    assert said == [
        f"{CORPUS}: left out: JSON without a text in 'text': 1 (settings.json); hidden: 1 (.hidden.txt); "
        "of other kinds: 1 (notes.md)"
    ]
    assert read_documents(CORPUS) == read_documents(corpus) == TEXTS
    assert [file.path for file in find_files([f"{CORPUS}/*.parquet"])] == [f"{CORPUS}/c.parquet"]
    assert [file.path for file in find_files([f"{CORPUS}/d*/*.gz"])] == [f"{CORPUS}/deep/d.tar.gz"]
    for name in ("a.jsonl", "c.parquet"):
        parts = divide(find_files([f"{CORPUS}/{name}"]), 500)
        assert len(parts) > 3
        own = [row.text for part in parts for piece in part for row in read_rows(piece, "text")]
        assert own == read_documents(corpus / name)


def test_what_is_not_there_or_changes_is_said_in_a_line(address):
    for name, message in (
        (f"{address}/no.jsonl", "no such file or folder, and as a pattern it matches no file"),
        (f"{address}/*.jsonl", "no such file or folder, and as a pattern it matches no file"),
        ("gs://other-bucket/x.jsonl", "there is no such bucket"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            find_files([name])
    file = as_path(f"{address}/a.jsonl")
    file.write_bytes(lines(TEXTS[:9]))
    ((piece,),) = divide(find_files([str(file)]), 1 << 20)
    file.write_bytes(lines(TEXTS[1:10]))
    with pytest.raises(DataError, match=r"a\.jsonl: was changed while it was read"):
        list(read_rows(piece, "text"))


def test_from_a_store_to_a_store_and_on_after_an_interruption(corpus, reference, address, monkeypatch):
    tokenizer = train_tokenizer(TEXTS, 300)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="stopped"):
        patch.setattr(module, "_complete", lambda *arguments: (_ for _ in ()).throw(OSError("stopped")))
        prepare([CORPUS], f"{address}/out", tokenizer, SETTINGS, quiet=True)
    output = as_path(f"{address}/out")
    assert not (output / "dataset.json").exists() and not (output / ".writing").exists()
    made = {name: (output / name).info().version for name in output.sizes() if name.endswith(".array_record")}
    with pytest.raises(ValueError, match="holds data of other settings or inputs .* seed 0 -> 1"):
        prepare([CORPUS], str(output), tokenizer, Settings(**vars(SETTINGS) | {"seed": 1}), quiet=True)
    manifest = prepare([CORPUS], str(output), tokenizer, SETTINGS, quiet=True)
    assert made == {name: (output / name).info().version for name in made} and len(made) > 4
    wanted = read_manifest(reference)
    assert manifest.shards == wanted.shards
    assert set(output.sizes()) == {str(file.relative_to(reference)) for file in reference.rglob("*")}
    assert verify(str(output)) == manifest
    windows, here = (
        Data(str(folder)).windows(tokenizer, Packing(16, 300, 0.1, 0, None))[0] for folder in (output, reference)
    )
    assert windows.identity() == here.identity() and (windows[3]["ids"] == here[3]["ids"]).all()


@pytest.mark.whole
def test_to_s3(corpus, reference, s3):
    manifest = prepare([CORPUS], "s3://bucket/out", train_tokenizer(TEXTS, 300), SETTINGS, quiet=True)
    assert manifest.shards == read_manifest(reference).shards and verify("s3://bucket/out") == manifest


def test_a_part_asks_for_little_more_than_its_own(address, monkeypatch):
    """A part of 2 MB of a Parquet file of 32 MB: the blocks of 4 MiB that it lies in, four ahead, and the footer."""
    texts = [f"{i} " + "x" * 2000 for i in range(16_000)]
    buffer = io.BytesIO()
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, buffer, row_group_size=500, compression="none", use_dictionary=False)
    as_path(f"{address}/a.parquet").write_bytes(buffer.getvalue())
    read, asked = StorePath._read, []

    def counted(path, start, stop):
        asked.append(stop - start)
        return read(path, start, stop)

    monkeypatch.setattr(StorePath, "_read", counted)
    parts = divide(find_files([f"{address}/a.parquet"]), 2 << 20)
    assert len(parts) == 16
    asked.clear()
    (piece,) = parts[2]
    found = [row.text for row in read_rows(piece, "text")]
    assert found == texts[500 * piece.start : 500 * piece.stop] and len(found) == 1000
    assert max(asked) <= 4 << 20 and sum(asked) <= 7 * (4 << 20) < len(buffer.getvalue())


def test_from_the_hub(corpus):
    """A data set is read as the folder that it was made of; a repository that is not there is said in a line."""
    with buckets.hub(corpus):
        assert read_documents("hf://datasets/org/name") == TEXTS
        assert [file.path for file in find_files(["hf://datasets/org/name/deep"])] == [
            "hf://datasets/org/name/deep/d.tar.gz"
        ]
        with pytest.raises(OSError, match="hf://datasets/org/other: there is no such repository"):
            find_files(["hf://datasets/org/other"])


@pytest.mark.whole
def test_from_the_hub_to_a_store(corpus, reference, address):
    with buckets.hub(corpus):
        settings = Settings(**vars(SETTINGS) | {"dedup": "near"})
        manifest = prepare(
            ["hf://datasets/org/name"], f"{address}/out", train_tokenizer(TEXTS, 300), settings, quiet=True
        )
    assert manifest.copies["exact"] == 1
    documents, before = (
        sum(made.total(split, "documents") for split in ("train", "validation"))
        for made in (manifest, read_manifest(reference))
    )
    assert before - documents == sum(manifest.copies.values())
    assert {file["path"] for file in manifest.inputs} == {
        f"hf://datasets/org/name/{name}" for name in ("a.jsonl", "b.jsonl.zst", "c.parquet", "deep/d.tar.gz", "e.txt")
    }
