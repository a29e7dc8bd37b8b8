"""Tests of twotower_jax.generation.answers: what is right, what is counted, and which setting is chosen."""

import dataclasses
from types import SimpleNamespace

import pytest

from twotower_jax.data import EOS_ID, encode
from twotower_jax.data.tasks import all_words, questions
from twotower_jax.data.tokenizer import word_tokenizer
from twotower_jax.generation.answers import Examinee, Marks, ask, fastest, is_right
from twotower_jax.generation.settings import Result


@pytest.fixture(scope="module")
def who():
    return Examinee(None, None, word_tokenizer(all_words(), 576))


def result(tokens, evaluations=0, reason="eos"):
    return Result([5], tokens, evaluations, 1, reason)


def test_questions_of_tasks_come_in_turns(who):
    asked = ask(who.tokenizer, ["spell", "add"], "validation", 3)
    assert [question.task for question in asked] == ["spell", "add"] * 3
    assert [question.prompt for question in asked[1::2]] == [q.prompt for q in questions("add", "validation", 3)]
    assert all(who.tokenizer.decode(question.ids) == question.prompt for question in asked)


def test_an_answer_is_right_if_it_says_so_and_ends(who):
    (question,) = ask(who.tokenizer, ["add"], "test", 1)
    (right,) = questions("add", "test", 1)
    ids = encode(who.tokenizer, [right.answer])[0].tolist()
    assert is_right(who, question, result([*ids, EOS_ID]))
    assert not is_right(who, question, result([*ids[:-1], EOS_ID]))
    assert not is_right(who, question, result([*ids, ids[-1]], reason="length"))
    assert not is_right(who, question, result([EOS_ID]))


def answers(right, seconds, evaluations=2):
    asked = [SimpleNamespace(task="ab"[i % 2]) for i in range(len(right))]
    return Marks(asked, [result([7] * 10, evaluations) for _ in right], right, seconds)


def test_what_is_counted():
    found = answers([True, False, True, True], [4.0, 1.0, 2.0])
    assert (found.accuracy, found.tokens, found.tokens_per_second, found.tokens_per_evaluation) == (0.75, 40, 20.0, 5.0)
    assert (found.of("a").accuracy, found.of("b").accuracy, found.of("b").tokens) == (1.0, 0.5, 20)
    assert answers([True], [1.0], evaluations=0).tokens_per_evaluation is None


def test_tasks_that_were_timed_apart_are_joined():
    parts = [dataclasses.replace(answers([True], [1.0, 4.0, 2.0]), asked=[SimpleNamespace(task="a")])]
    parts += [dataclasses.replace(answers([False, True], [3.0, 3.0, 3.0]), asked=[SimpleNamespace(task="b")] * 2)]
    found = Marks.joined(parts)
    assert found.right == [True, False, True] and found.seconds == [4.0, 7.0, 5.0]
    assert (found.tokens, found.tokens_per_second) == (30, 6.0)
    assert found.of("a").tokens_per_second == 5.0 and found.of("b").accuracy == 0.5


def test_the_fastest_that_keeps_enough():
    ar = answers([True] * 10, [8.0])
    ways = {
        "fast": answers([True] * 8 + [False] * 2, [1.0]),
        "middle": answers([True] * 9 + [False], [2.0]),
        "slow": answers([True] * 9 + [False], [4.0]),
    }
    assert [fastest(ar, ways, part) for part in (0.5, 0.85, 0.99)] == ["fast", "middle", "middle"]
