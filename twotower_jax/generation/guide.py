"""One row that has to be a sentence of an automaton: what may stand at its positions, and which tokens go together.

A step of diffusion decides several positions, each by itself. Each of the tokens alone leaves a sentence possible, but
two of them together may leave none. So the host looks at each step of such a row: it goes through the new tokens, the
most probable first, keeps each that goes together with those kept, and has the others masked again. The first always
is kept, so that every step decides something; and a block is read by the context only when the host has seen all of
it. Steps beyond those that the request allows follow as long as tokens are masked again.

The row ends with an end token where a sentence is complete; where it may have no more tokens, without one.
"""

from collections.abc import Sequence

import numpy as np

from twotower_jax.generation.automaton import Automaton
from twotower_jax.generation.slots import allowed_bits


class Guide:
    """What one row may say.

    Args:
      end_tokens: that end the row; no token of the automaton. limit: of its new tokens.
      mask_token_id: of undecided positions.

    Attributes:
      whole: whether the newest block is decided and may be committed.

    Raises:
      ValueError: if there is no end token, or no sentence within the limit.
    """

    def __init__(self, automaton: Automaton, end_tokens: Sequence[int], limit: int, mask_token_id: int):
        if not end_tokens:
            raise ValueError("constraint needs an end token, with which a row says that it is complete")
        if said := [token for token in end_tokens if automaton.says(token)]:
            raise ValueError(f"constraint holds the token {said[0]}, which ends a row")
        if automaton.shortest > limit:
            raise ValueError(
                f"constraint: max_new_tokens={limit} are too few, at least {automaton.shortest:g} are needed"
            )
        self._automaton, self._ends, self._limit, self._mask = automaton, tuple(end_tokens), limit, mask_token_id
        self._count, self._state = 0, 0  # Tokens of the row so far; the state after them, None after an end token.
        self._block: list[int] = []
        self.whole = False

    def advance(self, tokens: Sequence[int]) -> None:
        """The row has got these tokens, all of which were allowed."""
        for token in tokens:
            over = self._state is None or token in self._ends or self._count >= self._limit
            self._state = None if over else self._automaton.move(self._state, token)
            self._count += 1
        self._block, self.whole = [], False

    def allowed(self, count: int, vocab_size: int) -> np.ndarray:
        """Which tokens may stand at the next `count` positions, given what is decided of them: (count, ⌈V/8⌉) uint8,
        see `slots.allowed_bits`."""
        block = (self._block or [self._mask] * count)[:count]
        before, after = self._passes(block)
        out = np.empty((count, -(-vocab_size // 8)), np.uint8)
        for place in range(count):
            if self._count + place >= self._limit:
                out[place] = 255  # Computed with the block, and cut.
                continue
            out[place] = allowed_bits(self._between(before[place], after[place + 1]), vocab_size)
        return out

    def settle(self, block: Sequence[int], probable: Sequence[float]) -> np.ndarray:
        """Takes what a step made of the block; (S,) bool, the positions that are to be masked again.

        Args:
          block: after the step, the mask token where undecided. probable: how probable each position's token was.
        """
        old = self._block or [self._mask] * len(block)
        kept = [new if new == was else self._mask for new, was in zip(block, old, strict=True)]
        again = np.zeros(len(block), bool)
        new = [place for place, token in enumerate(block) if token not in (self._mask, kept[place])]
        for place in sorted(new, key=lambda place: -probable[place]):
            kept[place] = block[place]
            if not self._possible(kept):
                kept[place], again[place] = self._mask, True
        self._block = kept
        self.whole = self._mask not in kept
        return again

    # States of the automaton, and one more, of rows that have had their end token.

    def _passes(self, block: Sequence[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The states possible at each border between positions of the block: by what stands before it; and, of these,
        by what stands after it too."""
        states = len(self._automaton.final)
        begin = np.zeros(states + 1, bool)
        begin[states if self._state is None else self._state] = True
        before = [begin]
        for place, token in enumerate(block):
            before.append(self._after(before[-1], token, place))
        left = self._limit - self._count - len(block)
        end = np.append(self._automaton.within(max(0, left)), True) & before[-1]
        after = [end]
        for place in reversed(range(len(block))):
            after.append(self._before(after[-1], block[place], place, before[place]))
        return before, after[::-1]

    def _possible(self, block: Sequence[int]) -> bool:
        return bool(self._passes(block)[1][0].any())

    def _after(self, states: np.ndarray, token: int, place: int) -> np.ndarray:
        if self._count + place >= self._limit:
            return states
        token = None if token == self._mask else token
        out = np.append(self._automaton.after(states[:-1], token), False)
        if token is None or token in self._ends:
            out[-1] = (states[:-1] & self._automaton.final).any()
        if token is None or token == self._ends[0]:
            out[-1] |= states[-1]
        return out

    def _before(self, states: np.ndarray, token: int, place: int, among: np.ndarray) -> np.ndarray:
        if self._count + place >= self._limit:
            return states & among
        token = None if token == self._mask else token
        out = np.append(self._automaton.before(states[:-1], token, among[:-1]), False)
        if states[-1]:
            if token is None or token in self._ends:
                out[:-1] |= self._automaton.final & among[:-1]
            if token is None or token == self._ends[0]:
                out[-1] = among[-1]
        return out

    def _between(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """The tokens that lead from states before a position to states after it."""
        found = self._automaton.between(before[:-1], after[:-1])
        if after[-1]:
            if (before[:-1] & self._automaton.final).any():
                found.append(np.array(self._ends, np.int32))
            if before[-1]:
                # After the end: one token, and no choice.
                found.append(np.array(self._ends[:1], np.int32))
        return np.concatenate(found) if found else np.zeros(0, np.int32)
