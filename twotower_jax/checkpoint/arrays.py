"""Parameters on disk: an Orbax checkpoint (Zarr v3 arrays, no OCDBT), with one file for each published tensor.

An array of the parameter table, such as the (R, E, D, F) experts of R repeats of a segment, is cut along its stacked
leading axes: the file `c.2.17.0.0` holds one tensor, the one of repeat 2 and expert 17, in this program's orientation
and C order, uncompressed. So a parameter of any size is written tensor by tensor, and any slice of it can be read.
Within a file the rows are cut into parts of at most 1 MiB (Zarr's `sharding_indexed`), so that a host of a mesh that
shards rows reads its rows only. A file is therefore the tensor's bytes followed by an index of those parts.

Nothing in these files depends on when or where they are written: the same parameters give the same bytes.
"""

import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
import tensorstore

from twotower_jax.files import CheckpointError, read_json
from twotower_jax.parameters import Parameter, Path

PARAMS = "params"  # The Orbax folder within a checkpoint folder.
DTYPES = {str(dtype): dtype for dtype in map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16, np.int8))}
_PART_BYTES = 1 << 20
_STRIP_BYTES = 16 << 20
_BLOCK = 256
_LITTLE_ENDIAN = [{"name": "bytes", "configuration": {"endian": "little"}}]


def check_path(folder: pathlib.Path) -> None:
    """Refuses a folder whose path TensorStore, which reads and writes arrays, takes for another one.

    Raises:
      ValueError: naming the character.
    """
    path = str(folder.absolute())
    if odd := next((c for c in path if c == "\\" or 0xD800 <= ord(c) <= 0xDFFF), None):
        refuse_path(folder, odd)


def refuse_path(folder: pathlib.Path, odd: str) -> NoReturn:
    """Raises ValueError: that a path holds characters with which arrays cannot be stored there."""
    raise ValueError(f"{folder}: arrays cannot be stored under a path with {odd!r}; choose another name")


def folder_name(path: Path) -> str:
    """The array's folder, by Orbax's rule."""
    return ".".join(path)


def chunk_name(parameter: Parameter, index: tuple[int, ...]) -> str:
    """The file of one tensor, relative to the Orbax folder. `index` is the tensor's place in `parameter.tensors`."""
    cells = (*index, *(0 for _ in parameter.shape[len(index) :]))
    return f"{folder_name(parameter.path)}/{'.'.join(map(str, ('c', *cells)))}"


def metadata(parameters: Mapping[Path, Parameter], dtypes: Mapping[Path, np.dtype]) -> dict[str, str]:
    """The text of every file that is not a tensor, by name relative to the Orbax folder."""
    files = orbax_metadata({path: parameter.shape for path, parameter in parameters.items()})
    for path, parameter in parameters.items():
        files[f"{folder_name(path)}/zarr.json"] = _zarr(parameter, dtypes[path])
    return {name: json.dumps(value, indent=1) + "\n" for name, value in files.items()}


def orbax_metadata(shapes: Mapping[Path, tuple[int, ...]]) -> dict[str, Any]:
    """What Orbax needs beside Zarr's own files to read a folder of arrays, by file name."""
    tree = {
        str(path): {
            "key_metadata": [{"key": key, "key_type": 2} for key in path],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": list(shape),
            },
        }
        for path, shape in shapes.items()
    }
    orbax = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    checkpoint = {
        "item_handlers": "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler",
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": None,
        "commit_timestamp_nsecs": None,
        "custom_metadata": {},
    }
    return {"_METADATA": orbax, "_CHECKPOINT_METADATA": checkpoint}


def _zarr(parameter: Parameter, dtype: np.dtype) -> dict:
    lead, ours = parameter.tensors.ndim, parameter.shape[parameter.tensors.ndim :]
    ones = [1] * lead
    codec = {
        "chunk_shape": [*ones, ours[0] // _parts(ours, dtype), *ours[1:]],
        "codecs": _LITTLE_ENDIAN,
        "index_codecs": _LITTLE_ENDIAN,
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(parameter.shape),
        "data_type": str(dtype),
        "fill_value": 0 if dtype == np.int8 else 0.0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [*ones, *ours]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "sharding_indexed", "configuration": codec}],
    }


def _parts(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Into how many runs of rows a tensor is cut: the fewest, a power of two, that are small and of equal size."""
    size, parts = math.prod(shape) * dtype.itemsize, 1
    while size > parts * _PART_BYTES and shape[0] % (2 * parts) == 0:
        parts *= 2
    return parts


def _index(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Offset and size of every part."""
    parts = _parts(shape, dtype)
    size = math.prod(shape) * dtype.itemsize // parts
    return np.array([(i * size, size) for i in range(parts)], "<u8").tobytes()


def chunk_bytes(parameter: Parameter, tensor: np.ndarray) -> Iterator[memoryview | bytes]:
    """One tensor's file, piece by piece, from the tensor as published. Never holds a second copy of the whole."""
    array = parameter.from_tensor(tensor)
    rows = max(1, _STRIP_BYTES * array.shape[0] // array.nbytes)
    for start in range(0, array.shape[0], rows):
        yield contiguous(array[start : start + rows]).reshape(-1).view(np.uint8).data
    yield _index(array.shape, array.dtype)


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array in C order, itself where it is so. A transposed one is copied block by block, which caches like."""
    if array.flags.c_contiguous or array.ndim != 2:
        return np.ascontiguousarray(array)
    out = np.empty(array.shape, array.dtype)
    for i in range(0, array.shape[0], _BLOCK):
        for j in range(0, array.shape[1], _BLOCK):
            out[i : i + _BLOCK, j : j + _BLOCK] = array[i : i + _BLOCK, j : j + _BLOCK]
    return out


def chunk_tensor(path: pathlib.Path, data: np.ndarray, parameter: Parameter, dtype: np.dtype) -> np.ndarray:
    """One tensor as published (a view), from the bytes of its file.

    Raises:
      CheckpointError: if the file is not as long as it has to be.
    """
    ours = parameter.shape[parameter.tensors.ndim :]
    size = math.prod(ours) * dtype.itemsize
    expected = size + len(_index(ours, dtype))
    if data.size != expected:
        raise CheckpointError(f"{path}: has {data.size} bytes instead of {expected}")
    return parameter.to_tensor(data[:size].view(dtype).reshape(ours))


def stored_dtype(folder: pathlib.Path, path: Path) -> np.dtype:
    """The dtype of an array on disk.

    Raises:
      CheckpointError: if its metadata is broken.
    """
    file = folder / folder_name(path) / "zarr.json"
    raw = read_json(file)
    name = raw.get("data_type") if isinstance(raw, dict) else None
    if name not in DTYPES:
        raise CheckpointError(f"{file}: has data_type {name!r}; known are {', '.join(DTYPES)}")
    return DTYPES[name]


def open_array(folder: pathlib.Path, path: Path) -> tensorstore.TensorStore:
    """An array as it lies on disk; slices of it are read without reading the rest.

    Raises:
      ValueError: if it is not there or not a Zarr array.
    """
    store = {"driver": "file", "path": str(folder / folder_name(path))}
    return tensorstore.open({"driver": "zarr3", "kvstore": store}, open=True, read=True).result()
