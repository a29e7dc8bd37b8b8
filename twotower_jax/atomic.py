"""A folder that appears whole or not at all, whatever happens to the process that writes it."""

import contextlib
import fcntl
import os
import pathlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from twotower_jax.outputs import check_writable
from twotower_jax.paths import in_store

if TYPE_CHECKING:
    from twotower_jax.stores.path import StorePath

WRITING = ".writing"

_ELSEWHERE = "choose a folder on another one, such as a local disk, and copy the result"


@contextlib.contextmanager
def new_folder(final: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder beside `final`, which takes its name at the end, all of it on the disk by then.

    An exception removes the temporary folder. A killed process leaves it under its own name, `.NAME.partial`, and the
    next attempt removes it; a lock keeps two attempts apart.

    In a store it has its own name from the first object on, and beside them `WRITING`, a lease, until all are there; a
    writer that comes after one that was killed removes what that has left.

    Raises:
      ValueError: if `final` exists or another process is writing it.
      OSError: if it cannot be written.
    """
    if in_store(final):
        with _new_prefix(final):
            yield final
        return
    final = pathlib.Path(os.path.abspath(final))
    if os.path.lexists(final):
        raise ValueError(f"{final}: exists already; choose another output or remove it")
    if not final.parent.is_dir():
        raise ValueError(f"{final.parent}: no such folder to write {final.name} in")
    partial = final.parent / f".{final.name}.partial"
    left_behind = partial.exists()
    try:
        partial.mkdir(exist_ok=True)
        with locked_folder(partial, f"{final}: another process is writing it", ours=True):
            try:
                _clear(partial)
                yield partial
                sync_tree(partial)
                if os.path.lexists(final):
                    raise ValueError(f"{final}: came into being meanwhile")
                partial.rename(final)
                sync_path(final.parent)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except KeyboardInterrupt:
        # It may have come before the folder was locked.
        if not left_behind:
            shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def _new_prefix(final: "StorePath") -> Iterator[None]:
    from twotower_jax.stores.lease import held

    check_writable(final)
    mark = final / WRITING
    if final.is_file() or final.is_dir() and not mark.exists():
        raise ValueError(f"{final}: exists already; choose another output or remove it")
    with held(mark, f"{final}: another process is writing it") as lease:
        _clear_prefix(final)
        try:
            yield
            lease.check()
        except BaseException:
            with contextlib.suppress(OSError):
                if not lease.lost:
                    _clear_prefix(final)
            raise


def _clear_prefix(final: "StorePath") -> None:
    for name in final.sizes():
        if name != WRITING:
            (final / name).unlink(missing_ok=True)


@contextlib.contextmanager
def locked_folder(folder: pathlib.Path, busy: str, *, ours: bool = False) -> Iterator[None]:
    """Keeps every other process that asks for the same folder out, for as long as this one lives.

    Sees first that the file system can do what writing there needs, so that no work is lost for want of it. With `ours`
    a folder that it cannot do that in is removed if it is empty.

    Raises:
      ValueError: saying `busy` if another process has it; naming the folder if its file system has no locks, or cannot
        promise that a folder's entries are on the disk.
      OSError: if the folder is not there.
    """
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(busy) from None
        except OSError as error:
            reason = f"its file system cannot lock a folder (flock: {error.strerror})"
            _remove_empty(folder, ours)
            raise ValueError(f"{folder}: {reason}; {_ELSEWHERE}") from None
        try:
            os.fsync(lock)
        except OSError as error:
            reason = f"its file system cannot bring a folder to the disk (fsync: {error.strerror})"
            _remove_empty(folder, ours)
            raise ValueError(f"{folder}: {reason}; {_ELSEWHERE}") from None
        yield
    finally:
        os.close(lock)


def _remove_empty(folder: pathlib.Path, ours: bool) -> None:
    if ours:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _clear(folder: pathlib.Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def sync_tree(folder: pathlib.Path) -> None:
    """Waits until every file and folder below is on the disk."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(sync_path, (entry for entry in folder.rglob("*"))))
    sync_path(folder)


def sync_path(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
