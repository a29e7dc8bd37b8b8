"""Conversations: rows of files, made into tokens of which it is known what the assistant says.

A row is `{"messages": [{"role": …, "content": …}, …]}`, with "tools" and "documents" where its template knows them, or
`{"prompt": …, "response": …}`, a conversation of two messages. Until it is tokenized, a conversation is a text: the
JSON of what counts in its row. So copies are told and conversations held out as other texts are.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from tokenizers import Tokenizer

from twotower_jax.data.chat import ChatTemplate, check_messages
from twotower_jax.data.tokenizer import encode
from twotower_jax.files import CheckpointError

JOINS = "the tokenizer has no chat template; prompts and responses are joined as they are"
ROLES = ("system", "developer", "user", "assistant", "tool")

_PAIR = ("prompt", "response")
_KEPT = ("messages", "tools", "documents")


class Turns(NamedTuple):
    """A conversation in tokens, up to the end of its last answer.

    Attributes:
      ids: (length,) int32.
      parts: (turns, 2) int64, how many tokens are said before each answer since the last one, and how many the answer
        has, its end token included. Together they are all of `ids`.
    """

    ids: np.ndarray
    parts: np.ndarray


class Conversations(Protocol):
    """Conversations in a fixed order, wherever they lie."""

    @property
    def count(self) -> int:
        """How many there are."""

    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """How many turns each of them has (count,), and `Turns.parts` end to end (turns, 2); integers."""

    def __getitem__(self, number: int) -> Turns:
        """One of them."""

    def identity(self) -> dict[str, Any]:
        """JSON-able values that are equal for equal conversations, and in practice for no others."""


class ConversationList:
    """Conversations in memory."""

    def __init__(self, turns: Sequence[Turns]):
        self._turns = list(turns)
        self.count = len(self._turns)

    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        counts = np.array([len(one.parts) for one in self._turns], np.int64)
        return counts, np.concatenate([np.zeros((0, 2), np.int64), *(one.parts for one in self._turns)])

    def __getitem__(self, number: int) -> Turns:
        return self._turns[number]

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for ids, parts in self._turns:
            digest.update(np.array(parts.shape[:1], "<i8").tobytes())
            digest.update(parts.astype("<i8").tobytes())
            digest.update(ids.astype("<i4").tobytes())
        return {"sha256": digest.hexdigest()}


def is_conversation(row: Any) -> bool:
    """Whether a row of JSON is meant as one, be it right or not; one with a "text" is a text."""
    return isinstance(row, dict) and "text" not in row and any(name in row for name in ("messages", *_PAIR))


def conversation_text(row: Any) -> str:
    """A row as a text.

    Raises:
      ValueError: saying what is wrong with it.
    """
    if not is_conversation(row):
        raise ValueError('every row must be a conversation, {"messages": […]} or {"prompt": …, "response": …}')
    if "messages" in row:
        check_messages(row["messages"])
        for number, message in enumerate(row["messages"], 1):
            _check_message(number, message)
        if all(message["role"] != "assistant" for message in row["messages"]):
            raise ValueError('no message has the role "assistant", so there is nothing to learn')
        kept = {name: row[name] for name in _KEPT if row.get(name) is not None}
    else:
        for name in _PAIR:
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise ValueError(f'"{name}" must be a string that holds text')
        kept = {name: row[name] for name in _PAIR}
    text = json.dumps(kept, ensure_ascii=False)
    text.encode("utf-8")  # JSON can spell half of a surrogate pair, which is no text.
    return text


def contents(text: str) -> list[str]:
    """What is said in a conversation, message by message."""
    row = json.loads(text)
    said = (message.get("content") for message in row["messages"]) if "messages" in row else map(row.get, _PAIR)
    return [content for content in said if content]


class Coder:
    """Makes tokens of conversations, by the chat template of a tokenizer's folder.

    An answer is what the template marks by `{% generation %}`, up to its first end token, where generating stops. An
    end token right after the mark is taken into it, and an answer without any gets one. Where the tokenizer has no
    template, a prompt and its response are joined as they are.

    Attributes:
      joins: whether there is no template.
    """

    def __init__(self, tokenizer: Tokenizer, folder: str | pathlib.Path | None, end_tokens: Collection[int]):
        """`folder` has the tokenizer and its template, None for neither; `end_tokens` end an answer, the first of which
        closes one that has none.

        Raises:
          ValueError: the template does not mark what the assistant says; CheckpointError: it is broken.
        """
        self._tokenizer, self._ends = tokenizer, list(end_tokens)
        self._template, self._why = None, "a tokenizer that is trained on the data has none"
        if folder is not None:
            try:
                self._template = ChatTemplate.load(folder, tokenizer)
            except CheckpointError:
                raise
            except ValueError:
                self._why = f"the tokenizer of {folder} has none"
        if self._template is not None and not self._template.marks_assistant:
            raise ValueError(
                f"{folder}: the chat template does not say what the assistant says; put {{% generation %}} and "
                "{% endgeneration %} around it"
            )

    @property
    def joins(self) -> bool:
        return self._template is None

    @property
    def template_sha256(self) -> str:
        """The hash of the template, "" without one."""
        return "" if self._template is None else self._template.sha256

    def __call__(self, text: str) -> Turns:
        """The tokens of a conversation that `conversation_text` gave.

        Raises:
          ValueError: the template refuses it or marks nothing of it, or there is none and the row has messages.
        """
        row = json.loads(text)
        if "messages" not in row and self._template is None:
            ids, answer = encode(self._tokenizer, [row[name] for name in _PAIR])
            assistant = np.arange(len(ids) + len(answer)) >= len(ids)
            return self._turns(np.concatenate([ids, answer]), assistant)
        if "messages" not in row:
            messages = [{"role": role, "content": row[name]} for role, name in zip(ROLES[2:4], _PAIR, strict=True)]
            row = {"messages": messages}
        if self._template is None:
            raise ValueError(f'"messages" need a chat template (chat_template.jinja), and {self._why}')
        encoded = self._template.encode(row["messages"], tools=row.get("tools"), documents=row.get("documents"))
        if not encoded.assistant.any():
            raise ValueError("the chat template marks nothing of it as said by the assistant")
        return self._turns(encoded.ids, encoded.assistant)

    def _turns(self, ids: np.ndarray, assistant: np.ndarray) -> Turns:
        pieces, parts, at = [], [], 0
        for first, last in np.flatnonzero(np.diff(np.pad(assistant.astype(np.int8), 1))).reshape(-1, 2).tolist():
            added = []
            if len(ends := np.flatnonzero(np.isin(ids[first:last], self._ends))):
                last = first + int(ends[0]) + 1
            elif last < len(ids) and ids[last] in self._ends:
                last += 1
            else:
                added = self._ends[:1]
            pieces += [ids[at:last], np.array(added, np.int32)]
            parts.append((first - at, last - first + len(added)))
            at = last
        return Turns(np.concatenate(pieces), np.array(parts, np.int64))


class Encoding:
    """Reads rows as `formats.read_rows` wants it, and keeps what they become: a row that gives no tokens is reported
    with its place like one that is no conversation.

    Attributes:
      turns: by text, in the order of the rows; copies are left out.
    """

    def __init__(self, coder: Callable[[str], Turns]):
        self._coder = coder
        self.turns: dict[str, Turns] = {}

    def __call__(self, row: Any) -> str:
        text = conversation_text(row)
        if text not in self.turns:
            self.turns[text] = self._coder(text)
        return text


def _check_message(number: int, message: Any) -> None:
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise ValueError(f"message {number} has the unknown role {role!r}; known are {', '.join(ROLES)}")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise ValueError(f'message {number} ({role}): "content" must be a string')
