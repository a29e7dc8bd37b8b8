"""Adapters that one server serves beside its model: requests choose by name, and the weights are there once."""

import asyncio

import jax.numpy as jnp
import numpy as np
import openai
import pytest
from served import SETTINGS, running

from twotower_jax import lora
from twotower_jax.adapted import Adapted
from twotower_jax.data.tokenizer import load_tokenizer
from twotower_jax.generation import generate
from twotower_jax.generation.engine import Engine
from twotower_jax.generation.prefix_cache import PrefixCache
from twotower_jax.generation.request import Request
from twotower_jax.generation.score import score_ar
from twotower_jax.parameters import flatten, parameter_table, unflatten

PROMPTS = ["The list", "naïve café"]


@pytest.fixture(scope="module")
def adapters(loaded):
    """Two that change both towers so much that their tokens are others."""
    model, params, _ = loaded

    def make(seed):
        rng = np.random.default_rng(seed)
        table = lora.adapter_table(parameter_table(model), 2)
        drawn = {path: jnp.asarray(rng.standard_normal(p.shape), jnp.float32) for path, p in table.items()}
        return lora.attach(params, unflatten(drawn), 1.0)

    return {"polite": make(1), "short": make(2)}


@pytest.mark.whole
def test_requests_choose_an_adapter_by_name_and_get_what_it_gives_alone(served, loaded, checkpoint, adapters):
    model, params, _ = loaded
    tokenizer = load_tokenizer(checkpoint)
    ids = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    named, told = {"small": params} | adapters, {"return_token_ids": True}
    expected = {name: [r.tokens for r in generate(model, one, ids, SETTINGS)] for name, one in named.items()}
    assert len({str(tokens) for tokens in expected.values()}) == 3

    async def work():
        async with running(served(adapters=adapters)) as client:
            url = {"base_url": "http://test/v1", "api_key": "none"}
            return await asked_of(openai.AsyncOpenAI(**url, http_client=client, max_retries=0), client)

    async def asked_of(official, client):
        # All at once: rows of three sets of weights share the slots.
        asked = [official.completions.create(model=name, prompt=ids, max_tokens=12, extra_body=told) for name in named]
        answers = await asyncio.gather(*asked)
        scored = await official.completions.create(model="short", prompt=ids[0], max_tokens=1, echo=True, logprobs=1)
        with pytest.raises(openai.NotFoundError, match="there is no 'rude' here; served is 'small', 'polite', 'short'"):
            await official.completions.create(model="rude", prompt="a")
        return answers, scored, (await client.get("/v1/models")).json(), (await client.get("/v1/models/short")).json()

    answers, scored, models, one = asyncio.run(work())
    for name, answer in zip(named, answers, strict=True):
        assert answer.model == name
        assert [choice.token_ids for choice in answer.choices] == expected[name], name
    assert [(m["id"], m.get("parent")) for m in models["data"]] == [
        ("small", None), ("polite", "small"), ("short", "small")
    ]  # fmt: skip
    assert one["id"] == "short" and one["parent"] == "small"
    told = scored.choices[0].logprobs.token_logprobs[1 : len(ids[0])]
    np.testing.assert_allclose(told, score_ar(model, adapters["short"], ids[:1], 1)[0], rtol=1e-4, atol=1e-4)


def test_what_adapters_do_not_change_is_there_once(loaded, adapters):
    _, params, _ = loaded
    flat = flatten(params)
    for one in adapters.values():
        for path, value in flatten(one).items():
            assert (value.base if isinstance(value, Adapted) else value) is flat[path]


@pytest.mark.whole
def test_a_prefix_of_one_adapter_is_none_of_another(loaded, adapters):
    """What the context keeps of a prompt depends on what reads it."""
    model, params, _ = loaded
    prefixes = PrefixCache(10**8)
    settings = SETTINGS.__class__(**{**SETTINGS.__dict__, "prefill_chunk": 64})
    engine = Engine(model, params, settings, capacity=200, slots=2, prefix_cache=prefixes, adapters=adapters)
    prompt = np.random.default_rng(0).integers(4, 290, 130).tolist()

    def tokens(adapter):
        engine.submit(Request(prompt=prompt, max_new_tokens=4, mode="ar", sampling=SETTINGS.sampling, adapter=adapter))
        found = None
        while engine.busy:
            found = next((p.result for p in engine.step() if p.result is not None), found)
        return found.tokens

    first = {name: tokens(name) for name in (None, "polite")}
    assert prefixes.hits == 0 and len(prefixes) == 4
    assert {name: tokens(name) for name in (None, "polite")} == first and prefixes.hits == 256
    with pytest.raises(ValueError, match="adapter 'rude' is not one of the engine's"):
        tokens("rude")
