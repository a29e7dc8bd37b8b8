"""Arrays of a checkpoint in a store: Zarr v3 without compression, one object for each chunk.

Of a converted checkpoint a chunk is a tensor (arrays.py), of a workdir in a store a part of what one device holds
(store_steps.py). Either way an object's bytes begin with the chunk in C order. A chunk is read whole, compared with its
recorded hash as it comes, and of it is taken what is wanted: so a checkpoint is read once, and each process reads the
chunks of its own devices.
"""

import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from twotower_jax.checkpoint import manifest
from twotower_jax.checkpoint.manifest import Digest
from twotower_jax.files import CheckpointError, read_file, read_json
from twotower_jax.paths import AnyPath, in_store
from twotower_jax.stores.retrying import StoreError

# Chunks of one array that are on their way at a time; requests are those of stores/path.py.
_THREADS = 8
_ZARR = "zarr.json"
LITTLE_ENDIAN = [{"name": "bytes", "configuration": {"endian": "little"}}]

type Index = tuple[slice, ...]


def dtype_of(name: Any) -> np.dtype:
    """A dtype by Zarr's name; ValueError if there is none of that name."""
    try:
        return jax.numpy.dtype(name)
    except TypeError:
        raise ValueError(f"data_type {name!r}") from None


class Array:
    """An array in the folder `place`; nothing but what describes it is read before `read`."""

    def __init__(
        self,
        place: AnyPath,
        digest: Callable[[str], Digest | None],
    ):
        """Reads what describes the array.

        Args:
          digest: recorded of an object of the folder, by name; None for one to be taken as it is.

        Raises:
          CheckpointError: if there is no such array, or it is stored in another way.
        """
        self._place, self._digest = place, digest
        raw = read_json(place / _ZARR)
        try:
            self.shape = tuple(int(n) for n in raw["shape"])
            self.dtype = dtype_of(raw["data_type"])
            self._chunk = tuple(int(n) for n in raw["chunk_grid"]["configuration"]["chunk_shape"])
            (codec,) = raw["codecs"]
            inner = codec["configuration"]
            plain = [codec] == LITTLE_ENDIAN
            sharded = codec["name"] == "sharding_indexed" and inner["index_location"] == "end"
            if not plain and not (sharded and inner["codecs"] == inner["index_codecs"] == LITTLE_ENDIAN):
                raise ValueError(f"codecs {raw['codecs']!r}")
            if raw["chunk_key_encoding"] != {"name": "default", "configuration": {"separator": "."}}:
                raise ValueError(f"chunk_key_encoding {raw['chunk_key_encoding']!r}")
            if any(c < 1 or n % c for n, c in zip(self.shape, self._chunk, strict=True)):
                raise ValueError(f"chunks {self._chunk} of {self.shape}")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{place / _ZARR}: describes no array that is read from here ({error})") from None
        self._chunk_bytes = math.prod(self._chunk) * self.dtype.itemsize

    def read(self, index: tuple[slice | int, ...]) -> np.ndarray:
        """What numpy's indexing gives of the array, in C order.

        Raises:
          CheckpointError: if a chunk is missing, cut off, or not the one recorded.
        """
        numbers = tuple(axis for axis, part in enumerate(index) if not isinstance(part, slice))
        index = tuple(part if isinstance(part, slice) else slice(part, part + 1) for part in index)
        index = self._whole(index)
        out = np.empty([s.stop - s.start for s in index], self.dtype)
        cells = [range(s.start // c, -(-s.stop // c)) for s, c in zip(index, self._chunk, strict=True)]

        def fill(cell: tuple[int, ...]) -> None:
            chunk = self._read_chunk(cell)
            ours, theirs = [], []
            for at, size, wanted in zip(cell, self._chunk, index, strict=True):
                first, last = max(at * size, wanted.start), min((at + 1) * size, wanted.stop)
                ours.append(slice(first - wanted.start, last - wanted.start))
                theirs.append(slice(first - at * size, last - at * size))
            out[tuple(ours)] = chunk[tuple(theirs)]

        wanted = list(itertools.product(*cells))
        if len(wanted) == 1:
            fill(wanted[0])
        else:
            with ThreadPoolExecutor(min(_THREADS, len(wanted) or 1)) as threads:
                list(threads.map(fill, wanted))
        return out.squeeze(numbers)

    def _whole(self, index: Index) -> Index:
        index = tuple(index) + (slice(None),) * (len(self.shape) - len(index))
        return tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, self.shape, strict=True))

    def _fetch(self, name: str, expected: Digest | None) -> np.ndarray:
        path = self._place / name
        if expected is None or not in_store(path):
            return read_file(path)
        try:
            return np.frombuffer(path.read(0, expected.size), np.uint8)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: cannot be read (no such object)") from None
        except StoreError:
            if (size := path.info().size) != expected.size:
                raise CheckpointError(f"{path}: has {size} bytes, recorded were {expected.size}") from None
            raise

    def _read_chunk(self, cell: tuple[int, ...]) -> np.ndarray:
        name = ".".join(map(str, ("c", *cell)))
        expected = self._digest(name)
        data = self._fetch(name, expected)
        if expected is not None:
            manifest.compare(self._place / name, manifest.digest_of(data.data), expected)
        if data.size < self._chunk_bytes:
            raise CheckpointError(f"{self._place / name}: has {data.size} bytes instead of {self._chunk_bytes}")
        return data[: self._chunk_bytes].view(self.dtype).reshape(self._chunk)
