"""Rows that have to be sentences of an automaton: they always are, and nobody else's tokens change."""

import dataclasses
import itertools
import random
import re

import numpy as np
import pytest
from calls import results_of

from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation import Engine, Request, Settings
from twotower_jax.generation.automaton import MOST_STATES, Automaton, Spellings, of_choices
from twotower_jax.generation.guide import Guide
from twotower_jax.two_tower import TwoTower

VOCAB, BLOCK, MASK, END, OTHER_END = 64, 4, 3, 2, 11
ENGINE = Settings(batch_size=4, prefill_chunk=64)
# One is the beginning of another, some go over a block, several share what they begin with.
CHOICES = [[20], [20, 21], [20, 21, 22, 23, 24, 25], [30, 21], [40, 41, 42, 43], [40, 41, 42, 44, 45, 46, 47, 48, 49]]


@pytest.fixture(scope="module")
def tiny(small_config, random_params):
    model = TwoTower(small_config("M*", vocab_size=VOCAB))
    return model, random_params(model)


def request(number: int, mode: str = "diffusion", **values) -> Request:
    sampling = {"temperature": 8.0 * (1 + number % 2), "top_k": 16 * (number % 3)}
    if mode == "diffusion":
        sampling |= {"block_size": BLOCK, "steps_per_block": 1 + number % 4, "confidence_threshold": number % 3 / 10}
    sampling |= values.pop("sampling", {})
    plain = {"prompt": [5 + number % 20, 6], "max_new_tokens": 10, "seed": number, "sample": 0}
    values = plain | {"constraint": of_choices(CHOICES), "end_tokens": (END, OTHER_END)} | values
    return Request(mode=mode, sampling=SamplingConfig(**sampling), **values)


def results(tiny, requests) -> list:
    return results_of(Engine(*tiny, ENGINE, capacity=128), requests)


def sentences(automaton: Automaton, most: int) -> set[tuple[int, ...]]:
    """All of at most so many tokens, by walking."""
    found, open_ = set(), [((), 0)]
    for _ in range(most + 1):
        found |= {row for row, state in open_ if automaton.final[state]}
        pairs = [(row, state, automaton.tokens[state]) for row, state in open_]
        open_ = [((*row, t), automaton.move(state, t)) for row, state, ts in pairs for t in ts.tolist()]
    return {row for row in found if len(row) <= most}


def random_automaton(draw: random.Random) -> Automaton:
    """An automaton of five tokens, with circles."""
    count = draw.randint(2, 5)
    tokens = [np.array(sorted(draw.sample(range(20, 25), draw.randint(0, 3))), np.int32) for _ in range(count)]
    targets = [np.array([draw.randrange(count) for _ in one], np.int32) for one in tokens]
    return Automaton(tokens, targets, np.array([draw.random() < 0.4 for _ in range(count)]))


def rows_of(automaton: Automaton, limit: int, width: int) -> set[tuple[int, ...]]:
    """What may stand at the first `width` positions, end tokens and what follows them included, up to the limit."""
    out = set()
    for sentence in sentences(automaton, limit):
        if len(sentence) == limit:
            out.add(sentence[:width])
        else:
            rest = max(0, min(width, limit) - len(sentence) - 1)
            out |= {((*sentence, end) + (END,) * rest)[:width] for end in (END, OTHER_END)}
    return out


def unpacked(bits: np.ndarray) -> list[set[int]]:
    return [set(np.flatnonzero(np.unpackbits(row)[:VOCAB]).tolist()) for row in bits]


def test_what_may_stand_somewhere_is_what_some_sentence_has_there():
    """Against all sentences, over blocks of which some positions are decided and which may reach beyond the limit."""
    draw, seen = random.Random(0), 0
    while seen < 60:
        automaton, limit = random_automaton(draw), draw.randint(1, 7)
        if automaton.shortest > limit:
            with pytest.raises(ValueError, match="are too few, at least"):
                Guide(automaton, (END, OTHER_END), limit, MASK)
            continue
        seen += 1
        guide, told = Guide(automaton, (END, OTHER_END), limit, MASK), []
        while len(told) < limit:
            possible = {
                row[len(told) : len(told) + BLOCK]
                for row in rows_of(automaton, limit, len(told) + BLOCK)
                if row[: len(told)] == tuple(told)
            }
            inside = min(BLOCK, limit - len(told))
            block = [MASK] * BLOCK
            while MASK in block[:inside]:
                allowed = unpacked(guide.allowed(BLOCK, VOCAB))
                left = [row for row in possible if all(b in (MASK, t) for b, t in zip(block, row, strict=False))]
                for place in range(inside):
                    if block[place] == MASK:
                        assert allowed[place] == {row[place] for row in left}
                # As a step does, each position by itself; what does not go together is masked again.
                step = [
                    draw.choice(sorted(allowed[place])) if token == MASK and draw.random() < 0.7 else token
                    for place, token in enumerate(block)
                ]
                decided = [place for place in range(inside) if step[place] != block[place]]
                again = guide.settle(step, [draw.random() for _ in step])
                block = [MASK if masked else token for masked, token in zip(again, step, strict=True)]
                assert not decided or any(block[place] != MASK for place in decided)
                assert any(all(b in (MASK, t) for b, t in zip(block, row, strict=False)) for row in left)
            guide.advance(block)
            told += block
        told = told[:limit]
        length = next((i for i, token in enumerate(told) if token in (END, OTHER_END)), limit)
        assert tuple(told[:length]) in sentences(automaton, limit)


MODES = [("diffusion", {}), *(pytest.param(mode, {}, marks=pytest.mark.whole) for mode in ("ar", "mock_ar"))]
MODES += [
    pytest.param("diffusion", {"strategy": strategy, "confidence_threshold": 0.8} | more, marks=pytest.mark.whole)
    for strategy, more in (
        ("remasking", {"confidence_threshold": 0.0, "strategy_options": {"doubt_threshold": 0.5}}),
        ("posterior", {}),
    )
]


@pytest.mark.parametrize(("mode", "sampling"), MODES)
def test_an_answer_is_one_of_the_choices(tiny, mode, sampling):
    rows = [request(i, mode, sampling=sampling) for i in range(24)]
    found = results(tiny, rows)
    for result in found:
        assert result.finish_reason == "eos" and result.tokens[-1] in (END, OTHER_END)
        assert result.tokens[:-1] in CHOICES
    assert len({tuple(result.tokens) for result in found}) > 3  # Not always the same.


def test_an_answer_that_fills_its_place_needs_no_end(tiny):
    (result,) = results(tiny, [request(1, constraint=of_choices([[20, 21, 22, 23, 24, 25]]), max_new_tokens=6)])
    assert (result.tokens, result.finish_reason) == ([20, 21, 22, 23, 24, 25], "length")


@pytest.mark.whole
@pytest.mark.parametrize("mode", ["diffusion", pytest.param("ar", marks=pytest.mark.whole)])
def test_others_get_what_they_get_alone(tiny, mode):
    """Rows with and without a choice in one table, and steps told of some."""
    free = [request(i, mode, constraint=None) for i in range(6)]
    bound = [request(i, mode) for i in range(6)]
    together = results(tiny, [one for pair in zip(bound, free, strict=True) for one in pair])
    assert together[1::2] == results(tiny, free)
    for one, result in zip(bound, together[::2], strict=True):
        (alone,) = results(tiny, [dataclasses.replace(one, provisional=True)])
        assert alone == result


def test_bytes_are_spelled_in_tokens_in_every_way():
    """Against Python's own reading of a pattern, over all rows of few tokens."""
    spelled = {20: b"a", 21: b"b", 22: b"ab", 23: b"ba", 24: b"aab", 25: "é".encode(), 26: b"\xc3", 27: b"\xa9"}
    # (a|é)(ba|ab)*b?  written by hand: 0 begins, 1 after a or é, 2 after é's first byte, 3 and 4 inside a pair, 5 ends.
    table = np.full((6, 256), -1, np.int32)
    for state, byte, target in ((0, 97, 1), (0, 0xC3, 2), (2, 0xA9, 1), (1, 97, 3), (3, 98, 1), (1, 98, 4), (4, 97, 1)):
        table[state, byte] = target
    automaton = Spellings(spelled).automaton(table, np.isin(np.arange(6), [1, 4]))
    found = sentences(automaton, 4)
    for count in range(5):
        for row in itertools.product(spelled, repeat=count):
            text = b"".join(spelled[token] for token in row)
            assert (row in found) == bool(re.fullmatch(rb"(a|\xc3\xa9)(ba|ab)*b?", text)), row


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "speculative"}, "not in mode 'speculative'"),
        ({"pinned": {0: 20}}, "with it pinned cannot be given"),
        ({"allowed": {0: [20]}}, "with it allowed cannot be given"),
        ({"start": [20]}, "with it start cannot be given"),
        ({"stop": ("a",)}, "with it stop cannot be given"),
        ({"end_tokens": ()}, "constraint needs an end token"),
        ({"end_tokens": (END, 42)}, "constraint holds the token 42, which ends a row"),
        ({"constraint": of_choices([[5] * 11])}, "max_new_tokens=10 are too few, at least 11 are needed"),
        ({"constraint": of_choices([[VOCAB]])}, "constraint: id 64"),
        ({"constraint": of_choices([[MASK]])}, "constraint holds the mask token"),
    ],
)
def test_constraints_that_cannot_be_met(tiny, values, message):
    engine = Engine(*tiny, ENGINE, capacity=128)
    with pytest.raises(ValueError, match=message):
        engine.submit(request(0, values.pop("mode", "diffusion"), **values))
    assert not engine.busy


@pytest.mark.parametrize("choices", [[], [[1], []], [[1] * (MOST_STATES + 1)]])
def test_choices_that_cannot_be(choices):
    with pytest.raises(ValueError, match="choices"):
        of_choices(choices)
