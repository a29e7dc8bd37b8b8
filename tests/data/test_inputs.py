"""Folders of text as people have them: the same documents for runs and for prepare.py, and a word on what is not."""

import gzip
import json
import os
import sys

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from twotower_jax.data import EOS_ID, read_documents, train_tokenizer
from twotower_jax.data.formats import format_of
from twotower_jax.data.inputs import divide, find_files, read_rows, text_files
from twotower_jax.data.opening import Data
from twotower_jax.data.prepare import prepare
from twotower_jax.data.prepared import TRAIN, PreparedDocuments


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def zstd(content: bytes) -> bytes:
    """Two frames, as parallel compressors write them."""
    half = len(content) // 2
    return b"".join(zstandard.compress(part) for part in (content[:half], content[half:]))


FILES = {
    "a.jsonl": lines("a1", "a2"),
    "b.JSONL": lines("b1"),
    "c.ndjson": lines("c1", "c2"),
    "d.jsonl.gz": gzip.compress(lines("d1", "d2")),
    "e.jsonl.zst": zstd(lines("e1", "e2")),
    "f.Ndjson.ZST": zstd(lines("f1")),
    "g.json": json.dumps([{"text": "g1"}, {"text": "g2"}], indent=1).encode(),
    "h.json": b'\xef\xbb\xbf{"text":\n"h1"}',
    "i.json": lines("i1", "i2"),
    "j.json.gz": gzip.compress(lines("j1", "j2")),
    "k.json.zst": zstd(b'[{"text": "k1"}]'),
    "l.TXT": b"l1\r\nl2\rl3\n",
    "m.txt.gz": gzip.compress(b"m1\r\n\r\nm2"),
    "n.txt.zst": zstd(b"n1\nn2"),
    "sub/o.txt": b"o1",
}
TEXTS = ["a1", "a2", "b1", "c1", "c2", "d1", "d2", "e1", "e2", "f1", "g1", "g2", "h1", "i1", "i2", "j1", "j2", "k1",
         "l1\nl2\nl3\n", "m1\n\nm2", "n1\nn2", "o1", "p1"]  # fmt: skip
LEFT_OUT = {
    "notes.md": b"not read",
    "data.csv": b"not read",
    "package.json": b'{"name": "x", "text": 3}',
    ".ipynb_checkpoints/a.jsonl": lines("a1", "a2"),
    ".hidden.txt": b"not read",
}


@pytest.fixture
def folder(tmp_path):
    """Files of every kind; p1 is in a linked folder, one link leads around, one nowhere, one to a file of the set."""
    root, beside = tmp_path / "text", tmp_path / "beside"
    for name, content in (FILES | LEFT_OUT).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    beside.mkdir()
    (beside / "p.txt").write_text("p1")
    (root / "z").symlink_to(beside)
    (beside / "around").symlink_to(root)
    (root / "gone.txt").symlink_to(tmp_path / "nowhere")
    (root / "again.txt").symlink_to(root / "sub" / "o.txt")
    return root


def prepared_texts(folder, output, tokenizer) -> list[str]:
    prepare([str(folder)], output, tokenizer, quiet=True)
    documents = PreparedDocuments(str(output), TRAIN)
    ids = documents.read(0, documents.tokens)
    ends = np.cumsum(documents.lengths(0, documents.count))
    assert (ids[ends - 1] == EOS_ID).all()
    return [tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, ends[:-1])]


def test_a_run_and_prepare_read_the_same_documents(folder, tmp_path):
    assert read_documents(folder) == TEXTS
    assert prepared_texts(folder, tmp_path / "out", train_tokenizer(TEXTS, 300)) == TEXTS


def test_what_is_left_out_is_said_in_one_line(folder, tmp_path, capsys):
    said = []
    assert len(text_files(folder, said.append)) == len(FILES) + 1
    assert said == [
        f"{folder}: left out: JSON without a text in 'text': 1 (package.json); "
        "broken links or no regular files: 1 (gone.txt); hidden: 2 (.hidden.txt, .ipynb_checkpoints); "
        "linked twice: 2 (again.txt, z/around); of other kinds: 2 (data.csv, notes.md)"
    ]
    Data(str(folder), said.append)
    find_files([str(folder)], "text", said.append)
    assert said == said[:1] * 3
    # Named themselves they are read, or refused.
    with pytest.raises(ValueError, match="data.csv: cannot read files of this kind"):
        read_documents(folder / "data.csv")
    with pytest.raises(ValueError, match=r'package.json, entry 1: every row must be .* string field "text"'):
        read_documents(folder / "package.json")
    assert read_documents(folder / ".ipynb_checkpoints") == ["a1", "a2"]
    # Another field makes other files text.
    assert f"{folder}/package.json" in [file.path for file in find_files([str(folder)], "name")]


def test_a_folder_of_nothing_to_read_says_what_it_holds(tmp_path):
    (tmp_path / "data.csv").write_text("x")
    with pytest.raises(ValueError, match=r"no \.txt, .* files in this folder.*left out: of other kinds: 1 \(data.csv"):
        read_documents(tmp_path)


def test_a_link_and_what_it_names_are_one_file(folder, tmp_path):
    (tmp_path / "link.txt").symlink_to(folder / "sub" / "o.txt")
    assert read_documents(tmp_path / "link.txt") == ["o1"]
    with pytest.raises(ValueError, match="among the inputs twice"):
        find_files([str(tmp_path / "link.txt"), str(folder)])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "x"}, {"tex', r"a\.json: not a whole JSON array in UTF-8"),
        ("a.json", b'[{"text": "x"}, 3]', r"a\.json, entry 2: every row must"),
        ("a.json", b'{"text": "x"}\n\n{"text": 3}\n', r"a\.json, line 3: every row must"),
        ("a.json", b"[" * 100_000, r"a\.json: not a whole JSON array"),
        ("a.json", b"[]", r"a\.json: the file holds no rows"),
        (
            "a.jsonl.zst",
            zstandard.compress(lines("x", "y")) + zstandard.compress(b"z")[:-1],
            r"zst, line 3: the zstd file is cut off",
        ),
        ("a.jsonl.zst", b"not zstd", r"a\.jsonl\.zst, line 1: the zstd file is cut off or broken"),
        ("a.txt.zst", zstd(b"text")[:-1], r"a\.txt\.zst: not a whole zstd file"),
        ("a.txt.gz", gzip.compress(b"text", mtime=0)[:-9], r"a\.txt\.gz: not a whole gzip file"),
        ("a.JSON.GZ", b"{}", r"a\.JSON\.GZ: not a whole gzip file"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)


def test_zstandard_is_asked_for_before_anything_is_read(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(lines("x"))
    (tmp_path / "b.jsonl.zst").write_bytes(zstd(lines("y")))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"b\.jsonl\.zst: .* needs zstandard, .*: pip install 'twotower_jax\[data\]'"):
        find_files([str(tmp_path)])
    assert read_documents(tmp_path / "a.jsonl") == ["x"]


def test_pyarrow_is_asked_for_before_anything_is_read(tmp_path, monkeypatch):
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"b\.parquet: .* needs pyarrow, .*: pip install 'twotower_jax\[data\]'"):
        find_files([str(tmp_path)])


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=1, max_size=30))
def test_compression_changes_nothing(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("same")
    for ending, change in (("", bytes), (".gz", gzip.compress), (".zst", zstd)):
        file = folder / f"a.jsonl{ending}"
        file.write_bytes(change(lines(*texts)))
        ((piece,),) = divide(find_files([str(file)]), 1 << 20)
        assert [row.text for row in read_rows(piece, "text")] == texts


def test_formats_by_name():
    assert {name for name in (*FILES, *LEFT_OUT) if not format_of(name)} == {"notes.md", "data.csv"}
    for name in ("txt", "a.gz", "a.zst", "a.parquet.gz", "a.jsonl.bz2", "a.jsonl.gz.zst", ".txt", "a.json~"):
        assert format_of(name) is None, name
    assert format_of("dir.txt/README") is None and format_of("A.PARQUET") == format_of("a.parquet")


def test_sources_of_a_mixture_share_no_file(tmp_path):
    for name in ("a/b/x.txt", "a/y.txt", "c/z.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name * 50)
    (tmp_path / "c" / "link").symlink_to(tmp_path / "a" / "b")

    def opened(**paths):
        entries = {name: {"path": path, "weight": 1} for name, path in paths.items()}
        (tmp_path / "mixture.json").write_text(json.dumps(entries))
        return Data(str(tmp_path / "mixture.json"))

    for paths in ({"one": "a", "two": "a/b"}, {"one": "a", "two": "a"}, {"one": "c", "two": "a/b/x.txt"}):
        with pytest.raises(ValueError, match=r"mixture.json: 'one' and 'two' overlap: both hold .*[xy]\.txt"):
            opened(**paths)
    os.remove(tmp_path / "c" / "link")
    opened(one="a", two="c")
