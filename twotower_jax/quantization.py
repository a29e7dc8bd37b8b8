"""Which weights of a model are stored in fewer bits, and how: `Method`, and the numbers of one tensor, on the host.

    int8    the routed experts in 8 bits, a scale for each group of rows in a column
    int4    the routed experts in 4 bits, a scale for each group of rows in a column

Both store every other matrix in 8 bits: one scale per column for what layers multiply with (so that the scales
can be applied to the product), one scale per row for the embedding (so that a lookup reads its rows alone). Vectors,
the router, the convolutions and the time conditioning stay as they came. Where each one belongs is declared with the
parameter (`Parameter.scales`); kernels/numerics/quantized.py says what a quantized matrix is.

Numbers are made here with NumPy and not on the device, so that a tensor gives the same bits wherever and whenever it
is quantized: when a checkpoint is converted or when it is loaded, for one device or a mesh of any kind.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from twotower_jax.kernels.numerics.quantized import Quantized, group_size
from twotower_jax.parameters import AS_IS, GROUPS, ROWS, Parameter, Params, Path, flatten
from twotower_jax.sharding import RULES

VALUES, SCALES = "values", "scales"
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
VALUE_DTYPE, SCALE_DTYPE = np.dtype(np.int8), _BFLOAT16
_LARGEST = {8: 127, 4: 7}
# What is worked on at a time: it should stay in a core's cache.
_TILE_NUMBERS = 1 << 17


@dataclasses.dataclass(frozen=True)
class Method:
    """A name of `METHODS`, and the bits of the routed experts."""

    name: str
    expert_bits: int

    def layout(self, parameter: Parameter) -> tuple[int, int] | None:
        """Bits, and the rows that share a scale, of a matrix (K, N) that is quantized; None of another parameter.

        Raises:
          ValueError: if the matrix cannot be stored so.
        """
        if parameter.scales is None:
            return None
        rows = parameter.shape[-2]
        if parameter.scales != GROUPS:
            return 8, 1 if parameter.scales == ROWS else rows
        try:
            return self.expert_bits, group_size(rows, self.expert_bits)
        except ValueError as error:
            raise ValueError(f"{self.name} does not fit {'/'.join(parameter.path)}: {error}") from None

    def describe(self, table: Mapping[Path, Parameter]) -> dict[str, Any]:
        """Bits and groups as JSON has them; what they are follows from the name and the model."""
        groups = {p.path[-1]: self.layout(p)[1] for p in table.values() if p.scales == GROUPS}
        return {"method": self.name, "expert_bits": self.expert_bits, "expert_groups": groups, "other_bits": 8}

    def parts(self, parameter: Parameter) -> dict[str, Parameter]:
        """The two arrays of a quantized matrix, declared as parameters themselves: their paths, shapes and tensors.

        They are divided over a mesh as what they stand for is, as far as their shapes go.
        """
        bits, group = self.layout(parameter)
        *leading, rows, columns = parameter.shape
        shapes = {
            VALUES: (*leading, rows * bits // 8, columns),
            SCALES: (*leading, rows // group, 1 if parameter.scales == ROWS else columns),
        }
        return {
            name: dataclasses.replace(parameter, path=(*parameter.path, name), shape=shape, layout=AS_IS, scales=None)
            for name, shape in shapes.items()
        }

    def quantize(self, parameter: Parameter, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values and scales of one tensor (K, N) of a parameter, in this program's orientation; see `quantize`."""
        bits, group = self.layout(parameter)
        return quantize(matrix, bits, group, by_row=parameter.scales == ROWS)


METHODS = {method.name: method for method in (Method("int8", 8), Method("int4", 4))}


def abstract(
    parameter: Parameter, method: Method | None, dtype: np.dtype = _BFLOAT16
) -> jax.ShapeDtypeStruct | Quantized:
    """Shape and dtype of a parameter or of the two arrays of a quantized one; `dtype` of what is neither quantized nor
    has to be float32."""
    if method is None or parameter.scales is None:
        return jax.ShapeDtypeStruct(parameter.shape, np.float32 if parameter.float32 else dtype)
    parts = method.parts(parameter)
    return Quantized(
        jax.ShapeDtypeStruct(parts[VALUES].shape, VALUE_DTYPE),
        jax.ShapeDtypeStruct(parts[SCALES].shape, SCALE_DTYPE),
        method.layout(parameter)[0],
    )


def as_read(parameter: Parameter, matrix: jax.Array | Quantized, platform: str) -> jax.Array | Quantized:
    """A parameter as the kernels of a platform read it without a copy: on TPUs zeros follow quantized experts.

    Where devices divide the matrix by rows or columns it stays as it is.

    Args:
      matrix: its arrays, or shapes without a device.
    """
    if platform != "tpu" or not isinstance(matrix, Quantized) or parameter.scales != GROUPS:
        return matrix
    place = getattr(matrix.values, "sharding", None)
    if place is not None and place.shard_shape(matrix.values.shape)[-2:] != matrix.values.shape[-2:]:
        return matrix
    # Kernels are imported where they are needed.
    from twotower_jax.kernels.experts.tpu import stored

    stored = functools.partial(stored, width_axis=parameter.axes[-2:].index("expert_mlp") - 2)
    return jax.jit(stored)(matrix) if isinstance(matrix.values, jax.Array) else jax.eval_shape(stored, matrix)


def disk_table(table: Mapping[Path, Parameter], method: Method | None) -> dict[Path, Parameter]:
    """The arrays that a checkpoint has of these parameters, quantized ones being two."""
    arrays = {}
    for path, parameter in table.items():
        if method is None or parameter.scales is None:
            arrays[path] = parameter
        else:
            arrays |= {part.path: part for part in method.parts(parameter).values()}
    return arrays


def kind_bytes(table: Mapping[Path, Parameter], method: Method | None) -> dict[str, int]:
    """What a model's weights take, by kind, where all that is not quantized is bfloat16 or has to be float32."""
    sizes = dict.fromkeys(("routed experts", "embeddings and heads", "other matrices", "the rest"), 0)
    for parameter in table.values():
        if parameter.scales is None:
            kind = "the rest"
        elif parameter.scales == GROUPS:
            kind = "routed experts"
        else:
            kind = "embeddings and heads" if "vocab" in parameter.axes else "other matrices"
        sizes[kind] += sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(abstract(parameter, method)))
    return sizes


def check_mesh(table: Mapping[Path, Parameter], params: Params, mesh: Mesh) -> None:
    """Refuses a mesh that would part rows from their scale where experts are divided by rows.

    Raises:
      ValueError: naming the axis and the groups.
    """
    for path, leaf in flatten(params).items():
        if isinstance(leaf, Quantized) and table[path].scales == GROUPS:
            axis = table[path].axes[-2]
            parts, groups = math.prod(mesh.shape.get(name, 1) for name in RULES[axis].used), leaf.groups
            if groups % parts or (parts > 1 and leaf.spare):
                raise ValueError(
                    f"mesh: {' × '.join(RULES[axis].used)}={parts} cuts the groups of {leaf.group} rows of the "
                    f"quantized {'/'.join(path)}, {groups} groups; give the devices to expert or data instead"
                )


def quantize(matrix: np.ndarray, bits: int, group: int, *, by_row: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The nearest matrix of so many bits: |w − value · scale| ≤ scale / 2 (and the rounding of float32).

    The same numbers as `kernels.quantized.quantize`, whose packing they have. Works tile by tile, so that a view of
    any strides is read once and nothing of the matrix's size exists beside the result.

    Args:
      matrix: (K, N), any float dtype, finite.
      bits: 8 or 4.
      group: rows that share a scale in a column; it divides K, and for 4 bits it is even.
      by_row: all columns of a row share the scale instead; group is 1.

    Returns:
      values int8, (K, N) or for 4 bits (K/2, N), and scales bfloat16, (K/group, N), or (K, 1) by row.

    Raises:
      ValueError: if a number is not finite.
    """
    rows, columns = matrix.shape
    values = np.empty((rows * bits // 8, columns), VALUE_DTYPE)
    scales = np.empty((rows // group, 1 if by_row else columns), SCALE_DTYPE)
    height = max(1, _TILE_NUMBERS // columns) if by_row else group
    width = columns if by_row else max(1, _TILE_NUMBERS // group)
    for i in range(0, rows, height):
        for j in range(0, columns, width):
            tile = np.array(matrix[i : i + height, j : j + width], np.float32, order="C")
            largest = np.max(np.abs(tile), axis=1 if by_row else 0, keepdims=True)
            if not np.isfinite(largest).all():
                raise ValueError("holds numbers that are not finite")
            scale = (largest / np.float32(_LARGEST[bits])).astype(SCALE_DTYPE)
            scales[i // group : (i + height) // group, j : j + width] = scale
            scale = scale.astype(np.float32)
            # A scale of 0 is one of zeros, or of numbers so small that they become zeros.
            tile = np.rint(np.divide(tile, scale, out=np.zeros_like(tile), where=scale > 0))
            whole = np.clip(tile, -_LARGEST[bits], _LARGEST[bits]).astype(VALUE_DTYPE)
            if bits == 4:
                low, high = np.split(whole, 2)
                whole = (low & 0xF) | (high << 4)
            start = i * bits // 8
            values[start : start + len(whole), j : j + width] = whole
    return values, scales
