"""Tokenized documents in a fixed order, wherever they lie: what every kind of data set offers to the packing."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from twotower_jax.files import CheckpointError


class DataError(CheckpointError):
    """Data that are broken; the message names the file and the place. Commands exit as for a broken checkpoint."""


class Documents(Protocol):
    """Documents end to end in one line of tokens, the end-of-text token of each included."""

    @property
    def count(self) -> int:
        """How many documents there are."""

    @property
    def tokens(self) -> int:
        """How many tokens they have together."""

    def lengths(self, start: int, stop: int) -> np.ndarray:
        """Tokens in each of the documents `start` ... `stop` - 1, int64 (stop - start,)."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` ... `stop` - 1 of the line, any integer dtype (stop - start,)."""

    def identity(self) -> dict[str, Any]:
        """JSON-able values that are equal for equal documents, and in practice for no others."""


class ArrayDocuments:
    """Documents in memory."""

    def __init__(self, arrays: Sequence[np.ndarray], identity: dict[str, Any]):
        """`arrays` are token ids, one array (length,) a document."""
        self._lengths = np.array([len(ids) for ids in arrays], np.int64)
        self._line = np.concatenate([np.zeros(0, np.int32), *arrays])
        self._identity = identity
        self.count, self.tokens = len(arrays), len(self._line)

    def lengths(self, start: int, stop: int) -> np.ndarray:
        return self._lengths[start:stop]

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._line[start:stop]

    def identity(self) -> dict[str, Any]:
        return dict(self._identity)


def held_out(start: int, stop: int, *, fraction: float, seed: int) -> np.ndarray:
    """Which of the documents numbered `start` ... `stop` - 1 are held out for validation, bool (stop - start,).

    Each is by its own chance of `fraction`, decided by `seed` and its number alone: the SplitMix64 generator's output
    (Steele, Lea, Flood 2014) for that number, from a state that the seed gives.
    """
    with np.errstate(over="ignore"):
        key = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
        z = key + (np.arange(start, stop, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)) < np.uint64(round(fraction * 2**53))
