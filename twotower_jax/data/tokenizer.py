"""Byte-level BPE tokenizers in the layout of the published model.

Ids 0 to 3 are special tokens, the rest are byte strings. Special tokens only ever enter a sequence by id: text that
spells one ("</s>") is encoded as ordinary characters, so no document or prompt can end a sequence or mask a position.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from twotower_jax.files import CheckpointError
from twotower_jax.paths import as_path, in_store
from twotower_jax.texts import check_text

PAD_ID, BOS_ID, EOS_ID, MASK_ID = range(4)

# The published names: padding shares id 0 with the unknown token, and the mask token is an unnamed spare.
_SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<SPECIAL_3>"]

# What a checkpoint says about its tokenizer, beside tokenizer.json.
_ABOUT = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_MORE_ABOUT = "additional_chat_templates"

_NUM_BYTES = 256

# Texts encoded at a time. The library's result objects take some 100 bytes per token; ours take 4.
_ENCODE_CHUNK = 1024


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """Learns a byte-level BPE of at most `vocab_size` tokens; fewer if the documents offer too few merges.

    The result depends on the documents, their order and `vocab_size` alone. It can encode any text.

    Raises:
      ValueError: `vocab_size` has no room for the special tokens and the 256 bytes.
    """
    _check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return _plain(tokenizer)


def word_tokenizer(documents: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level tokenizer in which each word of the documents is one token, and any other text is spelled in bytes.

    Words are those that `train_tokenizer` would not merge beyond; the most frequent get the lowest ids, and of at most
    `vocab_size` tokens those that fit are there.

    Raises:
      ValueError: `vocab_size` has no room for the special tokens and the 256 bytes.
    """
    _check_vocab_size(vocab_size)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    seen = Counter(word for text in documents for word, _ in split.pre_tokenize_str(text) if len(word) > 1)
    words = sorted(seen, key=lambda word: (-seen[word], word))
    tokens = [*_SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *words][:vocab_size]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    tokenizer.add_special_tokens(_SPECIAL_TOKENS)
    return _plain(tokenizer)


def _check_vocab_size(vocab_size: int) -> None:
    smallest = len(_SPECIAL_TOKENS) + _NUM_BYTES
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: {len(_SPECIAL_TOKENS)} special tokens and {_NUM_BYTES} bytes "
            f"need {smallest}"
        )


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Reads `folder`/tokenizer.json, ours or any Hugging Face model's.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointError: the file is not a tokenizer.
    """
    file = as_path(folder) / "tokenizer.json"
    if not file.is_file():
        remedy = unread_tokenizer(folder) or "give a folder that holds the model's tokenizer"
        raise FileNotFoundError(f"{file}: no such file; {remedy}")
    try:
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception for every fault it finds
        raise CheckpointError(f"{file}: not a tokenizer: {error}") from error
    return _plain(tokenizer)


def unread_tokenizer(folder: str | Path) -> str:
    """What to do about a tokenizer that is in the folder in another form than tokenizer.json; "" if none is."""
    folder = as_path(folder)
    if not (folder / "tokenizer.json").exists() and (folder / "tokenizer.model").exists():
        return (
            'tokenizer.model (SentencePiece) is not read; make a tokenizer.json of it: python -c "from transformers '
            "import AutoTokenizer as A; A.from_pretrained('DIR').save_pretrained('DIR')\""
        )
    return ""


def save_tokenizer(
    tokenizer: Tokenizer, folder: str | Path, end_token: int = EOS_ID, source: Path | None = None
) -> None:
    """Writes tokenizer.json and the files that tell Hugging Face's loader the special tokens' roles.

    `folder` is created if needed. Each file appears whole or not at all.

    Args:
      source: the folder that the tokenizer was read from, which knows the roles and may have a chat template.
    """
    folder = as_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    roles = {
        "bos_token": tokenizer.id_to_token(BOS_ID),
        "eos_token": tokenizer.id_to_token(end_token),
        "unk_token": tokenizer.id_to_token(PAD_ID),
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **roles, "clean_up_tokenization_spaces": False}
    _write(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=1))
    _write(folder / "special_tokens_map.json", json.dumps(roles, indent=1))
    if source is None:
        return
    for name in (*_ABOUT, *(f"{_MORE_ABOUT}/{file.name}" for file in sorted((source / _MORE_ABOUT).glob("*.jinja")))):
        if (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            _write(folder / name, (source / name).read_text(encoding="utf-8").removesuffix("\n"))


class Decoder:
    """Token ids to text, special tokens left out.

    Attributes:
      special: the text of each special token, by id.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special = {number: token.content for number, token in added.items() if token.special}

    def __call__(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids)

    def spelled(self, ids: Sequence[int]) -> str:
        """The text with the special tokens in it."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the token ids of each text, int32 (length,), with no special tokens added or recognized.

    Raises:
      ValueError: for a string that is no text, see `check_text`.
    """
    arrays = []
    for start in range(0, len(texts), _ENCODE_CHUNK):
        chunk = list(texts[start : start + _ENCODE_CHUNK])
        try:
            chunk = tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
        except TypeError:  # the library's word for a string that is no text
            for number, text in enumerate(chunk, start + 1):
                check_text(text, f"text {number}")
            raise
        arrays += [np.array(encoding.ids, np.int32) for encoding in chunk]
    return arrays


def id_range(tokenizer: Tokenizer) -> int:
    """The least number that is larger than every id of the tokenizer: with holes, more than it has tokens."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """Makes the tokenizer treat special tokens in text as text, and drops length limits that a file may carry."""
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _write(file: Path, text: str) -> None:
    if in_store(file):
        file.write_text(text + "\n")
        return
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, file)
