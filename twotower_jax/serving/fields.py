"""Fields of a body, each read once, and what is done with those that are not for us."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from twotower_jax.serving.errors import ApiError

_LARGEST = 2**31 - 1
_MISSING = object()

# Fields that say who asks, or what to call it. They change no answer.
_ABOUT = {"user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier"}
# Fields of OpenAI and vLLM that are understood at these values alone, at which they change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "store": (False,),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "stop_token_ids": ([],),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
}
NEUTRAL_COMPLETION = {"suffix": ("",)}
NEUTRAL_CHAT = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
_INSTEAD = {
    "suffix": 'tokens that are to follow can be given as "pinned"',
}
# Fields that clients send as null though only other servers know them.
_NULL = {"guided_grammar", "reasoning_effort", "prompt_logprobs"}


def refused(name: str, what: str, code: str | None = "invalid_value") -> ApiError:
    """The error for a field, or for a part of it: `stop`, `messages[2]`."""
    param = name.partition("[")[0] if name.endswith("]") else name
    return ApiError(400, f"{shown(name, '')}: {what}", param=param[:100], code=code)


class Fields:
    """The fields of an object, each read once. Null is as good as nothing."""

    def __init__(self, values: Mapping[str, Any]):
        self._left = {name: value for name, value in values.items() if value is not None}
        self._null = values.keys() - self._left.keys()
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, default: Any = _MISSING) -> Any:
        self._read.add(name)
        value = self._left.pop(name, default)
        if value is _MISSING:
            raise refused(name, "is missing")
        return value

    def integer(self, name: str, default: Any, least: int = 0, most: int = _LARGEST) -> Any:
        """`default`, of any type, where nothing is given."""
        if name not in self:
            return self.take(name, default)
        value = self.take(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise refused(name, f"must be a whole number in [{least}, {most}], not {shown(value)}")
        return value

    def number(self, name: str, default: Any, least: float, most: float) -> Any:
        if name not in self:
            return self.take(name, default)
        value = self.take(name)
        fine = not isinstance(value, bool) and isinstance(value, int | float) and least <= value <= most
        if not fine or not math.isfinite(value):
            raise refused(name, f"must be a number in [{least:g}, {most:g}], not {shown(value)}")
        return float(value)

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise refused(name, f"must be true or false, not {shown(value)}")
        return value

    def word(self, name: str, default: Any, choices: Sequence[str]) -> Any:
        value = self.take(name, default)
        if value is not default and value not in [*choices]:
            raise refused(name, f"must be one of {', '.join(choices)}, not {shown(value)}")
        return value

    def finish(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Refuses what is left and means something."""
        known = neutral.keys() | _ABOUT
        for name, value in self._left.items():
            if name in _ABOUT or any(_same(value, allowed) for allowed in neutral.get(name, ())):
                continue
            if name in neutral:
                instead = f": {_INSTEAD[name]}" if name in _INSTEAD else ""
                raise refused(name, f"cannot be honored by this model, at {shown(value)}{instead}")
            raise refused(name, "is not known here", code="unknown_field")
        if unknown := sorted(self._null - self._read - known - _NULL):
            raise refused(unknown[0], "is not known here", code="unknown_field")


def is_integer(value: Any) -> bool:
    """Whether it is a whole number, and not true or false."""
    return isinstance(value, int) and not isinstance(value, bool)


def _same(value: Any, allowed: Any) -> bool:
    """Whether they are the same in JSON, where 0 and false are not."""
    return isinstance(value, bool) == isinstance(allowed, bool) and value == allowed


def shown(value: Any, quotes: str | None = None) -> str:
    """A value in a message, cut to what can be read; a text with `quotes` in place of Python's."""
    text = repr(value) if quotes is None else f"{quotes}{value}{quotes}"
    return text if len(text) <= 60 else f"{text[:60]} …"
