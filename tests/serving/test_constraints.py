"""What a body says of the positions of its answer is what comes: tokens, choices, expressions, JSON schemas."""

import asyncio
import json
import random
import re

import jsonschema
import numpy as np
import openai
import pytest
from served import running, small_config

from twotower_jax.data.tokenizer import load_tokenizer
from twotower_jax.generation.automaton import Automaton
from twotower_jax.serving import grammars, json_schema
from twotower_jax.serving.text import TokenTexts

CHOICES = ["yes", "no", "yes, 日本語", "item by item", "item"]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 3}, "age": {"type": "integer"}, "x": {"enum": ["é", None]}},
    "required": ["name"],
}
SCHEMAS = [
    PERSON,
    {"type": "array", "items": {"anyOf": [{"type": "number"}, {"type": "boolean"}]}, "minItems": 1, "maxItems": 3},
    {"$defs": {"p": PERSON}, "type": "object", "properties": {"a.[b]é": {"$ref": "#/$defs/p"}}, "required": ["a.[b]é"]},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "array", "prefixItems": [{"type": ["string", "null"]}, {"const": 'q"\\'}, {"type": "null"}]},
    {"enum": ["a", 1, 2.5, None, True, [1], {"b": "c"}], "title": "anything"},
    {"type": "string", "minLength": 2, "maxLength": 4},
]


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def made(tokenizer):
    return grammars.Grammars(tokenizer, TokenTexts(tokenizer), small_config(), (2,))


def walk(automaton: Automaton, draw: random.Random, most: int) -> list[int]:
    """A row of it, at random, and home by the shortest way when it becomes long."""
    state, tokens = 0, []
    while not automaton.final[state] or (len(automaton.tokens[state]) and draw.random() < 0.8 and len(tokens) < most):
        moves = range(len(automaton.tokens[state]))
        if len(tokens) >= most:
            moves = [k for k in moves if automaton.left[automaton.targets[state][k]] < automaton.left[state]]
        # Bytes that are nothing by themselves would nearly always be chosen.
        good = [k for k in moves if np.isfinite(automaton.left[automaton.targets[state][k]])]
        k = draw.choice(good)
        tokens.append(int(automaton.tokens[state][k]))
        state = int(automaton.targets[state][k])
    return tokens


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_what_an_automaton_says_is_valid(made, tokenizer, schema):
    """Against the validator of the package jsonschema."""
    json_schema.check(schema)
    automaton, draw = made.schema(schema), random.Random(0)
    rows = [walk(automaton, draw, 12) for _ in range(40)]
    texts = {TokenTexts(tokenizer).decode(row) for row in rows}
    for text in texts:
        assert "\ufffd" not in text
        jsonschema.validate(json.loads(text), schema)
    assert len(texts) > 3
    assert made.schema(schema) is automaton


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (True, "schema must be an object, not True"),
        ({}, "schema needs a type"),
        ({"type": "text"}, "schema needs a type"),
        ({"type": "object"}, "schema is an object and needs properties"),
        ({"type": "array"}, "schema is an array and needs items"),
        ({"type": "integer", "minimum": 3}, "schema.minimum cannot be honored in a schema of type integer"),
        ({"type": "string", "pattern": "a"}, "schema.pattern cannot be honored"),
        ({"type": "string", "format": "date"}, "schema.format cannot be honored in a schema of type string"),
        ({"type": "string", "minLength": 4, "maxLength": 3}, "schema.minLength is more than maxLength"),
        ({"type": "string", "minLength": "4"}, "schema.minLength must be a whole number"),
        ({"oneOf": [{"type": "null"}]}, "schema needs a type"),
        ({"anyOf": []}, "schema.anyOf must be a list"),
        ({"anyOf": [{"type": "null"}], "type": "null"}, "schema.type cannot be honored beside anyOf"),
        ({"type": "integer", "enum": [1, "a"]}, "schema.enum holds 'a', which is not of its type"),
        ({"type": "boolean", "const": 1}, "schema.const holds 1, which is not of its type"),
        ({"enum": []}, "schema.enum must be a list of values"),
        ({"type": ["string", "object"]}, "schema.type: say what object holds"),
        ({"type": "array", "items": {"type": "null", "x": 1}}, "schema.items.x cannot be honored"),
        ({"type": "array", "prefixItems": [{"type": "null"}], "minItems": 2}, "minItems cannot be honored beside"),
        ({"type": "object", "properties": {}, "required": ["a"]}, "schema.required holds 'a'"),
        ({"type": "object", "properties": {}, "additionalProperties": {}}, "additionalProperties cannot be honored"),
        ({"type": "object", "properties": {'a"': {"type": "null"}}}, "schema.properties: the name 'a\"'"),
        ({"$ref": "#/$defs/a"}, "schema.$ref must be '#/$defs/NAME'"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "schema is nested more than 32 times"),
    ],
)
def test_schemas_that_would_not_be_kept_to_are_refused(schema, message):
    with pytest.raises(ValueError, match="^" + re.escape(message) if message.startswith("schema") else message):
        json_schema.check(schema)


@pytest.mark.parametrize("expression", ["[a-c]{2,3}", "é+|[0-9]{3}", "(item by )*item", ""])
def test_expressions_are_read_as_python_reads_them(made, tokenizer, expression):
    automaton, draw = made.regex(expression), random.Random(1)
    decode = TokenTexts(tokenizer).decode
    for _ in range(20):
        assert re.fullmatch(expression, decode(walk(automaton, draw, 6)))


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("a(", "Failed to build"),
        ("(?=a)b", "Failed to build"),
        ("(a|b)*a(a|b){14}", "takes too (much|long)|has .* states"),
        ("a" * 20_000, "has 20000 characters"),
    ],
)
def test_expressions_that_cannot_be_are_refused(made, monkeypatch, expression, message):
    monkeypatch.setattr(grammars, "_SECONDS", 1)
    with pytest.raises(ValueError, match=message):
        made.regex(expression)


def ask(served, bodies: list[dict], kind: str = "completions", **options) -> list:
    """What OpenAI's client gets for each."""

    async def run():
        service = served(**options)
        async with running(service) as client:
            official = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=client, max_retries=0)
            create = official.completions.create if kind == "completions" else official.chat.completions.create
            return await asyncio.gather(*(create(model="small", **body) for body in bodies))

    return asyncio.run(run())


@pytest.mark.whole
@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_answers_are_what_they_have_to_be(served, mode):
    """Choices, expressions and schemas, of rows side by side with free ones, which are alone what they are together."""
    free = [{"prompt": "The", "max_tokens": 9, "seed": seed, "temperature": 1.0} for seed in (4, 5)]
    free = [body | {"extra_body": {"mode": mode}} for body in free]
    bodies, expected = list(free), [None, None]
    for number in range(9):
        shared = {"prompt": f"item {number}", "temperature": 5.0, "seed": number}
        asked, pattern = [
            ({"guided_choice": CHOICES}, "|".join(map(re.escape, CHOICES))),
            ({"structured_outputs": {"regex": "[a-c]{2,3}|é"}}, "[a-c]{2,3}|é"),
            ({"guided_json": json.dumps(SCHEMAS[1]), "n": 2}, None),
        ][number % 3]
        n = asked.pop("n", 1)
        bodies.append(shared | {"n": n, "max_tokens": 20, "extra_body": {"mode": mode} | asked})
        expected.append(pattern)
    answers = ask(served, bodies)
    for answer, pattern in list(zip(answers, expected, strict=True))[2:]:
        for choice in answer.choices:
            # One that fills its room has none for an end token.
            assert choice.finish_reason == "stop" or pattern is None
            if pattern is None:
                jsonschema.validate(json.loads(choice.text), SCHEMAS[1])
            else:
                assert re.fullmatch(pattern, choice.text)
    assert [answer.choices[0].text for answer in answers[:2]] == [a.choices[0].text for a in ask(served, free)]


def test_conversations_may_ask_for_json_and_streams_join(served):
    form = {"type": "json_schema", "json_schema": {"name": "list", "schema": SCHEMAS[1], "strict": True}}
    body = {"messages": [{"role": "user", "content": "hi"}], "temperature": 3.0, "seed": 1, "response_format": form}

    async def run():
        async with running(served()) as client:
            official = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=client, max_retries=0)
            create = official.chat.completions.create
            whole = await create(model="small", max_tokens=30, **body)
            parts = await create(model="small", max_tokens=30, **body, stream=True, extra_body={"stream_steps": True})
            return whole, [choice async for part in parts for choice in part.choices]

    whole, parts = asyncio.run(run())
    text = whole.choices[0].message.content
    jsonschema.validate(json.loads(text), SCHEMAS[1])
    assert "".join(part.delta.content or "" for part in parts) == text
    # Without a number of tokens as many as the longest choice needs.
    (short,) = ask(served, [{"prompt": "a", "extra_body": {"guided_choice": ["item by item " * 3]}}])
    assert short.choices[0].text == "item by item " * 3


def test_allowed_and_started_positions(served):
    plain = {"prompt": "The", "max_tokens": 7}
    allowed = {"2": [70, 71], "5": [90]}
    start = [80, None, 3, 81, None, 82]
    told = {"return_token_ids": True, "return_step_map": True}
    given = (
        {"allowed": allowed},
        {"start": start},
        {"start": start, "allowed": allowed | {"5": [82]}, "pinned": {"0": 80}},
    )
    bodies = [plain | {"extra_body": told | more} for more in given]
    one, two, three = (answer.choices[0] for answer in ask(served, bodies))
    for choice in (one, three):
        assert choice.token_ids[2] in (70, 71)
    assert (one.token_ids[5], three.token_ids[5]) == (90, 82)
    for choice in (two, three):
        assert [choice.token_ids[k] for k in (0, 3)] == [80, 81]
        assert [choice.step_map[k] for k in (0, 3)] == [0, 0]
