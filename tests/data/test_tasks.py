"""Tests of twotower_jax.data.tasks and task_windows: answers against other ways to find them, splits, windows."""

import random
import re

import numpy as np
import pytest

from twotower_jax.data import EOS_ID, PAD_ID, encode
from twotower_jax.data.opening import Data
from twotower_jax.data.packing import Packing
from twotower_jax.data.tasks import SPLITS, TASKS, check, questions, split_of, stream

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
VOCAB_SIZE = 576


def of(name, count=40):
    return [
        (q.prompt, q.prompt.removeprefix(f"{name}: ").removesuffix(" ->"), q.answer)
        for q in questions(name, "test", count)
    ]


@pytest.fixture(scope="module")
def data():
    return Data("tasks")


@pytest.fixture(scope="module")
def tokenizer(data):
    return data.tokenizer(VOCAB_SIZE)


def windows(data, tokenizer, length, align):
    return data.windows(tokenizer, Packing(length, VOCAB_SIZE, 0.01, 3, align))


# Answers. Each oracle goes another way than the task's own `solve`.


def test_letters_tell_every_fact_once():
    for _, body, answer in of("letter"):
        facts = dict(pair.split() for pair in body.split(", "))
        tone = facts.pop("tone")
        assert answer.startswith(" Dear ") == (tone == "warm")
        words = re.findall(r"\w+", answer)
        assert all(1 <= words.count(value) <= 2 for value in facts.values()), answer
        assert words[words.index("on") + 1] == facts["day"]
        assert words[words.index("I") - 1] in facts.values()


def test_directories_tell_what_is_listed_of_who_is_asked_for():
    for _, body, answer in of("directory"):
        rows, asked = body.split("; ")
        told = re.findall(r" (\w+) is a (\w+) and lives in (\w+)\.", answer)
        assert [name for name, _, _ in told] == asked.split()
        assert {" ".join(row) for row in told} <= set(rows.split(", "))


def test_spelled_digits_read_back():
    for _, body, answer in of("spell"):
        back = " ".join(str(DIGITS.index(w)) if w in DIGITS else w for w in answer.replace(",", " ,").split())
        assert back == body.replace(",", " ,")


def test_getters_run():
    for _, body, answer in of("getters"):
        name, *fields = body.split()
        scope = {}
        exec(answer, scope)
        thing = scope[name]()
        for number, field in enumerate(fields):
            setattr(thing, field, number)
        assert [getattr(thing, f"get_{field}")() for field in fields] == list(range(len(fields)))
        assert len([method for method in vars(scope[name]) if method.startswith("get_")]) == len(fields)


def test_sql_holds_the_description():
    pattern = (
        r" INSERT INTO (?P<into>\w+) \((?P<columns>.*)\) VALUES \((?P<values>.*)\);"
        r" SELECT (?P<show>.*) FROM (?P=into) WHERE (?P<where>\w+ = \d) ORDER BY (?P<order>\w+);"
        r" DELETE FROM (?P=into) WHERE (?P=where);"
    )
    for _, body, answer in of("sql"):
        found = re.fullmatch(pattern, answer).groupdict()
        columns, values = found.pop("columns").split(", "), found.pop("values").split(", ")
        row = " ".join(f"{column} {value}" for column, value in zip(columns, values, strict=True))
        found |= {"row": row, "show": found["show"].replace(",", ""), "where": found["where"].replace(" =", "")}
        assert sorted(f"{key} {value}" for key, value in found.items()) == sorted(body.split(", "))


def test_lists_of_words():
    for _, body, answer in of("replace"):
        rule, words = body.split("; ")
        old, new = rule.split(" by ")
        assert answer == re.sub(rf"\b{old}\b", new, f" {words}") and old not in answer.split()
    for _, body, answer in of("expand"):
        codes, letters = body.split("; ")
        assert "".join(f" {re.search(rf'\b{letter} (\w+)', codes)[1]}" for letter in letters.split()) == answer
    for _, body, answer in of("reverse"):
        assert answer.split()[::-1] == body.split()


def test_digits():
    for _, body, answer in of("sort"):
        for before, after in zip(body.split(", "), answer.split(", "), strict=True):
            digits = after.split()
            assert sorted(before.split()) == sorted(digits)
            assert all(a < b for a, b in zip(digits, digits[1:], strict=False))
    for _, body, answer in of("add"):
        equations = answer.replace(" ", "").split(",")
        assert [equation.split("=")[0] for equation in equations] == body.replace(" ", "").split(",")
        assert all(eval(equation.replace("=", "==").replace("+", "+")) for equation in equations)


@pytest.mark.parametrize("name", TASKS)
def test_a_checker_takes_the_answer_and_nothing_else(name):
    asked = questions(name, "test", 20)
    for (prompt, answer), (_, other) in zip(asked, asked[1:], strict=False):
        assert check(name, prompt, answer) and check(name, prompt, answer + " \n")
        assert not check(name, prompt, other) and not check(name, prompt, "") and not check(name, prompt, "def (")
        assert not check(name, prompt, answer[: len(answer) // 2])
        # One word wrong is wrong.
        words = re.findall(r"\w+", answer)
        wrong = random.Random(prompt).choice(sorted(set(words) - {"self", "return", "def", "class"}))
        assert not check(name, prompt, re.sub(rf"\b{wrong}\b|(?<=_){wrong}\b", "wrong", answer, count=1))


def test_spacing_that_says_nothing_is_free():
    for prompt, answer in questions("getters", "test", 3):
        assert check("getters", prompt, answer.replace("\n    def", "\n\n    def"))
    for prompt, answer in questions("sql", "test", 3):
        assert check("sql", prompt, answer.replace(", ", ","))


def test_unknown_tasks_and_foreign_prompts_are_refused():
    for ask in (lambda: questions("fly", "test", 1), lambda: check("fly", "", "")):
        with pytest.raises(ValueError, match="no task 'fly'; choose one of letter"):
            ask()
    with pytest.raises(ValueError, match="no split 'exam'"):
        questions("add", "exam", 1)
    with pytest.raises(ValueError, match="no prompt of the task 'add'"):
        check("add", "letter: to Anna ->", "")


# Splits.


@pytest.mark.parametrize("name", TASKS)
def test_questions_of_a_split_belong_to_it_alone(name):
    asked = {split: questions(name, split, 30, seed=1) for split in SPLITS}
    prompts = {split: {prompt for prompt, _ in of_split} for split, of_split in asked.items()}
    assert all(len(found) == 30 for found in prompts.values())
    assert all(split_of(prompt) == split for split, found in prompts.items() for prompt in found)
    assert not prompts["train"] & prompts["test"] and not prompts["train"] & prompts["validation"]
    assert questions(name, "test", 10, seed=1) == asked["test"][:10] != questions(name, "test", 10, seed=2)


def test_a_stream_holds_all_tasks_of_one_split():
    asked = [question for question, _ in zip(stream(0, 7, "train"), range(200), strict=False)]
    assert {question.prompt.split(":")[0] for question in asked} == set(TASKS)
    assert {split_of(question.prompt) for question in asked} == {"train"}
    assert asked[0] != next(stream(0, 8, "train")) and asked[0] == next(stream(0, 7, "train"))


# Tokens and windows.


def test_every_word_is_a_token(tokenizer):
    assert tokenizer.get_vocab_size() <= VOCAB_SIZE
    for name in TASKS:
        for text in questions(name, "test", 30)[-1]:
            ids = encode(tokenizer, [text])[0]
            assert tokenizer.decode(ids.tolist()) == text
            # A byte alone is a letter, a digit without a space before it, or a sign of its own.
            spelled = "".join(tokenizer.id_to_token(i) for i in ids.tolist() if 4 <= i < 260)
            assert not re.search(r"[A-Z]", spelled) and not set(spelled) & set("uvwxyz"), spelled


def test_windows_are_whole_questions_whose_answers_begin_with_a_block(data, tokenizer):
    length, align = 192, 32
    training, validation = windows(data, tokenizer, length, align)
    for source, split in ((training, "train"), (validation, "validation")):
        for number in range(6):
            window = source[number]
            ids, counted, start = window["ids"], window["counted"], window["document_start"]
            edges = np.flatnonzero(np.diff(np.concatenate([[0], counted, [0]]))).reshape(-1, 2)
            # Answers that follow each other without a gap are none: a prompt lies between them.
            assert len(edges) and not (edges % align).any()
            for first, last in edges.tolist():
                begin = int(start[first])
                assert (start[begin:last] == begin).all() and ids[begin - 1] in (PAD_ID, EOS_ID)
                prompt = tokenizer.decode(ids[begin:first].tolist())
                answer, *rest = np.split(ids[first:last], [np.flatnonzero(ids[first:last] == EOS_ID)[0]])
                assert set(rest[0].tolist()) == {EOS_ID} and len(rest[0]) <= align
                assert split_of(prompt) == split
                assert check(prompt.split(":")[0], prompt, tokenizer.decode(answer.tolist()))
            assert (ids[~counted & (start == 0) & (np.arange(length) < start.max(initial=0))] != EOS_ID).all()


def test_windows_without_documents_are_a_line_of_questions(data, tokenizer):
    training, _ = windows(data, tokenizer, 96, None)
    (ids,) = training[5].values()
    first, *_ = tokenizer.decode(ids.tolist(), skip_special_tokens=False).split("</s>")
    prompt, answer = first.split(" ->")
    assert len(ids) == 96 and check(prompt.split(":")[0], f"{prompt} ->", answer)


def test_a_window_is_a_function_of_seed_and_number(data, tokenizer):
    (one, _), (same, _) = (windows(data, tokenizer, 128, 16) for _ in range(2))
    other, _ = data.windows(tokenizer, Packing(128, VOCAB_SIZE, 0.01, 4, 16))
    assert one.identity() == same.identity() != other.identity()
    assert (one[9]["ids"] == same[9]["ids"]).all() and (one[9]["ids"] != one[10]["ids"]).any()
    with pytest.raises(ValueError, match="lies outside the vocabulary of 300"):
        data.windows(tokenizer, Packing(128, 300, 0.01, 3, 16))
    with pytest.raises(
        ValueError, match="^sequence_length=64 has no room for questions of the task 'letter', which take 96"
    ):
        data.windows(tokenizer, Packing(64, VOCAB_SIZE, 0.01, 3, 16))


def test_some_tasks_alone(tokenizer):
    window = Data("tasks:add,sort").windows(tokenizer, Packing(64, VOCAB_SIZE, 0.01, 0, None))[0][2]
    names = re.findall(r"(\w+):", tokenizer.decode(window["ids"].tolist(), skip_special_tokens=False))
    assert {"add", "sort"} & set(names) and set(names) <= {"add", "sort"}
    with pytest.raises(ValueError, match="no task 'fly'"):
        Data("tasks:add,fly")
