"""The tensors of a small checkpoint, packed so that it can travel with a program: some five bits for each number.

Each row of a matrix is rounded to whole multiples of a step of its own, w ≈ step · q, where step = coarseness · (root
mean square of the row). The q of a row are nearly normal, with an entropy of log2(√(2πe) / coarseness) bits (Cover and
Thomas, Elements of Information Theory, theorem 8.3.1): 4.9 bits at a coarseness of 0.14. Huffman codes come within some
hundredths of that; nothing is gained by looking for repetitions. What rounding changes has a root mean square of
coarseness / √12 of the row's, 4 % at 0.14. Vectors are kept as they are.

A folder has `packed.npz.gz` in place of safetensors files; everything that reads a folder reads it, but convert.py.
"""

import gzip
import io
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Mapping

import numpy as np

from twotower_jax.atomic import new_folder
from twotower_jax.checkpoint.manifest import write_file
from twotower_jax.files import CheckpointError, check_link, open_regular

TENSORS = "packed.npz.gz"
_STEP = ".step"  # After the name of a matrix: its rows' steps.
_LARGEST = 127
# The most that an archive may unpack to: nobody packs a large model.
_MOST_BYTES = 1 << 30


def write_packed(
    output: pathlib.Path,
    tensors: Mapping[str, Callable[[], np.ndarray]],
    small: Mapping[str, bytes],
    coarseness: float,
) -> None:
    """Writes a packed folder, or none where anything goes wrong.

    Args:
      tensors: what reads each. small: files by name.
      coarseness: of the steps, above 0: the smaller, the larger the archive and the nearer the numbers.

    Raises:
      ValueError: if a row has a number so far from its others that its multiple does not fit eight bits.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, read in tensors.items():
        arrays[name] = np.asarray(read(), np.float32)
        if arrays[name].ndim > 1:
            try:
                arrays[name], arrays[name + _STEP] = rounded(arrays[name], coarseness)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    with new_folder(output) as partial:
        for name, content in small.items():
            write_file(partial / name, [content])
        write_file(partial / TENSORS, _compressed(arrays))


def _compressed(arrays: Mapping[str, np.ndarray]) -> list[bytes]:
    plain = io.BytesIO()
    np.savez(plain, **arrays)
    gzipped = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_HUFFMAN_ONLY)
    return [gzipped.compress(plain.getbuffer()), gzipped.flush()]


def rounded(matrix: np.ndarray, coarseness: float) -> tuple[np.ndarray, np.ndarray]:
    """Whole multiples (…, N) int8 and steps (…, 1) float32 of a matrix (…, N) float32.

    Raises:
      ValueError: see `write_packed`.
    """
    step = np.float32(coarseness) * np.sqrt(np.mean(np.square(matrix), axis=-1, keepdims=True))
    multiples = np.rint(matrix / np.where(step == 0, np.float32(1), step))
    most = np.abs(multiples).max(initial=0)
    if not most <= _LARGEST:
        raise ValueError(f"a number is {most:.0f} steps from 0, of {_LARGEST} that there are; pack more coarsely")
    return multiples.astype(np.int8), step


def read_packed(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a packed folder by name, float32.

    Raises:
      CheckpointError: if the archive is broken.
    """
    path = folder / TENSORS
    check_link(path)
    try:
        with open_regular(path) as packed, gzip.open(packed) as file:
            plain = file.read(_MOST_BYTES + 1)
        if len(plain) > _MOST_BYTES:
            raise CheckpointError(f"{path}: holds more than {_MOST_BYTES:,} bytes")
        with np.load(io.BytesIO(plain), allow_pickle=False) as archive:
            arrays = dict(archive)
    except CheckpointError:
        raise
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: cannot be unpacked ({error})") from None
    tensors = {}
    for name, array in arrays.items():
        step = arrays.get(name + _STEP)
        if array.ndim > 1 and not name.endswith(_STEP):
            if step is None or array.dtype != np.int8 or step.shape != (*array.shape[:-1], 1):
                raise CheckpointError(f"{path}: {name!r} is not whole multiples of steps")
            array = array.astype(np.float32) * step
        if not name.endswith(_STEP):
            tensors[name] = array.astype(np.float32, copy=False)
    return tensors
