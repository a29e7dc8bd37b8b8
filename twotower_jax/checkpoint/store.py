"""This program's own checkpoint folder, written by `launch/convert.py`.

conversion.json   what was converted, and the size and SHA-256 of every file (`manifest.py`)
config.json       the model's configuration, as it came
tokenizer.json …  the tokenizer's files, as they came
params/           an Orbax checkpoint of the parameters in the layout of the default `Execution` (`arrays.py`);
                  a quantized matrix is two arrays, …/values and …/scales
"""

import math
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from twotower_jax import layout, parameters
from twotower_jax.checkpoint import arrays, chunks, manifest
from twotower_jax.checkpoint.arrays import PARAMS
from twotower_jax.checkpoint.config_file import read_config
from twotower_jax.checkpoint.manifest import Manifest
from twotower_jax.checkpoint.pipeline import in_order
from twotower_jax.checkpoint.plan import Place, segment_list, table_places
from twotower_jax.checkpoint.quantizing import read_quantized
from twotower_jax.config import ModelConfig, Variant
from twotower_jax.execution import Execution
from twotower_jax.files import CheckpointError, some
from twotower_jax.kernels.numerics.quantized import Quantized
from twotower_jax.parameters import Parameter, Params, Path, ShardingOf, parameter_table, unflatten
from twotower_jax.paths import as_path, in_store
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
    execution: Execution | None = None,
    *,
    sharding: ShardingOf | None = None,
    verify: bool = True,
    quantize: Method | None = None,
) -> tuple[TwoTower, Params]:
    """A converted checkpoint as a two-tower model and its parameters, in the dtypes stored or quantized.

    Args:
      path: the folder.
      variant: None for the default one.
      execution: decides, among other things, whether layers come stacked; None as in `load.load`.
      sharding: where each parameter goes; each host reads what its devices hold, and no more. None for one device.
      verify: compares every file with its recorded hash first.
      quantize: how, where the checkpoint is not quantized already.

    Raises:
      CheckpointError: if anything is missing, broken or changed.
      ValueError: if the variant cannot start from this checkpoint, or it is quantized in another way.
    """
    path = as_path(path)
    variant = variant or Variant()
    store = open_store(path, verify)
    if variant.context == "tied" and store.manifest.kind != "single_tower":
        raise ValueError(f"{path}: context='tied' needs a checkpoint made from one tower; this has two different ones")
    stored = store.manifest.method
    if stored is not None and quantize not in (None, stored):
        raise ValueError(
            f"{path}: is stored as {stored.name}; {quantize.name} is made from a checkpoint that is not quantized"
        )
    if verify and not in_store(path):  # where each chunk is compared as it comes
        manifest.verify(path, store.manifest.files, store.manifest.files)
    model = TwoTower(store.config, variant, execution or layout.decoding(store.config))
    places = table_places(store.table)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def as_stored(parameter: Parameter, part: str | None = None) -> jax.Array:
        read = _reader(store, parameter, places, part)
        parameter = parameter if part is None else stored.parts(parameter)[part]
        return jax.make_array_from_callback(parameter.shape, sharding(parameter) if sharding else device, read)

    def read(parameter: Parameter) -> jax.Array | Quantized:
        if parameter.scales is None or (stored is None and quantize is None):
            return as_stored(parameter)
        if stored is not None:
            bits, _ = stored.layout(parameter)
            made = Quantized(as_stored(parameter, VALUES), as_stored(parameter, SCALES), bits)
            return as_read(parameter, made, next(iter(made.values.sharding.device_set)).platform)
        return read_quantized(parameter, quantize, _reader(store, parameter, places), sharding)

    wanted = parameter_table(model)
    if in_store(path):  # which answers later than a disk: several arrays are on their way
        arrived = in_order(wanted.values(), read, lambda p: 4 * math.prod(p.shape))
        return model, unflatten(dict(zip(wanted, arrived, strict=True)))
    return model, unflatten({path: read(parameter) for path, parameter in wanted.items()})


def _reader(
    store: Store, parameter: Parameter, places: dict[str, Place], part: str | None = None
) -> Callable[[tuple], np.ndarray]:
    """Reads slices of the array on disk that holds `parameter`, or a part of a quantized one, or of the layer of it
    that does."""
    whole, index = places[str(parameter.tensors.flat[0])]
    stored = whole if part is None else store.arrays[*whole.path, part]
    folder = store.path / PARAMS / arrays.folder_name(stored.path)
    layer = () if whole.shape == parameter.shape else (index[0],)
    if in_store(store.path):
        prefix = f"{PARAMS}/{folder.name}/"
        view = chunks.Array(folder, lambda name: store.manifest.files[prefix + name] if store.verified else None)
        _check_shape(folder, view.shape, stored.shape)
        return lambda place: view.read((*layer, *place))
    try:
        view = arrays.open_array(store.path / PARAMS, stored.path)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {str(error).splitlines()[0]}") from None
    _check_shape(folder, view.shape, stored.shape)
    view = view[layer] if layer else view
    return lambda place: view[place].read().result()


def _check_shape(folder: pathlib.Path, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise CheckpointError(f"{folder}: has shape {list(found)}, the model's is {list(expected)}")
