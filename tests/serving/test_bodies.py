"""Bodies of every kind: what cannot be honored is refused by name, and nothing makes the server fail."""

import asyncio
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import running

from twotower_jax.serving.fields import NEUTRAL, NEUTRAL_CHAT, NEUTRAL_COMPLETION
from twotower_jax.serving.limits import Limits

PROMPT = {"prompt": [5], "max_tokens": 4}
MESSAGES = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
# Paths, bodies that are fine, and those of each that are not, with the field that is to be named.
BAD_SHARED = [
    ({"max_tokens": 1000}, "max_tokens"),
    ({"max_tokens": "4"}, "max_tokens"),
    ({"max_tokens": 4.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 1e999}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": 301}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": 7}, "n"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**32}, "seed"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": "a" * 257}, "stop"),
    ({"stop": 3}, "stop"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"other": True}}, "other"),
    ({"stream_steps": True}, "stream_steps"),
    ({"mode": "other"}, "mode"),
    ({"block_size": 0}, "block_size"),
    ({"block_size": 65}, "block_size"),
    ({"mode": "speculative", "block_size": 1}, "block_size"),
    ({"steps_per_block": 0}, "steps_per_block"),
    ({"strategy": "other"}, "strategy"),
    ({"confidence_threshold": 1.1}, "confidence_threshold"),
    ({"strategy": "factor", "confidence_threshold": 0.5}, "confidence_threshold"),
    ({"strategy_options": {"other": 1}}, "strategy_options"),
    ({"strategy_options": [1]}, "strategy_options"),
    ({"strategy": "factor", "strategy_options": {"factor": "no"}}, "strategy_options"),
    ({"tolerance": 0.5}, "tolerance"),
    ({"mode": "ar", "return_step_map": True}, "return_step_map"),
    ({"mode": "mock_ar", "return_context_logprobs": True}, "return_context_logprobs"),
    ({"pinned": {"4": 1}}, "pinned"),
    ({"pinned": {"-1": 1}}, "pinned"),
    ({"pinned": {"x": 1}}, "pinned"),
    ({"pinned": {"1": 300}}, "pinned"),
    ({"pinned": {"1": 3}}, "pinned"),  # The mask token.
    ({"pinned": [1]}, "pinned"),
    ({"allowed": {"4": [5]}}, "allowed"),
    ({"allowed": {"1": []}}, "allowed"),
    ({"allowed": {"1": 5}}, "allowed"),
    ({"allowed": {"1": [300]}}, "allowed"),
    ({"allowed": {"1": [3]}}, "allowed"),  # The mask token alone.
    ({"allowed": {"1": [5]}, "pinned": {"1": 6}}, "pinned"),
    ({"allowed": [5]}, "allowed"),
    ({"start": [5] * 5}, "start"),
    ({"start": []}, "start"),
    ({"start": [300]}, "start"),
    ({"start": {"0": 5}}, "start"),
    ({"start": [5], "mode": "ar"}, "start"),
    ({"guided_choice": "yes"}, "guided_choice"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": ["yes", ""]}, "guided_choice"),
    ({"guided_choice": ["yes", 3]}, "guided_choice"),
    ({"guided_choice": ["\ud800"]}, "guided_choice"),
    ({"guided_choice": ["zzzzzzzzz"]}, "max_tokens"),
    ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_regex"),
    ({"guided_choice": ["a"], "pinned": {"0": 5}}, "pinned"),
    ({"guided_choice": ["a"], "allowed": {"0": [5]}}, "allowed"),
    ({"guided_choice": ["a"], "start": [5]}, "start"),
    ({"guided_choice": ["a"], "stop": "b"}, "stop"),
    ({"guided_choice": ["a"], "ignore_eos": True}, "ignore_eos"),
    ({"guided_choice": ["a"], "mode": "speculative"}, "guided_choice"),
    ({"guided_regex": 3}, "guided_regex"),
    ({"guided_regex": "a("}, "guided_regex"),
    ({"guided_regex": "z{9}"}, "max_tokens"),
    ({"guided_json": {"type": "object"}}, "guided_json"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_grammar": "root ::= a"}, "guided_grammar"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"grammar": "a"}}, "structured_outputs"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format"),
    ({"response_format": "text"}, "response_format"),
    ({"frequency_penalty": 0.1}, "frequency_penalty"),
    ({"presence_penalty": 0.1}, "presence_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"minimal_p": 0.1}, "minimal_p"),
    ({"minimal_p": None}, "minimal_p"),
    ({"model": 3}, "model"),
]
BAD_COMPLETIONS = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [1, 300]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"prompt": [1] * 200}, "prompt"),
    ({"prompt": "a" * 100_000}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "end"}, "suffix"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": "yes"}, "echo"),
]
BAD_CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages"),
    ({"messages": [{"content": "hi"}]}, "messages"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "</s>"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "messages"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": 2}, "logprobs"),
    ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ({"tools": [{"type": "function"}]}, "tools"),
]


def ask(scripted, requests: list[tuple[str, bytes]], headers: dict = {}, **options) -> list:  # noqa: B006
    """The answers to bodies, one after another."""

    async def run():
        service, _ = scripted(**options)
        async with running(service) as client:
            head = {"content-type": "application/json"} | headers
            answers = [await client.post(path, content=body, headers=head) for path, body in requests]
            assert (await client.get("/health")).status_code == 200
            assert service.loop.taken == 0
            return answers

    return asyncio.run(run())


def test_fields_that_cannot_be_honored_are_named(scripted):
    cases = [("/v1/completions", PROMPT | bad, name) for bad, name in BAD_SHARED + BAD_COMPLETIONS]
    cases += [("/v1/chat/completions", MESSAGES | bad, name) for bad, name in BAD_SHARED + BAD_CHATS]
    # Python reads a number that is too large as infinity, and writes no JSON for it.
    bodies = [(path, json.dumps(body).replace("Infinity", "1e999").encode()) for path, body, _ in cases]
    answers = ask(scripted, bodies)
    for (_, body, name), answer in zip(cases, answers, strict=True):
        assert answer.status_code == 400, body
        error = answer.json()["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", name), body
        assert name in error["message"], body


def test_fields_that_change_nothing_are_understood(scripted):
    shared = {
        "response_format": {"type": "text"},
        "guided_json": None,
        "user": "me",
        "metadata": {"a": "b"},
        "logit_bias": None,
        "best_of": None,
        "reasoning_effort": None,
    }
    cases = [("/v1/completions", PROMPT | shared), ("/v1/chat/completions", MESSAGES | shared)]
    for (path, body), fields in zip(cases, (NEUTRAL_COMPLETION, NEUTRAL_CHAT), strict=True):
        cases = [*cases, *((path, body | {name: v}) for name, values in (NEUTRAL | fields).items() for v in values)]
    cases.append(("/v1/completions", PROMPT | {"best_of": 2, "n": 2, "top_k": -1, "max_tokens": 4.0}))
    # What the most probable token is does not depend on them.
    cases.append(("/v1/completions", PROMPT | {"temperature": 0, "top_p": 0.5, "top_k": 3}))
    cases.append(("/v1/chat/completions", MESSAGES | {"max_completion_tokens": 4}))
    # Zero is not false.
    for answer, (_, body) in zip(ask(scripted, [(p, json.dumps(b).encode()) for p, b in cases]), cases, strict=True):
        assert answer.status_code == 200, (body, answer.text)
    (answer,) = ask(scripted, [("/v1/completions", json.dumps(PROMPT | {"frequency_penalty": False}).encode())])
    assert answer.json()["error"]["param"] == "frequency_penalty"


def test_bodies_that_are_no_json_objects(scripted):
    bodies = [b"", b"{", b"[]", b"3", b'"a"', b"\xff", b'{"prompt": NaN}', b'{"n": 1, "n": 2}', b"[" * 10**5, b"{}" * 2]
    bodies += [b'{"max_tokens": ' + b"9" * 5000 + b"}", b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}"]
    for answer in ask(scripted, [("/v1/completions", body) for body in bodies]):
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]


def test_bodies_of_another_type_or_too_long(scripted):
    body = json.dumps(PROMPT).encode()
    (answer,) = ask(scripted, [("/v1/completions", body)], {"content-type": "text/plain"})
    assert answer.status_code == 415  # Else any web page could have this machine compute.
    (answer,) = ask(scripted, [("/v1/completions", body + b" " * 100)], limits=Limits(body_bytes=100))
    assert (answer.status_code, answer.headers["connection"]) == (413, "close")

    async def pieces():
        for _ in range(10):
            yield body

    (answer,) = ask(scripted, [("/v1/completions", pieces())], limits=Limits(body_bytes=100))
    assert answer.status_code == 413


def test_another_model_is_not_found(scripted):
    (answer,) = ask(scripted, [("/v1/completions", json.dumps(PROMPT | {"model": "other"}).encode())])
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_no_more_kinds_of_functions_are_compiled_than_allowed(scripted):
    bodies = [PROMPT | {"block_size": size} for size in (1, 2, 3, 1)] + [PROMPT | {"mode": "ar"}]
    answers = ask(scripted, [("/v1/completions", json.dumps(b).encode()) for b in bodies], limits=Limits(compiled=2))
    assert [answer.status_code for answer in answers] == [200, 200, 400, 200, 400]
    assert [answers[n].json()["error"]["param"] for n in (2, 4)] == ["block_size", "mode"]


def test_a_slow_body_ends_by_its_deadline(scripted):
    async def pieces():
        yield b"{"
        await asyncio.sleep(60)

    async def run():
        service, _ = scripted(limits=Limits(body_seconds=0.05))
        async with running(service) as client:
            answer = await client.post(
                "/v1/completions", content=pieces(), headers={"content-type": "application/json"}
            )
            assert (answer.status_code, answer.headers["connection"]) == (408, "close")

    asyncio.run(run())


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["ar", "factor"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=6,
)
NAMES = sorted(
    {name for bad, _ in BAD_SHARED + BAD_COMPLETIONS + BAD_CHATS for name in bad} | {"tokens", "add_special_tokens"}
)
BODIES = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), VALUES, max_size=5)
FINE = st.sampled_from([{}, PROMPT, MESSAGES, {"tokens": [5]}, {"prompt": "a"}])
PATHS = st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])


@settings(max_examples=12)
@given(st.lists(st.tuples(PATHS, FINE, BODIES, st.binary(max_size=3)), min_size=10, max_size=10))
def test_no_body_makes_the_server_fail(scripted, cases):
    bodies = [(path, json.dumps(fine | body).encode() + rest) for path, fine, body, rest in cases]
    for (path, body), answer in zip(bodies, ask(scripted, bodies), strict=True):
        assert answer.status_code in (200, 400, 404), (path, body, answer.text)
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert error["message"] and error["type"] in ("invalid_request_error", "not_found_error")


@pytest.mark.parametrize("path", ["/v1/other", "/v1/completions", "/ready"])
def test_other_paths_and_methods(scripted, path):
    async def run():
        service, _ = scripted()
        async with running(service) as client:
            answer = await client.delete(path)
            assert answer.status_code == (404 if path == "/v1/other" else 405)
            assert answer.json()["error"]["message"]

    asyncio.run(run())
