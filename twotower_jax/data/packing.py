"""Documents packed into windows of equal length, without padding.

Tokenized documents, each closed by the end-of-text token, are laid end to end in shuffled order and the stream is cut
every `sequence_length` tokens. A window may therefore hold the end of one document and the start of others; the
end-of-text token is all that separates them.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from twotower_jax.data.documents import ArrayDocuments
from twotower_jax.data.tokenizer import EOS_ID, encode
from twotower_jax.data.windows import DocumentWindows
from twotower_jax.shares import ceil_share
from twotower_jax.tokens import check_ids


class Packing(NamedTuple):
    """How documents become windows; see `TrainConfig`. `align` is None where documents are not told apart; `end_tokens`
    are the model's, of which the first closes a document; the others are for conversations, see `ConversationWindows`,
    whose tokenizer comes from `tokenizer_folder`, None for one that was trained on the data."""

    sequence_length: int
    vocab_size: int
    validation_fraction: float
    seed: int
    align: int | None
    end_tokens: tuple[int, ...] = (EOS_ID,)
    turn_align: int = 1
    padding_weight: float = 0.1
    tokenizer_folder: Path | None = None


class PackedSequences:
    """Windows of one token stream, a random-access data source for Grain.

    Attributes:
      windows: int32 (N, L), read-only; flattened, the stream without a last stretch shorter than a window.
    """

    def __init__(self, tokens: np.ndarray, sequence_length: int, vocab_size: int):
        """Cuts `tokens`, any integer dtype (T,), into T // `sequence_length` windows.

        Raises:
          ValueError: `sequence_length` is not positive, there is not one window, or an id is outside [0, `vocab_size`).
        """
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be positive, not {sequence_length}")
        count = len(tokens) // sequence_length
        if count == 0:
            raise ValueError(
                f"{len(tokens)} tokens do not fill one window of sequence_length {sequence_length}: "
                "give more text or a smaller sequence_length"
            )
        tokens = check_ids(tokens, vocab_size, "tokenized documents")
        self.windows = tokens[: count * sequence_length].reshape(count, sequence_length)
        self.windows.flags.writeable = False

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"ids": self.windows[index]}

    @property
    def sequence_length(self) -> int:
        """Tokens in a window, L."""
        return self.windows.shape[1]

    @property
    def tokens(self) -> int:
        """In all windows together."""
        return self.windows.size

    def identity(self) -> dict[str, Any]:
        """JSON-able values that are equal for equal windows, and in practice for no others."""
        return {"sequence_length": self.sequence_length, "tokens": self.tokens, "sha256": _sha256(self.windows)}


def pack_documents(
    documents: Sequence[str],
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    vocab_size: int,
    validation_fraction: float,
    seed: int,
    align: int | None = None,
    end_token: int = EOS_ID,
) -> tuple[PackedSequences | DocumentWindows, PackedSequences | DocumentWindows | None]:
    """Tokenizes, shuffles, splits and packs documents; returns training and validation windows.

    The held-out documents are the first of the shuffled order that together hold `validation_fraction` of all tokens
    and at least one window; no window mixes them with training documents. Where they would leave less than a window to
    train on (a single long document, for one), the last of them is divided: its tail is held out and its head trains.
    With a fraction of 0 nothing is held out
    and the validation windows are None. `seed` decides the order and the split. With `align`, every document begins at
    a multiple of it and the windows tell where; see `DocumentWindows`. `end_token` closes every document.

    Raises:
      ValueError: there are no documents, the fraction is outside [0, 1), the documents are too few or too short to
        give one window to each side, or a token id does not fit `vocab_size`.
    """
    if not documents:
        raise ValueError("there are no documents to pack")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be at least 0 and less than 1, not {validation_fraction}")
    arrays = [np.append(ids, np.int32(end_token)) for ids in encode(tokenizer, documents)]
    arrays = [arrays[i] for i in np.random.default_rng(seed).permutation(len(arrays))]
    ends = np.cumsum([len(ids) for ids in arrays])
    total = int(ends[-1])

    def pack(start: int, stop: int) -> PackedSequences | DocumentWindows:
        part = arrays[start:stop]
        if align is None:
            return PackedSequences(np.concatenate(part), sequence_length, vocab_size)
        lengths = np.array([len(ids) for ids in part], "<i8")
        documents = ArrayDocuments(part, {"sha256": _sha256(np.concatenate(part)), "lengths_sha256": _sha256(lengths)})
        return DocumentWindows(documents, sequence_length, vocab_size, name="tokenized documents", align=align)

    if validation_fraction == 0:
        return pack(0, len(arrays)), None

    wanted = max(ceil_share(validation_fraction, total), sequence_length)
    held_out = np.searchsorted(ends, wanted) + 1  # the fewest documents that together hold that many tokens
    first = min(held_out, len(arrays))
    split = ends[first - 1]
    if total - split < sequence_length <= total - wanted:
        # The last of them is divided: its tail is held out, its head trains.
        tail = wanted - (split - len(arrays[first - 1]))
        arrays[first - 1 : first] = [arrays[first - 1][-tail:], arrays[first - 1][:-tail]]
    elif total - split < sequence_length:
        raise ValueError(
            f"{len(arrays)} documents with {total} tokens do not give one window of sequence_length "
            f"{sequence_length} each to training and to validation (validation_fraction "
            f"{validation_fraction}): give more text, a smaller sequence_length, or validation_fraction 0"
        )
    return pack(first, len(arrays)), pack(0, first)


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<"), copy=False)).hexdigest()
