"""Where a row ends: end of text, a stop text, or its limit. On the host, on the tokens of one row."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

Decode = Callable[[Sequence[int]], str]


class Cut(NamedTuple):
    """A row as far as it goes: its tokens, why it ends there (None: it does not yet), and its text, if decodable."""

    tokens: list[int]
    reason: str | None
    text: str | None


def cut(
    tokens: list[int], limit: int, *, eos: Collection[int] = (), stop: Sequence[str] = (), decode: Decode | None = None
) -> Cut:
    """Cuts a row after its limit, after the first of its end-of-text tokens, or after the token that completes a stop
    text.

    Whichever comes first counts. The text ends before the stop text; the tokens may hold some of it, because a token
    may begin before it and end in it, and all of it is in them. Text of the prompt is not looked at.
    """
    tokens, reason = tokens[:limit], "length" if len(tokens) >= limit else None
    if (end := next((i for i, token in enumerate(tokens) if token in eos), None)) is not None:
        tokens, reason = tokens[: end + 1], "eos"
    text = None if decode is None else decode(tokens)
    if not any(stopper in text for stopper in stop):
        return Cut(tokens, reason, text)
    length = next(n for n in range(1, len(tokens) + 1) if any(s in decode(tokens[:n]) for s in stop))
    tokens = tokens[:length]
    text = decode(tokens)
    return Cut(tokens, "stop", text[: min(text.index(s) for s in stop if s in text)])
