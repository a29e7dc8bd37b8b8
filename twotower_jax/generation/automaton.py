"""Languages of token sequences, as deterministic automata: what a row may say, where that is more than one position's
matter. A list of texts is one (a tree of their tokens), and so is every regular language of bytes, spelled in tokens.

Positions of a block are decided in any order. So what may stand at one is a question of both sides: of the states that
the tokens before can lead to, and of those from which the tokens after, and enough tokens to come, lead to an end. Both
are sets of states, found by one pass each way over the block (as DINGO does it, arXiv 2505.23061).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

# The most that one automaton may have: token moves, in 8 bytes each, and states.
MOST_MOVES, MOST_STATES = 1 << 23, 1 << 12


@dataclasses.dataclass(frozen=True, eq=False)
class Automaton:
    """States 0 … Q − 1, of which a row begins in 0.

    Attributes:
      tokens, targets: of each state the tokens that may come, (n,) int32 in rising order, and the states they lead to.
      final: (Q,) bool, where a row may end.
      said: (n,) int32, all tokens that may come somewhere, in rising order.
      left: (Q,) float64, the fewest tokens that lead there from each state; infinite where none do.

    Raises:
      ValueError: at construction, if there are too many states or moves.
    """

    tokens: Sequence[np.ndarray]
    targets: Sequence[np.ndarray]
    final: np.ndarray
    said: np.ndarray = dataclasses.field(init=False)
    left: np.ndarray = dataclasses.field(init=False)

    def __post_init__(self):
        count, moves = len(self.final), self.moves
        if count > MOST_STATES or moves > MOST_MOVES:
            raise ValueError(
                f"{count} states with {moves} moves are more than the {MOST_STATES} and {MOST_MOVES} that can be"
            )
        # The pairs of states of which one token leads from the first to the second.
        next_ones = [np.unique(targets) for targets in self.targets]
        starts = [np.full(len(one), state) for state, one in enumerate(next_ones)]
        object.__setattr__(self, "_pairs", tuple(np.concatenate([*v, np.zeros(0, int)]) for v in (starts, next_ones)))
        object.__setattr__(self, "said", np.unique(np.concatenate([*self.tokens, np.zeros(0, np.int32)])))
        object.__setattr__(self, "left", self._left())

    @property
    def moves(self) -> int:
        """How many there are, of all states together."""
        return sum(map(len, self.tokens))

    @property
    def shortest(self) -> float:
        """How many tokens the shortest row has; infinite where there is none."""
        return float(self.left[0])

    def says(self, token: int) -> bool:
        """Whether the token may come somewhere."""
        place = int(np.searchsorted(self.said, token))
        return place < len(self.said) and self.said[place] == token

    def within(self, tokens: int) -> np.ndarray:
        """(Q,) bool, the states from which so many more tokens are enough to end."""
        return self.left <= tokens

    def after(self, states: np.ndarray, token: int | None) -> np.ndarray:
        """(Q,) bool, the states after those of `states` (Q,) bool and a token; after any token where that is None."""
        if token is None:
            return self._next(states)
        out = np.zeros(len(states), bool)
        for state in np.flatnonzero(states).tolist():
            if (target := self.move(state, token)) is not None:
                out[target] = True
        return out

    def before(self, states: np.ndarray, token: int | None, among: np.ndarray) -> np.ndarray:
        """(Q,) bool, the states `among` (Q,) bool from which the token, or any, leads to one of `states`."""
        if token is None:
            return among & self._next(states, back=True)
        out = np.zeros(len(states), bool)
        for state in np.flatnonzero(among).tolist():
            target = self.move(state, token)
            out[state] = target is not None and states[target]
        return out

    def between(self, before: np.ndarray, after: np.ndarray) -> list[np.ndarray]:
        """The tokens that lead from one of the states to one of the others, a list of arrays."""
        found = []
        for state in np.flatnonzero(before).tolist():
            found.append(self.tokens[state][after[self.targets[state]]])
        return found

    def move(self, state: int, token: int) -> int | None:
        """The state after a token; None where it may not come."""
        place = int(np.searchsorted(self.tokens[state], token))
        if place == len(self.tokens[state]) or self.tokens[state][place] != token:
            return None
        return int(self.targets[state][place])

    def _next(self, states: np.ndarray, back: bool = False) -> np.ndarray:
        """(Q,) bool, the states that one token leads to; or from which."""
        first, second = reversed(self._pairs) if back else self._pairs
        out = np.zeros(len(states), bool)
        out[second[states[first]]] = True
        return out

    def _left(self) -> np.ndarray:
        left = np.where(self.final, 0.0, math.inf)
        reached, steps = self.final, 0
        while reached.any():
            steps += 1
            reached = self._next(reached, back=True) & np.isinf(left)
            left[reached] = steps
        return left


def of_choices(choices: Sequence[Sequence[int]]) -> Automaton:
    """Exactly these rows of tokens.

    Raises:
      ValueError: if there are none, one is empty, or they have too many tokens together.
    """
    if not choices or not all(choices):
        raise ValueError("choices must be rows of tokens, at least one, and none of them empty")
    moves: list[dict[int, int]] = [{}]
    ends = set()
    for choice in choices:
        state = 0
        for token in choice:
            if token not in moves[state]:
                moves[state][token] = len(moves)
                moves.append({})
            state = moves[state][token]
        ends.add(state)
        if len(moves) > MOST_STATES:
            raise ValueError(f"the choices have too many tokens: {MOST_STATES} are possible")
    return Automaton(*_arrays(moves), np.isin(np.arange(len(moves)), list(ends)))


class Spellings:
    """The bytes of tokens, by which an automaton of bytes becomes one of tokens.

    Args:
      spelled: of each token that may be said its bytes, at least one.
    """

    def __init__(self, spelled: Mapping[int, bytes]):
        self._ids = np.array(sorted(spelled), np.int32)
        self._lengths = np.array([len(spelled[token]) for token in self._ids.tolist()], np.int32)
        self._bytes = np.zeros((len(self._ids), self._lengths.max(initial=1)), np.uint8)
        for row, token in enumerate(self._ids.tolist()):
            self._bytes[row, : self._lengths[row]] = np.frombuffer(spelled[token], np.uint8)

    def automaton(self, table: np.ndarray, final: np.ndarray) -> Automaton:
        """The rows of tokens whose bytes one takes.

        Args:
          table: (Q, 256) int32, of each state the one after each byte, −1 where it may not come; they begin in 0.
          final: (Q,) bool, where bytes may end.

        Raises:
          ValueError: if it becomes too large.
        """
        tokens: dict[int, np.ndarray] = {}
        targets: dict[int, np.ndarray] = {}
        number, moves = {0: 0}, 0  # The states that whole tokens lead to, and what they are called here.
        waiting = [0]
        while waiting:
            state = waiting.pop()
            ids, ends = self._from(table, state)
            moves += len(ids)
            for end in np.unique(ends).tolist():
                if end not in number:
                    number[end] = len(number)
                    waiting.append(end)
            if len(number) > MOST_STATES or moves > MOST_MOVES:
                raise ValueError(f"it has more than the {MOST_STATES} states or {MOST_MOVES} moves that can be")
            tokens[state], targets[state] = ids, ends
        new = np.full(len(table), -1, np.int32)
        new[list(number)] = list(number.values())
        ordered = sorted(number, key=number.get)
        return Automaton([tokens[q] for q in ordered], [new[targets[q]] for q in ordered], final[ordered])

    def _from(self, table: np.ndarray, state: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens whose bytes can be taken from a state, in rising order, and the states after them."""
        rows = np.arange(len(self._ids))
        states = np.full(len(rows), state)
        found, ends = [], []
        for place in range(self._bytes.shape[1]):
            states = table[states, self._bytes[rows, place]]
            taken = states >= 0
            rows, states = rows[taken], states[taken]
            last = self._lengths[rows] == place + 1
            found.append(rows[last])
            ends.append(states[last])
            rows, states = rows[~last], states[~last]
            if not len(rows):
                break
        rows, states = np.concatenate(found), np.concatenate(ends)
        order = np.argsort(rows)
        return self._ids[rows[order]], states[order].astype(np.int32)


def _arrays(moves: Sequence[Mapping[int, int]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    tokens = [np.array(sorted(one), np.int32) for one in moves]
    return tokens, [np.array([one[t] for t in sorted(one)], np.int32) for one in moves]
