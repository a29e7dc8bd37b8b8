"""Copies of objects on this machine's disk, for readers that need a file, never more than a limit of bytes in all.

A copy belongs to one content of its object, so that a later one is another copy. Copies that no process uses go first
when there is no room, the longest unused before the others.
"""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from twotower_jax.compilation_cache import default_folder
from twotower_jax.files import CheckpointError
from twotower_jax.stores.path import StorePath

# Says the limit, in GB, to this process and those that it starts; the flag --cache_gb sets it.
VARIABLE = "TWOTOWER_CACHE_GB"
DEFAULT_GB = 16.0
_THREADS = 8
_PIECE = 64 << 20

_in_use: dict[pathlib.Path, int] = {}


def folder() -> pathlib.Path:
    """Where the copies are: `twotower_jax/stores` in the user's cache folder."""
    return default_folder().parent / "stores"


def limit() -> int:
    """In bytes."""
    return int(float(os.environ.get(VARIABLE) or DEFAULT_GB) * 1e9)


def local(path: StorePath, sha256: str | None = None) -> pathlib.Path:
    """A copy of an object, which stays for as long as this process lives.

    Raises:
      FileNotFoundError, StoreError: if it cannot be read.
      CheckpointError: if its content has another hash than it should.
      ValueError: if it does not fit into the limit.
    """
    found = path.info()
    key = hashlib.sha256(f"{path} {found.version} {found.size} {sha256}".encode()).hexdigest()
    return _held(key, {path.name: found.size}, lambda name: path, {path.name: sha256}) / path.name


def local_folder(path: StorePath, files: Mapping[str, tuple[int, str]]) -> pathlib.Path:
    """A folder with copies of objects below a path: bytes and SHA-256 of each, by name. Errors as `local`."""
    key = hashlib.sha256(f"{path} {sorted(files.items())}".encode()).hexdigest()
    sizes = {name: size for name, (size, _) in files.items()}
    return _held(key, sizes, lambda name: path / name, {name: sha256 for name, (_, sha256) in files.items()})


def check_room(what: str, needed: int) -> None:
    """Refuses what could not be copied whole, whatever else is there.

    Raises:
      ValueError: with both numbers.
    """
    if needed > limit():
        raise ValueError(
            f"{what}: needs {needed / 1e9:.3g} GB of this machine's disk for copies, --cache_gb={limit() / 1e9:.3g} is "
            "the limit; allow more, or copy it to this machine"
        )


def _held(
    key: str, sizes: Mapping[str, int], place: Callable[[str], StorePath], hashes: Mapping[str, str | None]
) -> pathlib.Path:
    top = folder()
    final = top / key[:32]
    if final in _in_use:
        return final
    top.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(top / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # while room is made and taken, and not while bytes come
        if _hold(final):
            os.utime(final)
            return final
        partial = top / f"{key[:32]}.{uuid.uuid4().hex[:8]}"
        _make_room(top, sum(sizes.values()), str(place(next(iter(sizes)))))
        partial.mkdir()
        _hold(partial)
        for name, size in sizes.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            with (partial / name).open("wb") as file:
                file.truncate(size)
    try:
        with ThreadPoolExecutor(_THREADS) as threads:
            work = [threads.submit(_fetch, place(name), partial / name, size, hashes[name])
                    for name, size in sizes.items()]  # fmt: skip
            for each in work:
                each.result()
        try:
            partial.rename(final)
        except OSError:  # another process was faster
            shutil.rmtree(partial, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _hold(final)
    return final


def _fetch(source: StorePath, target: pathlib.Path, size: int, sha256: str | None) -> None:
    digest = hashlib.sha256()
    with target.open("r+b", buffering=0) as file:
        for start in range(0, size, _PIECE):
            piece = source.read(start, min(start + _PIECE, size))
            digest.update(piece)
            file.write(piece)
    if sha256 is not None and digest.hexdigest() != sha256:
        raise CheckpointError(
            f"{source}: its content is not what was recorded (SHA-256 {digest.hexdigest()}, recorded {sha256})"
        )


def _hold(entry: pathlib.Path) -> bool:
    """Keeps an entry from being removed for as long as this process lives; whether it is there."""
    try:
        descriptor = os.open(entry, os.O_RDONLY)
    except FileNotFoundError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    _in_use[entry] = descriptor
    return True


def _make_room(top: pathlib.Path, needed: int, what: str) -> None:
    """Removes what nobody uses until there is room.

    Raises:
      ValueError: if there cannot be.
    """
    entries = [entry for entry in top.iterdir() if entry.is_dir()]
    sizes = {entry: sum(f.stat().st_size for f in entry.rglob("*") if f.is_file()) for entry in entries}
    total = sum(sizes.values())
    for entry in sorted(entries, key=lambda entry: entry.stat().st_mtime):
        if total + needed <= limit():
            break
        descriptor = os.open(entry, os.O_RDONLY)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(entry, ignore_errors=True)
            total -= sizes[entry]
        os.close(descriptor)
    if total + needed > limit():
        raise ValueError(
            f"{what}: needs {needed / 1e9:.3g} GB of this machine's disk for a copy, --cache_gb={limit() / 1e9:.3g} "
            f"leaves {max(0, limit() - total) / 1e9:.3g} in {top}; allow more, or copy it to this machine"
        )
