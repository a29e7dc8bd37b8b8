"""What `--checkpoint` takes: a Hugging Face folder, this program's own checkpoint folder, or a training workdir."""

import collections
import pathlib
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from twotower_jax import lora, randomness
from twotower_jax.checkpoint import adapter as adapters
from twotower_jax.checkpoint import huggingface, manifest, store, workdir, workdir_model
from twotower_jax.config import ModelConfig, Variant
from twotower_jax.execution import Execution
from twotower_jax.files import check_folder
from twotower_jax.parameters import Params, ShardingOf, parameter_table
from twotower_jax.paths import as_path
from twotower_jax.quantization import METHODS, Method, check_mesh
from twotower_jax.sharding import stored_sharding
from twotower_jax.two_tower import TwoTower, from_backbone

_WANTED = "give a Hugging Face folder, a converted one or a workdir"


class Loaded(NamedTuple):
    """A model, its parameters in the dtypes stored or quantized, and the folder that holds its tokenizer."""

    model: TwoTower
    params: Params
    tokenizer_folder: pathlib.Path


def load(
    path: str | pathlib.Path,
    variant: Variant | None = None,
    execution: Execution | None = None,
    *,
    mesh: Mesh | None = None,
    sharding: ShardingOf | None = None,
    verify: bool = True,
    quantize: str | None = None,
    adapter: str | pathlib.Path | None = None,
    adapter_tower: str | None = None,
) -> Loaded:
    """Loads a checkpoint of any kind. A single tower becomes both towers; an adapter's workdir becomes its base with
    the adapter beside it.

    Args:
      path: a Hugging Face folder, a folder written by `launch/convert.py`, or a training workdir (its newest step).
      variant: of the model to make; None takes the one the checkpoint was trained as, or the default.
      execution: how the model is to be computed; None for float32, its layers laid out as layout.py says.
      mesh: where parameters go, each device holding its part (see sharding.py); None for one device. From a converted
        checkpoint or a workdir each host reads what its devices hold and no more.
      sharding: where each parameter goes instead, as generation has it (generation/placement.py).
      verify: compare the files of a converted checkpoint with their recorded hashes first; those of a workdir always
        are.
      quantize: a name of `quantization.METHODS`, by which weights are stored in fewer bits as they are read; None
        takes them as they are, which may be quantized; of an adapter's workdir, as it was trained.
      adapter: a folder of PEFT's files, put beside the weights (checkpoint/adapter.py).
      adapter_tower: which tower an adapter of a backbone changes, one of `choices.APPLIED_TO`; None takes both where
        the checkpoint is a backbone, else the context tower.

    Raises:
      CheckpointError: if the folder is none of these, or is broken.
      ValueError: if there is no such folder, or it cannot be loaded as the variant, quantized so, or onto the mesh.
    """
    if quantize is not None and quantize not in METHODS:
        raise ValueError(f"quantize={quantize!r} is not one of {', '.join(METHODS)}")
    path, method = as_path(path), METHODS.get(quantize)
    if mesh is not None:
        sharding = lambda p: stored_sharding(mesh, p.axes, p.shape)  # noqa: E731
    check_folder(path, _WANTED)
    base = workdir.read_base(path)
    found = None if adapter is None else read_adapter(adapter, path)
    if base is not None:
        model, params = _load_adapted(path, base, variant, execution, sharding, verify, method or stored_method(path))
    elif (path / store.MANIFEST).exists():
        model, params = store.load(path, variant, execution, sharding=sharding, verify=verify, quantize=method)
    elif (path / workdir.CHECKPOINTS).exists():
        model, params = workdir_model.load(path, variant, execution, sharding=sharding, quantize=method)
    else:
        variant = variant or Variant()
        model, params = huggingface.load(path, variant, execution, sharding=sharding, quantize=method)
    if found is not None:
        params = beside(found, model, params, path, adapter_tower, sharding)
    if mesh is not None:
        check_mesh(parameter_table(model), params, mesh)
    return Loaded(model, params, path)


def read_adapter(folder: str | pathlib.Path, checkpoint: str | pathlib.Path) -> adapters.Adapter:
    """The adapter of a folder of PEFT's files, which is of this checkpoint as far as can be told.

    Raises:
      CheckpointError, ValueError: see `adapter.read` and `adapter.check_base`; also if the checkpoint has one already.
    """
    checkpoint = as_path(checkpoint)
    if (base := workdir.read_base(checkpoint)) is not None:
        raise ValueError(f"{checkpoint}: holds an adapter already; give its base, {base.checkpoint}, as the checkpoint")
    found = adapters.read(as_path(folder))
    adapters.check_base(found, checkpoint)
    return found


def beside(
    adapter: adapters.Adapter,
    model: TwoTower,
    params: Params,
    checkpoint: str | pathlib.Path,
    tower: str | None = None,
    sharding: ShardingOf | None = None,
) -> Params:
    """The parameters of a loaded checkpoint with an adapter beside them; what it does not change is shared.

    Args:
      tower: see `adapter.towers_of`. sharding: where the adapter's arrays go.

    Raises:
      CheckpointError: if it does not fit the model.
    """
    towers = adapters.towers_of(adapter, is_backbone(as_path(checkpoint)), tower)
    if model.variant.context == "tied":
        towers = towers[:1] and ("context",)
    return lora.attach(params, adapters.fit(adapter, parameter_table(model), towers, sharding), adapter.scale)


def _load_adapted(
    path: pathlib.Path,
    base: workdir.Base,
    variant: Variant | None = None,
    execution: Execution | None = None,
    sharding: ShardingOf | None = None,
    verify: bool = True,
    quantize: Method | None = None,
) -> tuple[TwoTower, Params]:
    """The base of an adapter's workdir, and the adapter beside it."""
    found, source = adapters.from_workdir(path), base_folder(path, base)
    adapters.check_base(found, source)
    _, trained_as, single = workdir.described(path)
    variant, method = variant or trained_as, None if quantize is None else quantize.name
    model, params, _ = load(source, variant, execution, sharding=sharding, verify=verify, quantize=method)
    if single:
        # What a backbone's run took of the base was the context tower; now it becomes both again.
        backbone = {"tower": params["context_tower"], "head": params["context_head"]}
        params = from_backbone(model, backbone, randomness.key(0))
    # A backbone's changes both towers that it becomes, if there are two.
    towers = ("context", "denoiser")[: 1 if variant.context == "tied" else 2] if single else ()
    return model, lora.attach(params, adapters.fit(found, parameter_table(model), towers, sharding), found.scale)


def load_merged(
    path: str | pathlib.Path, adapter: str | pathlib.Path | None = None, adapter_tower: str | None = None
) -> Loaded:
    """As `load`, with one matrix in place of each that has an update beside it (`lora.merged`).

    The update is added to the matrices that the base has on disk, also where it was trained beside quantized ones.
    """
    path = as_path(path)
    if adapter is None and path.is_dir() and (base := workdir.read_base(path)) is not None:
        loaded = Loaded(*_load_adapted(path, base), path)
    else:
        loaded = load(path, adapter=adapter, adapter_tower=adapter_tower)
    return loaded._replace(params=lora.merged(loaded.params))


def base_folder(path: pathlib.Path, base: workdir.Base) -> pathlib.Path:
    """Where the base of an adapter's workdir lies.

    Raises:
      ValueError: if it is not where it was.
    """
    folder = as_path(base.checkpoint)
    if not folder.is_dir():
        raise ValueError(
            f"{path}: its base is not at {folder} any more; put it back, or export the adapter (launch/export.py "
            "--adapter) and give it beside the base (--adapter=DIR)"
        )
    return folder


def is_backbone(path: pathlib.Path) -> bool:
    """Whether a checkpoint was made from one tower, which nothing has changed since."""
    if (path / store.MANIFEST).exists():
        return manifest.read(path).kind == "single_tower"
    return contents(path).shared


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
    path = as_path(path)
    check_folder(path, _WANTED)
    if (path / store.MANIFEST).exists():
        return Contents(store.open_store(path).config, Variant(), False, None)
    if (base := workdir.read_base(path)) is not None:
        _, variant, single = workdir.described(path)
        of_base = contents(base_folder(path, base))
        return of_base._replace(variant=of_base.variant if single else variant)
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
    path = as_path(path)
    if workdir.read_base(path) is not None:
        return METHODS.get(workdir.read_settings(path)["lora"]["base"])
    return manifest.read(path).method if (path / store.MANIFEST).exists() else None
