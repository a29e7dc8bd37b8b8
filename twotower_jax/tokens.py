"""Token ids on the host. JAX clamps an id that is out of range, or wraps it; here it is an error."""

from collections.abc import Sequence

import numpy as np


def check_ids(ids: Sequence[int] | np.ndarray, vocab_size: int, what: str = "token ids") -> np.ndarray:
    """`ids` as int32.

    Raises:
      ValueError: if they are not whole numbers in [0, vocab_size); names the first offender and its place.
    """
    try:
        array = np.asarray(ids)
    except ValueError:  # lists of different lengths in a list
        raise ValueError(f"{what}: expected one list of token ids, found lists in it") from None
    if array.size == 0:
        return np.zeros(array.shape, np.int32)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{what}: expected whole numbers, found {array.dtype} values")
    bad = np.flatnonzero((array < 0) | (array >= vocab_size))
    if bad.size:
        place = int(bad[0])
        raise ValueError(
            f"{what}: id {array.flat[place]} at position {place} lies outside the vocabulary of {vocab_size}"
        )
    return array.astype(np.int32)


def parse_ids(texts: Sequence[str], what: str) -> tuple[int, ...]:
    """The token ids that `texts` spell, each once.

    Raises:
      ValueError: naming `what`, if one of them is no whole number of at least 0.
    """
    if not all(text.strip().isascii() and text.strip().isdigit() for text in texts):
        raise ValueError(f"{what}={','.join(texts)}: not a list of token ids, such as 2,11")
    return tuple(dict.fromkeys(int(text) for text in texts))


def pad_rows(rows: Sequence[np.ndarray], pad_id: int, multiple: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as one int32 array padded on the right, (B, L), and their lengths (B,) int32.

    L is the longest row's length rounded up to a multiple, so that few shapes are compiled.
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    width = -(-max(1, int(lengths.max())) // multiple) * multiple
    ids = np.full((len(rows), width), pad_id, np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return ids, lengths
