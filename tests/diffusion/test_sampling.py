"""The published sampling strategies against a literal step, position by position."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from hypothesis import given, settings
from hypothesis import strategies as st

from literal_diffusion import (
    LITERAL_MASK_PROBABILITY,
    MASK,
    VOCAB,
    literal_filter,
    literal_log_softmax,
    seeds,
)
from twotower_jax.diffusion import SCHEDULES, STRATEGIES, SamplingConfig, noise_level, sample_step

pytestmark = pytest.mark.usefixtures("strict_arithmetic")

# Every setting at least once, T below, at and above S, S from 1 to 64.
CONFIGS = [
    SamplingConfig(block_size=1, steps_per_block=1),
    SamplingConfig(block_size=16, steps_per_block=16, confidence_threshold=0.3),
    SamplingConfig(block_size=5, steps_per_block=9, confidence_threshold=1.0),
    SamplingConfig(block_size=16, steps_per_block=3, confidence_threshold=0.0),
    SamplingConfig(block_size=64, steps_per_block=10, confidence_threshold=0.5, temperature=0.7, top_k=4, top_p=0.9),
    SamplingConfig(block_size=16, steps_per_block=5, strategy="posterior"),
    SamplingConfig(block_size=64, steps_per_block=6, strategy="posterior", schedule="cosine", temperature=1.0),
    SamplingConfig(block_size=5, steps_per_block=8, strategy="posterior", schedule="exponential"),
    SamplingConfig(block_size=10, steps_per_block=10, strategy="predict_and_noise"),
    SamplingConfig(block_size=64, steps_per_block=5, strategy="predict_and_noise", schedule="cosine", temperature=1.5),
    SamplingConfig(block_size=5, steps_per_block=16, strategy="predict_and_noise", schedule="exponential"),
]


def describe(config):
    return f"{config.strategy}-S{config.block_size}-T{config.steps_per_block}-{config.schedule}"


@functools.partial(jax.jit, static_argnums=0)
def take_step(config, keys, xt, logits, block, step):
    return sample_step(config, keys, xt, logits, block=block, step=step, mask_token_id=MASK)


def literal_step(config, key, xt, logits, block, step):
    """One row, position by position, in float64; only the random draws are JAX's."""
    token_key, coin_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, block), step))
    logits = np.where(np.arange(VOCAB) == MASK, -np.inf, np.asarray(logits, np.float64))
    probabilities = np.exp(literal_log_softmax(logits))
    predictions = logits.argmax(axis=-1).tolist()
    if config.temperature > 0:
        bits = np.asarray(jax.random.bits(token_key, logits.shape, jnp.uint32), np.float64)
        noisy = logits / config.temperature - np.log(-np.log1p(-(bits + 0.5) / 2**32))
        for i in range(len(xt)):
            kept = sorted(literal_filter(logits[i] / config.temperature, config.top_k, config.top_p))
            predictions[i] = kept[int(noisy[i][kept].argmax())]
    confidence = [probabilities[i, token] for i, token in enumerate(predictions)]
    undecided = [i for i in range(len(xt)) if xt[i] == MASK]
    surest_first = sorted(undecided, key=lambda i: (-confidence[i], i))
    last = step == config.steps_per_block - 1
    level_t, level_s = (
        LITERAL_MASK_PROBABILITY[config.schedule](1 - k / config.steps_per_block) for k in (step, step + 1)
    )
    if last:
        commits = undecided
    elif config.strategy == "confidence":
        above = [i for i in undecided if confidence[i] > config.confidence_threshold]
        required = math.ceil(len(undecided) / (config.steps_per_block - step))
        commits = surest_first[: min(max(1, len(above), required), len(undecided))]
    elif config.strategy == "posterior":
        coins = np.asarray(jax.random.uniform(coin_key, xt.shape, jnp.float32))
        commits = [i for i in undecided if coins[i] >= 1 - (level_t - level_s) / level_t]
    else:
        stay = min(math.floor(config.block_size * level_s + 1e-9), len(undecided) - 1)
        commits = surest_first[: len(undecided) - stay] if undecided else []
    result = np.array(xt)
    for i in commits:
        result[i] = predictions[i]
    return result, sorted(commits), confidence


def random_blocks(config, rng, batch=3):
    """Rows from all masked to almost decided, and logits from flat to peaked."""
    masked = rng.random((batch, config.block_size)) < rng.choice([0.2, 0.6, 1.0], (batch, 1))
    tokens = rng.integers(4, VOCAB, masked.shape)
    scale = rng.choice([0.5, 2.0, 6.0], (batch, config.block_size, 1))
    logits = rng.normal(size=(*masked.shape, VOCAB)) * scale
    xt = np.where(masked, MASK, tokens).astype(np.int32)
    return xt, logits.astype(np.float32), jax.random.split(jax.random.key(rng.integers(2**32)), batch)


@pytest.mark.whole(but=["confidence-S64", "posterior-S5-", "predict_and_noise-S5-"])
@pytest.mark.parametrize("config", CONFIGS, ids=describe)
@settings(max_examples=8)
@given(seed=seeds, block=st.integers(0, 1000), data=st.data())
def test_step_against_the_literal_one(config, seed, block, data):
    step = data.draw(st.integers(0, config.steps_per_block - 1))
    xt, logits, keys = random_blocks(config, np.random.default_rng(seed))
    result = jax.device_get(take_step(config, keys, xt, logits, block, step))
    assert np.all(result.finite)
    for row in range(len(xt)):
        expected, commits, confidence = literal_step(config, keys[row], xt[row], logits[row], block, step)
        np.testing.assert_array_equal(result.xt[row], expected)
        np.testing.assert_array_equal(np.flatnonzero(result.committed[row]), commits)
        np.testing.assert_allclose(result.confidence[row], confidence, rtol=1e-5)


@pytest.mark.whole(but=["posterior-S64", "predict_and_noise-S5-", "confidence-S5-"])
@pytest.mark.parametrize("config", CONFIGS, ids=describe)
def test_rows_are_exactly_what_they_are_alone(config):
    xt, logits, keys = random_blocks(config, np.random.default_rng(6))
    step = config.steps_per_block // 2
    batch = take_step(config, keys, xt, logits, 4, step)
    for i in range(3):
        one = slice(i, i + 1)
        alone = take_step(config, keys[one], xt[one], logits[one], 4, step)
        jax.tree.map(lambda a, b, one=one: np.testing.assert_array_equal(a[one], b), batch, alone)


def test_rows_may_be_at_different_blocks_and_steps():
    config = SamplingConfig(block_size=16, steps_per_block=5, strategy="posterior")
    xt, logits, keys = random_blocks(config, np.random.default_rng(7))
    blocks, steps = [0, 3, 1], [4, 0, 2]
    mixed = take_step(config, keys, xt, logits, jnp.asarray(blocks), jnp.asarray(steps))
    for i in range(3):
        together = take_step(config, keys, xt, logits, blocks[i], steps[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b[i]), mixed, together)


@pytest.mark.parametrize("config", CONFIGS, ids=describe)
def test_a_block_ends_in_time_and_never_takes_a_token_back(config):
    rng = np.random.default_rng(8)
    xt = jnp.full((3, config.block_size), MASK, jnp.int32)
    keys = jax.random.split(jax.random.key(8), 3)
    assert np.all(noise_level(xt, MASK) == 1.0)
    for step in range(config.steps_per_block):
        logits = jnp.asarray(rng.normal(size=(*xt.shape, VOCAB)) * 3, jnp.float32)
        result = take_step(config, keys, xt, logits, 0, step)
        was_masked = np.asarray(xt == MASK)
        np.testing.assert_array_equal(np.asarray(result.xt)[~was_masked], np.asarray(xt)[~was_masked])
        np.testing.assert_array_equal(result.committed, was_masked & np.asarray(result.xt != MASK))
        if config.strategy != "posterior":
            assert np.all(np.any(result.committed, axis=1) | ~np.any(was_masked, axis=1))
        t = noise_level(result.xt, MASK)
        assert t.dtype == jnp.float32
        np.testing.assert_allclose(t, np.mean(np.asarray(result.xt) == MASK, axis=1), rtol=1e-7)
        xt = result.xt
    assert not np.any(xt == MASK)


def test_ties_go_to_the_left():
    config = SamplingConfig(block_size=6, steps_per_block=3)
    xt = jnp.asarray([[MASK, 7, MASK, MASK, 7, MASK]], jnp.int32)
    logits = jnp.zeros((1, 6, VOCAB), jnp.float32)
    result = take_step(config, jax.random.split(jax.random.key(0), 1), xt, logits, 0, 0)
    np.testing.assert_array_equal(result.xt, [[0, 7, 0, MASK, 7, MASK]])


def test_confidence_must_exceed_the_threshold():
    # Two tokens with equal logits: exactly 0.5.
    logits = jnp.full((1, 4, VOCAB), -jnp.inf, jnp.float32).at[:, :, :2].set(0.0)
    xt, keys = jnp.full((1, 4), MASK, jnp.int32), jax.random.split(jax.random.key(0), 1)
    for threshold, commits in [(0.5, 1), (0.499, 4)]:
        config = SamplingConfig(block_size=4, steps_per_block=4, confidence_threshold=threshold)
        result = take_step(config, keys, xt, logits, 0, 0)
        np.testing.assert_array_equal(result.confidence, 0.5)
        assert np.sum(result.committed) == commits


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_unmasks_as_often_as_the_schedule_says(schedule):
    steps, batch, size = 4, 400, 32
    config = SamplingConfig(block_size=size, steps_per_block=steps, strategy="posterior", schedule=schedule)
    xt = jnp.full((batch, size), MASK, jnp.int32)
    keys = jax.random.split(jax.random.key(9), batch)
    logits = jnp.zeros((batch, size, VOCAB), jnp.float32)
    for step in range(steps):
        # The marginal of x_t is the forward process's: every position masked with probability 1 − α(t).
        level = LITERAL_MASK_PROBABILITY[schedule](1 - step / steps)
        tolerance = 4 * math.sqrt(level * (1 - level) / (batch * size)) + 1e-12
        assert abs(np.mean(xt == MASK) - level) <= tolerance
        xt = take_step(config, keys, xt, logits, 0, step).xt
    assert not np.any(xt == MASK)


@pytest.mark.parametrize(("size", "steps"), [(29, 29), (58, 29), (5, 25), (16, 5)])
def test_predict_and_noise_follows_its_schedule(size, steps):
    config = SamplingConfig(block_size=size, steps_per_block=steps, strategy="predict_and_noise")
    xt, logits = jnp.full((1, size), MASK, jnp.int32), jnp.zeros((1, size, VOCAB), jnp.float32)
    num_masked = size
    for step in range(steps):
        xt = take_step(config, jax.random.split(jax.random.key(0), 1), xt, logits, 0, step).xt
        # In whole numbers, where nothing can round.
        num_masked = max(0, min(size * (steps - step - 1) // steps, num_masked - 1))
        assert np.sum(xt == MASK) == num_masked
    assert num_masked == 0


def test_draws_differ_between_rows_blocks_steps_and_positions():
    config = SamplingConfig(block_size=16, steps_per_block=16, temperature=1.0, confidence_threshold=0.0)
    xt, logits = jnp.full((2, 16), MASK, jnp.int32), jnp.zeros((2, 16, VOCAB), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 2)
    first, second = np.asarray(take_step(config, keys, xt, logits, 0, 0).xt)
    next_block = np.asarray(take_step(config, keys, xt, logits, 1, 0).xt)[0]
    next_step = np.asarray(take_step(config, keys, xt, logits, 0, 1).xt)[0]
    assert len({tuple(row) for row in (first, second, next_block, next_step)}) == 4
    assert len(set(first)) > 3


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_logit_is_reported_and_commits_nothing(strategy, bad):
    config = SamplingConfig(block_size=4, steps_per_block=2, strategy=strategy)
    xt = jnp.asarray([[MASK] * 4, [MASK] * 4, [5, MASK, MASK, MASK]], jnp.int32)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, VOCAB)), jnp.float32)
    broken = logits.at[1, 2, 6].set(bad).at[2, 0, 6].set(bad)
    keys = jax.random.split(jax.random.key(0), 3)
    for step in range(2):
        result = take_step(config, keys, xt, broken, 0, step)
        # Row 1 is broken where it is masked; row 2 only where it is decided already, which decides nothing.
        np.testing.assert_array_equal(result.finite, [True, False, True])
        assert not result.committed[1, 2] and result.xt[1, 2] == MASK
        whole = take_step(config, keys, xt, logits, 0, step)
        np.testing.assert_array_equal(result.xt[0], whole.xt[0])
        np.testing.assert_array_equal(result.xt[2], whole.xt[2])
    # Last step: everything else is committed.
    np.testing.assert_array_equal(result.committed, (np.asarray(xt) == MASK) & ~np.isnan(result.confidence))


def test_published_traces_obey_the_confidence_rule(data):
    """Logits under which the published choice at each step is the only right one, and the steps that follow from them.

    Without the model the confidences are unknown, but not where they must lie: the positions committed beyond the
    required number were surer than γ, and if more than required were committed, nothing else was.
    """
    cases = json.loads((data / "tiny" / "generation.json").read_text())["cases"]
    for run in (run for case in cases for run in case["mask_diffusion"]):
        size, steps = run["block_size"], run["steps_per_block"]
        config = SamplingConfig(size, steps, confidence_threshold=run["confidence_threshold"])
        tokens = np.reshape(run["tokens"], (-1, size))
        assert len(run["trace"]) == run["denoiser_evaluations"]
        for now, then in zip(run["trace"], [*run["trace"][1:], {"block": None}], strict=True):
            before = np.array(now["xt"])
            after = np.array(then["xt"]) if then["block"] == now["block"] else tokens[now["block"]]
            committed = before != after
            required = math.ceil((before == MASK).sum() / (steps - now["step"]))
            assert committed.sum() >= required and np.all(before[committed] == MASK)
            surer, less_sure = run["confidence_threshold"] + np.array([0.05, -0.05])
            if committed.sum() == required:
                surer, less_sure = less_sure, less_sure - 0.05
            confidence = np.where(committed, surer, less_sure)
            # What the right tokens leave is spread over as many tokens again, which the published vocabulary of 512
            # does not have, so that none of them is likelier.
            logits = np.full((1, size, 1024), -np.inf)
            logits[0, :, 512:] = np.log((1 - confidence) / 512)[:, None]
            logits[0, np.arange(size), tokens[now["block"]]] = np.log(confidence)
            xt = jnp.asarray(before[None], jnp.int32)
            assert noise_level(xt, MASK) == now["t"]
            keys = jax.random.split(jax.random.key(0), 1)
            result = take_step(config, keys, xt, jnp.asarray(logits, jnp.float32), now["block"], now["step"])
            np.testing.assert_array_equal(result.xt[0], after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 0}, "block_size=0 and steps_per_block=16"),
        ({"steps_per_block": 0}, "block_size=16 and steps_per_block=0"),
        ({"strategy": "greedy"}, "'greedy'.*confidence, posterior, predict_and_noise"),
        ({"schedule": "sigmoid"}, "'sigmoid'.*linear"),
        ({"confidence_threshold": 1.1}, "confidence_threshold=1.1"),
        ({"confidence_threshold": math.nan}, "confidence_threshold=nan"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": 1e-9}, "temperature=1e-09"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": 1.0, "top_k": -1}, "top_k=-1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
        ({"top_k": 5}, "top_k=5 .* temperature=0.0"),
        ({"top_p": 0.9}, "top_p=0.9 .* temperature=0.0"),
        ({"schedule": "cosine"}, "schedule='cosine' .* strategy='confidence'"),
        ({"strategy": "posterior", "confidence_threshold": 0.5}, "confidence_threshold=0.5 .* strategy='posterior'"),
    ],
)
def test_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)


@pytest.mark.parametrize(
    ("xt", "logits", "keys"),
    [((2, 5), (2, 5, 9), 2), ((2, 4), (2, 5, 9), 2), ((2, 4), (1, 4, 9), 2), ((2, 4), (2, 4, 9), 1)],
)
def test_step_refuses_shapes_that_do_not_fit(xt, logits, keys):
    config = SamplingConfig(block_size=4)
    keys = jax.random.split(jax.random.key(0), keys)
    with shapes.unchecked(), pytest.raises(ValueError, match=r"expected xt \(B, 4\)"):
        take_step(config, keys, jnp.zeros(xt, jnp.int32), jnp.zeros(logits, jnp.float32), 0, 0)
