"""This program's own checkpoint folder, written by `launch/convert.py`.

conversion.json   what was converted, and the size and SHA-256 of every file (`manifest.py`)
config.json       the model's configuration, as it came
tokenizer.json …  the tokenizer's files, as they came
params/           an Orbax checkpoint of the parameters in the layout of the default `Execution` (`arrays.py`);
                  a quantized matrix is two arrays, …/values and …/scales
"""

import pathlib
from typing import NamedTuple

import jax
import numpy as np

from twotower_jax import parameters
from twotower_jax.checkpoint import arrays, manifest
from twotower_jax.checkpoint.arrays import PARAMS
from twotower_jax.checkpoint.config_file import read_config
from twotower_jax.checkpoint.manifest import Manifest
from twotower_jax.checkpoint.plan import Place, segment_list, table_places
from twotower_jax.checkpoint.quantizing import read_quantized
from twotower_jax.config import ModelConfig, Variant
from twotower_jax.execution import Execution
from twotower_jax.files import CheckpointError, some
from twotower_jax.kernels.numerics.quantized import Quantized
from twotower_jax.parameters import Parameter, Params, Path, ShardingOf, parameter_table, unflatten
from twotower_jax.quantization import SCALES, VALUES, Method, as_read, disk_table
from twotower_jax.two_tower import TwoTower

MANIFEST = manifest.NAME


class Store(NamedTuple):
    """A folder whose manifest and configuration have been read.

    Attributes:
      table: the parameters on disk.
      arrays: the arrays on disk, which are those of `table` unless matrices are quantized.
      verified: whether files are to be compared with their recorded hashes.
    """

    path: pathlib.Path
    config: ModelConfig
    manifest: Manifest
    table: dict[Path, Parameter]
    arrays: dict[Path, Parameter]
    verified: bool


def open_store(path: pathlib.Path, verify: bool = True) -> Store:
    """Reads manifest and configuration; no parameter yet.

    Raises:
      CheckpointError: if they are broken or contradict each other.
    """
    listed = manifest.read(path)
    small = [name for name in listed.files if not _is_chunk(name)]
    if verify:
        manifest.verify(path, listed.files, small)
    config = read_config(path)
    if listed.segments != segment_list(config):
        raise CheckpointError(
            f"{path / MANIFEST}: its arrays are laid out as {listed.segments}, this program has "
            f"{segment_list(config)}; convert the source again"
        )
    table = parameter_table(TwoTower(config))
    expected = (parameters.count(table), sum(parameter.tensors.size for parameter in table.values()))
    if (listed.parameters, listed.tensors) != expected:
        raise CheckpointError(
            f"{path / MANIFEST}: counts {listed.parameters} parameters in {listed.tensors} tensors; the model of "
            f"config.json has {expected[0]} in {expected[1]}"
        )
    if listed.method is not None and listed.quantization != listed.method.describe(table):
        raise CheckpointError(
            f"{path / MANIFEST}: its weights are quantized as {listed.quantization}, this program has "
            f"{listed.method.describe(table)}; convert the source again"
        )
    on_disk = disk_table(table, listed.method)
    chunks = {
        f"{PARAMS}/{arrays.chunk_name(parameter, index)}"
        for parameter in on_disk.values()
        for index, _ in np.ndenumerate(parameter.tensors)
    }
    folders = {f"{PARAMS}/{arrays.folder_name(path)}/zarr.json" for path in on_disk}
    missing = sorted((chunks | folders | {"config.json", f"{PARAMS}/_METADATA"}) - set(listed.files))
    if missing:
        raise CheckpointError(f"{path / MANIFEST}: does not list {len(missing)} files: {some(missing)}")
    return Store(path, config, listed, table, on_disk, verify)


def _is_chunk(name: str) -> bool:
    return name.startswith(f"{PARAMS}/") and pathlib.PurePosixPath(name).name.startswith("c.")


def load(
    path: str | pathlib.Path,
    variant: Variant | None = None,
    execution: Execution = Execution(),  # noqa: B008 (frozen)
    *,
    sharding: ShardingOf | None = None,
    verify: bool = True,
    quantize: Method | None = None,
) -> tuple[TwoTower, Params]:
    """A converted checkpoint as a two-tower model and its parameters, in the dtypes stored or quantized.

    Args:
      path: the folder.
      variant: None for the default one.
      execution: decides, among other things, whether layers come stacked.
      sharding: where each parameter goes; each host reads what its devices hold, and no more. None for one device.
      verify: compares every file with its recorded hash first.
      quantize: how, where the checkpoint is not quantized already.

    Raises:
      CheckpointError: if anything is missing, broken or changed.
      ValueError: if the variant cannot start from this checkpoint, or it is quantized in another way.
    """
    path = pathlib.Path(path)
    variant = variant or Variant()
    store = open_store(path, verify)
    if variant.context == "tied" and store.manifest.kind != "single_tower":
        raise ValueError(f"{path}: context='tied' needs a checkpoint made from one tower; this has two different ones")
    stored = store.manifest.method
    if stored is not None and quantize not in (None, stored):
        raise ValueError(
            f"{path}: is stored as {stored.name}; {quantize.name} is made from a checkpoint that is not quantized"
        )
    if verify:
        manifest.verify(path, store.manifest.files, store.manifest.files)
    model = TwoTower(store.config, variant, execution)
    places = table_places(store.table)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def as_stored(parameter: Parameter, part: str | None = None) -> jax.Array:
        view = _view(store, parameter, places, part)
        parameter = parameter if part is None else stored.parts(parameter)[part]
        return jax.make_array_from_callback(
            parameter.shape, sharding(parameter) if sharding else device, lambda place: view[place].read().result()
        )

    def read(parameter: Parameter) -> jax.Array | Quantized:
        if parameter.scales is None or (stored is None and quantize is None):
            return as_stored(parameter)
        if stored is not None:
            bits, _ = stored.layout(parameter)
            made = Quantized(as_stored(parameter, VALUES), as_stored(parameter, SCALES), bits)
            return as_read(parameter, made, next(iter(made.values.sharding.device_set)).platform)
        view = _view(store, parameter, places)
        return read_quantized(parameter, quantize, lambda index: view[index].read().result(), sharding)

    return model, unflatten({path: read(parameter) for path, parameter in parameter_table(model).items()})


def _view(store: Store, parameter: Parameter, places: dict[str, Place], part: str | None = None):
    """The array on disk that holds `parameter`, or a part of a quantized one, or the layer of it that does."""
    whole, index = places[str(parameter.tensors.flat[0])]
    stored = whole if part is None else store.arrays[*whole.path, part]
    folder = store.path / PARAMS / arrays.folder_name(stored.path)
    try:
        view = arrays.open_array(store.path / PARAMS, stored.path)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {str(error).splitlines()[0]}") from None
    if view.shape != stored.shape:
        raise CheckpointError(f"{folder}: has shape {list(view.shape)}, the model's is {list(stored.shape)}")
    return view if whole.shape == parameter.shape else view[index[0]]
