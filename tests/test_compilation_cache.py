"""Compiled programs that the next start of a command finds, and starts that must do without."""

import os
import pathlib
import subprocess
import sys

import filelock
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from twotower_jax import compilation_cache

_COMMAND = """
import jax
from absl import flags
from twotower_jax import command_line

flags.DEFINE_bool("measure", False, "Measure compiling.")
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)


def main():
    result = float(jax.jit(lambda x: (x @ x).sum())(jax.numpy.arange(9.0).reshape(3, 3)))
    print(result, len(hits) > 0)


command_line.run(main, cache={cache})
"""


@pytest.fixture
def settings(monkeypatch):
    """JAX without a cache; afterwards again with what it had."""
    names = (
        "jax_compilation_cache_dir",
        "jax_enable_compilation_cache",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: jax.config.values[name] for name in names}
    for name in names:
        monkeypatch.delenv(name.upper(), raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def start(home: pathlib.Path, *flags: str, cache: bool = True, **environment: str) -> subprocess.Popen:
    """Starts a command that compiles one program and says its result and whether it was found compiled."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    settings = {"XDG_CACHE_HOME": str(home), "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", _COMMAND.replace("{cache}", str(cache)), *flags],
        env=inherited | settings | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen) -> str:
    """What a command printed, which has to end well and without a warning."""
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    return out.strip()


def entries(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*-cache"))


@pytest.mark.whole
def test_a_second_start_finds_what_a_first_compiled(tmp_path):
    """The first two at the same time; a fourth start meets damaged files, and compiles."""
    folder = tmp_path / "twotower_jax" / "compiled"
    outputs = [ended(process) for process in [start(tmp_path), start(tmp_path)]]
    assert {out.split()[0] for out in outputs} == {"486.0"}
    assert entries(folder)
    assert folder.stat().st_mode & 0o077 == 0
    assert ended(start(tmp_path)) == "486.0 True"
    for entry in entries(folder):
        entry.write_bytes(entry.read_bytes()[:-20])
    assert ended(start(tmp_path)) == "486.0 False"


@pytest.mark.whole
def test_starts_without_the_default_folder(tmp_path):
    """Switched off, measuring, or with a folder of the user's, by flag or as JAX's own; those are used."""
    processes = [
        start(tmp_path / "0", "--compilation_cache=off"),
        start(tmp_path / "1", cache=False),
        start(tmp_path / "2", f"--compilation_cache={tmp_path}/flag"),
        start(tmp_path / "3", JAX_COMPILATION_CACHE_DIR=f"{tmp_path}/environment"),
        start(tmp_path / "4", "--compilation_cache=off", JAX_COMPILATION_CACHE_DIR=f"{tmp_path}/unused"),
    ]
    assert [ended(process) for process in processes] == ["486.0 False"] * 5
    assert entries(tmp_path / "flag") and entries(tmp_path / "environment")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["environment", "flag"]


def test_the_folder_is_bounded(tmp_path):
    """By what the environment says here: less than the program takes."""
    folder = tmp_path / "twotower_jax" / "compiled"
    assert ended(start(tmp_path)) == "486.0 False"
    sizes = [entry.stat().st_size for entry in entries(folder)]
    limit = sum(sizes) - 1
    other = tmp_path / "other"
    assert ended(start(other, JAX_COMPILATION_CACHE_MAX_SIZE=str(limit))) == "486.0 False"
    kept = [entry.stat().st_size for entry in entries(other / "twotower_jax" / "compiled")]
    assert sum(kept) <= limit and len(kept) < len(sizes)


def test_a_folder_that_cannot_be_written(tmp_path):
    """A chosen one is refused in one line; without a default one a command runs silently."""
    (tmp_path / "file").write_text("")
    assert ended(start(tmp_path / "file")) == "486.0 False"
    refused = start(tmp_path, f"--compilation_cache={tmp_path}/file/folder")
    out, err = refused.communicate(timeout=120)
    assert (refused.returncode, out) == (2, "")
    assert err == f"error: --compilation_cache={tmp_path}/file/folder: Not a directory\n"


def test_a_default_folder_that_others_can_write_is_not_used(tmp_path, monkeypatch, settings):
    """What it holds would be executed. One named by the user is the user's business."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = compilation_cache.default_folder()
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert compilation_cache.enable(None) is None
    assert jax.config.jax_compilation_cache_dir is None
    assert compilation_cache.enable(str(folder)) == folder
    jax.config.update("jax_compilation_cache_dir", None)
    folder.chmod(0o700)
    assert compilation_cache.enable(None) == folder
    assert jax.config.jax_compilation_cache_max_size == 2**30


def test_home_is_understood_in_what_jax_itself_reads(tmp_path, monkeypatch, settings):
    monkeypatch.setenv("HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "~/compiled")
    assert compilation_cache.enable(None) is None
    assert jax.config.jax_compilation_cache_dir == f"{tmp_path}/compiled"


def test_entries_without_a_time_of_use_are_cleared_away(tmp_path, settings):
    """Their writer died; but not while another process holds the lock, which may be writing one."""
    for name in ("whole-cache", "whole-atime", "half-cache", "other"):
        (tmp_path / name).write_bytes(b"1")
    with filelock.FileLock(tmp_path / ".lockfile"):
        compilation_cache.enable(str(tmp_path))
        assert (tmp_path / "half-cache").exists()
    compilation_cache.enable(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lockfile") == [
        "other",
        "whole-atime",
        "whole-cache",
    ]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"XDG_CACHE_HOME": "/somewhere", "HOME": "/home/me"}, "/somewhere/twotower_jax/compiled"),
        ({"XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/twotower_jax/compiled"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/home/me"}, "/home/me/.cache/twotower_jax/compiled"),
    ],
)
def test_default_folder(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert compilation_cache.default_folder() == pathlib.Path(expected)
