"""Where a row ends, against the definition: the whole row decoded at each of its tokens."""

import hypothesis.strategies as st
import pytest
from hypothesis import given
from tokenizers import AddedToken, Tokenizer, decoders, models

from twotower_jax.data import Decoder, train_tokenizer
from twotower_jax.generation.stops import Cut, Ending, cut

TEXT = "stop here, and there: <end> of the naïve 東京 🙂 café.\n"


@pytest.fixture(scope="module")
def byte_level() -> Decoder:
    tokenizer = train_tokenizer([TEXT * 3], 300)
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    return Decoder(tokenizer)


@pytest.fixture(scope="module")
def metaspace() -> Decoder:
    """Tokens that begin with a space unless they come first, as SentencePiece has them."""
    pieces = ["<s>", "▁stop", "▁", "▁he", "re", ",", "p", "▁he▁", "st", "op"]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<s>"))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return Decoder(tokenizer)


def literal(tokens: list[int], limit: int, eos: set[int], stop: list[str], decode: Decoder) -> Cut:
    """The definition."""
    special = [text for text in stop if any(content in text for content in decode.special.values())]

    def holds(ids: list[int]) -> bool:
        return any(s in decode(ids) for s in stop) or any(s in decode.spelled(ids) for s in special)

    tokens, reason = tokens[:limit], "length" if len(tokens) >= limit else None
    places = [place for place, token in enumerate(tokens) if token in eos]
    if places:
        tokens, reason = tokens[: places[0] + 1], "eos"
    if not holds(tokens):
        return Cut(tokens, reason, decode(tokens))
    tokens = next(tokens[:n] for n in range(1, len(tokens) + 1) if holds(tokens[:n]))
    text = decode(tokens)
    if any(s in text for s in stop):
        text = text[: min(text.index(s) for s in stop if s in text)]
    else:
        whole = decode.spelled(tokens)
        text = whole[: min(whole.index(s) for s in special if s in whole)]
        for content in decode.special.values():
            text = text.replace(content, "")
    return Cut(tokens, "stop", text)


def grown(tokens: list[int], sizes: list[int], **options) -> Cut | None:
    """What `Ending` says of a row that grows by these sizes, each again and again."""
    limit = options.pop("limit")
    ending, done, turn = Ending(limit, **options), 0, 0
    while done < len(tokens):
        done, turn = done + sizes[turn % len(sizes)], turn + 1
        if found := ending.look(tokens[:done]):
            return found
    return None


def check(decode: Decoder, vocabulary: int, data: st.DataObject):
    tokens = data.draw(st.lists(st.integers(0, vocabulary - 1), min_size=1, max_size=90), "tokens")
    whole = decode(tokens) + "zz"
    place = data.draw(st.integers(0, len(whole) - 2), "place")
    some = [
        whole[place : place + data.draw(st.integers(1, 4))],
        *data.draw(st.sets(st.sampled_from(["op", "e,", "q"]))),
    ]
    some += data.draw(st.lists(st.sampled_from([*decode.special.values(), "e<|im_end|>"]), max_size=1), "special")
    stop = [text for text in some if "\N{REPLACEMENT CHARACTER}" not in text] or ["stop"]
    options = {
        "limit": data.draw(st.integers(1, 100), "limit"),
        "eos": data.draw(st.sets(st.integers(0, vocabulary - 1), max_size=2), "eos"),
        "stop": stop,
        "decode": decode,
    }
    sizes = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3), "sizes")
    expected = literal(tokens, **options)
    assert cut(tokens, **options) == expected
    found = grown(tokens, sizes, **options)
    assert (found or Cut(tokens[: options["limit"]], None, decode(tokens))) == expected


@given(data=st.data())
def test_rows_of_bytes_end_as_defined(byte_level, data):
    check(byte_level, 301, data)


@given(data=st.data())
def test_rows_of_words_end_as_defined(metaspace, data):
    check(metaspace, 10, data)


@pytest.mark.parametrize("stop", ["<|im_end|>", "re<|im_end|>", "<|im_end|>, "])
def test_a_special_token_is_a_stop_text(byte_level, stop):
    end = next(i for i, text in byte_level.special.items() if text == "<|im_end|>")
    ids = lambda text: byte_level._tokenizer.encode(text).ids  # noqa: E731
    tokens = [*ids("stop here"), end, *ids(", and there")]
    assert "<|im_end|>" not in byte_level(tokens)
    found = grown(tokens, [1], limit=99, stop=[stop], decode=byte_level)
    assert found.reason == "stop" and found.text == {"r": "stop he"}.get(stop[0], "stop here")
    assert stop in byte_level.spelled(found.tokens) and stop not in byte_level.spelled(found.tokens[:-1])


@pytest.mark.parametrize("kind", ["words", "bytes that are no characters", "special tokens"])
def test_the_host_does_no_more_for_a_longer_row(byte_level, kind):
    """Tokens decoded in all, which is what costs: for each new one a bounded number, and all of them at the end."""
    ids = lambda text: byte_level._tokenizer.encode(text).ids  # noqa: E731
    continuation = ids("東")[1:] or ids("東")
    broken = [i for i in range(4, 260) if byte_level([i]) == "\N{REPLACEMENT CHARACTER}"][:1] or continuation
    unit = {"words": ids(" and there"), "special tokens": [1]}.get(kind, broken)
    counts = []
    for length in (1000, 4000):
        tokens, count = (unit * length)[:length], 0

        def decode(given):
            nonlocal count
            count += len(given)
            return byte_level(given)

        ending = Ending(length, stop=["never said"], decode=decode)
        for n in range(1, length + 1):
            found = ending.look(tokens[:n])
        assert found.reason == "length"
        counts.append(count / length)
    assert counts[1] < 1.2 * counts[0] and counts[1] < 200, counts
