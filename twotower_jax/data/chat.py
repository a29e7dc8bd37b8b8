"""Conversations to text and tokens, by the template that comes with a chat model's tokenizer.

The template is a program in Jinja, written by whoever made the model: it runs in Jinja's sandbox, on plain data, in the
environment that `transformers` gives it (blocks trimmed, `raise_exception`, `strftime_now`, `break` and `continue`,
`tojson` without HTML escapes, and `{% generation %} … {% endgeneration %}` around what the assistant says).
"""

import contextvars
import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
from tokenizers import Tokenizer

from twotower_jax.files import CheckpointError, read_bytes, read_json
from twotower_jax.texts import check_text

Message = Mapping[str, Any]

_CONFIG, _ROLES, _JINJA, _MORE_JINJA = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates",
)
_MAX_BYTES = 16 << 20
# The special tokens that a template may name.
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Names under which a message's reasoning comes; templates read the first, some the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_ASSISTANT = "assistant"


class Encoded(NamedTuple):
    """A conversation in tokens.

    Attributes:
      ids: (L,) int32.
      assistant: (L,) bool, of tokens that any of the text between `{% generation %}` and `{% endgeneration %}` is in.
    """

    ids: np.ndarray
    assistant: np.ndarray


class ChatTemplate:
    """The chat template of a tokenizer's folder.

    Attributes:
      marks_assistant: whether any template says which spans are the assistant's.
      sha256: of the templates and of what they may name.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str], tokenizer: Tokenizer, where: str):
        """Compiles the templates.

        Args:
          sources: templates by name: "default" and, for conversations with tools, "tool_use".
          special_tokens: what the templates may name, such as "bos_token".
          tokenizer: as `load_tokenizer` gives it.
          where: the file, for messages.

        Raises:
          CheckpointError: for a template with a mistake.
        """
        self._where, self._special_tokens = where, dict(special_tokens)
        environment = _environment()
        try:
            self._templates = {name: environment.from_string(source) for name, source in sources.items()}
        except Exception as error:  # the template is a foreign program
            raise CheckpointError(f"{where}: the chat template is not valid Jinja ({error})") from None
        self.marks_assistant = any("endgeneration" in source for source in sources.values())
        told = json.dumps([dict(sources), self._special_tokens], sort_keys=True)
        self.sha256 = hashlib.sha256(told.encode()).hexdigest()
        # A copy, which takes the special tokens that the template spells for what they are.
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._control = [token.content for token in added if token.special]

    @classmethod
    def load(cls, folder: str | Path, tokenizer: Tokenizer) -> "ChatTemplate":
        """Reads chat_template.jinja or, without it, `chat_template` of tokenizer_config.json, a text or named texts.

        Raises:
          ValueError: there is no template; CheckpointError: it or its file is broken.
        """
        folder = Path(folder)
        config = _read_object(folder / _CONFIG)
        sources, where = _sources(folder, config)
        roles = _read_object(folder / _ROLES) | {k: v for k, v in config.items() if v is not None}
        special = {name: _text(roles[name]) for name in _SPECIAL if _text(roles.get(name)) is not None}
        return cls(sources, special, tokenizer, str(where))

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        *,
        tools: Sequence[Mapping] | None = None,
        documents: Sequence[Mapping] | None = None,
    ) -> str:
        """The text of a conversation.

        Args:
          messages: each with a "role" and mostly a "content".
          add_generation_prompt: end with what precedes an answer of the assistant.
          tools, documents: JSON values, for templates that know them.

        Raises:
          ValueError: if the template refuses the conversation or fails on it, a message has no role, or a text spells a
            special token in the name of anybody but the assistant (so that no user can end a turn and begin another's).
        """
        return self._render(messages, add_generation_prompt, tools, documents)[0]

    def encode(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        *,
        tools: Sequence[Mapping] | None = None,
        documents: Sequence[Mapping] | None = None,
    ) -> Encoded:
        """The tokens of a conversation and which of them are the assistant's. Arguments and errors as `render`."""
        text, spans = self._render(messages, add_generation_prompt, tools, documents)
        check_text(text, "the conversation")
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        assistant = np.zeros(len(encoding.ids), bool)
        starts, stops = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        for start, stop in spans:
            assistant |= (starts < stop) & (stops > start)
        return Encoded(np.array(encoding.ids, np.int32), assistant)

    def encode_text(self, text: str) -> list[int]:
        """The tokens of a text that `render` gave, or of a part of it; special tokens that it spells are such."""
        return self._tokenizer.encode(check_text(text, "the conversation"), add_special_tokens=False).ids

    def _render(self, messages, add_generation_prompt, tools, documents) -> tuple[str, list[tuple[int, int]]]:
        """The text and the assistant's spans of it, in characters."""
        check_messages(messages)
        self._check_spelling(messages, tools, documents)
        template = self._templates["tool_use" if tools is not None and "tool_use" in self._templates else "default"]
        given = {"tools": _plain(tools), "documents": _plain(documents), "add_generation_prompt": add_generation_prompt}
        blocks, spans = [], []
        token = _TRACKED.set((blocks, spans))
        try:
            for block in template.generate(
                **self._special_tokens | given | {"messages": [_normalized(message) for message in messages]}
            ):
                blocks.append(block)
        except Exception as error:  # the template is a foreign program
            raise ValueError(f"the chat template of {self._where} refuses the conversation: {error}") from None
        finally:
            _TRACKED.reset(token)
        return "".join(blocks), spans

    def _check_spelling(self, messages, tools, documents) -> None:
        given = [(f"message {n} ({m['role']})", m) for n, m in enumerate(messages, 1) if m["role"] != _ASSISTANT]
        for what, value in [*given, ("tools", tools), ("documents", documents)]:
            texts = "\n".join(_texts(value))
            if spelled := next((token for token in self._control if token in texts), None):
                raise ValueError(f"{what} spells the special token {spelled!r}, which only the template may set")


def check_messages(messages: Any) -> None:
    """Refuses what is no conversation.

    Raises:
      ValueError: saying what is expected.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError('"messages" must be a list of at least one {"role": …, "content": …}')
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f'message {number} must be an object with a "role", a string')


# What `{% generation %}` writes to while a template is rendered: the text before it, and the spans found.
_TRACKED: contextvars.ContextVar[tuple[list[str], list[tuple[int, int]]]] = contextvars.ContextVar("tracked")


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`: the text between, and its place noted."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller) -> str:
        text = caller()
        blocks, spans = _TRACKED.get()
        start = sum(map(len, blocks))
        spans.append((start, start + len(text)))
        return text


class _Dict:
    """`dict` for templates, without the attributes of a type."""

    def __call__(self, *args, **kwargs) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args) -> dict:
        return dict.fromkeys(*args)


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now, "dict": _Dict()}
    return environment


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message) -> None:
    raise jinja2.TemplateError(str(message))


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _sources(folder: Path, config: dict[str, Any]) -> tuple[dict[str, str], Path]:
    """Templates by name, and the file that has them."""
    found, where = {}, folder / _JINJA
    if where.exists():
        found["default"] = _read_text(where)
    for path in sorted((folder / _MORE_JINJA).glob("*.jinja")):
        found[path.stem] = _read_text(path)
    if not found:
        where, given = folder / _CONFIG, config.get("chat_template")
        if isinstance(given, list):
            given = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
        found = {"default": given} if isinstance(given, str) else given
    if not found:
        raise ValueError(
            f"{folder}: its tokenizer has no chat template (no {_JINJA}, and no chat_template in {_CONFIG}): it is no "
            "chat model; give plain prompts"
        )
    if not isinstance(found, dict) or not all(isinstance(part, str) for pair in found.items() for part in pair):
        raise CheckpointError(f"{where}: chat_template must be a text, or a list of templates with name and text")
    if "default" not in found:
        raise CheckpointError(f"{where}: none of the chat templates {', '.join(sorted(found))} is named 'default'")
    return found, where


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no such file."""
    if not path.exists():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value


def _read_text(path: Path) -> str:
    try:
        return read_bytes(path, _MAX_BYTES).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text ({error})") from None


def _text(token: Any) -> str | None:
    """A special token, given as text or as an object with it."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _plain(value: Any) -> Any:
    """A copy of JSON values that holds nothing else."""
    return json.loads(json.dumps(value))


def _normalized(message: Message) -> dict[str, Any]:
    """Without nulls, on which templates fail, and with its reasoning under the names that they read."""
    message = {name: value for name, value in _plain(dict(message)).items() if value is not None}
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning} | message | {"reasoning_content": reasoning}
    return message


def _texts(value: Any) -> list[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = [part for pair in value.items() for part in pair]
    return [text for part in value for text in _texts(part)] if isinstance(value, list | tuple) else []
