"""Folders of arrays under a workdir in a store: the steps of `checkpoints/`, and `frozen/`; `orbax_steps.py` elsewhere.

    FOLDER/TREE/NAME/c.0.1…  one part of an array, no larger than what one device holds
    FOLDER/TREE/…            what Orbax and Zarr need to read the arrays, also from a copy on a disk
    FOLDER/NAME.json         JSON values beside them
    FOLDER/hashes.json       size and SHA-256 of every other object; written last, and with it the folder is whole

Nothing is renamed there and nothing is on its way through a disk. Every process writes the parts that its devices hold
the first copy of, straight from memory and many at a time, hashes them, and says so in an object of its own; process 0
gathers these and writes hashes.json. No object of a folder is ever written over: where one is there already, another
run writes here, and this one ends. Each part is compared with its hash as it is read.
"""

import itertools
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from twotower_jax.checkpoint import arrays, chunks, manifest
from twotower_jax.checkpoint.manifest import Digest
from twotower_jax.checkpoint.orbax_steps import HASHES, BackgroundWriter, SaveError, as_save_error
from twotower_jax.checkpoint.pipeline import in_order
from twotower_jax.files import CheckpointError, read_bytes, read_json
from twotower_jax.parameters import Params, Path, flatten, unflatten
from twotower_jax.paths import AnyPath
from twotower_jax.stores import cache
from twotower_jax.stores.lease import Lease
from twotower_jax.stores.path import StorePath
from twotower_jax.stores.retrying import Changed

_METADATA, _ZARR = "_METADATA", "zarr.json"
# An object of about this size is sent and read at full speed, and sent again in seconds.
_CHUNK_BYTES = 64 << 20
_WRITERS = 8
# Other processes may take as long to write their parts.
_PATIENCE_SECONDS = 3600.0
_MAX_JSON_BYTES = 1 << 28


class Part(NamedTuple):
    """An object of an array: its name below the folder, and its bytes."""

    name: str
    data: np.ndarray


class StoreWriter(BackgroundWriter):
    """Writes folders one after another in the background, with the interface of `orbax_steps.FolderWriter`.

    Args:
      lease: of the workdir, on process 0.
      before: is called on process 0 before a folder becomes whole.
      keep: is given the name of a folder, its texts by name, and the parts that this process holds, those that others
        write included, before anything is sent.
    """

    def __init__(
        self,
        lease: Lease | None = None,
        before: Callable[[], None] = lambda: None,
        keep: Callable[[str, Mapping[str, bytes], Iterator[Part]], None] | None = None,
    ):
        super().__init__()
        self._lease, self._before, self._keep = lease, before, keep

    def start(
        self,
        final: StorePath,
        trees: Mapping[str, Params],
        values: Mapping[str, Any],
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """See `orbax_steps.FolderWriter.start`."""
        self.wait()
        texts = {f"{name}.json": json.dumps(value).encode() for name, value in values.items()}
        owned: list[Part] = []
        held: list[Part] = []
        for tree, params in trees.items():
            flat = flatten(params)
            chunk_shapes = {path: _chunk_shape(array) for path, array in flat.items()}
            texts |= {f"{tree}/{name}": text for name, text in _metadata(flat, chunk_shapes).items()}
            for path, array in flat.items():
                for part, ours in _parts(f"{tree}/{arrays.folder_name(path)}", array, chunk_shapes[path], self._keep):
                    (owned if ours else held).append(part)
        with as_save_error(final):
            if jax.process_index() == 0:
                self._check()
                final.remove_tree(first=HASHES)
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices(f"{final} is empty")
        self._begin(self._finish, final, texts, owned, held, then)

    @property
    def failed(self) -> bool:
        """Whether an error waits to be raised, the loss of the lease included."""
        return super().failed or self._lease is not None and self._lease.lost

    def raise_failure(self) -> None:
        """Raises SaveError if a save has failed or the lease is lost; does not wait for a save that is under way."""
        super().raise_failure()
        if self._lease is not None and self._lease.lost:
            with as_save_error(None):
                self._lease.check()

    def close(self) -> None:
        """Has nothing to let go of."""

    def _check(self) -> None:
        if self._lease is not None:
            self._lease.check()

    def _finish(
        self,
        final: StorePath,
        texts: Mapping[str, bytes],
        owned: list[Part],
        held: list[Part],
        then: Callable[[], None],
    ) -> None:
        with as_save_error(final):
            if self._keep is not None:
                self._keep(final.name, texts, itertools.chain(owned, held))
            held.clear()
            hashes = _send(final, texts if jax.process_index() == 0 else {}, owned)
            if jax.process_index() > 0:
                (final / _share(jax.process_index())).create(listed(hashes))
                return
            hashes |= _shares(final)
            self._before()
            self._check()
            (final / HASHES).create(listed(hashes))
            for process in range(1, jax.process_count()):
                (final / _share(process)).unlink(missing_ok=True)
            then()


def _send(final: StorePath, texts: Mapping[str, bytes], parts: list[Part]) -> dict[str, Digest]:
    """Writes objects, none of which is there yet, many at a time."""

    def one(item: tuple[str, Any]) -> tuple[str, Digest]:
        name, data = item
        try:
            (final / name).create(data)
        except Changed:
            raise SaveError(f"{final / name}: is there already; another run writes to this workdir") from None
        return name, manifest.digest_of(data)

    objects = itertools.chain(texts.items(), ((part.name, part.data.data) for part in parts))
    with ThreadPoolExecutor(_WRITERS) as threads:
        return dict(threads.map(one, objects))


def _share(process: int) -> str:
    return f"hashes.process_{process}.json"


def listed(hashes: Mapping[str, Digest]) -> bytes:
    """The content of a hashes.json."""
    return (json.dumps({name: digest._asdict() for name, digest in sorted(hashes.items())}, indent=1) + "\n").encode()


def _shares(final: StorePath) -> dict[str, Digest]:
    """What the other processes have written, once they have."""
    found: dict[str, Digest] = {}
    end, pause = time.monotonic() + _PATIENCE_SECONDS, 0.05
    for process in range(1, jax.process_count()):
        share = final / _share(process)
        while not share.is_file():
            if time.monotonic() > end:
                raise SaveError(f"{share}: process {process} has not written its part of the arrays")
            time.sleep(pause)
            pause = min(2 * pause, 2.0)
        found |= digests(share)
    return found


def _chunk_shape(array: jax.Array) -> tuple[int, ...]:
    """The shape of an array's objects: a device's part, cut along its leading axes until it is small."""
    shape = list(array.sharding.shard_shape(array.shape))
    for axis, length in enumerate(shape):
        for divisor in (d for d in range(1, length + 1) if length % d == 0):
            shape[axis] = length // divisor
            if math.prod(shape) * array.dtype.itemsize <= _CHUNK_BYTES:
                return tuple(shape)
    return tuple(shape)


def _parts(folder: str, array: jax.Array, chunk: tuple[int, ...], all_held: Any) -> Iterator[tuple[Part, bool]]:
    """Copies of the array's objects that this process holds, and whether it is the one that writes them."""
    seen = set()
    for shard in sorted(array.addressable_shards, key=lambda shard: shard.replica_id):
        starts = tuple(part.start or 0 for part in shard.index)
        if starts in seen or shard.replica_id and not all_held:
            continue
        seen.add(starts)
        data = np.asarray(shard.data)
        for cell in itertools.product(*(range(n // c) for n, c in zip(data.shape, chunk, strict=True))):
            place = tuple(slice(i * c, (i + 1) * c) for i, c in zip(cell, chunk, strict=True))
            numbers = (i + start // c for i, start, c in zip(cell, starts, chunk, strict=True))
            name = f"{folder}/{'.'.join(map(str, ('c', *numbers)))}"
            # A copy, because what trains may use this memory again.
            yield Part(name, np.array(data[place], order="C").reshape(-1).view(np.uint8)), shard.replica_id == 0


def _metadata(flat: Mapping[Path, jax.Array], chunk_shapes: Mapping[Path, tuple[int, ...]]) -> dict[str, bytes]:
    files = arrays.orbax_metadata({path: array.shape for path, array in flat.items()})
    for path, array in flat.items():
        files[f"{arrays.folder_name(path)}/{_ZARR}"] = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(array.shape),
            "data_type": str(array.dtype),
            "fill_value": False if array.dtype == bool else 0 if np.issubdtype(array.dtype, np.integer) else 0.0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk_shapes[path])}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": chunks.LITTLE_ENDIAN,
        }
    return {name: (json.dumps(value, indent=1) + "\n").encode() for name, value in files.items()}


# Reading.


def clean_up(folder: StorePath, name: str) -> None:
    """Removes folders called `name` that are not whole."""
    for entry in list(folder.glob(name)):
        if not (entry / HASHES).is_file():
            entry.remove_tree()


def keep_newest(folder: StorePath, steps: list[int], count: int) -> None:
    """Removes all but the newest `count` of the whole steps; one is no checkpoint any more from the first object on."""
    for step in steps[:-count]:
        (folder / str(step)).remove_tree(first=HASHES)


def verify(folder: StorePath, only: str = "") -> None:
    """Sees that every object of a folder, or of its tree `only`, is there and as long as recorded, and compares those
    that are no parts of arrays with their hashes; parts are compared as they are read.

    Raises:
      CheckpointError: naming the object that differs or is missing.
    """
    recorded, found = digests(folder / HASHES), folder.sizes()
    names = sorted(name for name in recorded if name.startswith(f"{only}/" if only else ""))
    for name in names:
        digest = recorded[name]
        if name not in found:
            raise CheckpointError(f"{folder / name}: is not there any more")
        if found[name] != digest.size:
            raise CheckpointError(f"{folder / name}: has {found[name]} bytes, recorded were {digest.size}")

    def compare(name: str) -> None:
        content = read_bytes(folder / name, _MAX_JSON_BYTES)
        manifest.compare(folder / name, manifest.digest_of(content), recorded[name])

    texts = [name for name in names if "/" not in name or name.endswith((_ZARR, "METADATA"))]
    with ThreadPoolExecutor(_WRITERS) as threads:
        list(threads.map(compare, texts))


def stored_arrays(folder: AnyPath) -> Params | None:
    """Shape and dtype of every array of a tree's folder; None where it is in another layout, as Orbax writes to disks.

    Raises:
      CheckpointError: if the folder is not there, or broken.
    """
    if not (folder / _METADATA).is_file():
        raise CheckpointError(f"{folder}: no such folder; the checkpoint is not whole")
    raw = read_json(folder / _METADATA)
    if not isinstance(raw, dict) or raw.get("use_ocdbt") is not False or raw.get("use_zarr3") is not True:
        return None
    paths = _paths(folder, raw)
    with ThreadPoolExecutor(_WRITERS) as threads:
        found = threads.map(lambda path: chunks.Array(folder / arrays.folder_name(path), lambda name: None), paths)
        described = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in found]
    return unflatten(dict(zip(paths, described, strict=True)))


def _paths(folder: AnyPath, raw: Mapping[str, Any]) -> list[Path]:
    try:
        return [tuple(part["key"] for part in about["key_metadata"]) for about in raw["tree_metadata"].values()]
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder / _METADATA}: is not Orbax's list of arrays") from None


def restore_arrays(folder: AnyPath, target: Params) -> Params:
    """Reads a tree's folder, of a store or of local_copies.py, into a tree of `jax.ShapeDtypeStruct`, as
    `orbax_steps.restore_arrays`; what it holds has been compared with the target.
    """
    recorded, prefix = digests(folder.parent / HASHES), f"{folder.name}/"
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def read(item: tuple[Path, jax.ShapeDtypeStruct]) -> dict[tuple, np.ndarray]:
        path, wanted = item
        name = arrays.folder_name(path)
        array = _open(folder, name, recorded, prefix)
        indices = (wanted.sharding or device).addressable_devices_indices_map(wanted.shape).values()
        return {_key(index, wanted.shape): array.read(index) for index in _distinct(indices, wanted.shape)}

    def size(item: tuple[Path, jax.ShapeDtypeStruct]) -> int:
        return math.prod(item[1].shape) * item[1].dtype.itemsize

    flat, made = flatten(target), {}
    for (path, wanted), parts in zip(flat.items(), in_order(flat.items(), read, size), strict=True):

        def part(index: tuple, parts: Mapping = parts, shape: tuple = wanted.shape) -> np.ndarray:
            return parts[_key(index, shape)]

        made[path] = jax.make_array_from_callback(wanted.shape, wanted.sharding or device, part)
    return unflatten(made)


def restore_on_host(folder: StorePath, target: Params) -> Iterator[tuple[Path, np.ndarray]]:
    """As `orbax_steps.restore_on_host`."""
    recorded, prefix = digests(folder.parent / HASHES), f"{folder.name}/"
    for path, wanted in flatten(target).items():
        array = _open(folder, arrays.folder_name(path), recorded, prefix)
        yield path, array.read((slice(None),) * len(wanted.shape))


def local_copy(folder: StorePath) -> pathlib.Path:
    """A copy on this machine's disk of a tree's folder in another layout, its files compared with their hashes."""
    recorded, prefix = digests(folder.parent / HASHES), f"{folder.name}/"
    files = {name.removeprefix(prefix): tuple(d) for name, d in recorded.items() if name.startswith(prefix)}
    return cache.local_folder(folder, files)


def _open(folder: AnyPath, name: str, recorded: Mapping[str, Digest], prefix: str) -> chunks.Array:
    def digest(chunk: str) -> Digest:
        full = f"{prefix}{name}/{chunk}"
        if full not in recorded:
            raise CheckpointError(f"{folder / name / chunk}: is not listed in {HASHES}")
        return recorded[full]

    return chunks.Array(folder / name, digest)


def digests(path: AnyPath) -> dict[str, Digest]:
    """What a hashes.json lists.

    Raises:
      CheckpointError: if it is missing or no such file.
    """
    try:
        raw = json.loads(read_bytes(path, _MAX_JSON_BYTES))
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: is not an object of hashes by file")
    return {name: manifest.parse_digest(path, name, value) for name, value in raw.items()}


def _key(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple:
    return tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))


def _distinct(indices: Any, shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    return list({_key(index, shape): index for index in indices}.values())
