"""How arrays lie on a mesh of devices: its axes, and the rules from logical axes to them.

| mesh axis | what it divides |
|---|---|
| data | the batch; everything else is repeated along it |
| fsdp | the batch; at rest every matrix, or a layer's experts (ZeRO-3: gathered where used, one layer at a time) |
| sequence | the positions of a sequence; what fsdp divides at rest as well |
| expert | the routed experts; the batch and all other matrices at rest as well |
| tensor | heads, Mamba channels, widths of MLPs and experts, the vocabulary |

Parameters carry logical axes (`Parameter.axes`), activations are given theirs where it matters. Both are looked up in
`RULES`. The mesh is the one in force (`jax.set_mesh`); without one, or on one device, nothing here does anything, and
the program is the one that runs on a laptop.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# The names that a config, a flag and a message use; code says the constants. `MeshShape` has a field of each name.
MESH_AXES = DATA, FSDP, SEQUENCE, EXPERT, TENSOR = "data", "fsdp", "sequence", "expert", "tensor"
BATCH = (DATA, FSDP, EXPERT)
# An axis of one device; a mesh that has it leaves the axes of activations named here whole. See `with_whole_rows`.
_WHOLE_ROWS = "whole_rows"
_OF_ROWS = ("batch", "length", "shard")
# A tile of a matrix in a TPU's memory has this many rows, in bfloat16 and float32 alike.
_ROWS_OF_A_TILE = 8

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """The mesh axes that divide a logical axis: of parameters at rest, and of parameters in use and of activations."""

    stored: tuple[str, ...]
    used: tuple[str, ...]


RULES: Mapping[str, Rule] = {
    # Axes of parameters. A mesh axis divides an array once: "embed" has what experts leave it, which is nothing where
    # there are enough of them. Whole experts are then what is gathered, along the first axis of what a device holds,
    # and lie next to one another as they are used, whatever their matrices' sides.
    "layers": Rule((), ()),
    "experts": Rule((EXPERT, FSDP, SEQUENCE), (EXPERT,)),
    "embed": Rule((FSDP, SEQUENCE, EXPERT), ()),
    "vocab": Rule((TENSOR,), (TENSOR,)),
    "heads": Rule((TENSOR,), (TENSOR,)),
    "kv_heads": Rule((TENSOR,), ()),  # few: computed everywhere
    "mamba_in": Rule((TENSOR,), ()),  # z, x, B, C and dt side by side: divided once they are apart
    "mamba_inner": Rule((TENSOR,), (TENSOR,)),
    "mamba_heads": Rule((TENSOR,), (TENSOR,)),
    "mlp": Rule((TENSOR,), (TENSOR,)),
    "expert_mlp": Rule((TENSOR,), (TENSOR,)),
    # Axes of activations.
    "batch": Rule((), BATCH),
    "length": Rule((), (SEQUENCE,)),
    "shard": Rule((), (SEQUENCE,)),  # one entry for each part of a sequence
}


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each axis of the mesh; -1, for one of them, takes all that are left."""

    data: int = 1
    fsdp: int = 1
    sequence: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh: {name}={size} must be at least 1, or -1 for all devices that are left")
        if sum(size == -1 for size in sizes.values()) > 1:
            raise ValueError("mesh: only one axis can be -1")

    def resolve(self, devices: int) -> "MeshShape":
        """With -1 replaced.

        Raises:
          ValueError: if the axes do not multiply to the number of devices.
        """
        sizes = dataclasses.asdict(self)
        given = math.prod(size for size in sizes.values() if size != -1)
        sizes = {name: devices // given if size == -1 else size for name, size in sizes.items()}
        if math.prod(sizes.values()) != devices:
            text = " × ".join(f"{name}={size}" for name, size in dataclasses.asdict(self).items() if size != 1) or "1"
            raise ValueError(f"mesh: {text} does not fit {devices} devices")
        return MeshShape(**sizes)

    @property
    def batch_shards(self) -> int:
        return math.prod(getattr(self, axis) for axis in BATCH)


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices (or of those given), neighbors along "tensor" being nearest to one another.

    Raises:
      ValueError: if the shape does not fit them.
    """
    devices = jax.devices() if devices is None else devices
    shape = shape.resolve(len(devices))
    sizes = tuple(getattr(shape, axis) for axis in MESH_AXES)
    # A mesh axis may take part of an axis of the hardware's own mesh: expert 8 of the 16 by 16 chips of a v6e.
    arranged = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def with_whole_rows(mesh: Mesh) -> Mesh:
    """The same mesh, except that every device computes all rows and positions: for generating a few rows on it.

    Parameters lie as they did, and are gathered and exchanged as they were.
    """
    return Mesh(mesh.devices[..., None], (*MESH_AXES, _WHOLE_ROWS), axis_types=(AxisType.Auto,) * (len(MESH_AXES) + 1))


def check_divides(axis: str, size: int, whole: int, name: str) -> None:
    """Refuses `size` devices along an axis of the mesh for what they cannot divide evenly.

    Raises:
      ValueError: naming the axis and what it does not divide.
    """
    if whole % size:
        raise ValueError(f"mesh: {axis}={size} does not divide {name}={whole}")


def shards(axis: str) -> int:
    """The number of devices along an axis of the mesh in force; 1 without one."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1)


def dividing(*axes: str) -> list[str]:
    """The axes of the mesh in force that divide activations along these logical axes."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    divided = {mesh_axis for axis in axes for mesh_axis in _used(axis, sizes) if sizes.get(mesh_axis, 1) > 1}
    return [axis for axis in MESH_AXES if axis in divided]


def _used(axis: str, sizes: Mapping[str, int]) -> tuple[str, ...]:
    return () if _WHOLE_ROWS in sizes and axis in _OF_ROWS else RULES[axis].used


def _on_mesh() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def spec(axes: Axes, shape: tuple[int, ...], sizes: Mapping[str, int], *, stored: bool = False) -> PartitionSpec:
    """How an array with these logical axes is divided over a mesh of these sizes.

    A dimension takes the mesh axes of its rule, each once per array, as long as their product divides it. Vectors are
    stored whole everywhere: dividing them would save nothing.

    In a matrix at rest, what "embed" takes divides the rows (the last dimension but one) instead, wherever that gives
    every device whole tiles of rows: what is gathered by whole tiles of rows lies in memory as it is used, and TPUs
    copy anything else into place, once per layer and pass. (GPUs want rows, too: they gather along the first axis
    alone.)
    """
    if stored and len(axes) - axes.count("layers") < 2:
        return PartitionSpec()
    taken: set[str] = set()
    parts: list[tuple[str, ...]] = [()] * len(axes)

    def divide(i: int, mesh_axes: tuple[str, ...], multiple: int = 1) -> bool:
        before = parts[i]
        for axis in mesh_axes:
            if axis in taken or sizes.get(axis, 1) == 1:
                continue
            count = math.prod(sizes[taking] for taking in parts[i]) * sizes[axis]
            if shape[i] % (count * multiple) == 0:
                taken.add(axis)
                parts[i] += (axis,)
            elif multiple > 1 and parts[i] == before:
                break  # The first axis is the large one; where it makes no whole tiles, the others alone save little.
        return parts[i] != before

    # The experts' axis first, whatever its place: what it takes is not left for the others. "embed" last, for its rows.
    for i in sorted(range(len(axes)), key=lambda i: (axes[i] != "experts", axes[i] == "embed")):
        if axes[i] is None:
            continue
        mesh_axes = RULES[axes[i]].stored if stored else _used(axes[i], sizes)
        rows = len(axes) - 2
        by_rows = stored and axes[i] == "embed" and axes[rows] not in ("experts", "layers")
        if not (by_rows and divide(rows, mesh_axes, _ROWS_OF_A_TILE)):
            divide(i, mesh_axes)
    return PartitionSpec(*(part or None for part in parts))


def stored_sharding(mesh: Mesh, axes: Axes, shape: tuple[int, ...]) -> NamedSharding:
    """Where a parameter, its gradient and its moments lie."""
    return NamedSharding(mesh, spec(axes, shape, mesh.shape, stored=True))


def batch_sharding(mesh: Mesh, ndim: int = 2) -> NamedSharding:
    """Where a batch of token ids (B, L) lies, or of (B,) anything."""
    return NamedSharding(mesh, PartitionSpec(BATCH, *((SEQUENCE,) if ndim > 1 else ())))


def whole(tree: Any) -> Any:
    """Arrays of computations on meshes, whole on every device, so that every process can read them.

    Without a mesh in force those that this process can read already stay as they are.
    """
    if _on_mesh():
        return _replicate(jax.sharding.get_mesh())(tree)

    def readable(v):
        if not isinstance(v, jax.Array) or v.is_fully_addressable or v.is_fully_replicated:
            return v
        return _replicate(v.sharding.mesh)(v)

    return jax.tree.map(readable, tree)


@functools.cache
def _replicate(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda v: v, out_shardings=NamedSharding(mesh, PartitionSpec()))


def constrain(x: jax.Array, axes: Axes, *, stored: bool = False) -> jax.Array:
    """An activation with its logical axes, laid out so; with `stored`, a gradient, laid out as its parameter is."""
    if not _on_mesh():
        return x
    sizes = jax.sharding.get_abstract_mesh().shape
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, sizes, stored=stored))


def gathered(value: jax.Array, axes: Axes) -> jax.Array:
    """A parameter as it is used: whole but for its experts and widths. Its gradient is summed into where it lies."""
    return _gather(value, axes) if _on_mesh() else value


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(value, axes):
    return constrain(value, axes)


def _gather_forward(value, axes):
    return constrain(value, axes), None


def _gather_backward(axes, _, gradient):
    return (constrain(gradient, axes, stored=True),)


_gather.defvjp(_gather_forward, _gather_backward)


@dataclasses.dataclass(frozen=True)
class AtRest:
    """In `local`: a parameter with these logical axes, which comes as it is stored and is gathered on the device.

    Its gradient is then summed into where it lies by a reduce-scatter, whatever else divides the batch; of a parameter
    that comes gathered, XLA sums all of it on every device.
    """

    axes: Axes


def local(function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
    """`function` on every device's own part of the arrays, which is what kernels want; without a mesh, `function`.

    Args:
      function: of local arrays; it may use collectives over axes that `shards` says to exist.
      inputs: logical axes of every argument, as a prefix of the tree of arguments: tuples of names, or `AtRest`.
      outputs: tuples of names of what it returns. A dimension must be divisible by the devices along its axis.
    """
    if not _on_mesh():
        return function
    sizes = jax.sharding.get_abstract_mesh().shape

    def to_spec(axes, array=None):
        if isinstance(axes, AtRest):
            return jax.tree.map(lambda v: spec(axes.axes, v.shape, sizes, stored=True), array)
        return PartitionSpec(*(tuple(dividing(axis) if axis else ()) or None for axis in axes))

    def on_mesh(*arrays):
        in_specs = jax.tree.map(to_spec, inputs, arrays, is_leaf=is_axes)

        def gather(axes, part, array):
            if not isinstance(axes, AtRest):
                return part
            return jax.tree.map(lambda p, v: _gather_on_device(p, axes.axes, v.shape, sizes), part, array)

        def on_device(*parts):
            return function(*jax.tree.map(gather, inputs, parts, arrays, is_leaf=is_axes))

        out_specs = jax.tree.map(to_spec, outputs, is_leaf=is_axes)
        return jax.shard_map(on_device, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)

    return on_mesh


def _gather_on_device(part: jax.Array, axes: Axes, shape: tuple[int, ...], sizes: Mapping[str, int]) -> jax.Array:
    """The part of a parameter of `shape` that a device uses, of the part that it stores."""
    stored, used = (spec(axes, shape, sizes, stored=at_rest) for at_rest in (True, False))
    for i, (here, wanted) in enumerate(zip(map(_names, stored), map(_names, used), strict=True)):
        if more := here[len(wanted) :]:
            part = jax.lax.all_gather(part, more, axis=i, tiled=True)
    return part


def _names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else part or ()


def is_axes(node: Any) -> bool:
    """Whether this is the logical axes of one array; a NamedTuple of axes is a tree of them."""
    return type(node) is tuple and all(axis is None or isinstance(axis, str) for axis in node)
