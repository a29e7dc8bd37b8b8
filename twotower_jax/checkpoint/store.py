"""This program's own checkpoint folder, written by `launch/convert.py`.

conversion.json   what was converted, and the size and SHA-256 of every file (`manifest.py`)
config.json       the model's configuration, as it came
tokenizer.json …  the tokenizer's files, as they came
params/           an Orbax checkpoint of the parameters in the layout of the default `Execution` (`arrays.py`)
"""

import pathlib
from typing import NamedTuple

import jax
import numpy as np

from twotower_jax import parameters
from twotower_jax.checkpoint import arrays, manifest
from twotower_jax.checkpoint.arrays import PARAMS
from twotower_jax.checkpoint.config_file import read_config
from twotower_jax.checkpoint.files import CheckpointError
from twotower_jax.checkpoint.manifest import Manifest
from twotower_jax.checkpoint.plan import Place, segment_list, table_places
from twotower_jax.config import ModelConfig, Variant
from twotower_jax.parameters import Parameter, Params, Path, parameter_table, unflatten
from twotower_jax.sharding import ShardingOf
from twotower_jax.tower import Execution
from twotower_jax.two_tower import TwoTower

MANIFEST = manifest.NAME


class Store(NamedTuple):
    """A folder whose manifest and configuration have been read.

    Attributes:
      table: the parameters on disk.
      verified: whether files are to be compared with their recorded hashes.
    """

    path: pathlib.Path
    config: ModelConfig
    manifest: Manifest
    table: dict[Path, Parameter]
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
    chunks = {
        f"{PARAMS}/{arrays.chunk_name(parameter, index)}"
        for parameter in table.values()
        for index, _ in np.ndenumerate(parameter.tensors)
    }
    folders = {f"{PARAMS}/{arrays.folder_name(path)}/zarr.json" for path in table}
    missing = sorted((chunks | folders | {"config.json", f"{PARAMS}/_METADATA"}) - set(listed.files))
    if missing:
        raise CheckpointError(f"{path / MANIFEST}: does not list {len(missing)} files: {', '.join(missing)}")
    return Store(path, config, listed, table, verify)


def _is_chunk(name: str) -> bool:
    return name.startswith(f"{PARAMS}/") and pathlib.PurePosixPath(name).name.startswith("c.")


def load(
    path: str | pathlib.Path,
    variant: Variant | None = None,
    execution: Execution = Execution(),  # noqa: B008 (frozen)
    *,
    sharding: ShardingOf | None = None,
    verify: bool = True,
) -> tuple[TwoTower, Params]:
    """A converted checkpoint as a two-tower model and its parameters, in the dtypes stored.

    Args:
      path: the folder.
      variant: None for the default one.
      execution: decides, among other things, whether layers come stacked.
      sharding: where each parameter goes; each host reads what its devices hold, and no more. None for one device.
      verify: compares every file with its recorded hash first.

    Raises:
      CheckpointError: if anything is missing, broken or changed.
      ValueError: if the variant cannot start from this checkpoint.
    """
    path = pathlib.Path(path)
    variant = variant or Variant()
    store = open_store(path, verify)
    if variant.context == "tied" and store.manifest.kind != "single_tower":
        raise ValueError(f"{path}: context='tied' needs a checkpoint made from one tower; this has two different ones")
    if verify:
        manifest.verify(path, store.manifest.files, store.manifest.files)
    model = TwoTower(store.config, variant, execution)
    places = table_places(store.table)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def read(parameter: Parameter) -> jax.Array:
        view = _view(store, parameter, places)
        return jax.make_array_from_callback(
            parameter.shape, sharding(parameter) if sharding else device, lambda place: view[place].read().result()
        )

    return model, unflatten({path: read(parameter) for path, parameter in parameter_table(model).items()})


def _view(store: Store, parameter: Parameter, places: dict[str, Place]):
    """The array on disk that holds `parameter`, or the layer of it that does."""
    stored, index = places[str(parameter.tensors.flat[0])]
    folder = store.path / PARAMS / arrays.folder_name(stored.path)
    try:
        view = arrays.open_array(store.path / PARAMS, stored.path)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {str(error).splitlines()[0]}") from None
    if view.shape != stored.shape:
        raise CheckpointError(f"{folder}: has shape {list(view.shape)}, the model's is {list(stored.shape)}")
    return view if stored.shape == parameter.shape else view[index[0]]
