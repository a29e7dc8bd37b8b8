"""Matrices in 8 or 4 bits: whole numbers, and one scale for each group of rows in each column.

A matrix (rows, columns) is contracted over its rows. They are cut into groups; within a group, a column's numbers are

    w ≈ value · scale,    scale = max |w| / 127 (8 bits) or / 7 (4 bits),    value = round(w / scale),

symmetric: −127 … 127 or −7 … 7. Leading axes (experts, layers) are carried along.

Two numbers of 4 bits share one int8. The low half of a byte holds a row of the first half of a group, the high half the
row as far into the second half: taken apart, they are two contiguous pieces. (Not `jnp.int4`, which CPUs get wrong.)

Zeros may follow a matrix, and rows without meaning its scales (`padded`): hardware that moves whole tiles
then reads the arrays as they lie.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

_LARGEST = {8: 127, 4: 7}
_GROUP = 64


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["bits", "spare"])
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Stands for a matrix (…, rows, columns), `dequantize` gives it.

    A pytree; `q[i]` indexes leading axes, of both arrays.

    Attributes:
      values: int8, (…, rows, columns) for 8 bits, (…, rows/2, columns) for 4.
      scales: float32 or bfloat16, (…, rows/group + spare, columns).
      bits: 8 or 4.
      spare: rows of scales after the last group's, which stand for nothing.
    """

    values: jax.Array
    scales: jax.Array
    bits: int
    spare: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix that this stands for, (…, rows, columns)."""
        *leading, rows, columns = self.values.shape
        return (*leading, rows * 8 // self.bits, columns)

    @property
    def ndim(self) -> int:
        return len(self.values.shape)

    @property
    def groups(self) -> int:
        """Groups of rows."""
        return self.scales.shape[-2] - self.spare

    @property
    def group(self) -> int:
        """Rows that share a scale."""
        return self.shape[-2] // self.groups

    def __getitem__(self, index) -> "Quantized":
        return jax.tree.map(lambda v: v[index], self)


def group_size(width: int, bits: int) -> int:
    """Rows per group for a matrix of `width` rows: 64 if that divides it, else its largest divisor below.

    For 4 bits the divisor is even. 1856 = 29 · 64 and 2688 = 42 · 64 get 64.

    Raises:
      ValueError: for 4 bits and an odd width, or bits other than 8 and 4.
    """
    _check_bits(bits)
    for group in range(min(_GROUP, width), 0, -1):
        if width % group == 0 and (bits == 8 or group % 2 == 0):
            return group
    raise ValueError(f"a matrix of {width} rows cannot be cut into groups for {bits} bits: it needs an even number")


def quantize(
    w: Float[ArrayLike, "*leading rows columns"], bits: int, group: int, *, scale_dtype=jnp.float32
) -> Quantized:
    """The nearest matrix with so many bits: |w − ŵ| ≤ scale / 2 (and the rounding of float32).

    Rounds w / scale in float32 to the nearest whole number, halves to the even one, for the scale as it is stored.
    A group of zeros in a column has scale 0 and stays exactly zero.

    Args:
      w: (…, rows, columns), any float dtype, finite.
      bits: 8 or 4.
      group: rows that share a scale; see `group_size`.
      scale_dtype: float32 or bfloat16.

    Raises:
      ValueError: if `group` does not divide the rows, or is odd for 4 bits; or for other bits.
    """
    _check_bits(bits)
    *leading, rows, columns = w.shape
    if group < 1 or rows % group:
        raise ValueError(f"groups of {group} rows do not divide a matrix of {rows}; see quantized.group_size")
    if bits == 4 and group % 2:
        raise ValueError(f"a group of {group} rows is odd; for 4 bits, two of a group's rows share a byte")
    grouped = jnp.asarray(w).astype(jnp.float32).reshape(*leading, rows // group, group, columns)
    scales = (jnp.max(jnp.abs(grouped), axis=-2) / _LARGEST[bits]).astype(scale_dtype)
    scale = scales.astype(jnp.float32)[..., None, :]
    # Below the smallest normal number a scale may round to nothing; there the matrix is nothing as well.
    values = jnp.where(scale > 0, jnp.round(grouped / jnp.where(scale > 0, scale, 1)), 0)
    values = jnp.clip(values, -_LARGEST[bits], _LARGEST[bits]).astype(jnp.int8)
    if bits == 4:
        low, high = jnp.split(values, 2, axis=-2)
        values = (low & 0xF) | (high << 4)
    return Quantized(values.reshape(*leading, rows * bits // 8, columns), scales, bits)


def dequantize(q: Quantized, dtype: jax.typing.DTypeLike) -> Float[Array, "*leading rows columns"]:
    """The matrix (…, rows, columns): value · scale in float32, rounded to `dtype`."""
    *leading, rows, columns = q.shape
    values, scales = q.values, q.scales[..., : q.groups, :]
    if q.bits == 4:
        values = values.reshape(*leading, q.groups, q.group // 2, columns)
        # Shifts of int8 keep the sign.
        values = jnp.concatenate([(values << 4) >> 4, values >> 4], axis=-2)
    values = values.reshape(*leading, q.groups, q.group, columns).astype(jnp.float32)
    return (values * scales.astype(jnp.float32)[..., None, :]).reshape(*leading, rows, columns).astype(dtype)


def padded(q: Quantized, rows: int = 0, columns: int = 0, scale_rows: int = 1) -> Quantized:
    """The matrix with so many rows and columns of zeros after it, and rows of scales to a multiple of `scale_rows`.

    Args:
      q: stands for (…, k, n).
      rows: a multiple of the group. columns: any number.

    Returns:
      stands for (…, k + rows, n + columns).

    Raises:
      ValueError: if `rows` is no multiple of the group.
    """
    if rows % q.group:
        raise ValueError(f"{rows} rows of zeros are no whole groups of {q.group}")
    groups = q.groups + rows // q.group
    spare = -groups % scale_rows

    def pad(v, rows):
        return jnp.pad(v, [(0, 0)] * (v.ndim - 2) + [(0, rows), (0, columns)])

    return Quantized(
        pad(q.values, rows * q.bits // 8), pad(q.scales[..., : q.groups, :], groups + spare - q.groups), q.bits, spare
    )


def as_array(w: Float[Array, "..."] | Quantized, dtype: jax.typing.DTypeLike) -> Float[Array, "..."]:
    """w in `dtype`, whichever way it is stored."""
    return dequantize(w, dtype) if isinstance(w, Quantized) else w.astype(dtype)


def _check_bits(bits: int) -> None:
    if bits not in _LARGEST:
        raise ValueError(f"{bits} bits are not supported; there are 8 and 4")
