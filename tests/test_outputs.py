"""Files that commands write: whole or not at all, into pipes and through links, by one writer at a time; and paths."""

import fcntl
import os
import pathlib
import socket
import stat
import threading

import pytest

from twotower_jax.atomic import new_folder
from twotower_jax.jsonl import read_rows, row_writer
from twotower_jax.outputs import check_apart, output_file, output_folder, write_file
from twotower_jax.paths import local_path
from twotower_jax.texts import check_text


def write(path, *rows: dict) -> None:
    with row_writer(path) as put:
        for row in rows:
            put(row)


def test_a_new_file_appears_whole(tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text("before\n")
    with output_file(target) as file:
        file.write("half")
        file.flush()
        assert target.read_text() == "before\n"
    assert target.read_text() == "half" and os.listdir(tmp_path) == ["out.jsonl"]


def test_what_fails_leaves_what_was_there(tmp_path):
    target = tmp_path / "out.jsonl"
    write(target, {"n": 1})
    with pytest.raises(KeyboardInterrupt), row_writer(target) as put:
        put({"n": 2})
        raise KeyboardInterrupt
    assert read_rows(target) == [{"n": 1}] and os.listdir(tmp_path) == ["out.jsonl"]


def test_what_is_no_file_is_written_into(tmp_path):
    write("/dev/null", {"n": 1})
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    write(pipe, {"n": 1})
    reader.join()
    assert got == ['{"n": 1}\n'] and stat.S_ISFIFO(pipe.stat().st_mode)
    read, written = os.pipe()
    write(f"/dev/fd/{written}", {"n": 2})
    assert os.read(read, 99) == b'{"n": 2}\n'
    os.close(read)
    os.close(written)


@pytest.mark.parametrize("there", [True, False])
def test_links_are_written_through(tmp_path, there):
    (tmp_path / "a").mkdir()
    target, link, second = tmp_path / "a" / "real.jsonl", tmp_path / "link.jsonl", tmp_path / "second.jsonl"
    if there:
        target.write_text("before")
    link.symlink_to("a/real.jsonl")
    second.symlink_to("link.jsonl")
    write(second, {"n": 1})
    assert second.is_symlink() and link.is_symlink() and not target.is_symlink()
    assert read_rows(target) == [{"n": 1}] and os.listdir(tmp_path / "a") == ["real.jsonl"]


@pytest.mark.parametrize("content", ["naïve\r\n", b"\x00\xff"])
def test_a_whole_file_is_written_through_a_link(tmp_path, content):
    (tmp_path / "link").symlink_to("target")
    write_file(tmp_path / "link", content)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert sorted(os.listdir(tmp_path)) == ["link", "target"]


def test_what_cannot_be_written_is_said_first(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))
        for path, message in (
            (tmp_path, "is a folder"),
            (tmp_path / "no" / "out", "its folder does not exist"),
            (tmp_path / "socket", "is a socket"),
        ):
            with pytest.raises(ValueError, match=message), output_file(path):
                pytest.fail("it began")


@pytest.mark.parametrize("write", [output_file, new_folder])
def test_an_interruption_at_the_very_beginning_leaves_nothing(tmp_path, monkeypatch, write):
    def interrupted(*_):
        assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
        raise KeyboardInterrupt

    monkeypatch.setattr(fcntl, "flock", interrupted)
    with pytest.raises(KeyboardInterrupt), write(tmp_path / "out"):
        pytest.fail("it began")
    assert not list(tmp_path.iterdir())


def test_one_writer_at_a_time(tmp_path):
    target = tmp_path / "out"
    with output_file(target) as file:
        (tmp_path / "link").symlink_to("out")
        for name in ("out", "link"):
            with pytest.raises(ValueError, match="is being written already"), output_file(tmp_path / name):
                pytest.fail("it began")
        file.write("first")
    assert target.read_text() == "first"


def test_a_folder_for_results_goes_again_where_nothing_came_into_it(tmp_path):
    with pytest.raises(KeyboardInterrupt), output_folder(tmp_path / "a" / "b") as folder:
        assert folder.is_dir()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt), output_folder(tmp_path / "a" / "b") as folder:
        (folder / "result").touch()
        raise KeyboardInterrupt
    assert (tmp_path / "a" / "b" / "result").exists()
    with pytest.raises(ValueError, match="stays"), output_folder(tmp_path / "a"):
        raise ValueError("a folder that was there stays")
    assert (tmp_path / "a").is_dir()
    for path in ("a/b/result", "a/b/result/c"):
        with pytest.raises(ValueError, match="a/b/result is a file, not a folder"), output_folder(tmp_path / path):
            pytest.fail("it began")


def test_outputs_of_a_command_are_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("there").touch()
    pathlib.Path("link").symlink_to("there")
    os.link("there", "hard")
    check_apart({"--output": "a", "--trace": "b", "--json": None})
    check_apart({"--output": "/dev/null", "--trace": "/dev/null"})
    check_apart({"--output": "new"}, {"--input": "there", "--prompts": None, "--sha256": "nowhere"})
    for path in ("there", "link", "hard"):
        with pytest.raises(ValueError, match=f"--input and --output are both {path}"):
            check_apart({"--output": path}, {"--input": "there"})
    os.mkfifo("pipe")
    check_apart({"--output": "pipe"}, {"--input": "pipe"})
    for first, second in (("a", "./a"), ("there", "link"), ("there", "hard"), ("a", str(tmp_path / "x" / ".." / "a"))):
        with pytest.raises(ValueError, match="--output and --trace are both"):
            check_apart({"--output": first, "--trace": second})


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "rows").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    assert read_rows(tmp_path / "rows") == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("text", "said"),
    [("ok\ud800", "half a pair, U\\+D800"), (b"a\xff".decode("utf-8", "surrogateescape"), "character 2 .byte 0xff")],
)
def test_what_is_no_text_is_named(text, said):
    assert check_text("naïve 東京 🙂", "--prompt") == "naïve 東京 🙂"
    with pytest.raises(ValueError, match=f"--prompt: is no text at .*{said}"):
        check_text(text, "--prompt")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("", ""),
        ("runs/x", "runs/x"),
        ("nvidia/Nemotron", "nvidia/Nemotron"),
        ("./~x", "./~x"),
        ("a~", "a~"),
        ("~", "/home/me"),
        ("~/x y", "/home/me/x y"),
        ("file:///tmp/a%20b", "/tmp/a b"),
        ("file://localhost/tmp", "/tmp"),
        ("file://~/x", "/home/me/x"),
        ("file://./x", "./x"),
        ("/a/b%20c", "/a/b%20c"),
    ],
)
def test_paths_as_people_write_them(monkeypatch, text, path):
    monkeypatch.setenv("HOME", "/home/me")
    assert local_path(text) == path


def test_paths_of_nobody_and_of_elsewhere_are_refused():
    with pytest.raises(ValueError, match="no such home folder"):
        local_path("~nobody-of-this-name/x")
    with pytest.raises(ValueError, match="is on another machine, server"):
        local_path("file://server/x")
