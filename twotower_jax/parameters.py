"""One table that names every parameter once.

A module declares each of its arrays through a `Scope`, giving shape, logical axes, initializer and the name of the
tensor in a published checkpoint. Modules are built abstractly (no array exists); `parameter_table` collects the
declarations, and initialization, loading, saving, sharding, freezing and weight decay all read that table.

Parameters themselves are plain nested dictionaries of arrays, keyed as the table's paths; `bind` puts such a
dictionary into a module for one functional call. In place of a matrix there may be a `Quantized` one (quantization.py)
or one with an update beside it (lora.py).
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from twotower_jax import sharding
from twotower_jax.adapted import Adapted
from twotower_jax.kernels.numerics.quantized import Quantized

Path = tuple[str, ...]
Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]
Params = dict[str, Any]

# How a checkpoint stores one tensor, and the same seen from here.
AS_IS, LINEAR, CONV = "as_is", "linear", "conv"
_TO_OURS = {
    AS_IS: lambda w: w,
    LINEAR: lambda w: w.T,  # (out, in) -> (in, out)
    CONV: lambda w: w[:, 0, :].T,  # (channels, 1, width) -> (width, channels)
}
_TO_THEIRS = {AS_IS: lambda w: w, LINEAR: lambda w: w.T, CONV: lambda w: w.T[:, None, :]}


# Which numbers of a matrix (…, K, N) share a scale where it is stored in fewer bits (quantization.py): a group of rows
# in a column, as the routed experts have it, a whole column, or a row.
GROUPS, COLUMNS, ROWS = "groups", "columns", "rows"


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One declared array.

    Attributes:
      path: the keys that lead to it in the nested dictionary of parameters.
      shape: its shape, leading axes "layers" (repeated segments) and "experts" included.
      axes: one logical axis name, or None, for each dimension.
      init: draws an array of a given shape, float32.
      tensors: names in a published checkpoint; their array's shape is that of the leading stacked axes.
      layout: how a checkpoint stores one of those tensors: AS_IS, LINEAR or CONV.
      decay: whether weight decay applies.
      float32: whether it stays float32 when the rest of the model is stored in bfloat16.
      trainable: False for a buffer that no gradient reaches.
      scales: how it may be stored in fewer bits: GROUPS, COLUMNS or ROWS; None for what never is.
      in_backbone: whether a published backbone has it; what it lacks starts from `init`.
      balanced: whether it is a router's bias, which training may move by the load of the experts.
      adaptable: whether an `Adapted` matrix may stand in its place.
    """

    path: Path
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer
    tensors: np.ndarray
    layout: str
    decay: bool
    float32: bool
    trainable: bool
    scales: str | None
    in_backbone: bool
    balanced: bool = False
    adaptable: bool = False

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of one tensor in a published checkpoint."""
        ours = self.shape[self.tensors.ndim :]
        return {AS_IS: ours, LINEAR: ours[::-1], CONV: (ours[-1], 1, ours[0])}[self.layout]

    def from_tensor(self, tensor: np.ndarray) -> np.ndarray:
        """A published tensor in this program's orientation (a view)."""
        return _TO_OURS[self.layout](tensor)

    def to_tensor(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `from_tensor`."""
        return _TO_THEIRS[self.layout](array)


# Where a declared parameter goes.
ShardingOf = Callable[[Parameter], jax.sharding.Sharding]


@dataclasses.dataclass(frozen=True)
class Scope:
    """Where in a published checkpoint a module's tensors live.

    Attributes:
      prefixes: one for each repeat of a stacked segment, or a single one.
      stacked: whether declared arrays get a leading "layers" axis of len(prefixes).
      in_backbone: whether a published backbone has them.
    """

    prefixes: tuple[str, ...]
    stacked: bool = False
    in_backbone: bool = True

    def child(self, name: str) -> "Scope":
        return dataclasses.replace(self, prefixes=tuple(f"{prefix}{name}." for prefix in self.prefixes))

    def declare(
        self,
        tensor: str,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        init: Initializer,
        *,
        layout: str = AS_IS,
        experts: int | None = None,
        decay: bool = True,
        float32: bool = False,
        trainable: bool = True,
        balanced: bool = False,
        scales: str | None = None,
        adaptable: bool = False,
    ) -> nnx.Param:
        """Declares one array and returns it as an abstract `nnx.Param`.

        Args:
          tensor: name below the scope's prefix; with `experts`, `{e}` in it stands for the expert's number.
          shape: without the leading "experts" and "layers" axes, which are added here.
          axes: logical axes, one for each dimension of `shape`.
          init: called with a key and the whole shape, leading axes included.
        """
        if len(axes) != len(shape):
            raise ValueError(f"{tensor}: {len(axes)} logical axes for a shape of {len(shape)} dimensions")
        names = [[prefix + tensor.format(e=e) for e in range(experts or 1)] for prefix in self.prefixes]
        tensors = np.array(names, dtype=object)
        if experts is None:
            tensors = tensors[:, 0]
        else:
            shape, axes = (experts, *shape), ("experts", *axes)
        if self.stacked:
            shape, axes = (len(self.prefixes), *shape), ("layers", *axes)
        else:
            tensors = tensors[0]
        declaration = Parameter(
            *((), shape, axes, init, np.asarray(tensors, dtype=object)),
            *(layout, decay, float32, trainable, scales, self.in_backbone, balanced, adaptable),
        )
        return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), declaration=declaration)


def parameter_table(module: nnx.Module) -> dict[Path, Parameter]:
    """Every parameter of `module` by path, in a fixed order."""
    return {
        path: dataclasses.replace(variable.get_metadata()["declaration"], path=path)
        for path, variable in nnx.to_flat_state(nnx.state(module))
    }


def fresh(table: Mapping[Path, Parameter]) -> dict[Path, Parameter]:
    """The parameters of a table that no backbone has."""
    return {path: parameter for path, parameter in table.items() if not parameter.in_backbone}


def bind[M: nnx.Module](module: M, params: Params) -> M:
    """`module` with `params` for its arrays: a new object, ready for one functional call."""
    return nnx.merge(nnx.graphdef(module), params)


def at_rest(variable: nnx.Param, dtype: jnp.dtype | None = None) -> jax.Array | Quantized | Adapted:
    """The array of a bound parameter, cast, where it is stored: for a `sharding.local` that gathers it (`AtRest`).

    A quantized matrix stays one: only who multiplies with it knows when its numbers are best made of it. A layer that
    declares a parameter with `scales` takes either, and one that is `adaptable` also with an update beside it.
    """
    value = variable.get_value()
    if isinstance(value, Adapted):
        return value if dtype is None else value.cast(dtype)
    return value if dtype is None or isinstance(value, Quantized) else value.astype(dtype)


def use(variable: nnx.Param, dtype: jnp.dtype | None = None) -> jax.Array | Quantized | Adapted:
    """The array of a bound parameter as a layer computes with it: `at_rest`, then gathered from where it is stored."""
    value = at_rest(variable, dtype)
    axes = variable.get_metadata()["declaration"].axes
    # Inside a scan "layers" is gone.
    if isinstance(value, Adapted):
        return value.map_arrays(sharding.gathered, axes[len(axes) - value.ndim :])
    return jax.tree.map(lambda v: sharding.gathered(v, axes[len(axes) - v.ndim :]), value)


def flatten(params: Params) -> dict[Path, Any]:
    """A nested dictionary as a flat one keyed by path."""
    flat = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat.update({(key, *rest): leaf for rest, leaf in flatten(value).items()})
        else:
            flat[(key,)] = value
    return flat


def unflatten(flat: Mapping[Path, Any]) -> Params:
    """The inverse of `flatten`."""
    params: Params = {}
    for path, leaf in flat.items():
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return params


def initialize(table: Mapping[Path, Parameter], key: jax.Array) -> Params:
    """Draws every parameter, float32.

    Each array's key depends on its path alone, so what is drawn for it depends neither on the other parameters nor
    on how the result is sharded.
    """
    return unflatten(
        {
            path: parameter.init(jax.random.fold_in(key, zlib.crc32("/".join(path).encode())), parameter.shape)
            for path, parameter in table.items()
        }
    )


def count(table: Mapping[Path, Parameter]) -> int:
    """The number of parameters."""
    return sum(math.prod(parameter.shape) for parameter in table.values())


def cast(table: Mapping[Path, Parameter], params: Params, dtype: jnp.dtype) -> Params:
    """`params` stored as `dtype`, except those that the table keeps in float32, and quantized ones."""

    def one(path: Path, array: jax.Array | Quantized | Adapted) -> jax.Array | Quantized | Adapted:
        if isinstance(array, Adapted):
            return array.cast(dtype)
        return array if isinstance(array, Quantized) else array.astype(jnp.float32 if table[path].float32 else dtype)

    return unflatten({path: one(path, array) for path, array in flatten(params).items()})


# Initializers, all float32.


def normal(std: float) -> Initializer:
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def constant(value: float) -> Initializer:
    return lambda key, shape: jnp.full(shape, value, jnp.float32)


def uniform(limit: float) -> Initializer:
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -limit, limit)
