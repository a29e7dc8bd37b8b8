"""The newest state of a run whose workdir is in a store, kept on the disk of each of its machines as well.

A process keeps the parts of the arrays that its devices hold, in a folder laid out as the step in the store is, before
it sends anything there. A run that is started again goes on from these copies where every process has one, of the same
step and of the same save, whose files have the recorded hashes; where one is missing it goes on from the store's newest
checkpoint. A copy that cannot be written is no reason to end a run: it says so, and the store's checkpoints count.
"""

import functools
import hashlib
import pathlib
import shutil
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from twotower_jax.atomic import sync_tree
from twotower_jax.checkpoint import manifest
from twotower_jax.checkpoint.manifest import Digest
from twotower_jax.checkpoint.orbax_steps import HASHES
from twotower_jax.checkpoint.store_steps import Part, digests, listed
from twotower_jax.files import CheckpointError, read_bytes
from twotower_jax.stores.path import StorePath

_WRITING = ".writing"
_THREADS = 4
_MAX_JSON_BYTES = 1 << 28


class Copy(NamedTuple):
    """A whole copy: its folder, its step, and the hash of the values that the step was saved with."""

    folder: pathlib.Path
    step: int
    values: str


class LocalCopies:
    """This process's copies of a run.

    Args:
      folder: on this machine's disk; those of several runs and processes lie apart in it.
      workdir: of the run.
    """

    def __init__(self, folder: pathlib.Path, workdir: StorePath):
        run = hashlib.sha256(str(workdir).encode()).hexdigest()[:16]
        self._folder = folder / f"{workdir.name}-{run}" / f"{jax.process_index()}-of-{jax.process_count()}"

    def keep(self, step: str, texts: Mapping[str, bytes], parts: Iterable[Part]) -> None:
        """Writes the copy of a step, and removes those before it."""
        partial = self._folder / f"{step}{_WRITING}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

            def write(item: tuple[str, bytes | np.ndarray]) -> tuple[str, Digest]:
                name, data = item
                return name, manifest.write_file(partial / name, (data,))

            objects = [*texts.items(), *((part.name, part.data.data) for part in parts)]
            with ThreadPoolExecutor(_THREADS) as threads:
                hashes = dict(threads.map(write, objects))
            (partial / HASHES).write_bytes(listed(hashes))
            sync_tree(partial)
            shutil.rmtree(self._folder / step, ignore_errors=True)
            partial.rename(self._folder / step)
            for other in self._folder.iterdir():
                if other.name != step:
                    shutil.rmtree(other, ignore_errors=True)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            _warn(f"{partial}: no copy of step {step} on this machine ({error})")

    def newest(self) -> Copy | None:
        """The newest copy, all of whose files are as they were written."""
        steps = [entry.name for entry in self._folder.glob("*") if entry.name.isdecimal()]
        for step in sorted(steps, key=int, reverse=True):
            folder = self._folder / step
            try:
                recorded = digests(folder / HASHES)
                with ThreadPoolExecutor(_THREADS) as threads:
                    found = threads.map(lambda name, at=folder: manifest.digest_file(at / name), recorded)
                    for (name, expected), digest in zip(recorded.items(), found, strict=True):
                        manifest.compare(folder / name, digest, expected)
                values = hashlib.sha256(read_bytes(folder / "run.json", _MAX_JSON_BYTES)).hexdigest()
                return Copy(folder, int(step), values)
            except CheckpointError as error:
                _warn(f"{error}; this copy is not used")
        return None

    def agreed(self) -> Copy | None:
        """This process's newest copy where all processes have one of the same save. Every process calls it."""
        mine = self.newest()
        told = np.zeros(9, np.int64)
        if mine is not None:
            told[:] = [mine.step, *np.frombuffer(bytes.fromhex(mine.values), "<u4")]
        else:
            told[0] = -1
        if jax.process_count() > 1:
            everyone = multihost_utils.process_allgather(told.astype(np.uint32))
            if not (everyone == everyone[0]).all():
                return None
        return mine


@functools.cache
def _warn(line: str) -> None:
    """Says a line once."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


def all_well(well: bool) -> bool:
    """Whether it is so on every process; every process calls it."""
    if jax.process_count() == 1:
        return well
    return bool(multihost_utils.process_allgather(np.array(well)).all())
