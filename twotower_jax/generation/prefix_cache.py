"""What the context tower kept of prompts seen before, so that a prompt that begins like one of them costs its tail.

Prompts are read in pieces. Where a whole piece of `Settings.prefill_chunk` tokens ends there is a border, and what the
piece added to the cache of its row is kept: its keys and values, and the states after it. A border is known by a hash
of all tokens before it, a piece's hash being taken over the hash before it. A prompt takes what is kept up to its last
known border, and reads the rest in the very pieces in which it would have been read, so that its numbers stay.
"""

import hashlib
from collections import OrderedDict
from typing import NamedTuple

import jax
import numpy as np

from twotower_jax.cache import Cache


class _Piece(NamedTuple):
    news: Cache
    bytes: int


class PrefixCache:
    """Pieces of prompts, the least recently used of which go when they take more than `limit_bytes`, on all devices
    together. It belongs to one engine: what it holds is of one model and one length of pieces.

    Attributes:
      queries: tokens of all prompts that were looked up. hits: how many of them were found.
      bytes: what the pieces take.

    Raises:
      ValueError: for a limit that is not positive.
    """

    def __init__(self, limit_bytes: int):
        if limit_bytes < 1:
            raise ValueError(f"the limit of a prefix cache must be at least 1 byte, not {limit_bytes}")
        self._limit = limit_bytes
        # The least recently used first. A piece is always used with those before it, and they after it: what goes
        # first is never one that another is read after.
        self._pieces: OrderedDict[bytes, _Piece] = OrderedDict()
        self.queries = self.hits = self.bytes = 0

    def __len__(self) -> int:
        return len(self._pieces)

    def find(self, borders: list[bytes]) -> list[Cache]:
        """What is kept of the pieces with which a prompt begins, in order, given its `borders`."""
        known = next((i for i, key in enumerate(borders) if key not in self._pieces), len(borders))
        self._use(borders[:known])
        return [self._pieces[key].news for key in borders[:known]]

    def lacks(self, borders: list[bytes]) -> bool:
        """Whether the piece before the last of these borders is not kept though all before it are."""
        return borders[-1] not in self._pieces and all(key in self._pieces for key in borders[:-1])

    def add(self, borders: list[bytes], news: Cache) -> None:
        """Keeps what the piece before the last of these borders added."""
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(news))
        self._pieces[borders[-1]] = _Piece(news, size)
        self.bytes += size
        self._use(borders)
        while self.bytes > self._limit:
            self.bytes -= self._pieces.popitem(last=False)[1].bytes

    def _use(self, borders: list[bytes]) -> None:
        for key in reversed(borders):
            self._pieces.move_to_end(key)


def borders(ids: np.ndarray, chunk: int, weights: str | None = None) -> list[bytes]:
    """A hash for each border of a prompt (n,) int32, of all tokens before it and the name of what reads them."""
    out, key = [], b"" if weights is None else weights.encode()
    for end in range(chunk, len(ids) + 1, chunk):
        key = hashlib.sha256(key + np.ascontiguousarray(ids[end - chunk : end], np.int32).tobytes()).digest()
        out.append(key)
    return out
