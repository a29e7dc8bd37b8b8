"""What `--checkpoint` takes: a Hugging Face folder, this program's own checkpoint folder, or a training workdir."""

import collections
import pathlib
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from twotower_jax.checkpoint import huggingface, manifest, store, workdir
from twotower_jax.config import ModelConfig, Variant
from twotower_jax.execution import Execution
from twotower_jax.files import check_folder
from twotower_jax.parameters import Params, ShardingOf, parameter_table
from twotower_jax.quantization import METHODS, Method, check_mesh
from twotower_jax.sharding import stored_sharding
from twotower_jax.two_tower import TwoTower

# Bytes on disk.
_SMALL = 256 * 2**20
_WANTED = "give a Hugging Face folder, a converted one or a workdir"


class Loaded(NamedTuple):
    """A model, its parameters in the dtypes stored or quantized, and the folder that holds its tokenizer."""

    model: TwoTower
    params: Params
    tokenizer_folder: pathlib.Path


def load(
    path: str | pathlib.Path,
    variant: Variant | None = None,
    execution: Execution = Execution(),  # noqa: B008 (frozen)
    *,
    mesh: Mesh | None = None,
    sharding: ShardingOf | None = None,
    verify: bool = True,
    quantize: str | None = None,
) -> Loaded:
    """Loads a checkpoint of any kind. A single tower becomes both towers.

    Args:
      path: a Hugging Face folder, a folder written by `launch/convert.py`, or a training workdir (its newest step).
      variant: of the model to make; None takes the one the checkpoint was trained as, or the default.
      execution: how the model is to be computed.
      mesh: where parameters go, each device holding its part (see sharding.py); None for one device. From a converted
        checkpoint or a workdir each host reads what its devices hold and no more.
      sharding: where each parameter goes instead, as generation has it (generation/placement.py).
      verify: compare the files of a converted checkpoint with their recorded hashes first; those of a workdir always
        are.
      quantize: a name of `quantization.METHODS`, by which weights are stored in fewer bits as they are read; None
        takes them as they are, which may be quantized.

    Raises:
      CheckpointError: if the folder is none of these, or is broken.
      ValueError: if there is no such folder, or it cannot be loaded as the variant, quantized so, or onto the mesh.
    """
    if quantize is not None and quantize not in METHODS:
        raise ValueError(f"quantize={quantize!r} is not one of {', '.join(METHODS)}")
    path, method = pathlib.Path(path), METHODS.get(quantize)
    if mesh is not None:
        sharding = lambda p: stored_sharding(mesh, p.axes, p.shape)  # noqa: E731
    check_folder(path, _WANTED)
    if (path / store.MANIFEST).exists():
        model, params = store.load(path, variant, execution, sharding=sharding, verify=verify, quantize=method)
    elif (path / workdir.CHECKPOINTS).exists():
        model, params = workdir.load(path, variant, execution, sharding=sharding, quantize=method)
    else:
        variant = variant or Variant()
        model, params = huggingface.load(path, variant, execution, sharding=sharding, quantize=method)
    if mesh is not None:
        check_mesh(parameter_table(model), params, mesh)
    return Loaded(model, params, path)


class Contents(NamedTuple):
    """What a checkpoint holds, as its headers say.

    Attributes:
      variant: of the model that `load` makes of it.
      shared: whether it is one tower, whose arrays both towers share as they are loaded.
      dtype: of most matrices; None where they may be of several.
    """

    config: ModelConfig
    variant: Variant
    shared: bool
    dtype: np.dtype | None


def contents(path: str | pathlib.Path) -> Contents:
    """Looks into a checkpoint of any kind without reading parameters.

    Raises:
      CheckpointError: if what says it is missing or broken.
      ValueError: if there is no such folder.
    """
    path = pathlib.Path(path)
    check_folder(path, _WANTED)
    if (path / store.MANIFEST).exists():
        return Contents(store.open_store(path).config, Variant(), False, None)
    if (path / workdir.CHECKPOINTS).exists():
        config, variant, single = workdir.described(path)
        return Contents(config, variant, single, np.dtype(np.float32) if single else None)
    folder = huggingface.open_folder(path)
    huggingface.check(folder, huggingface.own_table(folder))
    dtypes = collections.Counter(
        tensor.entry.dtype for tensor in folder.tensors.values() if len(tensor.entry.shape) > 1
    )
    return Contents(folder.config, Variant(), folder.single_tower, max(dtypes, key=dtypes.get, default=None))


def stored_method(path: str | pathlib.Path) -> Method | None:
    """How the weights of a checkpoint of any kind are quantized on disk.

    Raises:
      CheckpointError: if it is a converted one with a broken manifest.
    """
    path = pathlib.Path(path)
    return manifest.read(path).method if (path / store.MANIFEST).exists() else None


def is_small(folder: pathlib.Path) -> bool:
    """Whether a checkpoint, by its size on disk, is computed so quickly that compiling is what takes time.

    Then layers are better stacked and scanned, which compiles fewer of them. But a scan copies each layer's weights out
    of the stack, every time it comes to it, and where they do not stay in a processor's caches that takes several times
    as long as the rest: a token of `ar` with 100 million parameters a tower took 71 ms of processor time, and 11 ms
    with layers one by one.
    """
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < _SMALL
