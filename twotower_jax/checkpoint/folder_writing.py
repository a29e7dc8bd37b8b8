"""Writing a Hugging Face folder: safetensors files, their index, and the small files beside them."""

import json
import math
import pathlib
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from twotower_jax.atomic import new_folder
from twotower_jax.checkpoint import arrays, huggingface
from twotower_jax.checkpoint.manifest import write_file
from twotower_jax.checkpoint.pipeline import in_order
from twotower_jax.checkpoint.safetensors_file import DTYPES
from twotower_jax.progress import Progress

_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Tensor(NamedTuple):
    """A tensor to be written: how it is stored, and a function that reads it."""

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_folder(
    output: pathlib.Path, tensors: Mapping[str, Tensor], small: Mapping[str, bytes], max_shard_size: int
) -> None:
    """Writes a Hugging Face folder: tensors in the order given, their index, and `small` files by name."""
    shards = list(_shards(tensors, max_shard_size))
    total = sum(tensor.size for tensor in tensors.values())
    progress = Progress("exporting", total)
    weight_map = {}
    with new_folder(output) as partial:
        for name, content in small.items():
            write_file(partial / name, [content])
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= dict.fromkeys(names, file)
            write_file(partial / file, _file_pieces({name: tensors[name] for name in names}, progress))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_file(partial / huggingface.INDEX, [json_bytes(index)])
    progress.finish()


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _shards(tensors: Mapping[str, Tensor], limit: int) -> Iterator[list[str]]:
    """Names by file."""
    shard: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        # The header counts too: its entry for this tensor, generously.
        cost = tensor.size + len(name) + 160
        if shard and size + cost > limit:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += cost
    yield shard


def _file_pieces(tensors: dict[str, Tensor], progress: Progress) -> Iterator[bytes | memoryview]:
    """One safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, tensor in tensors.items():
        offsets = [place, place + tensor.size]
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        place += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    read = in_order(tensors.values(), lambda tensor: arrays.contiguous(tensor.read()), lambda tensor: tensor.size)
    for data in read:
        yield data.reshape(-1).view(np.uint8).data
        progress.add(data.nbytes)
