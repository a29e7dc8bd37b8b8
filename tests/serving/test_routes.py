"""The routes on a small model, asked by OpenAI's own client: what they say is what the engine does."""

import asyncio
import dataclasses
import json
import math
import re

import httpx
import numpy as np
import openai
import pytest
from served import BLOCK, SETTINGS, running

from twotower_jax.data.chat import ChatTemplate
from twotower_jax.data.tokenizer import Decoder, load_tokenizer
from twotower_jax.generation import generate
from twotower_jax.generation.score import score_ar
from twotower_jax.serving.app import read_keys

PROMPTS = ["The list", "naïve café", "日本語", "item by item, so on"]


def ask(served, work, **options):
    """What `work` returns, given OpenAI's client and a plain one."""

    async def run():
        service = served(**options)
        async with running(service) as client:
            official = openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=client, max_retries=0)
            found = await work(official, client)
            assert service.loop.taken == 0
            return found

    return asyncio.run(run())


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def expected(loaded, tokenizer):
    """What the engine makes of the prompts, each alone."""
    model, params, _ = loaded
    return [
        next(generate(model, params, [tokenizer.encode(prompt).ids], SETTINGS, decode=Decoder(tokenizer)))
        for prompt in PROMPTS
    ]


def extra(**fields) -> dict:
    return {"extra_body": {"return_token_ids": True, "return_step_map": True} | fields}


def test_completions_are_what_the_engine_makes_of_each_prompt(served, tokenizer, expected):
    async def work(official, _):
        texts = await official.completions.create(model="small", prompt=PROMPTS, max_tokens=12, **extra())
        ids = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
        return texts, await official.completions.create(model="small", prompt=ids, max_tokens=12, **extra())

    for answer in ask(served, work):
        assert [choice.text for choice in answer.choices] == [result.text for result in expected]
        assert [choice.token_ids for choice in answer.choices] == [result.tokens for result in expected]
        assert [choice.prompt_token_ids for choice in answer.choices] == [result.prompt_ids for result in expected]
        for choice in answer.choices:
            assert choice.finish_reason in ("stop", "length")
            # Positions of each block are committed by its evaluations 1, 2, …, all of which commit something.
            blocks = [choice.step_map[i : i + BLOCK] for i in range(0, len(choice.step_map) // BLOCK * BLOCK, BLOCK)]
            assert blocks and all({*block} == {*range(1, max(block) + 1)} for block in blocks)
        usage = answer.usage
        assert usage.prompt_tokens == sum(len(result.prompt_ids) for result in expected)
        assert usage.completion_tokens == sum(len(result.tokens) for result in expected)
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert usage.denoiser_evaluations == sum(result.denoiser_evaluations for result in expected)
        assert usage.context_evaluations == sum(result.context_evaluations for result in expected)


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_streams_join_to_the_whole(served, kind):
    fields = {"max_tokens": 11, "temperature": 1.0, "seed": 5, "n": 2, "model": "small", "stop": ["e", "\ufffd!"]}

    async def work(official, _):
        if kind == "chat":
            create = official.chat.completions.create
            fields["messages"] = [{"role": "user", "content": "hi"}]
            asked = {"logprobs": True, "top_logprobs": 2}
        else:
            create, asked = official.completions.create, {"logprobs": 2}
            fields["prompt"] = "naïve"
        whole = await create(**fields, **asked, **extra())
        stream = await create(
            **fields, **asked, **extra(stream_steps=True), stream=True, stream_options={"include_usage": True}
        )
        return whole, [part async for part in stream]

    whole, parts = ask(served, work)
    assert parts[-1].usage.model_dump() == whole.usage.model_dump() and not parts[-1].choices
    provisional = 0
    for choice in whole.choices:
        mine = [one for part in parts[:-1] for one in part.choices if one.index == choice.index]
        steps = [one for one in mine if getattr(one, "provisional", None)]
        provisional += len(steps)
        mine = [one for one in mine if one not in steps]
        if kind == "chat":
            text, told = choice.message.content, choice.logprobs.content
            assert mine.pop(0).delta.role == "assistant"
            assert "".join(one.delta.content for one in mine) == text
            streamed = [entry for one in mine for entry in one.logprobs.content]
            assert all(step.delta.content == "" for step in steps)
        else:
            assert "".join(one.text for one in mine) == choice.text
            told, streamed = choice.logprobs.model_dump(), {}
            for name in told:
                streamed[name] = [entry for one in mine for entry in getattr(one.logprobs, name)]
            assert all(step.text == "" for step in steps)
        assert streamed == told
        assert [token for one in mine for token in one.token_ids] == choice.token_ids
        assert [step for one in mine for step in one.step_map] == choice.step_map
        assert [one.finish_reason for one in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == choice.finish_reason
        # A step may fill, and with this strategy keeps what is there.
        for before, after in zip(steps, steps[1:], strict=False):
            if before.provisional["start"] == after.provisional["start"]:
                pairs = zip(before.provisional["token_ids"], after.provisional["token_ids"], strict=True)
                assert all(old in (None, new) for old, new in pairs)
    assert provisional


def test_echo_with_logprobs_is_what_the_context_thinks(served, loaded, tokenizer):
    ids = [tokenizer.encode(prompt).ids for prompt in PROMPTS]

    async def work(official, client):
        # As lm-eval's local-completions asks.
        asked = {"model": "small", "prompt": ids, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
        scored = (await client.post("/v1/completions", json=asked | {"temperature": 0})).json()
        none = await official.completions.create(**asked | {"max_tokens": 0})
        streamed = await official.completions.create(**asked | {"prompt": ids[1]}, stream=True)
        return scored, none, [part async for part in streamed]

    scored, none, parts = ask(served, work)
    reference = score_ar(*loaded[:2], ids)
    for choice, row, expected in zip(scored["choices"], ids, reference, strict=True):
        told = choice["logprobs"]
        np.testing.assert_allclose(told["token_logprobs"][1:-1], expected, rtol=0, atol=2e-5)
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
        assert len(told["tokens"]) == len(row) + 1 == len(told["text_offset"])
        for value, best in zip(told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True):
            assert value in best.values() and value <= max(best.values())
        # What lm-eval compares to see whether a continuation is greedy: the one token of the prompt that is the best.
        greedy = next(
            k for k in range(1, len(row)) if told["token_logprobs"][k] < max(told["top_logprobs"][k].values())
        )
        assert len(told["top_logprobs"][greedy]) == 2
        offsets = told["text_offset"]
        assert offsets[0] == 0 and offsets == sorted(offsets) and offsets[-1] <= len(choice["text"])
    texts = [tokenizer.decode(row) for row in ids]
    assert [choice.text for choice in none.choices] == texts
    assert all(len(choice.logprobs.tokens) == len(row) for choice, row in zip(none.choices, ids, strict=True))
    assert none.usage.completion_tokens == 0
    joined = scored["choices"][1]
    assert "".join(part.choices[0].text for part in parts) == joined["text"]
    streamed = [v for part in parts for v in part.choices[0].logprobs.token_logprobs]
    assert streamed[0] is None and len(streamed) == len(joined["logprobs"]["token_logprobs"])
    np.testing.assert_allclose(streamed[1:], joined["logprobs"]["token_logprobs"][1:], rtol=0, atol=2e-5)


def test_logprobs_are_of_the_tokens_that_were_chosen(served):
    async def work(official, _):
        create = official.completions.create
        return [await create(model="small", prompt="The", max_tokens=6, logprobs=k, **extra()) for k in (0, 3)]

    plain, told = (answer.choices[0] for answer in ask(served, work))
    assert plain.logprobs.top_logprobs is None
    assert plain.logprobs.token_logprobs == told.logprobs.token_logprobs
    assert plain.token_ids == told.token_ids
    for name, value, best in zip(
        told.logprobs.tokens, told.logprobs.token_logprobs, told.logprobs.top_logprobs, strict=True
    ):
        assert value == best[name] == max(best.values())  # Greedy.
        assert len(best) == 3 and sum(map(math.exp, best.values())) <= 1.0001


def test_rows_of_a_body_and_each_alone_are_the_same(served):
    async def work(official, _):
        asked = {"model": "small", "max_tokens": 8, "temperature": 1.0, "seed": 11}
        together = await official.completions.create(prompt=PROMPTS, n=2, **asked, **extra())
        alone = [await official.completions.create(prompt=prompt, n=2, **asked, **extra()) for prompt in PROMPTS]
        other = [
            await official.completions.create(prompt=PROMPTS[0], **asked | {"seed": s}, **extra()) for s in (12, None)
        ]
        again = await official.completions.create(prompt=PROMPTS[0], **asked | {"seed": other[1].seed}, **extra())
        return together, alone, other, again

    together, alone, other, again = ask(served, work)
    tokens = [choice.token_ids for choice in together.choices]
    assert tokens == [choice.token_ids for answer in alone for choice in answer.choices]
    assert [choice.index for choice in together.choices] == [*range(8)]
    assert any(one != two for one, two in zip(tokens[::2], tokens[1::2], strict=True))
    assert other[0].choices[0].token_ids != tokens[0] != other[1].choices[0].token_ids
    # A seed that was drawn is told.
    assert other[1].choices[0].token_ids == again.choices[0].token_ids


@pytest.mark.whole
@pytest.mark.parametrize("mode", ["ar", "speculative"])
def test_other_modes(served, mode):
    async def work(official, _):
        asked = {"model": "small", "prompt": "The", "max_tokens": 6}
        create = official.completions.create
        body = {"mode": mode, "return_token_ids": True, "return_context_logprobs": True}
        whole = await create(**asked, logprobs=1, extra_body=body)
        stream = await create(**asked, extra_body=body, stream=True)
        return whole, [part async for part in stream]

    whole, parts = ask(served, work)
    choice = whole.choices[0]
    assert len(choice.token_ids) == len(choice.logprobs.tokens) == 6
    assert "".join(part.choices[0].text for part in parts) == choice.text
    # What these modes say is the context's.
    assert choice.context_logprobs == choice.logprobs.token_logprobs
    assert [value for part in parts for value in part.choices[0].context_logprobs] == choice.context_logprobs
    assert (whole.usage.denoiser_evaluations > 0) == (mode == "speculative")


def test_given_tokens_stand_where_they_are_pinned(served):
    async def work(official, _):
        pinned = {"0": 70, "5": 71, "6": 72}
        return await official.completions.create(model="small", prompt="The", max_tokens=9, **extra(pinned=pinned))

    choice = ask(served, work).choices[0]
    assert [choice.token_ids[k] for k in (0, 5, 6)] == [70, 71, 72]
    assert [choice.step_map[k] for k in (0, 5, 6)] == [0, 0, 0]


def test_requests_say_whether_they_go_on_after_an_end_token(served):
    async def work(official, _):
        asked = {"model": "small", "prompt": "The", "max_tokens": 8}
        bodies = (
            extra(pinned={"1": 2}),
            extra(pinned={"1": 2}, ignore_eos=False),
            extra(pinned={"1": 2}, ignore_eos=True),
        )
        return [(await official.completions.create(**asked, **body)).choices[0] for body in bodies]

    for default, reasons in ((False, ["stop", "stop", "length"]), (True, ["length", "stop", "length"])):
        choices = ask(served, work, settings=dataclasses.replace(SETTINGS, ignore_eos=default))
        assert [choice.finish_reason for choice in choices] == reasons
        assert [len(choice.token_ids) for choice in choices] == [2 if reason == "stop" else 8 for reason in reasons]


def test_conversations_go_through_the_template(served, checkpoint, tokenizer):
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    plain = [messages[0], {"role": "user", "content": "hi"}]
    prompt = ChatTemplate.load(checkpoint, tokenizer).encode(plain, True).ids.tolist()

    async def work(official, client):
        chat = await official.chat.completions.create(model="small", messages=messages, max_tokens=8, logprobs=True)
        same = await official.completions.create(model="small", prompt=prompt, max_tokens=8, logprobs=0)
        return chat, same, (await client.post("/tokenize", json={"messages": messages})).json()

    chat, same, tokens = ask(served, work)
    assert chat.choices[0].message.role == "assistant"
    assert chat.choices[0].message.content == same.choices[0].text
    assert [entry.logprob for entry in chat.choices[0].logprobs.content] == same.choices[0].logprobs.token_logprobs
    spelled = b"".join(bytes(entry.bytes) for entry in chat.choices[0].logprobs.content)
    assert spelled.decode(errors="replace").replace("</s>", "") == chat.choices[0].message.content
    assert chat.usage.prompt_tokens == len(prompt) == tokens["count"]
    assert tokens["tokens"] == prompt


def test_tokens_and_back(served, tokenizer):
    async def work(_, client):
        tokens = (await client.post("/tokenize", json={"prompt": "naïve </s>", "add_special_tokens": False})).json()
        text = (await client.post("/detokenize", json={"tokens": tokens["tokens"]})).json()
        return tokens, text

    tokens, text = ask(served, work)
    assert text == {"prompt": "naïve </s>"}  # Spelled, not the special token.
    assert (tokens["count"], tokens["max_model_len"]) == (len(tokens["tokens"]), 100)


def test_models_metrics_and_the_page(served):
    async def work(official, client):
        await official.completions.create(model="small", prompt="The", max_tokens=9, extra_body={"ignore_eos": True})
        models = (await official.models.list()).data
        return models, await official.models.retrieve("small"), await client.get("/metrics"), await client.get("/")

    models, model, metrics, page = ask(served, work)
    assert [model.id for model in models] == ["small"] == [model.id]
    assert model.max_model_len == 100
    values = dict(re.findall(r'^([\w:]+)\{model_name="small"\} (\S+)$', metrics.text, re.MULTILINE))
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    numbers = {name: float(value) for name, value in values.items()}
    assert numbers["vllm:generation_tokens_total"] == 9 == numbers["vllm:request_generation_tokens_sum"]
    assert numbers["vllm:num_requests_running"] == 0 == numbers["vllm:num_requests_waiting"]
    assert numbers["twotower:blocks_total"] == 3
    assert numbers["twotower:denoiser_evaluations_total"] / 9 == numbers["twotower:denoiser_evaluations_per_token_sum"]
    assert numbers["twotower:denoiser_evaluations_total"] / 3 == numbers["twotower:steps_per_block_sum"]
    assert numbers["vllm:time_to_first_token_seconds_count"] == 1 == numbers["vllm:e2e_request_latency_seconds_count"]
    assert numbers["vllm:inter_token_latency_seconds_count"] == 8
    assert 'request_success_total{finished_reason="length",model_name="small"} 1.0' in metrics.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    about = json.loads(re.search(r'type="application/json">(.*?)</script>', page.text, re.DOTALL)[1])
    assert about["model"] == "small" and about["chat"] is True
    # One file, which asks nobody else for anything.
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)|@import|url\(|https?://", page.text)


def test_prompts_that_begin_alike_are_read_once(served):
    async def work(official, client):
        prompt = [4 + k for k in range(70)]
        asked = {"model": "small", "max_tokens": 8, **extra()}
        rows = [await official.completions.create(prompt=[*prompt, last], **asked) for last in (5, 5, 6)]
        return [row.choices[0].token_ids for row in rows], (await client.get("/metrics")).text

    settings = dataclasses.replace(SETTINGS, prefill_chunk=64)
    kept, metrics = ask(served, work, settings=settings, prefix_cache_bytes=10**7)
    plain, _ = ask(served, work, settings=settings)
    assert kept == plain
    assert 'vllm:prefix_cache_queries_total{model_name="small"} 213.0' in metrics
    assert 'vllm:prefix_cache_hits_total{model_name="small"} 128.0' in metrics


def test_keys_are_asked_for(served, tmp_path):
    (tmp_path / "keys").write_text("# of the tests\nfirst-key\n\nsecond-key \n")
    keys = read_keys(str(tmp_path / "keys"))
    assert keys == [b"first-key", b"second-key"]

    async def work(_, client):
        found = {}
        for key in ("first-key", "second-key", "third-key", "first-ke", ""):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            found[key] = (await client.get("/v1/models", headers=headers)).status_code
        found["basic"] = (await client.get("/v1/models", headers={"authorization": "Basic first-key"})).status_code
        for path in ("/tokenize", "/detokenize", "/v1/completions", "/v1/chat/completions"):
            found[path] = (await client.post(path, json={})).status_code
        for path in ("/health", "/ready", "/metrics", "/"):
            found[path] = (await client.get(path)).status_code
        return found

    found = ask(served, work, keys=keys)
    assert {key for key, status in found.items() if status == 200} == {
        "first-key", "second-key", "/health", "/ready", "/metrics", "/",
    }  # fmt: skip
    assert {status for status in found.values() if status != 200} == {401}


@pytest.mark.parametrize("text", ["", "# none\n", "two words\n", "ключ\n"])
def test_files_without_keys_are_refused(tmp_path, text):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ValueError, match="--api_keys="):
        read_keys(str(tmp_path / "keys"))


def test_other_web_pages_may_ask_only_if_told_so(scripted):
    async def ask_from(origin, **options):
        service, _ = scripted()
        async with running(service, **options) as client:
            headers = {"origin": origin, "access-control-request-method": "POST"}
            return (await client.options("/v1/completions", headers=headers)).headers

    name = "access-control-allow-origin"
    assert name not in asyncio.run(ask_from("https://a.example"))
    headers = asyncio.run(ask_from("https://a.example", cors_origins=["https://a.example"]))
    assert headers[name] == "https://a.example"
    assert name not in asyncio.run(ask_from("https://b.example", cors_origins=["https://a.example"]))


def test_it_answers_to_its_own_names_alone(scripted):
    """A page elsewhere whose name leads here (DNS rebinding) is not answered, whatever it asks for."""

    async def work():
        service, _ = scripted()
        async with running(service, hosts={"localhost", "127.0.0.1", "[::1]"}) as client:
            found = {}
            for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:80", "[::1]:9", "evil.example", "localhost.evil:80"):
                found[host] = (await client.get("/health", headers={"host": host})).status_code
            page = await client.get("/", headers={"host": "evil.example:8000"})
            return found, page

    found, page = asyncio.run(work())
    assert {host for host, status in found.items() if status != 200} == {"evil.example", "localhost.evil:80"}
    assert (page.status_code, page.json()["error"]["code"]) == (403, "host_not_allowed")
    assert "--allowed_host" in page.json()["error"]["message"]


def test_the_official_client_understands_errors(served):
    async def work(official, _):
        with pytest.raises(openai.BadRequestError) as caught:
            await official.completions.create(model="small", prompt="a", max_tokens=1000)
        return caught.value

    error = ask(served, work)
    assert (error.param, error.code) == ("max_tokens", "context_length_exceeded")
    assert isinstance(error.response, httpx.Response)
