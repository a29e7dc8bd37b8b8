"""On which devices generation runs: both towers on one mesh, or each on its own, and where their parameters lie.

Decoding reads every parameter at each step, so that what training keeps divided and gathers where it is used lies where
it is used here. Of a mesh for generation

| axis | divides |
|---|---|
| data | the rows; every parameter is repeated |
| fsdp | the rows; matrices at rest, gathered at each use: slower, for models that do not fit otherwise |
| expert | the rows; the routed experts |
| tensor | heads and channels, and with them the states; widths of MLPs and experts; the vocabulary |

Keys are few and lie whole on each device of "tensor".
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from twotower_jax import sharding
from twotower_jax.adapted import Adapted
from twotower_jax.config import ModelConfig
from twotower_jax.mesh_check import check_fits
from twotower_jax.parameters import ROWS, Parameter, Params, bind, flatten, parameter_table, unflatten
from twotower_jax.quantization import check_mesh
from twotower_jax.sharding import BATCH, MeshShape, make_mesh
from twotower_jax.two_tower import TwoTower


@dataclasses.dataclass(frozen=True)
class TowerMeshes:
    """The meshes of the two towers.

    Attributes:
      context: the context tower's; None for the default device, or for the mesh in force and parameters as they lie.
      denoiser: the denoiser's, of the same shape and other devices; None where it is together with the context.
    """

    context: Mesh | None = None
    denoiser: Mesh | None = None

    def __post_init__(self):
        if self.denoiser is None:
            return
        if self.context is None or self.context.shape != self.denoiser.shape:
            raise ValueError("towers on devices of their own need two meshes of the same shape")
        if set(self.context.devices.flat) & set(self.denoiser.devices.flat):
            raise ValueError("the meshes of the two towers share a device")

    @property
    def rows(self) -> int:
        """The devices that rows are divided over; a table has a multiple of them."""
        if self.context is None:
            return _shards_in_force()
        return math.prod(self.context.shape[axis] for axis in BATCH)

    @property
    def devices(self) -> list[Any]:
        """All of them."""
        meshes = [mesh for mesh in (self.context, self.denoiser) if mesh is not None]
        return [device for mesh in meshes for device in mesh.devices.flat] or [jax.local_devices()[0]]

    def check(self, config: ModelConfig) -> None:
        """Refuses meshes that do not divide the model.

        Raises:
          ValueError: naming the axis and what it does not divide.
        """
        if self.context is not None:
            shape = MeshShape(**self.context.shape)
            check_fits(shape, config, shape.batch_shards, 1, 1)

    def parameter_sharding(self, parameter: Parameter) -> NamedSharding | None:
        """Where a parameter of a `TwoTower` lies; None for the default device."""
        if self.context is None:
            return None
        apart = self.denoiser is not None and parameter.path[0] in _DENOISER
        return _resting(self.denoiser if apart else self.context, parameter)

    def context_params(self, model: TwoTower, params: Params) -> Params:
        """What the context's mesh needs, moved there: everything, or its own tower where they are apart."""
        if self.context is None:
            return params
        wanted = None if self.denoiser is None else _CONTEXT
        return _on(self.context, model, params, wanted)

    def denoiser_params(self, model: TwoTower, params: Params) -> Params:
        """What the denoiser's own mesh needs; tied towers are copied there."""
        tied = ("context_tower",) if model.variant.context == "tied" else ()
        return _on(self.denoiser, model, params, (*_DENOISER, *tied))


_LANES = 128  # Numbers in a row of a TPU's tile.
_CONTEXT = ("context_tower", "context_head")
_DENOISER = ("denoiser_tower", "denoiser_head", "time")


def _on(mesh: Mesh, model: TwoTower, params: Params, names: tuple[str, ...] | None) -> Params:
    table = parameter_table(model)
    params = {name: part for name, part in params.items() if names is None or name in names}
    check_mesh(table, params, mesh)
    platform = mesh.devices.flat[0].platform

    def put(path, value):
        # A quantized matrix is two arrays, each divided as its own shape allows; an adapted one has more beside it.
        def one(v, axes):
            parameter = dataclasses.replace(table[path], shape=v.shape, axes=axes)
            return jax.device_put(v, row_format(parameter, v.shape, _resting(mesh, parameter), platform))

        if isinstance(value, Adapted):
            return value.map_arrays(one, table[path].axes)
        return jax.tree.map(lambda v: one(v, table[path].axes), value)

    return unflatten({path: put(path, value) for path, value in flatten(params).items()})


def by_rows(model: TwoTower, params: Params) -> Params:
    """The parameters where they are, tables of rows laid down as lookups read them without a copy; see `row_format`."""
    table, done = parameter_table(model), {}

    def one(parameter, v):
        found = row_format(parameter, v.shape, v.sharding, next(iter(v.sharding.device_set)).platform)
        if found is v.sharding:
            return v
        if id(v) not in done:  # Towers may share one.
            done[id(v)] = jax.device_put(v, found)
        return done[id(v)]

    return unflatten(
        {
            path: jax.tree.map(functools.partial(one, table[path]), value) if table[path].scales == ROWS else value
            for path, value in flatten(params).items()
        }
    )


def row_format(
    parameter: Parameter, shape: tuple[int, ...], place: jax.sharding.Sharding, platform: str
) -> Format | jax.sharding.Sharding:
    """Where a parameter's array of this shape lies and, where that has to be said, how.

    XLA lays a matrix down on a TPU so that least of its tiles is empty. Of the embedding of Nano 4B, whose rows of 3136
    do not fill tiles of 128 lanes, it puts the vocabulary along the lanes, and then copies the whole table in every
    program that looks up rows. Said to lie by rows, it takes 2 % more memory and is never copied.
    """
    # Scales of rows, a column of them, lie as they like.
    odd = parameter.scales == ROWS and shape[-1] > 1 and shape[-1] % _LANES
    return Format(Layout(tuple(range(len(shape)))), place) if odd and platform == "tpu" else place


def _resting(mesh: Mesh, parameter: Parameter) -> NamedSharding:
    """As the parameter is used, but for "fsdp", which divides it at rest."""
    sizes = dict(mesh.shape)
    if "experts" not in parameter.axes:
        del sizes[sharding.EXPERT]
    if {"kv_heads", "mamba_in"} & set(parameter.axes):
        del sizes[sharding.TENSOR]  # Used whole.
    return NamedSharding(mesh, sharding.spec(parameter.axes, parameter.shape, sizes, stored=True))


def bind_part(model: TwoTower, params: Params) -> TwoTower:
    """`parameters.bind` of one tower's parameters; the other tower's are not to be used."""
    declared = {path: jax.ShapeDtypeStruct(p.shape, "float32") for path, p in parameter_table(model).items()}
    return bind(model, unflatten(declared | flatten(params)))


def in_force(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """While what is compiled and called is to run on the mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def moved(tree: Any, mesh: Mesh) -> Any:
    """Arrays of another mesh of the same shape, each part on the device of the same place."""

    def move(v):
        spec = v.sharding.spec if isinstance(v.sharding, NamedSharding) else PartitionSpec()
        return jax.device_put(v, NamedSharding(mesh, spec))

    return jax.tree.map(move, tree)


def parse_mesh(words: list[str]) -> MeshShape:
    """From the words of a flag, such as ["expert=4", "tensor=2"].

    Raises:
      ValueError: for a word that is not of this form, or an axis that there is not.
    """
    sizes = {}
    for word in words:
        axis, _, size = word.partition("=")
        if not size.removeprefix("-").isdecimal():
            raise ValueError(f"mesh: {word!r} is not of the form AXIS=DEVICES")
        if axis not in sharding.MESH_AXES:
            raise ValueError(f"mesh: there is no axis {axis!r}; there are {', '.join(sharding.MESH_AXES)}")
        sizes[axis] = int(size)
    return MeshShape(**sizes)


def tower_meshes(shape: MeshShape, *, apart: bool = False) -> TowerMeshes:
    """The placement of a mesh of this shape or, with `apart`, of one for each tower, on the first devices.

    Raises:
      ValueError: if there are too few devices, or the mesh divides sequences.
    """
    devices = jax.devices()
    if -1 in dataclasses.astuple(shape):
        shape = shape.resolve(len(devices) // (2 if apart else 1))
    size = math.prod(dataclasses.astuple(shape))
    needed = size * (2 if apart else 1)
    if needed > len(devices):
        raise ValueError(f"mesh: {'two times ' if apart else ''}{size} devices are more than the {len(devices)} here")
    if shape.sequence > 1:
        raise ValueError(f"mesh: sequence={shape.sequence}: only training divides sequences")
    if apart:
        return TowerMeshes(*(make_mesh(shape, devices[first : first + size]) for first in (0, size)))
    return TowerMeshes(make_mesh(shape, devices[:size]) if size > 1 else None)


def rows_together(batch_size: int, rows: int) -> int:
    """How many of `rows` rows a batch takes: at most `batch_size`, and a multiple of the devices in force."""
    shards = _shards_in_force()
    return -(-min(batch_size, rows) // shards) * shards


def filled_up[T](batch: Sequence[T], batch_size: int, rows: int) -> list[T]:
    """A batch of `rows` rows in all; the last, smaller one is filled up with its last row: it has the same shape."""
    return [*batch, *[batch[-1]] * (rows_together(batch_size, rows) - len(batch))]


def _shards_in_force() -> int:
    return math.prod(sharding.shards(axis) for axis in sharding.dividing("batch"))
