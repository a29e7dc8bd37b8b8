"""Folders of arrays under a workdir, written by Orbax in the background: the steps of `checkpoints/`, and `frozen/`.

    FOLDER/TREE/…        Orbax, one folder for each tree of arrays
    FOLDER/NAME.json     JSON values beside them
    FOLDER/hashes.json   size and SHA-256 of every other file

A folder takes its name last, in one renaming, when all of it is written, hashed and on the disk. What Orbax leaves to
its caller is done here: an error of a background save is kept until somebody asks; files are hashed, and compared with
their hashes before they are read (flipped bits load silently); every array is compared with what is expected (float32
is cast to bfloat16 or int32 without a word); and arrays are placed as the reader wants, not as the writer had them.
"""

import contextlib
import functools
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from twotower_jax.atomic import sync_path, sync_tree
from twotower_jax.checkpoint import arrays, manifest
from twotower_jax.files import CheckpointError, read_json
from twotower_jax.parameters import Params, Path, flatten, unflatten
from twotower_jax.paths import in_store

HASHES = "hashes.json"
_PARTIAL, _REMOVED = ".writing", ".removed"
# Says where the arrays of a tree lie. Orbax has left it out and reported success.
_MANIFEST = "manifest.ocdbt"
# Orbax takes the path of what it merges for a pattern, and one that begins like an address for one.
_ODD = re.compile(r"[\[*?]|:/")
# Writing that takes longer has failed.
_PATIENCE_SECONDS = 3600


class SaveError(RuntimeError):
    """What a run has to keep could not be written; the message says what and why."""


def check_path(folder: pathlib.Path) -> None:
    """Refuses a folder under whose path Orbax could write what nobody can read.

    Raises:
      ValueError: naming the characters.
    """
    if in_store(folder):
        return  # Orbax writes nothing there.
    arrays.check_path(folder)
    if odd := _ODD.search(str(folder.absolute())):
        arrays.refuse_path(folder, odd[0])


def committed_steps(folder: pathlib.Path) -> list[int]:
    """The numbers of all whole checkpoints, in order."""
    names = (step.name for step in folder.glob("*") if (step / HASHES).exists())
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


def latest_step(folder: pathlib.Path) -> int | None:
    """The newest whole checkpoint."""
    return max(committed_steps(folder), default=None)


class BackgroundWriter:
    """One thing after another is written in the background.

    An error of the background is raised by the next call, whichever it is.
    """

    def __init__(self):
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def _begin(self, work: Callable[..., None], *arguments: Any) -> None:
        def run() -> None:
            try:
                work(*arguments)
            except BaseException as error:  # whatever it is, the thread that trains has to hear of it
                self._error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether an error waits to be raised."""
        return self._error is not None

    def raise_failure(self) -> None:
        """Raises SaveError if a save has failed; does not wait for one that is under way."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Returns when all is written; raises SaveError if it could not be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_failure()


class FolderWriter(BackgroundWriter):
    """Writes folders one after another in the background.

    Every process of a run calls it alike and writes its parts of the arrays; process 0 completes the folder.
    """

    def __init__(self):
        # Here and below, because it takes long to import, and most commands never need it.
        import orbax.checkpoint as ocp

        super().__init__()
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), timeout_secs=_PATIENCE_SECONDS)
        _say_failures_once()

    def start(
        self,
        final: pathlib.Path,
        trees: Mapping[str, Params],
        values: Mapping[str, Any],
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Begins to write a folder, which replaces one of that name; returns when the arrays may change.

        Args:
          trees: nested dictionaries of global arrays, by name.
          values: JSON-able, by name.
          then: is called on process 0 when the folder is complete.

        Raises:
          SaveError: if the folder before this one could not be written, or this one not be begun.
        """
        import orbax.checkpoint as ocp

        self.wait()
        final = final.absolute()
        partial = final.with_name(final.name + _PARTIAL)
        with as_save_error(final):
            final.parent.mkdir(parents=True, exist_ok=True)
            items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
            self._checkpointer.save(partial, args=ocp.args.Composite(**items), force=True)
        self._begin(self._finish, partial, final, list(trees), dict(values), then)

    def close(self) -> None:
        """Lets go of Orbax's threads, after `wait`."""
        self._checkpointer.close()

    def _finish(
        self,
        partial: pathlib.Path,
        final: pathlib.Path,
        trees: Sequence[str],
        values: Mapping[str, Any],
        then: Callable[[], None],
    ) -> None:
        with as_save_error(final):
            self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                _commit(partial, final, trees, values)
                then()


def clean_up(folder: pathlib.Path, name: str = "*") -> None:
    """Removes what a killed process left half written or half removed of the folders called `name`."""
    if in_store(folder):
        return _store_steps().clean_up(folder, name)
    for kind in (_PARTIAL, _REMOVED):
        for entry in folder.glob(f"{name}{kind}*"):
            shutil.rmtree(entry, ignore_errors=True)


def keep_newest(folder: pathlib.Path, count: int) -> None:
    """Removes all but the newest `count` checkpoints. One that is half removed has no number any more."""
    if in_store(folder):
        return _store_steps().keep_newest(folder, committed_steps(folder), count)
    for step in committed_steps(folder)[:-count]:
        removed = folder / f"{step}{_REMOVED}"
        (folder / str(step)).rename(removed)
        shutil.rmtree(removed)


def verify(folder: pathlib.Path, *, only: str = "") -> None:
    """Compares the files of a folder, or of its tree `only`, with their hashes; each process reads a share.

    Raises:
      CheckpointError: naming the file that differs or is missing.
    """
    if in_store(folder):
        return _store_steps().verify(folder, only)
    path = folder / HASHES
    files = read_json(path)
    if not isinstance(files, dict):
        raise CheckpointError(f"{path}: is not an object of hashes by file")
    files = {name: manifest.parse_digest(path, name, value) for name, value in files.items()}
    manifest.verify(folder, files, [name for name in files if name.startswith(f"{only}/" if only else "")])


def stored_arrays(folder: pathlib.Path) -> Params:
    """Shape and dtype of every array of a tree's folder.

    Raises:
      CheckpointError: if the folder is not there, or is not one of Orbax.
    """
    import orbax.checkpoint as ocp

    if in_store(folder):
        found = _store_steps().stored_arrays(folder)
        return stored_arrays(_store_steps().local_copy(folder)) if found is None else found
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; the checkpoint is not whole")
    try:
        return ocp.StandardCheckpointHandler().metadata(folder.absolute()).tree
    except (AttributeError, FileNotFoundError) as error:
        raise CheckpointError(f"{folder}: is not a folder of arrays ({error})") from None


def restore_arrays(folder: pathlib.Path, target: Params) -> Params:
    """Reads a tree's folder into a tree of `jax.ShapeDtypeStruct`, each array placed as its target's sharding says.

    Without a sharding, on this process's first device.

    Raises:
      CheckpointError: if an array is missing, left over, or of another shape or dtype.
    """
    import orbax.checkpoint as ocp

    if in_store(folder):
        found = _store_steps().stored_arrays(folder)
        if found is None:
            return restore_arrays(_store_steps().local_copy(folder), target)
        check_fits(folder, found, target)
        return _store_steps().restore_arrays(folder, target)
    check_fits(folder, stored_arrays(folder), target)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=s.sharding or device), target)
    return ocp.StandardCheckpointHandler().restore(folder.absolute(), args=ocp.args.StandardRestore(placed))


def restore_on_host(folder: pathlib.Path, target: Params) -> Iterator[tuple[Path, np.ndarray]]:
    """Reads a tree's folder array by array, each one whole; the others are not there meanwhile.

    Raises:
      CheckpointError: as `restore_arrays`, before anything is read.
    """
    import orbax.checkpoint as ocp

    if in_store(folder):
        found = _store_steps().stored_arrays(folder)
        if found is None:
            yield from restore_on_host(_store_steps().local_copy(folder), target)
            return
        check_fits(folder, found, target)
        yield from _store_steps().restore_on_host(folder, target)
        return
    check_fits(folder, stored_arrays(folder), target)
    handler = ocp.PyTreeCheckpointHandler()
    paths = list(flatten(target))
    for path in paths:
        chosen = {p: target_array if p == path else ocp.PLACEHOLDER for p, target_array in flatten(target).items()}
        options = {p: ocp.RestoreArgs(restore_type=np.ndarray) for p in paths}
        item = ocp.args.PyTreeRestore(item=unflatten(chosen), restore_args=unflatten(options))
        yield path, flatten(handler.restore(folder.absolute(), args=item))[path]


def name_leaves(tree: Any) -> tuple[Params, Any]:
    """A tree of any containers as nested dictionaries, whose order is the leaves' own, and its structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    named = {tuple(jax.tree_util.keystr((key,), simple=True) for key in path): leaf for path, leaf in leaves}
    return unflatten(named), structure


def unname_leaves(named: Params, order: Params, structure: Any) -> Any:
    """The inverse of `name_leaves`: the leaves of `named` in the order of those of `order`."""
    leaves = flatten(named)
    return jax.tree.unflatten(structure, [leaves[path] for path in flatten(order)])


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Replaces a small file, which is on the disk when this returns.

    Raises:
      SaveError: if it cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    if in_store(path):
        with as_save_error(path):
            path.write_text(text)
        return
    with as_save_error(path):
        partial.write_text(text, encoding="utf-8")
        sync_path(partial)
        os.replace(partial, path)
        sync_path(path.parent)


def _commit(partial: pathlib.Path, final: pathlib.Path, trees: Sequence[str], values: Mapping[str, Any]) -> None:
    for name in trees:
        if not (partial / name / _MANIFEST).is_file():
            raise SaveError(f"{final}: {name}/{_MANIFEST} was not written; without it nothing could be read back")
    for name, value in values.items():
        (partial / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    names = sorted(str(file.relative_to(partial)) for file in partial.rglob("*") if file.is_file())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda name: manifest.digest_file(partial / name), names)
        hashes = {name: digest._asdict() for name, digest in zip(names, digests, strict=True)}
    (partial / HASHES).write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")
    sync_tree(partial)
    if final.exists():
        removed = final.with_name(final.name + _REMOVED)
        final.rename(removed)
        partial.rename(final)
        shutil.rmtree(removed)
    else:
        partial.rename(final)
    sync_path(final.parent)


def _store_steps() -> Any:
    """The functions for folders in a store, imported for those alone."""
    from twotower_jax.checkpoint import store_steps

    return store_steps


@contextlib.contextmanager
def as_save_error(path: pathlib.Path | None) -> Iterator[None]:
    """Makes whatever goes wrong in writing a SaveError, which names `path` where the error does not."""
    try:
        yield
    except SaveError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        where = "" if path is None or reason.startswith(str(path)) else f"{path}: "
        raise SaveError(f"{where}could not be written: {reason}") from error


@functools.cache
def _say_failures_once() -> None:
    """Leaves out what would be printed, with tracebacks, beside the error that is raised."""
    # Orbax logs what it raises as well, and asyncio what all the other writes raised.
    logging.getLogger("absl").addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
    logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())
    # TensorStore has nobody to tell of a write that ends when another one has failed.
    hook = sys.unraisablehook

    def without_closed_loops(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = without_closed_loops


def check_fits(where: pathlib.Path, stored: Params, target: Params) -> None:
    """Raises CheckpointError if an array is missing, left over, or of another shape or dtype than the target's."""
    stored, target = flatten(stored), flatten(target)
    if odd := sorted(stored.keys() ^ target.keys()):
        kind = "is missing" if odd[0] in target else "is not of this model"
        raise CheckpointError(f"{where}: array {'/'.join(odd[0])} {kind}")
    for path, wanted in target.items():
        found = stored[path]
        if tuple(found.shape) != wanted.shape or found.dtype != wanted.dtype:
            raise CheckpointError(
                f"{where}: array {'/'.join(path)} is {found.dtype} {list(found.shape)}, "
                f"expected {wanted.dtype} {list(wanted.shape)}"
            )
