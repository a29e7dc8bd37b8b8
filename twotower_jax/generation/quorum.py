"""How many rows of a call have to finish their blocks before the context reads them.

A pass of the context costs the same for one row as for all: one for few makes all stop for few, and one for all makes
every row wait for the slowest. What is best depends on how the evaluations per block spread. Where they spread widely,
three eighths of the rows come within some percent of the best part, at any number of rows, and make up to twice as many
tokens as all; where they hardly do, all is best, and three eighths lose a tenth (`launch/benchmark.py serving_engine`).
So the rows that an engine has made decide: the part that makes most blocks in a simulation of their evaluations.
"""

import collections
import math
from collections.abc import Sequence

import numpy as np

# In the simulation a pass of the context costs what an evaluation of the denoiser does: a tower each.
CONTEXT_COST = 1.0
_PARTS = (3 / 8, 3 / 4)
# A part has to make so many times the blocks of all, or all is taken.
_WORTH = 1.02
# Blocks that are remembered; blocks of each row in a simulation.
_REMEMBERED, _SIMULATED = 256, 32


class Quorum:
    """How many rows of one kind have to be done. All of them, until four blocks of each have been seen."""

    def __init__(self):
        self._counts: collections.deque[int] = collections.deque(maxlen=_REMEMBERED)
        self._seen = self._chosen_at = 0
        self._part = 1.0

    def add(self, evaluations: int) -> None:
        """Remembers a finished block."""
        self._counts.append(evaluations)
        self._seen += 1

    def of(self, alive: int) -> int:
        """The quorum of so many rows."""
        # Chosen again when twice as much is known, and later every four times what is remembered.
        due = min(2 * self._chosen_at, self._chosen_at + 4 * _REMEMBERED)
        if self._seen >= max(4 * alive, due) and alive > 1:
            self._chosen_at, self._part = self._seen, best_part(self._counts, alive)
        return part_of(self._part, alive)


def part_of(part: float, alive: int) -> int:
    """So many of `alive` rows."""
    return math.ceil(part * alive)


def best_part(counts: Sequence[int], rows: int) -> float:
    """The part of `rows` that makes most blocks of such numbers of evaluations."""
    blocks = {part: simulate(counts, rows, part_of(part, rows), CONTEXT_COST) for part in (*_PARTS, 1.0)}
    best = max(blocks, key=blocks.get)
    return best if blocks[best] > _WORTH * blocks[1.0] else 1.0


def simulate(
    counts: Sequence[int], rows: int, quorum: int, context: float, blocks: int = _SIMULATED, seed: int = 0
) -> float:
    """Blocks that each of `rows` makes in the time of an evaluation, in a table that is always full.

    Args:
      counts: evaluations of blocks, of which each row draws its own, one after another.
      context: cost of a pass of the context; an evaluation costs 1.
      blocks: how many to make for each row.
    """
    rng, counts = np.random.default_rng(seed), np.asarray(counts)
    left, made, spent = rng.choice(counts, rows), 0, 0.0
    while made < blocks * rows:
        # Until the quorum has finished: as long as the slowest of the fastest.
        steps = int(np.partition(left, quorum - 1)[quorum - 1])
        left = np.maximum(left - steps, 0)
        done = left == 0
        count = int(done.sum())
        made, spent = made + count, spent + steps + context
        left[done] = rng.choice(counts, count)
    return made / spent / rows
