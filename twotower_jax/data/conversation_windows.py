"""Windows of whole conversations, every answer of which begins on a block border.

What is said before an answer stands right before it, as in generation, and the padding before that: between the border
of a block and the first word of a turn. An answer's last block is filled up with end tokens, which may count a little;
the next turn begins after it. So no block holds parts of an answer and of what is said later. All padding is the
model's first end token.

    |..user: 2 + 2?↵assistant:|4</s></s></s>|.....user: sure?↵assistant:|yes</s></s>|
     nothing                   1 1   w   w   nothing                     1  1   w      what each token counts

The first turn's padding belongs to the conversation before: a conversation begins with its own first token.
"""

from typing import Any

import numpy as np

from twotower_jax.data.conversations import Conversations, Turns
from twotower_jax.data.windows import Unloaded
from twotower_jax.tokens import check_ids


class ConversationWindows(Unloaded):
    """Windows of one or more whole conversations in their order; a random-access data source for Grain.

    A conversation that is longer than a window is cut at its end, and left out if no answer begins before that.

    Attributes:
      sequence_length: tokens in a window, L.
      tokens: in all windows together, padding included.
      answers, learned: how many answers there are, and how many tokens of them, without what fills their last block.
      filled: how many tokens of all windows are no padding.
      cut, left_out: how many conversations are.
    """

    def __init__(
        self,
        conversations: Conversations,
        sequence_length: int,
        vocab_size: int,
        *,
        name: str,
        align: int,
        padding_weight: float,
        end_token: int,
    ):
        """Looks at the sizes of all turns, at none of their tokens.

        Args:
          conversations: in the order of the windows.
          sequence_length: L.
          vocab_size: token ids must be smaller; checked in every window that is read.
          name: of the conversations, for messages.
          align: answers begin at multiples of it; it must divide L. 1 where nothing is generated in blocks.
          padding_weight: how much an end token counts that fills the last block of an answer, where others count 1.
          end_token: which token that is.

        Raises:
          ValueError: the lengths do not fit together, or there is not one conversation to learn from.
        """
        if align < 1 or sequence_length % align:
            raise ValueError(f"sequence_length {sequence_length} is not a multiple of align {align}")
        self.sequence_length, self.name = sequence_length, name
        self._conversations, self._vocab_size, self._align = conversations, vocab_size, align
        self._padding_weight, self._end_token = padding_weight, end_token
        counts, parts = conversations.parts()
        firsts = np.cumsum(counts) - counts
        in_blocks = -(-parts // align) * align
        spans = np.add.reduceat(in_blocks.sum(axis=1), firsts) if len(counts) else np.zeros(0, np.int64)
        left_out = in_blocks[firsts, 0] >= sequence_length
        self._spans = np.where(left_out, 0, np.minimum(spans, sequence_length))
        self.left_out, self.cut = int(left_out.sum()), int((~left_out & (spans > sequence_length)).sum())
        if self.left_out == len(counts):
            raise ValueError(
                f"{name}: no answer begins within sequence_length {sequence_length}: give more conversations or a "
                "larger sequence_length"
            )
        # Where each turn begins in its conversation, and how much of its answer lies within the window.
        before = np.cumsum(in_blocks.sum(axis=1)) - in_blocks.sum(axis=1)
        borders = before - np.repeat(before[firsts], counts) + in_blocks[:, 0]
        learned = np.clip(sequence_length - borders, 0, parts[:, 1])
        self.answers, self.learned = int((learned > 0).sum()), int(learned.sum())
        said = np.clip(sequence_length - (borders - parts[:, 0]), 0, parts[:, 0])
        self.filled = self.learned + int(said[~np.repeat(left_out, counts)].sum())
        # Each window takes the conversations that come next, as long as they fit.
        ends, starts = np.cumsum(self._spans), [0]
        while starts[-1] < len(ends):
            full = ends[starts[-1]] - self._spans[starts[-1]] + sequence_length
            starts.append(int(np.searchsorted(ends, full, side="right")))
        self._starts = np.array(starts)
        self.tokens = len(self) * sequence_length

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Reads a window.

        Returns:
          ids: int32 (L,).
          document_start: int32 (L,), for each position the place of the first token of its conversation. Padding
            belongs to the conversation before it.
          counted: bool (L,), True in answers and in what fills up their blocks.
          token_weight: float32 (L,), how much each token counts; 0 where it is not counted.
          turn: int32 (L,), the number of each such token's answer in its conversation, from 1; 0 elsewhere.

        Raises:
          IndexError: there is no such window.
          DataError: the data are broken.
          ValueError: a token id lies outside the vocabulary.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: no window {index} among {len(self)}")
        length = self.sequence_length
        ids, weight = np.full(length, self._end_token, np.int32), np.zeros(length, np.float32)
        starts, turn = np.zeros(length, np.int32), np.zeros(length, np.int32)
        at = 0
        for number in range(self._starts[index], self._starts[index + 1]):
            if self._spans[number]:
                self._lay_out(self._conversations[number], at, ids, weight, starts, turn)
                at += int(self._spans[number])
        check_ids(ids, self._vocab_size, f"{self.name}: window {index}")
        return {"ids": ids, "document_start": starts, "counted": weight > 0, "token_weight": weight, "turn": turn}

    def first_turns(self, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """What is said before the first answer, and that answer, of the first `count` conversations: token ids."""
        turns = [self._conversations[int(number)] for number in np.flatnonzero(self._spans)[:count]]
        return [(ids[: parts[0, 0]], ids[parts[0, 0] : parts[0].sum()]) for ids, parts in turns]

    def identity(self) -> dict[str, Any]:
        """JSON-able values that are equal for equal windows, and in practice for no others."""
        values = {"sequence_length": self.sequence_length, "tokens": self.tokens}
        values["conversations"] = (
            f"aligned to {self._align}, padded with token {self._end_token} of weight {self._padding_weight}"
        )
        return values | self._conversations.identity()

    def _lay_out(
        self, turns: Turns, at: int, ids: np.ndarray, weight: np.ndarray, starts: np.ndarray, turn: np.ndarray
    ) -> None:
        """Writes a conversation into a window from `at`, a block border, on; what does not fit is cut."""
        align, length, token = self._align, self.sequence_length, 0
        for number, (before, answer) in enumerate(turns.parts.tolist(), 1):
            at += -before % align
            if number == 1:
                starts[at:] = at  # Also of what comes after, until the next conversation.
            border, end = at + before, at + before + answer
            filled = end - end % -align
            fits = max(0, min(end, length) - at)
            ids[at : at + fits] = turns.ids[token : token + fits]
            weight[border:end], weight[end:filled] = 1.0, self._padding_weight
            turn[border:filled] = number
            at, token = filled, token + before + answer
