"""A path in a store, with what this program uses of pathlib's interface.

It is no `os.PathLike`: what can only do with a file of this machine fails at once, and asks `cache.local` for one.
A folder is there where an object is below it. What is read is as long as the store says, or an error.
"""

import fnmatch
import functools
import hashlib
import io
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from twotower_jax.stores import clients
from twotower_jax.stores.clients import ABSENT, Client, Info
from twotower_jax.stores.retrying import Changed, Short, StoreError, retried

SCHEMES = tuple(f"{scheme}://" for scheme in clients.KINDS)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,221}")
_REPOSITORY = re.compile(r"((?:(?:datasets|spaces|models)/)?[\w.-]+/[\w.-]+(?:@[^/]+)?)(?:/(.*))?", re.DOTALL)
# A file is read in blocks, as many ahead as fit in a window.
_BLOCK_BYTES = 4 << 20
_AHEAD = 4
_THREADS = 16


@functools.cache
def pool() -> ThreadPoolExecutor:
    """Threads that wait for stores."""
    return ThreadPoolExecutor(_THREADS, "store")


class Stat(NamedTuple):
    """What `os.stat_result` says of a file, as far as a store knows it; in place of a time a number of the version."""

    st_size: int
    st_mtime_ns: int


@functools.total_ordering
class StorePath:
    """An address such as gs://bucket/a/b, whole or of a prefix; compares and hashes by its text."""

    def __init__(self, text: str):
        """Takes an address apart; asks the store nothing.

        Raises:
          ValueError: if it is none, or no object could have that name.
        """
        self._scheme, separator, rest = text.partition("://")
        if self._scheme not in clients.KINDS or not separator:
            raise ValueError(f"{text}: is no address of a store; those begin with {', '.join(SCHEMES)}")
        if self._scheme == "hf":
            found = _REPOSITORY.fullmatch(rest.rstrip("/"))
            if found is None:
                raise ValueError(
                    f"{text}: is not hf://ORGANIZATION/NAME, with @REVISION and a path after it if need be"
                )
            self._bucket, key = found[1], found[2] or ""
        else:
            self._bucket, _, key = rest.partition("/")
            if not _BUCKET.fullmatch(self._bucket):
                raise ValueError(f"{text}: {self._bucket!r} is no name that a bucket can have")
        self._key = key.rstrip("/")
        parts = self._key.split("/") if self._key else []
        if any(part in ("", ".", "..") for part in parts) or re.search(r"[\x00-\x1f\x7f]", self._key):
            raise ValueError(f"{text!r}: holds an empty name, a dot in place of one, or a control character")
        try:
            if len(self._key.encode()) > 1024:
                raise ValueError(f"{text[:80]}…: is longer than a store's names may be (1,024 bytes)")
        except UnicodeEncodeError:
            raise ValueError(f"{text!r}: is not UTF-8 text") from None

    # Names.

    def __str__(self) -> str:
        return f"{self._scheme}://{self._bucket}" + (f"/{self._key}" if self._key else "")

    def __repr__(self) -> str:
        return f"StorePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StorePath) and str(self) == str(other)

    def __lt__(self, other: "StorePath") -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: Any) -> "StorePath":
        return self._at(f"{self._key}/{name}" if self._key else str(name))

    def _at(self, key: str) -> "StorePath":
        return StorePath(f"{self._scheme}://{self._bucket}/{key}" if key else f"{self._scheme}://{self._bucket}")

    def joinpath(self, *names: Any) -> "StorePath":
        return functools.reduce(lambda path, name: path / name, names, self)

    @property
    def name(self) -> str:
        return self._key.rpartition("/")[2] or self._bucket.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        stem, dot, suffix = self.name.rpartition(".")
        return f".{suffix}" if dot and stem else ""

    @property
    def stem(self) -> str:
        return self.name.removesuffix(self.suffix)

    @property
    def parent(self) -> "StorePath":
        return self._at(self._key.rpartition("/")[0])

    @property
    def parents(self) -> list["StorePath"]:
        found, path = [], self
        while path._key:
            path = path.parent
            found.append(path)
        return found

    def with_name(self, name: str) -> "StorePath":
        return self.parent / name

    def with_suffix(self, suffix: str) -> "StorePath":
        return self.with_name(self.stem + suffix)

    def relative_to(self, other: "StorePath") -> str:
        """The names below another path, with slashes.

        Raises:
          ValueError: if it is not below that one.
        """
        if not str(self).startswith(f"{other}/"):
            raise ValueError(f"{self}: is not below {other}")
        return str(self).removeprefix(f"{other}/")

    def absolute(self) -> "StorePath":
        return self

    resolve = absolute

    def is_symlink(self) -> bool:
        return False

    # What is there.

    @property
    def writable(self) -> bool:
        """Whether anything can be written below it, as far as the kind of store goes."""
        return self._client.writable

    @property
    def _client(self) -> Client:
        return clients.client(self._scheme, self._bucket)

    def _ask[T](self, request: Any) -> T:
        try:
            return retried(str(self), request)
        except FileNotFoundError:
            raise FileNotFoundError(2, "No such object", str(self)) from None
        except StoreError as error:
            if str(error).startswith(str(self)):
                raise
            raise type(error)(f"{self}: {error}") from None

    def info(self) -> Info:
        """What the store says of the object.

        Raises:
          FileNotFoundError: if there is none.
          StoreError: if the store does not say.
        """
        if not self._key:
            raise FileNotFoundError(2, "No such object", str(self))
        return self._ask(lambda seconds, _: self._client.info(self._key, seconds))

    def stat(self) -> Stat:
        found = self.info()
        version = hashlib.blake2b(found.version.encode(), digest_size=7).digest()
        return Stat(found.size, int.from_bytes(version, "little"))

    def is_file(self) -> bool:
        try:
            self.info()
            return True
        except FileNotFoundError:
            return False

    def is_dir(self) -> bool:
        try:
            return any(self._listing(deep=self._scheme != "hf", limit=1))
        except FileNotFoundError:
            return False

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def check(self) -> None:
        """Sees whether the store answers, and has this bucket for whoever asks.

        Raises:
          StoreError: in one line, if not.
        """
        try:
            self._listing(deep=self._scheme != "hf", limit=1)
        except FileNotFoundError as error:
            if self._scheme == "hf" and self._key:
                return self._at("").check()
            what = "repository, revision or right to read it" if self._scheme == "hf" else "bucket"
            raise StoreError(f"{self._at('')}: there is no such {what}") from error

    def _listing(self, deep: bool, limit: int | None = None) -> clients.Listing:
        prefix = f"{self._key}/" if self._key else ""
        return self._ask(lambda seconds, _: self._client.list(prefix, deep, seconds, limit))

    def iterdir(self) -> Iterator["StorePath"]:
        """What lies directly below, objects and folders."""
        prefix = f"{self._key}/" if self._key else ""
        objects, prefixes = self._listing(deep=False)
        # Some tools write an empty object for a folder.
        names = {key for key, _ in objects if key != prefix} | {key.rstrip("/") for key in prefixes}
        for key in sorted(names):
            yield self._at(key)

    def sizes(self) -> dict[str, int]:
        """The bytes of every object below, by its name relative to this path."""
        prefix = f"{self._key}/" if self._key else ""
        objects, _ = self._listing(deep=True)
        return {key.removeprefix(prefix): size for key, size in objects if not key.endswith("/")}

    def rglob(self, pattern: str) -> Iterator["StorePath"]:
        """Every object below whose last name fits the pattern."""
        for name in sorted(self.sizes()):
            if fnmatch.fnmatchcase(name.rpartition("/")[2], pattern):
                yield self / name

    def glob(self, pattern: str) -> Iterator["StorePath"]:
        """What lies below and fits a pattern with * within names."""
        first, _, rest = pattern.partition("/")
        try:
            entries = list(self.iterdir()) if any(c in first for c in "*?[") else [self / first]
        except FileNotFoundError:
            return
        for entry in entries:
            if fnmatch.fnmatchcase(entry.name, first):
                if rest:
                    yield from entry.glob(rest)
                elif len(entries) > 1 or entry.exists():
                    yield entry

    # Reading.

    def read_bytes(self) -> bytes:
        """All of an object.

        Raises:
          FileNotFoundError, StoreError: as `info`; also if other bytes come than the store says it has.
        """
        size = self.info().size
        if size > 2 * _BLOCK_BYTES:
            return self.read(0, size)

        def request(seconds: float, _: int) -> bytes:
            # It may be written anew meanwhile; another try then meets one object.
            content = self._client.get(self._key, None, None, seconds)
            return _of_length(content, self._client.info(self._key, seconds).size)

        return self._ask(request)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start` … `stop` - 1 of an object, in parallel where they are many."""
        if stop <= start:
            return b""
        spans = [(at, min(at + _BLOCK_BYTES, stop)) for at in range(start, stop, _BLOCK_BYTES)]
        if len(spans) == 1:
            return self._read(start, stop)
        return b"".join(pool().map(lambda span: self._read(*span), spans))

    def _read(self, start: int, stop: int) -> bytes:
        return self._ask(lambda seconds, _: _of_length(self._client.get(self._key, start, stop, seconds), stop - start))

    def open(self, mode: str = "r", buffering: int = -1, encoding: str | None = None, **_: Any) -> io.IOBase:
        """An object to read, a few blocks ahead of the reader: text or bytes, without `buffering` a `StoreFile`.

        Raises:
          ValueError: for a mode that writes.
        """
        if mode not in ("r", "rt", "rb"):
            raise ValueError(f"{self}: opened with mode {mode!r}; an object is written whole")
        file = StoreFile(self)
        if "b" in mode and not buffering:
            return file
        buffered = io.BufferedReader(file, _BLOCK_BYTES)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding or "utf-8")

    # Writing.

    def write(self, data: Any, expected: str | None = None) -> str:
        """Writes an object whole; the version that it has now.

        Args:
          expected: the version that has to be there before; `clients.ABSENT` for none, None for whatever may be.

        Raises:
          Changed: if another one is there.
          StoreError: if it cannot be written.
        """

        def request(seconds: float, attempt: int) -> str:
            try:
                return self._client.put(self._key, data, expected, seconds)
            except Changed:
                # A try before may have succeeded without our hearing of it.
                if attempt > 1 and self._holds(data, seconds):
                    return self._client.info(self._key, seconds).version
                raise
            except FileNotFoundError:
                raise StoreError("there is no such bucket") from None

        return self._ask(request)

    def _holds(self, data: Any, seconds: float) -> bool:
        try:
            return self._client.get(self._key, None, None, seconds) == bytes(data)
        except FileNotFoundError:
            return False

    def write_bytes(self, data: Any) -> int:
        self.write(data)
        return len(data)

    def write_text(self, text: str, encoding: str = "utf-8", **_: Any) -> int:
        return self.write_bytes(text.encode(encoding))

    def create(self, data: Any) -> None:
        """Writes an object that is not there yet.

        Raises:
          Changed: if it is.
        """
        self.write(data, ABSENT)

    def unlink(self, missing_ok: bool = False, expected: str | None = None) -> None:
        """Removes an object, where `expected` is its version."""
        try:
            self._ask(lambda seconds, _: self._client.delete(self._key, expected, seconds))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, *_: Any, **__: Any) -> None:
        """A folder needs no making."""

    def remove_tree(self, first: str = "") -> None:
        """Removes every object below, and before any other the one named `first`."""
        names = sorted(self.sizes())
        if first in names:
            (self / first).unlink(missing_ok=True)
        list(pool().map(lambda name: (self / name).unlink(missing_ok=True), names))


def _of_length(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise Short(f"{len(data)} bytes came, the store says it has {size}")
    return data


class StoreFile(io.RawIOBase):
    """An object that is read from start to end, or here and there; blocks ahead of a reader are on their way."""

    def __init__(self, path: StorePath):
        super().__init__()
        self._path, self.name = path, str(path)
        self.size = path.info().size
        self._at, self._blocks = 0, {}

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        done = min(len(view), max(0, self.size - self._at))
        stop = self._at + done
        if done > _BLOCK_BYTES:
            view[:done] = self._path.read(self._at, stop)
        elif done:
            at = self._at
            while at < stop:
                number = at // _BLOCK_BYTES
                block = self._block(number)
                piece = block[at - number * _BLOCK_BYTES :][: stop - at]
                view[at - self._at : at - self._at + len(piece)] = piece
                at += len(piece)
        self._at = stop
        return done

    def read(self, size: int = -1) -> bytes:
        if size is None or size < 0:
            size = max(0, self.size - self._at)
        data = bytearray(min(size, max(0, self.size - self._at)))
        self.readinto(data)
        return bytes(data)

    def _block(self, number: int) -> bytes:
        last = (self.size - 1) // _BLOCK_BYTES
        # Ahead only of one who reads on, and not of one who looks at a header.
        ahead = _AHEAD if number - 1 in self._blocks or number in self._blocks else 1
        wanted = range(number, min(number + ahead, last + 1))
        for block in [block for block in self._blocks if block not in wanted]:
            del self._blocks[block]
        for block in wanted:
            if block not in self._blocks:
                start = block * _BLOCK_BYTES
                span = start, min(start + _BLOCK_BYTES, self.size)
                self._blocks[block] = pool().submit(self._path._read, *span)
        future: Future[bytes] = self._blocks[number]
        return future.result()
