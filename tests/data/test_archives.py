"""Archives of texts: the same documents as the files in them give, and a word on what cannot be read."""

import gzip
import io
import json
import tarfile

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from twotower_jax.data import read_documents, train_tokenizer
from twotower_jax.data.archives import BrokenArchive, members
from twotower_jax.data.inputs import divide, find_files, holds_conversations, read_rows
from twotower_jax.data.opening import Data
from twotower_jax.data.prepare import Settings, prepare


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def table(*texts):
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), buffer, row_group_size=2)
    return buffer.getvalue()


def tar(files, **options):
    """An archive of files by name, or of `TarInfo` with None."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for name, content in files:
            info = name if content is None else tarfile.TarInfo(name)
            info.size = 0 if content is None else len(content)
            archive.addfile(info, io.BytesIO(content or b""))
    return buffer.getvalue()


def entry(name, kind, linkname=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, linkname
    return info, None


LONG = "d/" * 90 + "zwölf.txt"
FILES = [
    entry("a", tarfile.DIRTYPE),
    ("a/1.txt", b"\xef\xbb\xbfone\r\ntwo"),
    ("./a/2.jsonl", lines("three", "four")),
    ("a/3.json", json.dumps([{"text": "five"}]).encode()),
    ("a/4.parquet", table("six", "seven", "eight")),
    ("a/5.jsonl.gz", gzip.compress(lines("nine"))),
    ("a/6.TXT.zst", zstandard.compress(b"ten")),
    (LONG, b"eleven"),
    ("a/picture.jpg", b"\xff\xd8"),
    ("a/meta.json", b'{"width": 3}'),
    ("a/._1.txt", b"\0\1"),
    (".git/x.txt", b"no"),
    ("a/inner.tar", b""),
]
TEXTS = ["one\ntwo", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]
LEFT_OUT = ["a/picture.jpg", "a/meta.json", "a/._1.txt", ".git/x.txt", "a/inner.tar"]
PACKED = {".tar": bytes, ".tar.gz": gzip.compress, ".tgz": gzip.compress, ".TAR.zst": zstandard.compress}


def rows_of(path, field="text"):
    pieces = [piece for part in divide(find_files([str(path)]), 1 << 20) for piece in part]
    return [row for piece in pieces for row in read_rows(piece, field)]


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_an_archive_holds_what_its_files_do(tmp_path, ending, format):
    file = tmp_path / f"a{ending}"
    file.write_bytes(PACKED[ending](tar(FILES, format=format)))
    found = rows_of(file)
    assert [row.text for row in found if row.text] == TEXTS and not any(row.problem for row in found)
    assert [row.left_out for row in found if row.left_out] == [f"{file}, member {name}" for name in LEFT_OUT]
    assert all(0 <= row.done <= 1 for row in found)


def test_runs_and_prepare_read_archives_and_say_what_they_leave_out(tmp_path, capsys):
    """What is broken ends the one, and is counted by the other."""
    file = tmp_path / "in" / "a.tar.gz"
    file.parent.mkdir()
    file.write_bytes(gzip.compress(tar(FILES)))
    (tmp_path / "in" / "b.txt").write_text("last")
    said = f"left out of archives, as no text: 5 ({', '.join(f'{file}, member {name}' for name in LEFT_OUT[:3])}, …)"
    assert read_documents(tmp_path / "in") == [*TEXTS, "last"]
    told = []
    Data(str(tmp_path / "in"), told.append)
    assert told == [said]
    (tmp_path / "in" / "c.tar").write_bytes(tar([entry("link.txt", tarfile.SYMTYPE, "a.txt"), ("x.txt", b"x")]))
    with pytest.raises(ValueError, match="c.tar, member link.txt: is a link to 'a.txt'"):
        read_documents(tmp_path / "in")
    settings = Settings(skip_bad=True)
    manifest = prepare([str(tmp_path / "in")], tmp_path / "out", train_tokenizer(TEXTS, 300), settings, quiet=True)
    assert manifest.total("train", "documents") == len(TEXTS) + 2 and manifest.skipped == 1
    skipped, left = capsys.readouterr().err.splitlines()
    assert left == said and skipped.startswith(f"skipped 1 broken rows or files: {tmp_path}/in/c.tar, member link.txt")


def test_conversations_in_an_archive(tmp_path):
    talk = {"prompt": "a", "response": "b"}
    (tmp_path / "a.tar").write_bytes(tar([("x.jpg", b"x"), ("a.jsonl", json.dumps(talk).encode()), ("b.txt", b"b")]))
    assert holds_conversations(find_files([str(tmp_path / "a.tar")]))
    picture, one, other = rows_of(tmp_path / "a.tar", lambda row: row["prompt"])
    assert picture.left_out and one.text == "a" and "b.txt: conversations are rows of JSON" in other.problem


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (entry("b.txt", tarfile.SYMTYPE, "a.txt"), "member b.txt: is a link to 'a.txt'; archive what it leads to"),
        (entry("b.txt", tarfile.LNKTYPE, "a.txt"), "member b.txt: is a link to 'a.txt'"),
        (entry("b.txt", tarfile.FIFOTYPE), "member b.txt: is no regular file"),
        (entry("b.txt", tarfile.BLKTYPE), "member b.txt: is no regular file"),
        (("/etc/b.txt", b"b"), "member /etc/b.txt: has an absolute path"),
        (("x/../../b.txt", b"b"), r"member x/\.\./\.\./b.txt: has a path that leads out of its folder"),
        (("caf\udce9.txt", b"b"), r"member caf\\udce9.txt: has a name that is not UTF-8"),
        (("b\n.txt", b" "), r"member b\\n.txt: the file holds no text"),
        (("b.txt", b"\xff"), "member b.txt: not UTF-8 text"),
        (("b.jsonl", b"{"), "member b.jsonl, line 1: not a JSON object"),
        (("b.txt.gz", gzip.compress(b"b", mtime=0)[:-1]), "member b.txt.gz: not a whole gzip file"),
        (("b.jsonl.zst", b"b"), "member b.jsonl.zst, line 1: the zstd file is cut off or broken here"),
        (("b.parquet", b"PAR1"), "member b.parquet, row 1: the Parquet file is broken here"),
    ],
)
def test_odd_members_are_named(tmp_path, member, message):
    file = tmp_path / "in.tar"
    file.write_bytes(tar([("a.txt", b"a"), member, ("c.txt", b"c")], format=tarfile.GNU_FORMAT))
    first, broken, last = rows_of(file)
    assert (first.text, broken.text, last.text) == ("a", None, "c")
    with pytest.raises(ValueError, match=f"in.tar, {message}"):
        read_documents(file)


SMALL = tar([("a.txt", b"a" * 600), ("b.jsonl", lines("b", "c")), ("d.txt", b"d")])


@given(st.integers(0, len(SMALL) - 1), st.sampled_from(sorted(PACKED)))
def test_an_archive_cut_off_anywhere_is_noticed(tmp_path_factory, size, ending):
    """The texts before are read; the two blocks of zeros that end an archive are not asked for beyond the first."""
    file = tmp_path_factory.mktemp("cut") / f"a{ending}"
    whole = PACKED[ending](SMALL)
    file.write_bytes(whole[: size * len(whole) // len(SMALL)])
    found = rows_of(file)
    texts, problems = [row.text for row in found if row.text], [row.problem for row in found if row.problem]
    assert texts == ["a" * 600, "b", "c", "d"][: len(texts)]
    end = 6 * 512 + 512 if ending == ".tar" else len(whole) + 1
    assert len(problems) == (file.stat().st_size < end), problems
    assert all("the tar archive is cut off or broken" in problem for problem in problems)


@given(st.data())
def test_broken_headers_are_nothing_but_problems(data):
    """Whatever stands in an archive, members come or `BrokenArchive`."""
    content = bytearray(tar([("a.txt", b"a"), (LONG, b"b" * 600), ("c.txt", b"c")], format=tarfile.PAX_FORMAT))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    header = content[:512]  # whose sum may be right all the same
    header[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(header)
    try:
        for member in members(io.BytesIO(content)):
            if member.content is not None:
                member.content.read()
    except BrokenArchive:
        pass


def test_a_header_that_would_fill_the_memory_is_refused():
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    with pytest.raises(BrokenArchive, match="a header of 1099511627776 bytes"):
        list(members(io.BytesIO(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))))
    nested = tarfile.TarInfo("x")
    nested.type, nested.size = tarfile.GNUTYPE_LONGNAME, 2
    with pytest.raises(BrokenArchive):
        list(members(io.BytesIO((nested.tobuf(tarfile.GNU_FORMAT) + b"a\0" + bytes(510)) * 3000)))
