"""Windows of questions and answers (tasks.py), each made when it is asked for.

Where documents are told apart, a question is a document whose answer begins at a multiple of `align`: in the block that
a sampler would begin with. What is asked counts for nothing, the answer does, and so do the end tokens that fill up its
last block, which a sampler has to decide as well. Padding goes before the question.
"""

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from twotower_jax.data import tasks
from twotower_jax.data.packing import Packing
from twotower_jax.data.tokenizer import PAD_ID, encode
from twotower_jax.data.windows import Unloaded
from twotower_jax.tokens import check_ids

# Windows of a split; those for training are more than any run on these tasks reads.
_COUNTS = {"train": 1 << 20, "validation": 64, "test": 64}
# Questions that are tried for what is left of a window.
_TRIED = 8
_TOGETHER = 12
# Windows by whose tokens two sources are told apart.
_HASHED = 8


class TaskWindows(Unloaded):
    """A random-access data source for Grain, of one split; window i is a function of the packing's seed and i.

    Attributes:
      sequence_length: tokens in a window, L. tokens: in all windows together.
    """

    def __init__(self, tokenizer: Tokenizer, packing: Packing, split: str, names: tuple[str, ...] = ()):
        """Questions of some tasks; none named are all. `packing.validation_fraction` plays no part: what is held out is
        a split of its own.

        Raises:
          ValueError: the tokenizer gives ids outside the vocabulary, `align` does not divide the length, or a question
            of a task has no room in it.
        """
        if packing.align is not None and (packing.align < 1 or packing.sequence_length % packing.align):
            raise ValueError(f"sequence_length {packing.sequence_length} is not a multiple of align {packing.align}")
        self._tokenizer, self._packing, self._split, self._names = tokenizer, packing, split, names
        self.sequence_length = packing.sequence_length
        self.tokens = len(self) * self.sequence_length
        if packing.align:
            self._check_room(names or tuple(tasks.TASKS))
        self[0]  # Ids are checked before a run begins.

    def __len__(self) -> int:
        return _COUNTS[self._split]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """A window: `ids`, and where documents are told apart `document_start` and `counted`, as `DocumentWindows`.

        Raises:
          IndexError: there is no such window.
          ValueError: a token id lies outside the vocabulary.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"tasks: no window {index} among {len(self)}")
        questions = self._encoded(index)
        window = self._side_by_side(questions) if self._packing.align else self._end_to_end(questions)
        check_ids(window["ids"], self._packing.vocab_size, f"tasks: window {index}")
        return window

    def _encoded(self, index: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Prompts and answers without end, encoded some at a time, which is faster."""
        questions = tasks.stream(self._packing.seed, index, self._split, self._names)
        while True:
            texts = [text for question in itertools.islice(questions, _TOGETHER) for text in question]
            ids = encode(self._tokenizer, texts)
            yield from zip(ids[::2], ids[1::2], strict=True)

    def _check_room(self, names: tuple[str, ...]) -> None:
        """Refuses tasks that a window would leave out without a word."""
        for name in names:
            texts = [text for question in tasks.questions(name, "train", _TOGETHER) for text in question]
            ids = encode(self._tokenizer, texts)
            most = max(sum(self._places(*pair)) for pair in zip(ids[::2], ids[1::2], strict=True))
            if most > self.sequence_length:
                raise ValueError(
                    f"sequence_length={self.sequence_length} has no room for questions of the task {name!r}, which "
                    f"take {most} tokens in blocks of {self._packing.align}"
                )

    def _places(self, prompt: np.ndarray, answer: np.ndarray) -> tuple[int, int]:
        """What a question and its answer take, the answer with an end token, in whole blocks."""
        align = self._packing.align
        return -(-len(prompt) // align) * align, -(-(len(answer) + 1) // align) * align

    def _end_to_end(self, questions) -> dict[str, np.ndarray]:
        parts, length = [], 0
        while length < self.sequence_length:
            prompt, answer = next(questions)
            parts += [prompt, answer, np.array(self._packing.end_tokens[:1], np.int32)]
            length += len(prompt) + len(answer) + 1
        return {"ids": np.concatenate(parts)[: self.sequence_length]}

    def _side_by_side(self, questions) -> dict[str, np.ndarray]:
        align, length = self._packing.align, self.sequence_length
        ids, counted = np.full(length, PAD_ID, np.int32), np.zeros(length, bool)
        start, end, missed = np.zeros(length, np.int32), 0, 0
        while end < length and missed < _TRIED:
            prompt, answer = next(questions)
            begin = -(-(end + len(prompt)) // align) * align
            stop = begin + self._places(prompt, answer)[1]
            if stop > length:
                missed += 1
                continue
            first = begin - len(prompt)
            ids[first:begin] = prompt
            ids[begin:stop] = self._packing.end_tokens[0]
            ids[begin : begin + len(answer)] = answer
            start[first:], counted[begin:stop], end = first, True, stop
        return {"ids": ids, "document_start": start, "counted": counted}

    def identity(self) -> dict[str, Any]:
        """JSON-able values that are equal for equal windows, and in practice for no others."""
        first = np.concatenate([self[i]["ids"] for i in range(_HASHED)]).astype("<i4")
        values = {
            "sequence_length": self.sequence_length,
            "tokens": self.tokens,
            "tasks": f"{self._split} {' '.join(self._names)}",
        }
        if self._packing.align is not None:
            values["reset_at_documents"] = f"aligned to {self._packing.align}"
        return values | {"seed": self._packing.seed, "sha256": hashlib.sha256(first.tobytes()).hexdigest()}
