"""Files that commands write results to: a new file appears whole or not at all; what is no file is written into."""

import contextlib
import errno
import fcntl
import io
import os
import pathlib
import stat
import uuid
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, TextIO

from twotower_jax.paths import AnyPath, as_path, in_store

if TYPE_CHECKING:
    from twotower_jax.stores.path import StorePath

# Names of what the process has open, which may be a file that others write to as well.
_OPEN_FILES = ("/dev/stdin", "/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/")


@contextlib.contextmanager
def output_file(path: str | pathlib.Path) -> Iterator[TextIO]:
    """A file to write UTF-8 text to.

    A regular file, new or to be replaced, gets its name when all is written; through a link, the file it leads to. A
    device or pipe is written into as it is. In a store, the object is written when all is there.

    Raises:
      ValueError: naming the path, before anything is written: it is a folder or a socket, its folder does not exist, or
        it is being written already, by another process or this one.
      OSError: if it cannot be written.
    """
    path = as_path(path)
    if in_store(path):
        check_writable(path.parent)
        buffer = io.BytesIO()
        with io.TextIOWrapper(buffer, encoding="utf-8", write_through=True) as file:
            yield file
            path.write(buffer.getvalue())
        return
    with _naming(path):
        yield from _output_file(path)


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Gives the errors that a write has, and that say nothing of where, the path."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _output_file(path: pathlib.Path) -> Iterator[TextIO]:
    if not _is_regular(path):
        with path.open("w", encoding="utf-8") as file:
            yield file
        return
    target = pathlib.Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise ValueError(f"{path}: its folder does not exist")
    partial = target.with_name(f".{target.name}.partial")
    left_behind = partial.exists()
    try:
        with _locked(partial, path) as file:
            try:
                file.truncate()
                yield file
                file.flush()
                os.fsync(file.fileno())
                partial.replace(target)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
    except KeyboardInterrupt:
        # It may have come before the file was locked.
        if not left_behind:
            partial.unlink(missing_ok=True)
        raise


def write_file(path: str | pathlib.Path, content: str | bytes) -> None:
    """Writes a whole file; as `output_file`, with its errors."""
    with output_file(path) as file:
        file.buffer.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def output_folder(path: str | pathlib.Path, *continued: str) -> Iterator[pathlib.Path]:
    """A folder for results, made with those above it where it is not there. If the work fails or is interrupted before
    anything is in it, what was made is removed.

    Of a folder in a store it is one of this machine, from which the files go there every few seconds and at the end.

    Args:
      continued: names of files that the work goes on with where they are there.

    Raises:
      ValueError: naming the path, if something else has its name or it cannot be written in.
      OSError: if it cannot be made.
    """
    path = as_path(path)
    if in_store(path):
        check_writable(path)
        from twotower_jax.stores.spool import Spool

        spool = Spool(path)
        with spool.running(*continued):
            yield spool.folder
        return
    for parent in (path, *path.parents):
        if parent.exists() and not parent.is_dir():
            raise ValueError(f"{path}: {parent} is a file, not a folder")
    made = [parent for parent in (path, *path.parents) if not parent.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise ValueError(f"{path}: this folder cannot be written in")
        yield path
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


def check_writable(folder: "StorePath") -> None:
    """Sees whether objects can be written below a path of a store; leaves nothing there.

    Raises:
      ValueError: if such a store is only read.
      StoreError: if it refuses, in one line.
    """
    refuse_read_only(folder)
    folder.check()
    probe = folder / f".probe-{uuid.uuid4().hex}"
    probe.create(b"")
    probe.unlink(missing_ok=True)


def refuse_read_only(path: AnyPath) -> None:
    """Raises ValueError for an address of a store that is only read; asks nobody."""
    if in_store(path) and not path.writable:
        raise ValueError(f"{path}: such addresses are only read; write to a folder of this machine, gs:// or s3://")


def check_apart(paths: Mapping[str, str | None], inputs: Mapping[str, str | None] = {}) -> None:  # noqa: B006
    """Refuses two outputs of a command that are one file, and an output that would replace what is read.

    Args:
      paths: by flag; None where it is not given. inputs: likewise; terminals and pipes are read and written at once.

    Raises:
      ValueError: naming both flags. The null device may stand for several.
    """
    seen = {flag: os.path.realpath(path) for flag, path in inputs.items() if path is not None and os.path.isfile(path)}
    for flag, path in paths.items():
        real = None if path is None else os.path.realpath(path)
        if real in (None, os.devnull):
            continue
        for other, before in seen.items():
            if real == before or os.path.exists(real) and os.path.exists(before) and os.path.samefile(real, before):
                raise ValueError(f"{other} and {flag} are both {path}; give each a file of its own")
        seen[flag] = real


def _is_regular(path: pathlib.Path) -> bool:
    """Whether `path` is to be a regular file; what cannot be written at all is refused."""
    if os.path.abspath(path).startswith(_OPEN_FILES):
        return False
    try:
        mode = path.stat().st_mode  # of what a link leads to
    except FileNotFoundError:
        return True
    if stat.S_ISDIR(mode):
        raise ValueError(f"{path}: is a folder")
    if stat.S_ISSOCK(mode):
        raise ValueError(f"{path}: is a socket, which cannot be opened; a pipe (mkfifo) can")
    return stat.S_ISREG(mode)


@contextlib.contextmanager
def _locked(partial: pathlib.Path, path: pathlib.Path) -> Iterator[TextIO]:
    """The temporary file, which nobody else writes meanwhile where the file system has locks."""
    while True:
        with open(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "w", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{path}: is being written already; give another output") from None
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
            # Whoever had it before may have given it its final name, or removed it.
            try:
                ours = os.path.samestat(os.fstat(file.fileno()), partial.stat())
            except FileNotFoundError:
                continue
            if ours:
                yield file
                return
