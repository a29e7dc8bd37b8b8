"""Windows of equal length over documents of any number, read one at a time and never held in memory.

Documents are laid end to end and the line is cut every `sequence_length` tokens, as in packing.py. A line may leave out
documents (those held out), and it may begin every document at a multiple of some `align`, the gap before it filled
with padding. Where a document lies then depends on all documents before it. Sums over blocks of documents, made once
when the windows are opened, find it in constant time, and take 16 bytes for every 512 documents.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from twotower_jax.data.documents import Documents
from twotower_jax.data.tokenizer import PAD_ID
from twotower_jax.tokens import check_ids

_BLOCK, _BLOCKS_AT_A_TIME = 512, 128

# Which of the documents start ... stop - 1 belong to the line, bool (stop - start,).
Keep = Callable[[int, int], np.ndarray]


class Unloaded:
    """What windows on disk have in common with `PackedSequences`, whose `windows` is an array: its size."""

    tokens: int

    def first_turns(self, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Those of conversations, if there are any; see `ConversationWindows`."""
        return []

    @property
    def windows(self) -> "Unloaded":
        return self

    @property
    def size(self) -> int:
        """All windows' tokens."""
        return self.tokens


class DocumentWindows(Unloaded):
    """Windows of documents that are read when asked for; a random-access data source for Grain.

    Attributes:
      sequence_length: tokens in a window, L.
      tokens: in all windows together.
    """

    def __init__(
        self,
        documents: Documents,
        sequence_length: int,
        vocab_size: int,
        *,
        name: str,
        align: int | None = None,
        keep: Keep | None = None,
        about: dict[str, Any] | None = None,
    ):
        """Looks at the documents' lengths where it must, at none of their tokens.

        Args:
          documents: in the order of the line.
          sequence_length: L.
          vocab_size: token ids must be smaller; checked in every window that is read.
          name: of the documents, for messages.
          align: documents begin at multiples of it, and windows tell where documents begin; it must divide L. None
            for neither.
          keep: the documents of the line; None for all.
          about: what tells `keep` from another, for `identity`.

        Raises:
          ValueError: the lengths do not fit together, or there is not one window.
        """
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be positive, not {sequence_length}")
        if align is not None and (align < 1 or sequence_length % align):
            raise ValueError(f"sequence_length {sequence_length} is not a multiple of align {align}")
        self.sequence_length, self.name = sequence_length, name
        self._documents, self._vocab_size, self._align, self._keep = documents, vocab_size, align, keep
        self._about = dict(about or {})
        self._sums = None if align is None and keep is None else self._make_sums()
        total = documents.tokens if self._sums is None else int(self._sums[1, -1])
        self._count = total // sequence_length
        self.tokens = self._count * sequence_length
        if not self._count:
            raise ValueError(
                f"{name}: {total} tokens do not fill one window of sequence_length {sequence_length}: "
                "give more text or a smaller sequence_length"
            )

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Reads a window.

        Returns:
          ids: int32 (L,).
          With `align` also
          document_start: int32 (L,), for each position the place in the window of the first token of its document, 0
            where that lies before the window. Padding belongs to the document before it.
          counted: bool (L,), False at padding.

        Raises:
          IndexError: there is no such window.
          DataError: the data are broken.
          ValueError: a token id lies outside the vocabulary.
        """
        if not 0 <= index < self._count:
            raise IndexError(f"{self.name}: no window {index} among {self._count}")
        start = index * self.sequence_length
        stop = start + self.sequence_length
        if self._sums is None:
            return {"ids": self._checked(self._documents.read(start, stop), index)}
        # `line` is a place in the line of windows, `raw` one among the tokens of all documents.
        line, raw, lengths, spans = self._overlapping(start, stop)
        first, last = np.maximum(line, start), np.minimum(line + lengths, stop)
        used = first < last
        sizes = (last - first)[used]
        places = np.repeat(first[used] - start - _before(sizes), sizes) + np.arange(sizes.sum())
        ids = np.full(self.sequence_length, PAD_ID, np.int32)
        ids[places] = self._checked(self._read_runs((raw - line + first)[used], sizes), index)
        if self._align is None:
            return {"ids": ids}
        counted = np.zeros(self.sequence_length, bool)
        counted[places] = True
        visible = np.minimum(line + spans, stop) - np.maximum(line, start)
        document_start = np.repeat(np.maximum(line - start, 0), visible).astype(np.int32)
        return {"ids": ids, "document_start": document_start, "counted": counted}

    def identity(self) -> dict[str, Any]:
        """JSON-able values that are equal for equal windows, and in practice for no others."""
        values = {"sequence_length": self.sequence_length, "tokens": self.tokens} | self._about
        if self._align is not None:
            values["reset_at_documents"] = f"aligned to {self._align}"
        return values | self._documents.identity()

    def _spans(self, start: int, lengths: np.ndarray) -> np.ndarray:
        """Tokens of the line that each document takes, padding included."""
        align = self._align or 1
        spans = -(-lengths // align) * align
        return spans if self._keep is None else np.where(self._keep(start, start + len(lengths)), spans, 0)

    def _make_sums(self) -> np.ndarray:
        """Raw tokens, and tokens of the line, before each block of documents and in all: int64 (2, blocks + 1)."""
        count, step = self._documents.count, _BLOCK * _BLOCKS_AT_A_TIME
        sums = [np.zeros((2, 1), np.int64)]
        for start in range(0, count, step):
            lengths = self._documents.lengths(start, min(start + step, count))
            both = np.stack([lengths, self._spans(start, lengths)])
            sums.append(np.add.reduceat(both, range(0, len(lengths), _BLOCK), axis=1))
        return np.cumsum(np.concatenate(sums, axis=1), axis=1)

    def _overlapping(self, start: int, stop: int) -> tuple[np.ndarray, ...]:
        """Documents with a part in `start` ... `stop` of the line: where each begins, both ways; both sizes."""
        first = np.searchsorted(self._sums[1], start, side="right") - 1
        last = np.searchsorted(self._sums[1], stop, side="left")
        number = first * _BLOCK
        lengths = self._documents.lengths(number, min(last * _BLOCK, self._documents.count))
        spans = self._spans(number, lengths)
        line = self._sums[1, first] + _before(spans)
        raw = self._sums[0, first] + _before(lengths)
        # A document that is left out takes no place, wherever the line stands when its turn comes.
        hit = (line < stop) & (line + spans > start) & (spans > 0)
        return line[hit], raw[hit], lengths[hit], spans[hit]

    def _read_runs(self, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """The tokens of several stretches, each run of adjacent ones in one go."""
        if not len(starts):  # a window of nothing but padding
            return np.zeros(0, np.int32)
        breaks = np.flatnonzero(starts[1:] != starts[:-1] + sizes[:-1]) + 1
        firsts, lasts = np.append(0, breaks), np.append(breaks, len(starts)) - 1
        runs = zip(starts[firsts], starts[lasts] + sizes[lasts], strict=True)
        return np.concatenate([self._documents.read(int(start), int(stop)) for start, stop in runs])

    def _checked(self, ids: np.ndarray, index: int) -> np.ndarray:
        return check_ids(ids, self._vocab_size, f"{self.name}: window {index}")


class AllLearned(Unloaded):
    """Windows that tell documents apart as those of conversations are: every token that is no padding counts 1.

    Attributes:
      sequence_length: tokens in a window, L.
      tokens: in all windows together.
    """

    def __init__(self, windows: DocumentWindows):
        self._windows = windows
        self.sequence_length, self.tokens = windows.sequence_length, windows.tokens

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        window = self._windows[index]
        counted = window["counted"]
        return window | {"token_weight": counted.astype(np.float32), "turn": np.zeros(counted.shape, np.int32)}

    def identity(self) -> dict[str, Any]:
        """That of the windows."""
        return self._windows.identity()


class Concatenation(Unloaded):
    """Several sources' windows one after the other.

    Attributes:
      sequence_length: tokens in a window, L.
      tokens: in all windows together.
    """

    def __init__(self, parts: list):
        """`parts`: at least one, of one sequence length."""
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.sequence_length = parts[0].sequence_length
        self.tokens = sum(part.tokens for part in parts)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def first_turns(self, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        return [turn for part in self._parts for turn in part.first_turns(count)][:count]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part][int(index - (self._ends[part - 1] if part else 0))]


def _before(sizes: np.ndarray) -> np.ndarray:
    """The sum of all sizes before each."""
    return np.cumsum(sizes) - sizes
