"""Checkpoints of any shape with random bits in place of weights."""

import zlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from twotower_jax.checkpoint.folder_writing import Tensor
from twotower_jax.checkpoint.plan import table_places
from twotower_jax.parameters import Parameter, Path

_FLOAT32 = ("A_log", "D", "dt_bias", "e_score_correction_bias")


def tensors_of(table: Mapping[Path, Parameter], seed: int) -> dict[str, Tensor]:
    """A tensor for every name of a table, made when it is read; dtypes are those of the release."""

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        dtype = np.dtype(np.float32 if name.endswith(_FLOAT32) else ml_dtypes.bfloat16)

        def make() -> np.ndarray:
            rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
            values = rng.integers(0, 1 << 16, (*shape, dtype.itemsize // 2), dtype=np.uint16)
            return values.view(dtype).reshape(shape)

        return Tensor(dtype, shape, make)

    return {name: tensor(name, place.parameter.tensor_shape) for name, place in sorted(table_places(table).items())}
