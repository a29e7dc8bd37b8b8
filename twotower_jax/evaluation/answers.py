"""Answers that were given already, in a file: an evaluation that was interrupted goes on where it stopped.

One JSON object a line, `{"key": …, "answer": …}`, written as each answer comes. The key is a hash of all that the
answer depends on: the checkpoint's files, how it is computed, the request and its settings. Nothing has to be deleted
when one of them changes.
"""

import fcntl
import hashlib
import json
import os
from typing import Any

from twotower_jax.paths import as_path


class Answers:
    """The answers of one file, or of this process alone if there is none.

    Args:
      path: made if it is not there. The last line of a process that was killed may be cut off; it is left out.
      about: what all answers depend on, such as `fingerprint` of the checkpoint.

    Raises:
      ValueError: naming the file, if another process writes it; OSError if it cannot be written.
    """

    def __init__(self, path: str | os.PathLike | None = None, about: Any = None):
        self._known: dict[str, Any] = {}
        self._about = json.dumps(about, sort_keys=True)
        self._file = None if path is None else open(path, "a+", encoding="utf-8")  # noqa: SIM115 (kept open)
        if self._file is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{path}: another process evaluates into this folder; give another --output") from None
        self._file.seek(0)
        end = 0
        for line in iter(self._file.readline, ""):
            try:
                row = json.loads(line)
                self._known[row["key"]] = row["answer"]
            except (ValueError, KeyError, TypeError):
                break
            end = self._file.tell()
        self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)

    def __len__(self) -> int:
        return len(self._known)

    def key(self, *request: Any) -> str:
        """The key of a request, all of whose parts are JSON values."""
        told = json.dumps([self._about, *request], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()

    def get(self, key: str) -> Any:
        """The answer, or None."""
        return self._known.get(key)

    def add(self, key: str, answer: Any) -> None:
        """Keeps an answer, a JSON value that is not None."""
        self._known[key] = answer
        if self._file is not None:
            self._file.write(json.dumps({"key": key, "answer": answer}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Lets others write the file."""
        if self._file is not None:
            self._file.close()


def fingerprint(folder: str | os.PathLike) -> str:
    """A hash of a checkpoint's files: names, sizes and times of change, which tell of another content without reading
    it."""
    folder = as_path(folder)
    found = []
    for file in sorted(folder.rglob("*")):
        # A training run that goes on writes these beside its checkpoints, without changing one.
        if file.is_file() and file.suffix != ".jsonl" and "tensorboard" not in file.parts:
            about = file.stat()
            found.append([str(file.relative_to(folder)), about.st_size, about.st_mtime_ns])
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()
