"""Tokens to text while a row grows, and the text and bytes of single tokens."""

import json
import re
from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer

from twotower_jax.data import Decoder

# What a tokenizer writes in place of bytes that are no character, or not yet.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TokenTexts:
    """How tokens are written, together and one by one; in the latter case no two alike, where their bytes are known.

    Attributes:
      decode: tokens to text, special tokens left out.
      settling: tokens whose text may still change with the one after: the bytes of tokenizers that have a token for
        each, and write several either as characters, or each as one that stands for no character.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self.decode = tokenizer, Decoder(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        self._added = {number: token.content for number, token in added.items()}
        # A decoder of this type writes each byte as one character of its alphabet.
        kinds = _decoder_kinds(tokenizer)
        self._bytes = _byte_of_character() if "ByteLevel" in kinds else None
        vocabulary = tokenizer.get_vocab() if "ByteFallback" in kinds else {}
        self.settling = frozenset(i for text, i in vocabulary.items() if re.fullmatch(r"<0x[0-9A-F]{2}>", text))

    @property
    def bytewise(self) -> bool:
        """Whether texts are the bytes of their tokens, one after another."""
        return self._bytes is not None

    def bytes(self, token: int) -> bytes | None:
        """Its bytes; None where the tokenizer does not tell."""
        if token in self._added:
            return self._added[token].encode()
        spelled = self._tokenizer.id_to_token(token)
        if spelled is None:
            return None
        if self._bytes is not None and all(c in self._bytes for c in spelled):
            return bytes(self._bytes[c] for c in spelled)
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        return None if _REPLACEMENT in text else text.encode()

    def text(self, token: int) -> str:
        """Its text; bytes that are no text as OpenAI writes them, such as `bytes:\\xe2\\x82`."""
        found = self.bytes(token)
        if found is None:
            return self._tokenizer.id_to_token(token) or f"<{token}>"
        try:
            return found.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def longest(self) -> int:
        """The most characters that one token can stand for."""
        return max((len(text) for text in self._tokenizer.get_vocab(with_added_tokens=True)), default=1)


class Incremental:
    """The text of a growing row, each character as soon as no later token can change it.

    A tokenizer may need the token before to decode one (is there a space?), and several to make a character. So some
    tokens whose text is known stay for context, and characters that are still open are held back.

    Attributes:
      length: of the text that has been given out.
    """

    def __init__(self, texts: TokenTexts):
        self._texts = texts
        self._context: list[int] = []
        self._open: list[int] = []
        self._given = 0  # Characters of the open tokens' text.
        self.length = 0

    def push(self, tokens: Sequence[int]) -> str:
        """What has become certain of the text with these tokens."""
        self._open += tokens
        decode, settled = self._texts.decode, len(self._open)
        while settled and self._open[settled - 1] in self._texts.settling:
            settled -= 1
        text = decode(self._context + self._open[:settled])[len(decode(self._context)) :]
        certain = text.rstrip(_REPLACEMENT)
        new = certain[self._given :]
        self.length += len(new)
        if text and certain == text:
            self._context, self._open, self._given = self._open[:settled], self._open[settled:], 0
        elif text:
            self._given = max(self._given, len(certain))
        elif self._context:
            self._open = self._open[settled:]  # Nothing but special tokens.
        return new


class Deltas:
    """The text of a row in pieces that split no character, and hold nothing of a stop text that may be beginning.

    Args:
      stop: the row's stop texts, which may spell special tokens.
    """

    def __init__(self, texts: TokenTexts, stop: Sequence[str] = ()):
        self._text = Incremental(texts)
        special = texts.decode.special
        self._beginnings = sorted({_visible(text[:n], special) for text in stop for n in range(1, len(text))}, key=len)
        self._held = ""
        self._given = 0

    def push(self, tokens: Sequence[int]) -> str:
        """The next piece, after these tokens."""
        text = self._held + self._text.push(tokens)
        keep = next((len(b) for b in reversed(self._beginnings) if b and text.endswith(b)), 0)
        self._held = text[len(text) - keep :]
        piece = text[: len(text) - keep]
        self._given += len(piece)
        return piece

    def finish(self, text: str) -> str:
        """The last piece of a row whose whole text, cut before its stop text, is this one."""
        return text[self._given :]


def _visible(text: str, special: Mapping[int, str]) -> str:
    """What is seen of a text that spells special tokens where they are left out."""
    for content in special.values():
        text = text.replace(content, "")
    return text


def _decoder_kinds(tokenizer: Tokenizer) -> set[str]:
    decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
    return {decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", []))}


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 stands for itself, characters from 256 for all other bytes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}
