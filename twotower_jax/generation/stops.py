"""Where a row ends: end of text, a stop text, or its limit. On the host, on the tokens of one row.

What the end is, is said in terms of the whole row decoded at each of its tokens. That is looked up in the few tokens
that are new, so that a row costs the host as much as its length, and not its square.
"""

import bisect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

Decode = Callable[[Sequence[int]], str]

# What a tokenizer writes in place of bytes that are no character, or not yet.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Tokens whose text is still open, from which on a place is sought where it can be divided.
_LONG = 32


class Cut(NamedTuple):
    """A row as far as it goes: its tokens, why it ends there (None: it does not yet), and its text, if decodable."""

    tokens: list[int]
    reason: str | None
    text: str | None


def cut(
    tokens: list[int],
    limit: int,
    *,
    eos: Collection[int] = (),
    stop: Sequence[str] = (),
    decode: Decode | None = None,
) -> Cut:
    """Cuts a row after its limit, after its first end-of-text token, or after the token that completes a stop text.

    Whichever comes first counts. The text ends before the stop text; the tokens may hold some of it, because a token
    may begin before it and end in it, and all of it is in them. Text of the prompt is not looked at.
    """
    found = Ending(limit, eos=eos, stop=stop, decode=decode).look(tokens)
    return found or Cut(tokens, None, None if decode is None else decode(tokens))


class Ending:
    """Looks for the end of one row while it grows.

    Args:
      limit: of its tokens.
      eos: the tokens that end it.
      stop: the texts that end it; they need `decode`.
      decode: tokens to text. If it leaves special tokens out, and a stop text is to be found that holds one, it says so
        with two attributes, as `data.tokenizer.Decoder` does: `special`, their text by id, and `spelled`, a function
        that decodes with them.
    """

    def __init__(
        self, limit: int, *, eos: Collection[int] = (), stop: Sequence[str] = (), decode: Decode | None = None
    ):
        self._limit, self._eos, self._decode = limit, frozenset(eos), decode
        self._seen = 0
        special: Mapping[int, str] = getattr(decode, "special", {})
        spelled = [text for text in stop if any(content in text for content in special.values())]
        # Each way of decoding, and the stop texts that are looked for in what it gives.
        self._ways: list[tuple[Decode, Sequence[str]]] = [(decode, stop)] if stop else []
        if spelled:
            self._ways.append((decode.spelled, spelled))
        self._windows = [_Window(way, texts) for way, texts in self._ways]

    def look(self, tokens: list[int]) -> Cut | None:
        """The row as it ends, or None if it goes on; see `cut`.

        Args:
          tokens: all of the row, which begin with those of the call before.
        """
        start, stop = self._seen, min(len(tokens), self._limit)
        reason = "length" if len(tokens) >= self._limit else None
        for place in range(start, stop):
            if tokens[place] in self._eos:
                stop, reason = place + 1, "eos"
                break
        self._seen = stop
        new = tokens[start:stop]
        # Each window has to see every token.
        noticed = any([window.add(new) for window in self._windows])
        if reason is None and not noticed:
            return None
        tokens = tokens[:stop]
        if self._ways and self._holds(tokens):
            # Text only grows, so the first token with it can be found by halves.
            length = 1 + bisect.bisect_left(range(1, stop + 1), True, key=lambda n: self._holds(tokens[:n]))
            return Cut(tokens[:length], "stop", self._text_before_stop(tokens[:length]))
        if reason is None:
            return None
        return Cut(tokens, reason, None if self._decode is None else self._decode(tokens))

    def _holds(self, tokens: list[int]) -> bool:
        return any(any(text in whole for text in texts) for whole, texts in self._decoded(tokens))

    def _decoded(self, tokens: list[int]) -> list[tuple[str, Sequence[str]]]:
        return [(way(tokens), texts) for way, texts in self._ways]

    def _text_before_stop(self, tokens: list[int]) -> str:
        """The text of tokens that hold a stop text, up to it, special tokens left out."""
        text = self._decode(tokens)
        ends = []
        for (way, _), (whole, texts) in zip(self._ways, self._decoded(tokens), strict=True):
            place = min((whole.index(s) for s in texts if s in whole), default=None)
            if place is not None:
                ends.append(place if way is self._decode else self._without_special(tokens, whole, place, way))
        return text[: min(ends)]

    def _without_special(self, tokens: list[int], whole: str, place: int, spelled: Decode) -> int:
        """How long the text is that leaves special tokens out, where the one that spells them has length `place`."""
        before = bisect.bisect_right(range(1, len(tokens) + 1), place, key=lambda n: len(spelled(tokens[:n])))
        length = len(self._decode(tokens[:before]))
        if before < len(tokens) and tokens[before] not in self._decode.special:
            length += place - len(spelled(tokens[:before]))
        return length


class _Window:
    """The end of a row's text, decoded from its last tokens alone.

    A tokenizer may need the token before to decode one (is there a space?), and more than one to make a character. So
    some tokens whose text is known stay for context, and text that ends in an open character is not taken as known.
    """

    def __init__(self, decode: Decode, texts: Sequence[str]):
        self._decode, self._texts = decode, texts
        self._overlap = max(map(len, texts)) - 1
        self._tail = ""
        self._context: list[int] = []
        self._open: list[int] = []
        self._long = _LONG

    def add(self, new: list[int]) -> bool:
        """Whether a stop text may stand in the text, now that these tokens have come."""
        self._open += new
        text = self._text(self._context, self._open)
        found = any(stop in self._tail + text for stop in self._texts)
        if text and not text.endswith(_REPLACEMENT):
            self._keep(text, len(self._open))
        elif not text and self._context:
            self._open = []  # Nothing but special tokens.
        elif len(self._open) > self._long:
            self._divide()
        return found

    def _text(self, context: list[int], tokens: list[int]) -> str:
        return self._decode(context + tokens)[len(self._decode(context)) :]

    def _keep(self, text: str, count: int) -> None:
        """Takes the text of the first `count` open tokens as known."""
        known = self._tail + text
        self._tail = known[-self._overlap :] if self._overlap else ""
        self._context, self._open = self._open[:count], self._open[count:]
        self._long = _LONG

    def _divide(self) -> None:
        """Finds a place before the end where no character is open: where both sides alone give the same text."""
        whole = self._text(self._context, self._open)
        for count in range(len(self._open) - 1, max(0, len(self._open) - 8), -1):
            text = self._text(self._context, self._open[:count])
            if text + self._decode(self._open[count:]) == whole:
                self._keep(text, count)
                return
        self._long *= 2
