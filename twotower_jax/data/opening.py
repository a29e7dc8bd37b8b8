"""What `config.data` names, opened: text, prepared data, a Megatron set, or a mixture of these.

    ""                        the documentation shipped with Python
    tasks, tasks:NAME,NAME    questions with exact answers, made on the spot (tasks.py), of all tasks or some
    FILE.txt, FILE.jsonl ...  text of any kind that formats.py reads, tokenized and packed in memory
    FILE.jsonl                of conversations, which the first row tells, likewise
    FOLDER with dataset.json  prepared data
    FOLDER                    of files of text, or of conversations, as above
    PREFIX, PREFIX.bin        a Megatron set
    FILE.json                 a mixture of any of these but the first two

Each kind is a small class that can say which tokenizer its tokens need, and gives windows.
"""

import functools
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from twotower_jax.data.conversation_windows import ConversationWindows
from twotower_jax.data.conversations import (
    JOINS,
    Coder,
    ConversationList,
    Conversations,
    Encoding,
    contents,
    conversation_text,
)
from twotower_jax.data.documents import Documents, held_out
from twotower_jax.data.inputs import File, distinct_documents, holds_conversations, text_files
from twotower_jax.data.megatron import MegatronDocuments, is_megatron
from twotower_jax.data.mixture import Mixture, read_mixture, schedule_of
from twotower_jax.data.mixture_schedule import Run
from twotower_jax.data.packing import PackedSequences, Packing, pack_documents
from twotower_jax.data.prepared import TRAIN, VALIDATION, is_prepared, open_prepared, read_manifest
from twotower_jax.data.sources import python_documentation
from twotower_jax.data.task_windows import TaskWindows
from twotower_jax.data.tasks import TASKS, all_words
from twotower_jax.data.tokenizer import load_tokenizer, train_tokenizer, word_tokenizer
from twotower_jax.data.windows import AllLearned, Concatenation, DocumentWindows
from twotower_jax.paths import as_path, is_address
from twotower_jax.shares import ceil_share

Windows = PackedSequences | DocumentWindows | TaskWindows | ConversationWindows | AllLearned

Report = Callable[[str], None]

_HELD_OUT = ", documents held out (validation_fraction=0 goes without)"


_TASKS = "tasks"  # A folder of that name is ./tasks.

_LOOKED_AT = 64  # Documents of a Megatron set whose ends are compared with the model's.


class Source(Protocol):
    """One kind of data.

    Attributes:
      files: the real paths of what holds it.
      conversational: whether it gives conversations.
    """

    files: set[str]
    conversational: bool

    def tokenizer(self, vocab_size: int) -> Tokenizer | None:
        """A tokenizer for a model that has none yet, of at most `vocab_size` tokens where it is trained; or None."""

    def windows(self, tokenizer: Tokenizer, packing: Packing) -> tuple[Windows, Windows | None]:
        """Windows for training, and those held out."""


def open_source(path: str, report: Report) -> Source:
    """What a path names, mixtures excepted; `report` is given a line about what is left out.

    Raises:
      ValueError, OSError: nothing usable is there.
    """
    if path == _TASKS or path.startswith(f"{_TASKS}:"):
        return TaskSource(path.removeprefix(_TASKS).removeprefix(":"))
    if path and is_prepared(path):
        return PreparedSource(path, report)
    if path and not as_path(path).is_dir() and is_megatron(path):
        return MegatronSource(path)
    files = text_files(path, report) if path else []
    return ConversationSource(files, path, report) if holds_conversations(files) else TextSource(files, report)


class Data:
    """All that `config.data` names.

    Attributes:
      conversational: whether any of it is conversations. All windows then tell documents apart, and what each token
        counts.
    """

    def __init__(self, data: str, report: Report = lambda line: None):
        """Looks at what is there; `report` is given lines about what is left out.

        Raises:
          ValueError, OSError: the mixture file cannot be used, what is named is missing, or two sources hold one file.
        """
        self._path, self._mixed = data, Path(data).suffix == ".json"
        entries = read_mixture(data) if self._mixed else {}
        self._weights = {name: entry.weight for name, entry in entries.items()}
        paths = {name: entry.path for name, entry in sorted(entries.items())} if self._mixed else {"": data}
        self._sources = {name: open_source(path, report) for name, path in paths.items()}
        self.conversational = any(source.conversational for source in self._sources.values())
        for a, b in itertools.combinations(paths, 2):
            # Each source holds out documents of its own: what one holds out, the other would train on.
            if common := self._sources[a].files & self._sources[b].files:
                raise ValueError(
                    f"{data}: {a!r} and {b!r} overlap: both hold {min(common)}; held-out documents of one would be "
                    "trained on in the other, so give each its own files"
                )

    def tokenizer(self, vocab_size: int) -> Tokenizer:
        """The tokenizer for a model that starts from random weights: the first that a source offers.

        Raises:
          ValueError, OSError: no source offers one.
        """
        for source in self._sources.values():
            if (tokenizer := source.tokenizer(vocab_size)) is not None:
                return tokenizer
        raise ValueError(
            "data holds tokens without a tokenizer: set init_from to the checkpoint whose tokenizer they were made with"
        )

    def windows(
        self, tokenizer: Tokenizer, packing: Packing, run: Run | None = None
    ) -> tuple[Windows | Mixture, Windows | Concatenation | None]:
        """Windows for training, and those held out: of a mixture, each source's one after the other.

        `run` is how long the run is, which matters to a mixture whose weights change.

        Raises:
          ValueError, OSError: data that are missing, broken, of another tokenizer, or too few; weights that cannot be.
        """
        try:
            schedule_of(self._weights, run)  # before much is read
        except ValueError as error:
            raise ValueError(f"{self._path}: {error}") from None
        training, validation = {}, []
        for name, source in self._sources.items():
            both = source.windows(tokenizer, packing)
            if self.conversational and not source.conversational:
                both = (None if windows is None else AllLearned(windows) for windows in both)
            training[name], own = both
            validation += [] if own is None else [own]
        if not self._mixed:
            return training[""], validation[0] if validation else None
        return Mixture(training, self._weights, run), Concatenation(validation) if validation else None


class TextSource:
    """Text files, or with an empty path Python's documentation; read at once."""

    conversational = False

    def __init__(self, files: list[File], report: Report):
        self.files = {_real(file.path) for file in files}
        self._documents = distinct_documents(files, report=report) if files else python_documentation()

    def tokenizer(self, vocab_size: int) -> Tokenizer:
        return train_tokenizer(self._documents, vocab_size)

    def windows(self, tokenizer: Tokenizer, packing: Packing) -> tuple[Windows, Windows | None]:
        options = packing._asdict()
        for name in ("turn_align", "padding_weight", "tokenizer_folder"):
            options.pop(name)
        end_token, *_ = options.pop("end_tokens")
        return pack_documents(self._documents, tokenizer, end_token=end_token, **options)


class ConversationSource:
    """Files of conversations; read at once. Whole conversations are held out, at least one."""

    conversational = True

    def __init__(self, files: list[File], path: str, report: Report):
        self.files = {_real(file.path) for file in files}
        self._files, self._path, self._report = files, path, report

    def tokenizer(self, vocab_size: int) -> Tokenizer:
        texts = distinct_documents(self._files, conversation_text)
        return train_tokenizer([content for text in texts for content in contents(text)], vocab_size)

    def windows(self, tokenizer: Tokenizer, packing: Packing) -> tuple[Windows, Windows | None]:
        coder = Coder(tokenizer, packing.tokenizer_folder, packing.end_tokens)
        encoding = Encoding(coder)
        distinct_documents(self._files, encoding, self._report)
        turns = list(encoding.turns.values())
        if coder.joins:
            self._report(f"{self._path}: {JOINS}")
        turns = [turns[i] for i in np.random.default_rng(packing.seed).permutation(len(turns))]
        held_out = max(1, ceil_share(packing.validation_fraction, len(turns))) if packing.validation_fraction else 0
        if held_out == len(turns):
            raise ValueError(
                f"{self._path}: of {len(turns)} conversations none is left to train on after some are held out: give "
                "more, or validation_fraction=0"
            )
        training = _conversation_windows(ConversationList(turns[held_out:]), packing, self._path, self._report)
        if not held_out:
            return training, None
        name = self._path + _HELD_OUT
        return training, _conversation_windows(ConversationList(turns[:held_out]), packing, name, self._report)


class TaskSource:
    """Questions and answers without end; what is held out is the split for validation."""

    conversational = False

    def __init__(self, names: str):
        self.files: set[str] = set()
        self._names = tuple(names.split(",")) if names else tuple(TASKS)
        if unknown := [name for name in self._names if name not in TASKS]:
            raise ValueError(f"data: there is no task {unknown[0]!r}; choose among {', '.join(TASKS)}")

    def tokenizer(self, vocab_size: int) -> Tokenizer:
        return word_tokenizer(all_words(), vocab_size)

    def windows(self, tokenizer: Tokenizer, packing: Packing) -> tuple[Windows, Windows | None]:
        training = TaskWindows(tokenizer, packing, "train", self._names)
        if not packing.validation_fraction:
            return training, None
        return training, TaskWindows(tokenizer, packing, "validation", self._names)


class PreparedSource:
    """A folder of prepared data. What is held out was decided when it was made."""

    def __init__(self, path: str, report: Report):
        self._path, self._report = path, report
        self.files = {_real(path)}
        self.conversational = read_manifest(as_path(path)).conversational

    def tokenizer(self, vocab_size: int) -> Tokenizer:
        return load_tokenizer(self._path)

    def windows(self, tokenizer: Tokenizer, packing: Packing) -> tuple[Windows, Windows | None]:
        if load_tokenizer(self._path).to_str() != tokenizer.to_str():
            raise ValueError(
                f"{self._path}: was prepared with another tokenizer than the run's; prepare the text again with "
                "launch/prepare.py --tokenizer=CHECKPOINT"
            )
        documents = open_prepared(self._path, TRAIN)
        if (end_token := documents.manifest.end_token) not in packing.end_tokens:
            ends = " or ".join(map(str, packing.end_tokens))
            raise ValueError(
                f"{self._path}: its documents are closed by token {end_token}, the model's texts end with {ends}; "
                f"prepare the text again with launch/prepare.py --eos={packing.end_tokens[0]}, or give a new model "
                f"that end token (--config.model.eos_token_id={end_token})"
            )
        make = functools.partial(_conversation_windows, report=self._report) if self.conversational else _windows
        training = make(documents, packing, self._path)
        validation = open_prepared(self._path, VALIDATION)
        if not validation.count or not packing.validation_fraction:
            return training, None
        return training, make(validation, packing, self._path + _HELD_OUT)


class MegatronSource:
    """A Megatron set. Documents are held out by number."""

    conversational = False

    def __init__(self, path: str):
        self._path = path
        self.files = {_real(path.removesuffix(".bin") + ".bin")}

    def tokenizer(self, vocab_size: int) -> None:
        return None

    def windows(self, tokenizer: Tokenizer, packing: Packing) -> tuple[Windows, Windows | None]:
        documents, fraction, seed = MegatronDocuments(self._path), packing.validation_fraction, packing.seed
        _warn_of_other_ends(documents, packing, self._path)
        if not fraction:
            return _windows(documents, packing, self._path), None
        chosen = functools.partial(held_out, fraction=fraction, seed=seed)
        about = {"held_out": f"{fraction} by seed {seed}"}
        training = _windows(documents, packing, self._path, keep=lambda start, stop: ~chosen(start, stop), about=about)
        validation = _windows(documents, packing, self._path + _HELD_OUT, keep=chosen, about=about)
        return training, validation


def _real(path: str) -> str:
    """What a path leads to, by which two that lead to one file are told."""
    return path if is_address(path) else os.path.realpath(path)


def _warn_of_other_ends(documents: Documents, packing: Packing, name: str) -> None:
    """Says so on stderr where none of the first documents ends with a token that ends the model's texts."""
    lengths = documents.lengths(0, min(documents.count, _LOOKED_AT))
    ends = np.cumsum(lengths)[lengths > 0]
    last = {int(documents.read(end - 1, end)[0]) for end in ends.tolist()}
    if last and not last & set(packing.end_tokens):
        print(
            f"warning: {name}: its documents end with {', '.join(map(str, sorted(last)[:3]))}, the model's texts with "
            f"{' or '.join(map(str, packing.end_tokens))}: it will not learn where a text ends",
            file=sys.stderr,
        )


def _windows(documents: Documents, packing: Packing, name: str, **options) -> DocumentWindows:
    return DocumentWindows(
        documents, packing.sequence_length, packing.vocab_size, name=name, align=packing.align, **options
    )


def _conversation_windows(
    conversations: Conversations, packing: Packing, name: str, report: Report
) -> ConversationWindows:
    windows = ConversationWindows(
        conversations,
        packing.sequence_length,
        packing.vocab_size,
        name=name,
        align=packing.turn_align,
        padding_weight=packing.padding_weight,
        end_token=packing.end_tokens[0],
    )
    used = conversations.count - windows.left_out
    lost = [
        f"{count} {what}"
        for count, what in (
            (windows.cut, "cut at sequence_length"),
            (windows.left_out, "left out, whose first answer begins after it"),
        )
        if count
    ]
    report(
        f"{name.removesuffix(_HELD_OUT)}: {used:,} conversations{' held out' if name.endswith(_HELD_OUT) else ''}, "
        f"{windows.answers:,} answers of {windows.learned:,} tokens, in {len(windows):,} windows"
        + "".join(f"; {text}" for text in lost)
    )
    return windows
