"""Requests that differ, in one table: each gets what it gets alone, and what it asked for."""

import collections
import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation import Engine, Request, Settings
from twotower_jax.generation.quorum import Quorum
from twotower_jax.parameters import bind, flatten, unflatten
from twotower_jax.two_tower import TwoTower

VOCAB, BLOCK, SLOTS = 64, 8, 4
ENGINE = Settings(batch_size=SLOTS, prefill_chunk=64)


@pytest.fixture(scope="module")
def tiny(small_config, random_params):
    model = TwoTower(small_config("M*E", vocab_size=VOCAB))
    return model, random_params(model)


def prompt(seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    return rng.integers(4, VOCAB, rng.integers(1, 30)).tolist()


def request(number: int = 0, /, **values) -> Request:
    sampling = {"block_size": BLOCK, "steps_per_block": 5, "confidence_threshold": 0.3} | values.pop("sampling", {})
    if values.get("mode") in ("ar", "mock_ar"):
        sampling = {name: value for name, value in sampling.items() if name in ("temperature", "top_k", "top_p")}
    values = {"prompt": prompt(number), "max_new_tokens": 20, "end_tokens": ()} | values
    return Request(sampling=SamplingConfig(**sampling), **values)


def run(tiny, requests, **options) -> list:
    """All events of each request, submitted together, and its result."""
    engine = Engine(*tiny, ENGINE, capacity=128, **options)
    numbers = [engine.submit(r) for r in requests]
    events = {number: [] for number in numbers}
    while engine.busy:
        for progress in engine.step():
            events[progress.number].append(progress)
    return list(events.values())


def results(tiny, requests, **options) -> list:
    return [events[-1].result for events in run(tiny, requests, **options)]


def mixture(count: int, seed: int) -> list[Request]:
    """Requests of four programs."""
    draw = random.Random(seed)
    out = []
    for _ in range(count):
        mode = draw.choice(["diffusion", "diffusion", "ar", "speculative"])
        sampling = draw.choice([{}, {"temperature": 0.9}, {"temperature": 1.4, "top_k": 12, "top_p": 0.8}])
        sampling = sampling | {"steps_per_block": draw.choice([1, 3, 8]), "confidence_threshold": draw.random()}
        if mode == "diffusion" and draw.random() < 0.3:
            doubt = {"doubt_threshold": draw.random()}
            sampling |= {"strategy": "remasking", "strategy_options": doubt}
        out.append(
            request(
                seed=draw.randrange(2**32),
                sample=draw.randrange(2**32),
                mode=mode,
                prompt=prompt(draw.randrange(100)),
                max_new_tokens=draw.randrange(1, 30),
                sampling=sampling,
                end_tokens=draw.choice([(), (7,), (4, 9, 21), (30, 31, 32, 33)]),
                tolerance=draw.choice([0.0, 0.5]) if mode == "speculative" else 0.0,
                logprobs=3,
                context_logprobs=mode != "diffusion" and draw.random() < 0.5,
                provisional=draw.random() < 0.2,
                pinned={0: 11} if draw.random() < 0.3 else {},
                allowed={0: range(10, 20) if draw.random() < 0.3 else range(VOCAB)},
            )
        )
    return out


def test_rows_of_all_kinds_get_what_they_get_alone(tiny, pytestconfig):
    """Modes, strategies, knobs, filters, seeds, ends and wishes mixed; submitted late, some of them canceled."""
    requests, draw = mixture(24, 5), random.Random(1)
    assert len({r.mode for r in requests}) == 3 and len({r.sampling.strategy for r in requests}) == 2
    engine = Engine(*tiny, ENGINE, capacity=128)
    left, numbers, found, canceled = list(requests), {}, {}, set()
    while left or engine.busy:
        for _ in range(draw.randrange(3)):
            if left:
                asked = left.pop(0)
                numbers[engine.submit(asked)] = asked
        for progress in engine.step():
            assert progress.number not in canceled and progress.error is None
            if progress.result is not None:
                found[progress.number] = progress.result
        running = [number for number in numbers if number not in found and number not in canceled]
        if running and draw.random() < 0.1:
            canceled.add(draw.choice(running))
            engine.cancel(max(canceled))
            canceled.add(max(canceled))
    assert 0 < len(canceled) < 12 and len(found) + len(canceled) == 24
    assert {r.finish_reason for r in found.values()} == {"eos", "length"}
    of_a_kind = collections.defaultdict(list)
    for number in sorted(found):
        of_a_kind[numbers[number].mode, numbers[number].sampling.strategy].append(number)
    most = None if pytestconfig.getoption("whole") else 2
    for number in (number for same in of_a_kind.values() for number in same[:most]):
        result = found[number]
        # The wishes of others decide which program makes a row; its numbers are of the row's own.
        alone = results(tiny, [dataclasses.replace(numbers[number], provisional=False)])[0]
        assert alone._replace(logprobs=None, context_logprobs=None) == result._replace(
            logprobs=None, context_logprobs=None
        )
        for name in ("logprobs", "context_logprobs"):
            one, other = getattr(alone, name), getattr(result, name)
            assert (one is None) == (other is None) and len(one or ()) == len(other or ())
            one, other = ([v if isinstance(v, float) else v.logprob for v in values or ()] for values in (one, other))
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


@pytest.mark.whole
@pytest.mark.parametrize("of", [1, 2])
def test_the_quorum_changes_no_token(tiny, monkeypatch, of):
    requests = [
        request(i, mode=mode, sampling={"confidence_threshold": (i * 0.37) % 1.0, "steps_per_block": 8})
        for i, mode in enumerate(["diffusion", "speculative"] * 4)
    ]
    expected = results(tiny, requests)
    steps = {r.denoiser_evaluations for r in expected}
    assert len(steps) > 3  # Rows are not equally fast.
    monkeypatch.setattr(Quorum, "of", lambda self, alive: min(alive, of))
    assert results(tiny, requests) == expected


def test_numbers_are_the_seeds_and_samples(tiny):
    """A sample's number takes the place of the row's, and a seed is a row's own."""
    sampled = {"sampling": {"temperature": 1.5}, "prompt": [5, 6]}
    rows = [request(**sampled, seed=seed, sample=sample) for seed, sample in [(0, 1), (0, None), (0, 1), (1, 1)]]
    first, same, again, other = (r.tokens for r in results(tiny, rows))
    assert first == again == same  # The row with number 1.
    assert first != other


PLACES = [("diffusion", {}), ("ar", {}), ("mock_ar", {}), ("speculative", {}), ("diffusion", {"temperature": 2.0})]


@pytest.mark.whole(but=["[diffusion", "[ar"])
@pytest.mark.parametrize(("mode", "sampling"), PLACES)
def test_pinned_and_allowed_tokens_stand_where_they_are_said_to(tiny, mode, sampling):
    pinned = {0: 13, 5: 17, 6: 18, 19: 21}
    choices = {3: (40, 41), 9: (50,), 12: range(30, 40)}
    free, held = results(
        tiny,
        [request(2, mode=mode, sampling=sampling, sample=0)]
        + [request(2, mode=mode, sampling=sampling, sample=0, pinned=pinned, allowed=choices, logprobs=3)],
    )
    assert {i: held.tokens[i] for i in pinned} == pinned
    for place, ids in choices.items():
        assert held.tokens[place] in ids
        assert {token for token, value in held.logprobs[place].top if value > -np.inf} <= set(ids)
    others = set(range(20)) - set(pinned) - set(choices)
    assert any(free.tokens[i] != held.tokens[i] for i in others)  # They condition the rest.
    if mode == "diffusion":
        assert all((held.step_map[i] == 0) == (i in pinned) for i in range(20))


def test_a_pinned_token_conditions_what_comes_before_it(tiny):
    free, held = results(tiny, [request(3), request(3, pinned={7: 5})])
    assert free.tokens[:7] != held.tokens[:7]


@pytest.mark.whole
def test_what_ar_says_with_pinned_and_allowed_tokens_speculative_says_too(tiny):
    held = {"pinned": {0: 9, 4: 11, 11: 12}, "allowed": {2: (20, 30), 7: range(8), 13: (60, 61)}}
    for sampling in ({}, {"temperature": 1.2}):
        one, other = (
            [request(i, mode=mode, sampling=sampling, sample=i, **held) for i in range(4)]
            for mode in ("ar", "speculative")
        )
        assert [r.tokens for r in results(tiny, one)] == [r.tokens for r in results(tiny, other)]


@pytest.mark.whole
def test_a_start_block_is_where_diffusion_begins(tiny):
    mask = tiny[0].config.mask_token_id
    begun = [9, mask, 8, mask, mask, 7, mask, mask, 5]  # One token of the second block.
    (events,) = run(tiny, [request(4, start=begun)], record_trace=True)
    result = events[-1].result
    assert result.trace[0].xt == begun[:8] and result.trace[0].t == 5 / 8
    second = next(step for step in result.trace if step.block == 1)
    assert second.xt == [5] + [mask] * 7
    # Given, but not for ever: a strategy that masks again may do so.
    doubt = {"strategy": "remasking", "strategy_options": {"doubt_threshold": 1.0}, "confidence_threshold": 0.0}
    (events,) = run(tiny, [request(4, start=begun, sampling=doubt)], record_trace=True)
    assert any(step.tokens[0] == mask for step in events[-1].result.trace if step.block == 0)
    (events,) = run(tiny, [request(4, start=begun, pinned={0: 9}, sampling=doubt)], record_trace=True)
    assert all(step.tokens[0] == 9 for step in events[-1].result.trace if step.block == 0)


def test_a_block_that_is_given_whole_takes_no_evaluation(tiny):
    (result,) = results(tiny, [request(max_new_tokens=8, pinned=dict(enumerate(range(20, 28))))])
    assert (result.tokens, result.denoiser_evaluations, result.blocks) == (list(range(20, 28)), 0, 1)


@pytest.mark.whole
def test_log_probabilities_are_those_of_the_step_that_committed(tiny):
    """Against a plain forward pass for each recorded step; and step maps against the steps themselves."""
    model, params = tiny
    ids = prompt(1)[:5]
    asked = request(prompt=ids, max_new_tokens=16, logprobs=3, context_logprobs=True, sampling={"temperature": 1.0})
    (events,) = run(tiny, [asked], record_trace=True)
    result, text = events[-1].result, ids

    @jax.jit
    def evaluate(params, text, length, xt, t):
        bound = bind(model, params)
        _, cache = bound.prefill(text, length, 32)
        logits = bound.denoise(xt, t, cache).at[..., model.config.mask_token_id].set(-jnp.inf)
        return jax.nn.log_softmax(logits)

    for step in result.trace:
        text = ids + result.tokens[: BLOCK * step.block]
        padded = np.zeros((1, 24), np.int32)
        padded[0, : len(text)] = text
        logp = evaluate(params, padded, np.array([len(text)]), np.array([step.xt]), np.float32([step.t]))[0]
        for place in step.committed:
            told = result.logprobs[BLOCK * step.block + place]
            assert result.step_map[BLOCK * step.block + place] == step.step + 1
            assert told.token == step.tokens[place]
            assert told.logprob == pytest.approx(float(logp[place, told.token]), abs=1e-5)
            best = np.argsort(-logp[place])[:3]
            assert [token for token, _ in told.top] == best.tolist()
            np.testing.assert_allclose([value for _, value in told.top], logp[place, best], rtol=0, atol=1e-5)
    assert [p.step_map for p in events if p.tokens] == [result.step_map[:8], result.step_map[8:]]
    assert sum(([*p.logprobs] for p in events if p.tokens), []) == result.logprobs
    np.testing.assert_allclose(result.context_logprobs, of_context(tiny, ids, result.tokens), rtol=0, atol=1e-5)


def of_context(tiny, ids, tokens) -> np.ndarray:
    logits = jax.jit(lambda p, ids: bind(tiny[0], p).context_logits(ids))(tiny[1], np.array([ids + tokens]))
    logp = np.asarray(jax.nn.log_softmax(logits[0]))
    return logp[np.arange(len(ids) - 1, len(ids) + len(tokens) - 1), tokens]


@pytest.mark.whole
@pytest.mark.parametrize("mode", ["ar", "speculative"])
def test_log_probabilities_of_the_context(tiny, mode):
    """They are the context's given all before, for every token and for one that was pinned, whoever drafted it."""
    asked = request(1, mode=mode, logprobs=1, context_logprobs=True, pinned={3: 33}, sampling={"temperature": 1.0})
    (events,) = run(tiny, [asked])
    result = events[-1].result
    expected = of_context(tiny, asked.prompt, result.tokens)
    np.testing.assert_allclose([told.logprob for told in result.logprobs], expected, rtol=0, atol=1e-5)
    assert result.context_logprobs == [told.logprob for told in result.logprobs]
    assert all(told.top[0][1] >= told.logprob for told in result.logprobs)
    assert sum(([*p.logprobs] for p in events if p.tokens), [])[:20] == result.logprobs
    if mode == "speculative":
        assert len(result.step_map) == 20 and result.step_map[0] == 0
        drafted = sum(step > 0 for step in result.step_map)
        assert result.accepted_draft_tokens - drafted in (0, 1)  # The pinned one may count as drafted.


@pytest.mark.whole
def test_step_maps_of_drafts(tiny):
    asked = request(1, mode="speculative", sampling={"confidence_threshold": 1.0}, tolerance=1.0)
    (events,) = run(tiny, [asked], record_trace=True)
    for progress in events[1:]:
        decided = {i: step.step + 1 for step in progress.steps for i in step.committed}
        assert progress.step_map == [decided[i] for i in range(1, BLOCK)] + [0]


@pytest.mark.whole
def test_provisional_blocks_are_told_step_by_step(tiny):
    """An event for each evaluation but the last of a block, with what the trace has; nobody's tokens change."""
    asked = [request(i, mode=mode, sample=i) for i in range(2) for mode in ("diffusion", "speculative")]
    expected = results(tiny, asked)
    asked[1:3] = [dataclasses.replace(r, provisional=True) for r in asked[1:3]]
    told = run(tiny, asked, record_trace=True)
    for events, result, r in zip(told, expected, asked, strict=True):
        found = events[-1].result
        assert found._replace(trace=None) == result
        given = int(r.mode == "speculative")
        steps = [step.tokens[given:] for step in found.trace if tiny[0].config.mask_token_id in step.tokens]
        provisional = [p.provisional for p in events if p.provisional is not None]
        # A block that is finished waits for others; what it is told to be meanwhile has no masks.
        provisional = [block for block in provisional if tiny[0].config.mask_token_id in block]
        assert provisional == (steps if r.provisional else [])


@pytest.mark.whole
def test_one_token_at_a_time_on_request(tiny):
    (events,) = run(tiny, [request(mode="ar", provisional=True, max_new_tokens=5)])
    assert [len(p.tokens) for p in events] == [1, 1, 1, 1, 1]


@pytest.mark.whole(but=["diffusion"])
@pytest.mark.parametrize("mode", ["diffusion", "speculative", "ar"])
def test_a_row_whose_logits_are_not_finite_fails_alone(tiny, mode):
    model, params = tiny
    flat, bad = flatten(params), 50
    table = params["context_tower"]["embeddings"].at[bad].set(jnp.nan)
    broken = model, unflatten(flat | {("context_tower", "embeddings"): table})
    forbidden = {i: [t for t in range(VOCAB) if t != bad] for i in range(20)}
    good = [request(i, mode=mode, sample=i, prompt=[5 + i], allowed=forbidden) for i in range(5)]
    expected = results(tiny, good)
    told = run(broken, [*good[:2], request(mode=mode, prompt=[5, bad, 6]), *good[2:]])
    (failed,) = told.pop(2)
    assert failed.error == "prompt 3: the model's logits are not finite; are its weights?"
    assert (failed.result, failed.tokens) == (None, [])
    assert [events[-1].result for events in told] == expected


def test_cancel_frees_a_slot_for_the_next_step(tiny):
    engine = Engine(*tiny, ENGINE, capacity=128, slots=1)
    first, second, third = (engine.submit(request(i, max_new_tokens=60)) for i in range(3))
    assert (engine.running, engine.waiting, engine.slots, engine.capacity) == (0, 3, 1, 128)
    assert [p.number for p in engine.step()] == [first]
    assert (engine.running, engine.waiting) == (1, 2)
    engine.cancel(first)
    engine.cancel(second)
    assert (engine.running, engine.waiting) == (0, 1)
    assert [p.number for p in engine.step()] == [third]
    engine.cancel(third)
    engine.cancel(third)
    assert not engine.busy and engine.step() == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "dream"}, "unknown mode 'dream'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1 and less"),
        ({"seed": 2**32}, "seed must lie in"),
        ({"sample": -1}, "sample must lie in"),
        ({"stop": ("",)}, "stop must hold texts"),
        ({"stop": ("x",)}, "needs a tokenizer"),
        ({"tolerance": 0.5}, "tolerance=0.5 changes nothing in mode 'diffusion'"),
        ({"mode": "ar", "start": [5]}, "start changes nothing in mode 'ar'"),
        ({"mode": "mock_ar", "context_logprobs": True}, "context_logprobs are not to be had"),
        ({"logprobs": 65}, "logprobs must lie in"),
        ({"pinned": {20: 5}}, "pinned: there is no position 20; new tokens have 0 … 19"),
        ({"pinned": {1: VOCAB}}, r"pinned\[1\]: id 64"),
        ({"pinned": {1: 3}}, r"pinned\[1\]=3 is the mask token"),
        ({"allowed": {2: []}}, r"allowed\[2\] holds no token"),
        ({"allowed": {2: [3]}}, r"allowed\[2\] holds no token"),
        ({"allowed": {2: [5]}, "pinned": {2: 6}}, r"pinned\[2\]=6 is not among those allowed"),
        ({"allowed": {2: [5]}, "start": [3, 3, 6]}, r"start\[2\]=6 is not what is pinned or allowed there"),
        ({"pinned": {1: 5}, "start": [3, 6]}, r"start\[1\]=6 is not what is pinned or allowed there"),
        ({"start": [5] * 21}, "start must hold 1 … 20 token ids"),
        ({"end_tokens": (64,)}, "end_tokens: id 64"),
        ({"sampling": {"temperature": 1.0, "top_k": 65}}, "top_k=65 is more than the vocabulary has"),
        ({"prompt": []}, "prompt 1 is empty"),
        ({"prompt": [5] * 110}, "prompt 1 needs .* cache positions, and a slot has 128"),
    ],
)
def test_requests_that_cannot_be_met(tiny, values, message):
    engine = Engine(*tiny, ENGINE, capacity=128)
    with pytest.raises(ValueError, match=message):
        engine.submit(request(**values))
    assert not engine.busy
