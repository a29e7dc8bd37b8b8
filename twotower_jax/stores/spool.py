"""Files that grow while a command runs (metrics, samples, traces, answers), where objects are only ever written whole.

They grow in a folder of this machine, and their content goes to the store every few seconds, before a checkpoint
becomes whole, and in the end. So a killed run loses at most what came after its newest checkpoint, which is made again.
"""

import contextlib
import pathlib
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator

from twotower_jax.stores.path import StorePath
from twotower_jax.stores.retrying import StoreError

_EVERY_SECONDS = 15.0


class Spool:
    """A folder of this machine whose files are those of a folder in a store.

    Attributes:
      folder: on this machine; removed with this object.
    """

    def __init__(self, store: StorePath):
        self._store = store
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="twotower-spool-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._sent: dict[str, tuple[int, int]] = {}
        self._turn, self._ended = threading.Lock(), threading.Event()

    @contextlib.contextmanager
    def running(self, *names: str, later: pathlib.Path | None = None) -> Iterator[None]:
        """Begins with what the store has of `names`, and sends what is new while the block runs and at its end.

        Args:
          later: a folder of this machine that may have more of them.

        Raises:
          StoreError: if that cannot be read, or the last of it not be sent.
        """
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).write_bytes((self._store / name).read_bytes())
                self._sent[name] = self._state(name)
            with contextlib.suppress(FileNotFoundError):
                if later is not None:
                    (self.folder / name).write_bytes((later / name).read_bytes())
        threading.Thread(target=self._run, daemon=True).start()
        try:
            yield
        except BaseException:
            self._ended.set()
            with contextlib.suppress(StoreError):  # The first error counts.
                self.send()
            raise
        self._ended.set()
        self.send()

    def send(self) -> None:
        """Sends what has changed, but for hidden files, which are not finished.

        Raises:
          StoreError: if the store does not take it.
        """
        with self._turn:
            for file in sorted(self.folder.rglob("*")):
                name = str(file.relative_to(self.folder))
                if file.name.startswith(".") or not file.is_file():
                    continue
                if self._sent.get(name) == (state := self._state(name)):
                    continue
                content = file.read_bytes()
                if file.suffix == ".jsonl":
                    content = content[: content.rfind(b"\n") + 1]
                (self._store / name).write_bytes(content)
                self._sent[name] = state

    def _state(self, name: str) -> tuple[int, int]:
        found = (self.folder / name).stat()
        return found.st_size, found.st_mtime_ns

    def _run(self) -> None:
        while not self._ended.wait(_EVERY_SECONDS):
            with contextlib.suppress(StoreError, FileNotFoundError):  # the next time says so
                self.send()
