"""LoRA: which matrices of a model get an update of low rank, what it starts from, and how it is put beside them.

An adapter is a table of parameters derived from the model's own: for each matrix that a pattern names, A (in, r) and
B (r, out), declared as everything is declared, with axes, initializers and published names. Initialization, the mesh,
the optimizer and saving therefore know nothing of it. In a nested dictionary they lie next to the matrix, as `lora_a`
and `lora_b`; `attach` makes one `Adapted` value of the three, `merged` one matrix.

The update is scale · A · B with scale = alpha / r. A starts from Xavier's normal distribution, B from zeros (NVIDIA's
recipe for Nemotron), so that a fresh adapter changes nothing.
"""

import dataclasses
import fnmatch
import math
import zlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from twotower_jax import randomness
from twotower_jax.adapted import Adapted
from twotower_jax.kernels.numerics.quantized import Quantized, as_array
from twotower_jax.parameters import Parameter, Params, Path, constant, flatten, normal, unflatten
from twotower_jax.quantization import METHODS, Method

A, B = "lora_a", "lora_b"
# As PEFT names the tensors.
TENSOR_A, TENSOR_B = "lora_A.weight", "lora_B.weight"
_WEIGHT = ".weight"
# NVIDIA's for Nemotron: projections of attention and Mamba-2, dense MLPs and the experts' shared one.
TARGETS = "q_proj,k_proj,v_proj,o_proj,in_proj,out_proj,up_proj,down_proj"
BASES = ("float32", "bfloat16", *METHODS)


@dataclasses.dataclass(frozen=True)
class Lora:
    """The settings of an adapter that trains.

    Attributes:
      rank: r; 0 is no adapter.
      alpha: the update counts alpha / r.
      targets: patterns of module names, separated by commas, each the end of a name from a dot on; `*` stands for
        anything: "in_proj", "mixer.*_proj", "denoiser_tower.layers.3.mixer.q_proj".
      dropout: the share of an update's inputs that a training step leaves out.
      base: how the matrices that do not train are stored, one of `BASES`; "" for the dtype of activations.

    Raises:
      ValueError: at construction, for values that cannot be.
    """

    rank: int = 0
    alpha: float = 32.0
    targets: str = TARGETS
    dropout: float = 0.0
    base: str = ""

    def __post_init__(self):
        if self.rank < 0:
            raise ValueError(f"lora.rank={self.rank} must not be negative; 0 trains all parameters, without an adapter")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha={self.alpha} must be positive")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout} must be at least 0 and less than 1")
        if self.base and self.base not in BASES:
            raise ValueError(f"lora.base={self.base!r} is not one of {', '.join(BASES)}")
        if not all(self.patterns):
            raise ValueError(f"lora.targets={self.targets!r} holds an empty pattern")

    @property
    def patterns(self) -> tuple[str, ...]:
        return tuple(pattern.strip() for pattern in self.targets.split(","))

    @property
    def scale(self) -> float:
        return self.alpha / max(self.rank, 1)

    @property
    def method(self) -> Method | None:
        """By which the base is quantized, if it is."""
        return METHODS.get(self.base)


def module_name(tensor: str) -> str:
    """The module that a matrix belongs to, by the matrix's published name."""
    return tensor.removesuffix(_WEIGHT)


def parts(parameter: Parameter, rank: int) -> dict[str, Parameter]:
    """The two matrices beside an adaptable one, declared as parameters themselves."""
    *leading, fan_in, fan_out = parameter.shape
    *stacked, axis_in, axis_out = parameter.axes
    sides = {
        A: ((fan_in, rank), (axis_in, None), normal(math.sqrt(2 / (fan_in + rank))), TENSOR_A),
        B: ((rank, fan_out), (None, axis_out), constant(0.0), TENSOR_B),
    }
    return {
        name: dataclasses.replace(
            parameter,
            path=(*parameter.path[:-1], name),
            shape=(*leading, *shape),
            axes=(*stacked, *axes),
            init=init,
            tensors=_renamed(parameter.tensors, tensor),
            scales=None,
            in_backbone=False,
            adaptable=False,
        )
        for name, (shape, axes, init, tensor) in sides.items()
    }


def _renamed(tensors: np.ndarray, ending: str) -> np.ndarray:
    return np.array([f"{module_name(str(name))}.{ending}" for name in tensors.flat], object).reshape(tensors.shape)


def adapter_table(
    table: Mapping[Path, Parameter], rank: int, patterns: Iterable[str] = tuple(TARGETS.split(","))
) -> dict[Path, Parameter]:
    """The parameters of an adapter of those matrices of a table that the patterns name.

    Raises:
      ValueError: if a pattern names none (of `TARGETS` all together), or only some of the layers that are stacked in
        one array; or if the rank is more than a matrix has.
    """
    patterns = tuple(patterns)
    adaptable = {path: p for path, p in table.items() if p.adaptable and p.trainable}
    used, found = set(), {}
    for parameter in adaptable.values():
        names = [module_name(str(name)) for name in parameter.tensors.flat]
        hits = [{pattern for pattern in patterns if _matches(name, pattern)} for name in names]
        used |= set().union(*hits)
        if not any(hits):
            continue
        if not all(hits):
            inside, outside = (next(n for n, hit in zip(names, hits, strict=True) if bool(hit) is wanted)
                               for wanted in (True, False))  # fmt: skip
            raise ValueError(
                f"lora.targets names {inside} and not {outside}, and the two are stacked in one array; name all of "
                f"its layers or none, such as {inside.rpartition('.')[2]}"
            )
        if rank > min(parameter.shape[-2:]):
            raise ValueError(
                f"lora.rank={rank} is more than the matrix of {names[0]} has, {min(parameter.shape[-2:])}; take less"
            )
        found |= {part.path: part for part in parts(parameter, rank).values()}
    unused = [pattern for pattern in patterns if pattern not in used]
    if not found or unused and patterns != tuple(TARGETS.split(",")):
        possible = sorted({module_name(str(p.tensors.flat[0])).rpartition(".")[2] for p in adaptable.values()})
        raise ValueError(
            f"lora.targets: {', '.join(unused)} {'matches' if len(unused) == 1 else 'match'} nothing that an adapter "
            f"can change here; there are {', '.join(possible) or 'no such matrices'}"
        )
    return found


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def split(params: Params) -> tuple[Params, Params]:
    """An adapter that lies beside its base in one dictionary, and the base alone."""
    flat = flatten(params)
    ours = {path: v for path, v in flat.items() if path[-1] in (A, B)}
    return unflatten(ours), unflatten({path: v for path, v in flat.items() if path not in ours})


class Dropout(NamedTuple):
    """What rows need for dropout: its rate; `keys` (R, 2) uint32, each row's; and the adapter's table, by whose names
    each layer gets keys of its own."""

    rate: float
    keys: UInt32[Array, "R 2"]
    table: Mapping[Path, Parameter]

    def keys_of(self, path: Path) -> UInt32[Array, "*layers R 2"]:
        """The keys of the matrix whose A has this path: by the rows' keys and the layer's published name alone."""
        names = self.table[path].tensors
        hashes = jnp.asarray(np.array([zlib.crc32(str(n).encode()) for n in names.flat], np.uint32))

        def one(name: jax.Array, row: jax.Array) -> jax.Array:
            key = jax.random.wrap_key_data(row, impl=randomness.IMPLEMENTATION)
            return jax.random.key_data(jax.random.fold_in(key, name))

        keys = jax.vmap(jax.vmap(one, (None, 0)), (0, None))(hashes, self.keys)
        return keys.reshape(*names.shape, *self.keys.shape)


def attach(params: Params, adapter: Params, scale: float, dropout: Dropout | None = None) -> Params:
    """The base's parameters with an `Adapted` value in place of each matrix that the adapter is of; no array is copied.

    Args:
      adapter: of paths as `adapter_table` has them.
      dropout: of a training step.
    """
    flat, beside = flatten(params), flatten(adapter)
    for path in [path for path in beside if path[-1] == A]:
        weight = (*path[:-1], "weight")
        keys = None if dropout is None else dropout.keys_of(path)
        rate = 0.0 if dropout is None else dropout.rate
        flat[weight] = Adapted(flat[weight], beside[path], beside[*path[:-1], B], keys, scale, rate)
    return unflatten(flat)


def merged(params: Params) -> Params:
    """Parameters with one matrix in place of each `Adapted` one: base + scale · A · B, summed in float32 and rounded
    to the base's dtype.

    Raises:
      ValueError: for a quantized base, which would have to be rounded to its scales once more.
    """

    def one(path: Path, value):
        if not isinstance(value, Adapted):
            return value
        if isinstance(value.base, Quantized):
            raise ValueError(f"{'/'.join(path)}: is quantized; an update is added to the matrix that it was made from")
        a, b = (as_array(v, jnp.float32) for v in (value.a, value.b))
        update = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        return (value.base.astype(jnp.float32) + value.scale * update).astype(value.base.dtype)

    return unflatten({path: one(path, value) for path, value in flatten(params).items()})
