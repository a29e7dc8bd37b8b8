"""Text in pieces: what is given out is never taken back, split, or part of a stop text."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from twotower_jax.data.tokenizer import train_tokenizer
from twotower_jax.generation.stops import Ending, cut
from twotower_jax.serving.text import Deltas, Incremental, TokenTexts

TEXT = "naïve café 日本語 \N{GRINNING FACE} end of it, the end.\n"
TOKENIZER = train_tokenizer([TEXT] * 3, 300)
SIZE = TOKENIZER.get_vocab_size()
TEXTS = TokenTexts(TOKENIZER)
DECODE = TEXTS.decode


def sentence_pieces() -> Tokenizer:
    """Words with a mark for the space before, and bytes where a character has no token."""
    words = ["<unk>", "▁a", "▁b", "c", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


@pytest.mark.parametrize("tokenizer", [TOKENIZER, sentence_pieces()], ids=["byte level", "sentence pieces"])
@given(data=st.data())
def test_pieces_join_to_the_whole_and_never_change(tokenizer, data):
    texts, size = TokenTexts(tokenizer), tokenizer.get_vocab_size()
    decode = texts.decode
    blocks = data.draw(st.lists(st.lists(st.integers(0, size - 1), max_size=6), max_size=12))
    text, given_out, tokens = Incremental(texts), "", []
    for block in blocks:
        tokens += block
        given_out += text.push(block)
        assert decode(tokens).startswith(given_out)
    assert text.length == len(given_out)
    rest = list(itertools.takewhile(lambda token: token in texts.settling, reversed(tokens)))
    assert rest or decode(tokens)[len(given_out) :].strip("\ufffd") == ""


def test_a_character_of_several_tokens_comes_when_it_is_whole():
    ids = TOKENIZER.encode("é\N{SNOWMAN}x").ids
    text = Incremental(TEXTS)
    pieces = [text.push([token]) for token in ids]
    assert "".join(pieces) == "é\N{SNOWMAN}x"
    assert "\ufffd" not in "".join(pieces)
    assert any(piece == "" for piece in pieces)  # The snowman's first bytes.


@given(seed=st.integers(0, 2**20), stop=st.sampled_from([("end",), ("the end", " of"), ("é", "ee"), (".\n",)]))
def test_a_stop_text_is_never_begun(seed, stop):
    draw = random.Random(seed)
    tokens = TOKENIZER.encode(
        "".join(draw.choice(["th", "e e", "nd ", "of", "é", "e", ".", "\n"]) for _ in range(24))
    ).ids
    ending, deltas, row, said = Ending(len(tokens), stop=stop, decode=DECODE), Deltas(TEXTS, stop), [], ""
    end = None
    while end is None:
        new = tokens[len(row) : len(row) + draw.randint(1, 4)]
        row += new
        end = ending.look(row)
        if end is None:
            said += deltas.push(new)
            assert cut(tokens, len(tokens), stop=stop, decode=DECODE).text.startswith(said)
    assert said + deltas.finish(end.text) == end.text == cut(tokens, len(tokens), stop=stop, decode=DECODE).text


def test_a_stop_text_that_spells_a_special_token_is_not_begun_either():
    foo = TOKENIZER.encode("foo").ids
    deltas = Deltas(TEXTS, ("<s>foo</s>",))
    assert deltas.push(TOKENIZER.encode("a").ids) == "a"
    assert deltas.push([1, *foo]) == ""
    assert deltas.push(TOKENIZER.encode("d").ids) == "food"


def test_single_tokens_are_told_apart():
    texts = TEXTS
    names = [texts.text(token) for token in range(SIZE)]
    assert len(set(names)) == SIZE
    assert names[2] == "</s>" and texts.bytes(2) == b"</s>"
    ids = TOKENIZER.encode(TEXT).ids
    assert b"".join(texts.bytes(token) for token in ids).decode() == TEXT
    first = TOKENIZER.encode("\N{SNOWMAN}").ids[0]
    assert texts.text(first) == "bytes:" + "".join(f"\\x{byte:02x}" for byte in texts.bytes(first))
    assert texts.text(10**6) == "<1000000>"
    assert texts.longest() >= max(len(names[token]) for token in ids)
    assert TokenTexts(sentence_pieces()).bytes(4 + 0x80) is None  # A byte alone, of which the decoder does not tell.
