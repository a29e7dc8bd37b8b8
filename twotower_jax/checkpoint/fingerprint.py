"""What tells one checkpoint from another, whatever form it has: a hash for each tower.

An adapter is worth nothing beside another base than its own, and that base may by then be a Hugging Face folder, a
converted checkpoint or a training workdir. The hash is therefore of numbers and not of files: for each tensor of a
tower, by its published name in a backbone, its shape and a few of its numbers, spread over it and rounded to bfloat16,
in which any of these forms may store them. Training changes every number of what it trains, so that few suffice to
tell two models apart; they do not prove that all others are whole, for which there are the hashes of files.
"""

import functools
import hashlib
import math
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np

from twotower_jax.checkpoint import arrays, huggingface, orbax_steps, store, workdir
from twotower_jax.checkpoint.arrays import PARAMS
from twotower_jax.checkpoint.plan import table_places
from twotower_jax.checkpoint.safetensors_file import Entry, read_tensor
from twotower_jax.files import CheckpointError
from twotower_jax.parameters import parameter_table
from twotower_jax.paths import AnyPath, in_store
from twotower_jax.two_tower import Backbone, TwoTower

CONTEXT, DENOISER = "context", "denoiser"
_NUMBERS = 8


class Sample(NamedTuple):
    """A tensor by its published name, its shape, and some of its numbers in float32."""

    name: str
    shape: tuple[int, ...]
    numbers: np.ndarray


def fingerprint(path: pathlib.Path) -> dict[str, str] | None:
    """SHA-256 of the context and of the denoiser tower, hexadecimal; the same one twice for a backbone.

    None for a quantized checkpoint, whose numbers are others.

    Raises:
      CheckpointError: if the checkpoint is broken.
    """
    if (path / store.MANIFEST).exists():
        opened = store.open_store(path, verify=False)
        samples = None if opened.manifest.method is not None else _of_store(opened)
    elif (path / workdir.CHECKPOINTS).exists():
        samples = _of_workdir(path)
    else:
        samples = _of_folder(huggingface.open_folder(path))
    if samples is None:
        return None
    found = {sample.name: sample for sample in samples}
    # Tied towers are one. The head of each tower counts with it, the time conditioning with neither.
    towers = {
        DENOISER: _as_backbone(found, "denoiser_tower.", "lm_head.weight"),
        CONTEXT: _as_backbone(found, "context_tower.", "context_lm_head.weight"),
    }
    return {key: _digest(tower or found) for key, tower in towers.items()}


def _as_backbone(found: dict[str, Sample], prefix: str, head: str) -> dict[str, Sample]:
    """The tensors of one of two towers by their names in a backbone; none where there is but one."""
    if not any(name.startswith("context_tower.") for name in found):
        return {}
    if not any(name.startswith(prefix) for name in found):
        prefix = "context_tower."
    tower = {f"backbone.{name.removeprefix(prefix)}": one for name, one in found.items() if name.startswith(prefix)}
    return tower | {"lm_head.weight": found[head]}


def _digest(tower: dict[str, Sample]) -> str:
    hashed = hashlib.sha256()
    for name in sorted(tower):
        hashed.update(f"{name} {list(tower[name].shape)}\n".encode())
        hashed.update(tower[name].numbers.astype(ml_dtypes.bfloat16).tobytes())
    return hashed.hexdigest()


@functools.cache
def _positions(size: int) -> np.ndarray:
    return np.linspace(0, size - 1, num=min(_NUMBERS, size)).astype(np.int64)


def _sample(name: str, tensor: np.ndarray) -> Sample:
    """What is hashed of a tensor as published, which is read at a few places only."""
    places = np.unravel_index(_positions(tensor.size), tensor.shape)
    return Sample(name, tensor.shape, np.asarray(tensor[places]).astype(np.float32))


def _mapped(tensor: huggingface.Tensor) -> np.ndarray:
    return _bytes(tensor.file, tensor.entry.dtype, tensor.entry.start, tensor.entry.shape)


def _bytes(path: AnyPath, dtype: np.dtype, start: int, shape: tuple[int, ...]) -> np.ndarray:
    """An array in a file: of this machine read where it is looked at, of a store whole."""
    if in_store(path):
        return read_tensor(path, Entry(dtype, shape, start, start + math.prod(shape) * dtype.itemsize))
    return np.memmap(path, dtype, "r", start, shape)


def _of_folder(folder: huggingface.Folder) -> Iterator[Sample]:
    huggingface.check(folder, huggingface.own_table(folder))
    single = folder.single_tower
    for name, tensor in folder.tensors.items():
        if single or not _is_time(name):
            yield _sample(name, _mapped(tensor) if tensor.unpacked is None else tensor.unpacked)


def _of_store(opened: store.Store) -> Iterator[Sample]:
    dtypes = {path: arrays.stored_dtype(opened.path / PARAMS, path) for path in opened.table}
    for name, (parameter, index) in table_places(opened.table).items():
        if not _is_time(name):
            file = opened.path / PARAMS / arrays.chunk_name(parameter, index)
            ours = parameter.shape[parameter.tensors.ndim :]
            mapped = _bytes(file, dtypes[parameter.path], 0, ours)
            yield _sample(name, parameter.to_tensor(mapped))


def _of_workdir(path: pathlib.Path) -> Iterator[Sample]:
    """Array by array, each read whole."""
    config, variant, single = workdir.described(path)
    table = parameter_table(Backbone(config) if single else TwoTower(config, variant))
    step = orbax_steps.latest_step(path / workdir.CHECKPOINTS)
    if step is None:
        raise CheckpointError(f"{path}: this workdir has no finished checkpoint yet")
    for folder in (path / workdir.CHECKPOINTS / str(step), path / workdir.FROZEN):
        if not folder.is_dir():
            continue
        stored = orbax_steps.stored_arrays(folder / workdir.PARAMS)
        for array_path, array in orbax_steps.restore_on_host(folder / workdir.PARAMS, stored):
            parameter = table[array_path]
            for index, name in np.ndenumerate(parameter.tensors):
                if not _is_time(str(name)):
                    yield _sample(str(name), parameter.to_tensor(array[index]))


def _is_time(name: str) -> bool:
    """Whether a tensor belongs to the time conditioning, which a backbone has not."""
    return name.startswith(("t_embedder.", "t_block.", "scale_shift_tables."))
