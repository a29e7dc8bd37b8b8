"""Diffusion: schedules, corruption, losses, predictions and sampling strategies against literal numpy versions."""

import functools
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower_jax.diffusion import (
    SCHEDULES,
    STRATEGIES,
    LossSum,
    MaskedDiffusion,
    SamplingConfig,
    loss_by_block_position,
    loss_by_noise_level,
    masked_loss_sum,
    next_tokens,
    noise_level,
    predict,
    prediction,
    sample_step,
    sample_tokens,
    token_log_probabilities,
)
from twotower_jax.diffusion.times import Uniform

MASK = 3
VOCAB = 13

seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Nearly all the time goes into compiling hundreds of small programs, most of that into optimizing them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def strict_arithmetic():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


# Schedules.

LITERAL_MASK_PROBABILITY = {
    "linear": lambda t: t,
    "cosine": lambda t: 1 - np.cos(np.pi * t / 2),
    "exponential": lambda t: 1 - (np.exp(-3 * t) - np.exp(-3)) / (1 - np.exp(-3)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_its_formula_and_rises_from_exactly_zero_to_exactly_one(name):
    t = np.linspace(0, 1, 4097, dtype=np.float32)
    probability = np.asarray(SCHEDULES[name].mask_probability(jnp.asarray(t)))
    assert probability.dtype == np.float32
    assert probability[0] == 0.0 and probability[-1] == 1.0
    assert np.all(np.diff(probability) > 0)
    np.testing.assert_allclose(probability, LITERAL_MASK_PROBABILITY[name](t.astype(np.float64)), rtol=1e-6)


def test_unknown_schedule_names_the_known_ones():
    with pytest.raises(ValueError, match="'sigmoid'.*linear, cosine, exponential"):
        SCHEDULES["sigmoid"]


# Corruption.


@functools.partial(jax.jit, static_argnames=("seed", "schedule", "t_min"))
def corrupt_examples(ids, index, *, seed=7, step=11, schedule="linear", t_min=1e-3):
    process = MaskedDiffusion(SCHEDULES[schedule], Uniform(t_min))
    return process.corrupt(ids, seed=seed, step=step, example_index=index, mask_token_id=MASK)


def clean_ids(batch, length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(4, VOCAB, (batch, length)), jnp.int32)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_corruption_masks_at_the_rate_it_states(schedule):
    batch, length = 400, 1000
    ids = clean_ids(batch, length)
    noisy, masked, t, _ = corrupt_examples(ids, np.arange(batch, dtype=np.int32), schedule=schedule)
    assert (noisy.dtype, masked.dtype, t.dtype) == (jnp.int32, jnp.bool_, jnp.float32)
    np.testing.assert_array_equal(noisy, np.where(masked, MASK, ids))
    # Each row's count is Binomial(L, t): 5 standard deviations a row, 4 for the mean over all rows of the deviations.
    t, counts = np.asarray(t, np.float64), np.asarray(masked).sum(axis=1)
    deviations = (counts - length * t) / np.sqrt(length * t * (1 - t) + 1)
    assert np.abs(deviations).max() < 5 and abs(deviations.mean()) < 4 / math.sqrt(batch)
    # Neighbors are independent: given t, the chance that both are masked is t².
    both = (np.asarray(masked)[:, 1:] & np.asarray(masked)[:, :-1]).mean(axis=1)
    assert abs((both - t**2).mean()) < 4 / math.sqrt(batch * length)


def test_time_is_uniform_from_t_min_to_one():
    batch = 4000
    ids = jnp.zeros((batch, 1), jnp.int32)
    t = np.sort(np.asarray(corrupt_examples(ids, np.arange(batch, dtype=np.int32), t_min=0.25).t))
    assert t[0] >= 0.25 and t[-1] <= 1.0
    # Kolmogorov-Smirnov at a level of about 1e-4.
    empirical = np.arange(1, batch + 1) / batch
    assert np.abs(empirical - (t - 0.25) / 0.75).max() < 2.2 / math.sqrt(batch)


@settings(max_examples=20)
@given(seeds, st.permutations(range(6)))
def test_corruption_of_an_example_does_not_depend_on_its_batch(seed, order):
    ids, index = clean_ids(6, 9, seed), np.random.default_rng(seed).integers(2**31, size=6, dtype=np.int32)
    whole = corrupt_examples(ids, index)
    shuffled = corrupt_examples(np.asarray(ids)[order], index[order])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a)[order], b), whole, shuffled)
    alone = corrupt_examples(ids[2:3], index[2:3])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a)[2:3], b), whole, alone)


def test_corruption_differs_by_seed_step_and_example_and_is_the_same_without_jit():
    ids, index = clean_ids(1, 64), np.int32([5])
    reference = corrupt_examples(ids, index)
    for other in [
        corrupt_examples(ids, index + 1),
        corrupt_examples(ids, index, seed=8),
        corrupt_examples(ids, index, step=12),
    ]:
        assert other.t[0] != reference.t[0] and np.any(other.masked != reference.masked)
    eager = MaskedDiffusion().corrupt(ids, seed=7, step=11, example_index=index, mask_token_id=MASK)
    jax.tree.map(np.testing.assert_array_equal, reference, eager)


def test_corruption_does_not_depend_on_the_mesh():
    # In a process of its own, since a test cannot add devices to a running one.
    program = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from twotower_jax.diffusion import MaskedDiffusion
ids = jnp.arange(64, dtype=jnp.int32).reshape(8, 8) + 4
index = jnp.arange(100, 108, dtype=jnp.int32)
def noise(ids, index, step):
    return MaskedDiffusion().corrupt(ids, seed=1, step=step, example_index=index, mask_token_id=3)
expected = noise(ids, index, 2)
for shape in (4, 1), (2, 2), (1, 4):
    mesh = jax.make_mesh(shape, ("data", "length"))
    spread = jax.device_put(ids, NamedSharding(mesh, PartitionSpec("data", "length")))
    spread_index = jax.device_put(index, NamedSharding(mesh, PartitionSpec("data")))
    result = jax.jit(noise)(spread, spread_index, jnp.int32(2))
    assert len(result.noisy_ids.devices()) == 4
    jax.tree.map(np.testing.assert_array_equal, expected, result)
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t_min": 1.0}, "t_min=1.0"),
        ({"t_min": -0.1}, "t_min=-0.1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"seed": -1}, "seed=-1"),
        ({"index": np.int32([0, 1, 2])}, r"\(2, 4\) and \(3,\)"),
    ],
)
def test_corruption_refuses(options, message):
    with shapes.unchecked(), pytest.raises(ValueError, match=message):
        corrupt_examples(clean_ids(2, 4), **({"index": np.int32([0, 1])} | options))


# Losses.


def literal_log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def loss_inputs(seed=0, batch=4, length=24, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(size=(batch, length, VOCAB)) * 4, dtype)
    targets = jnp.asarray(rng.integers(0, VOCAB, (batch, length)), jnp.int32)
    return logits, targets, jnp.asarray(rng.random((batch, length)) < 0.4)


def literal_token_losses(logits, targets):
    return -np.take_along_axis(literal_log_softmax(logits), np.asarray(targets)[..., None], axis=-1)[..., 0]


def masked_cross_entropy(logits, targets, masked):
    sums = masked_loss_sum(token_log_probabilities(logits, targets), masked)
    return sums.mean, sums


loss_and_gradient = jax.jit(jax.value_and_grad(masked_cross_entropy, has_aux=True))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_masked_cross_entropy_and_its_gradient(dtype):
    logits, targets, masked = loss_inputs(dtype=dtype)
    (loss, sums), gradient = loss_and_gradient(logits, targets, masked)
    # The logits were rounded to bfloat16 before the test, never after: the loss is exact for them.
    expected = literal_token_losses(logits, targets)[np.asarray(masked)]
    assert loss.dtype == jnp.float32 and sums.count == expected.size
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-6)
    np.testing.assert_allclose(sums.total, expected.sum(), rtol=1e-6)
    one_hot = np.eye(VOCAB)[np.asarray(targets)]
    by_hand = (np.exp(literal_log_softmax(logits)) - one_hot) * np.asarray(masked)[..., None] / expected.size
    assert gradient.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(gradient, np.float64), by_hand, rtol=1e-2, atol=1e-8 if dtype == jnp.float32 else 1e-4
    )


def test_nothing_masked_is_a_loss_of_zero_with_zero_gradient():
    logits, targets, masked = loss_inputs()
    (loss, sums), gradient = loss_and_gradient(logits, targets, jnp.zeros_like(masked))
    assert loss == 0.0 and sums.count == 0 and np.all(gradient == 0.0)
    # An infinity where nothing is masked is no concern of the loss either.
    (loss, _), _ = loss_and_gradient(logits.at[0, 0, 0].set(jnp.inf), targets, masked.at[0, 0].set(False))
    assert np.isfinite(loss)


def test_sums_of_parts_make_the_mean_of_the_whole():
    logits, targets, masked = loss_inputs()
    loss, _ = masked_cross_entropy(logits, targets, masked)
    parts = [masked_loss_sum(token_log_probabilities(logits[i], targets[i]), masked[i]) for i in range(len(logits))]
    np.testing.assert_allclose(jax.tree.map(lambda *leaves: sum(leaves), *parts).mean, loss, rtol=1e-6)
    assert not np.isclose(np.mean([part.mean for part in parts]), loss, rtol=1e-3)


def test_next_token_cross_entropy():
    logits, ids, _ = loss_inputs()
    counted = jnp.asarray([True, True, False, True])
    loss, sums = masked_cross_entropy(logits, *next_tokens(ids, counted))
    expected = literal_token_losses(logits[:, :-1], ids[:, 1:])[np.asarray(counted)]
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-6)
    assert sums.count == expected.size
    changed, _ = masked_cross_entropy(logits.at[:, -1].multiply(5.0), *next_tokens(ids.at[:, 0].set(0), counted))
    assert changed == loss


def test_loss_by_noise_level_and_by_block_position():
    logits, targets, masked = loss_inputs(batch=6)
    t = jnp.asarray([0.001, 0.0999, 0.1, 0.55, 0.999, 1.0], jnp.float32)
    log_probabilities = token_log_probabilities(logits, targets)
    losses = literal_token_losses(logits, targets) * np.asarray(masked)
    by_level = loss_by_noise_level(log_probabilities, masked, t)
    total, count = np.zeros(10), np.zeros(10)
    for row, bin_index in enumerate([0, 0, 1, 5, 9, 9]):
        total[bin_index] += losses[row].sum()
        count[bin_index] += np.asarray(masked[row]).sum()
    np.testing.assert_allclose(by_level.total, total, rtol=1e-6)
    np.testing.assert_array_equal(by_level.count, count)
    assert np.all(np.isfinite(by_level.mean)) and by_level.mean[2] == 0.0
    by_position = loss_by_block_position(log_probabilities, masked, 8)
    np.testing.assert_allclose(by_position.total, [losses[:, i::8].sum() for i in range(8)], rtol=1e-6)
    np.testing.assert_array_equal(by_position.count, [masked[:, i::8].sum() for i in range(8)])
    assert by_position.count.dtype == by_level.count.dtype == jnp.float32
    with pytest.raises(ValueError, match="length=24.*block_size=7"):
        loss_by_block_position(log_probabilities, masked, 7)
    with shapes.unchecked(), pytest.raises(ValueError, match="logits"):
        token_log_probabilities(logits, targets[:, 1:])


def test_an_empty_sum_has_mean_zero():
    assert LossSum(jnp.float32(0), jnp.int32(0)).mean == 0.0


# Predictions.


def literal_filter(logits, top_k, top_p):
    """Keeps tokens one by one, most probable first."""
    order = np.argsort(-logits, kind="stable")
    order = order[:top_k] if top_k else order
    probabilities = np.exp(logits[order] - logits[order].max())
    probabilities /= probabilities.sum()
    kept, mass = [], 0.0
    for token, probability in zip(order, probabilities, strict=True):
        if mass >= top_p:
            break
        kept.append(token)
        mass += probability
    return set(kept)


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (VOCAB, 1.0), (0, 0.7), (5, 0.7), (0, 1e-6)]
)
def test_filter_keeps_the_most_probable(top_k, top_p):
    logits = np.random.default_rng(1).normal(size=(50, VOCAB)) * 2
    logits[:, MASK] = -np.inf
    filtered = np.asarray(prediction.filter_logits(jnp.asarray(logits, jnp.float32), top_k, top_p))
    for row, result in zip(logits, filtered, strict=True):
        kept = literal_filter(row, top_k, top_p) - {MASK}
        assert set(np.flatnonzero(result > -np.inf)) == kept
        np.testing.assert_array_equal(result[sorted(kept)], row[sorted(kept)].astype(np.float32))


def test_filter_keeps_ties_and_refuses_more_than_the_vocabulary():
    tied = jnp.asarray([1.0, 2.0, 1.0, 0.0], jnp.float32)
    np.testing.assert_array_equal(prediction.filter_logits(tied, 2, 1.0), [1, 2, 1, -np.inf])
    with pytest.raises(ValueError, match="top_k=5 .* 4"):
        prediction.filter_logits(tied, 5, 1.0)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 4, 1.0), (0.7, 0, 0.8)]
)
def test_samples_follow_the_tempered_filtered_distribution(temperature, top_k, top_p):
    draws = 20_000
    logits = np.random.default_rng(2).normal(size=VOCAB) * 1.5
    logits[MASK] = 9.0  # by far the best, and excluded
    excluded = np.where(np.arange(VOCAB) == MASK, -np.inf, logits)
    settings_ = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    tiled = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, VOCAB))
    chosen = predict(jax.random.key(0), tiled, mask_token_id=MASK, **settings_)
    kept = sorted(literal_filter(excluded / temperature, top_k, top_p) - {MASK})
    expected = np.exp(literal_log_softmax(excluded[kept] / temperature)) * draws
    observed = np.bincount(chosen.tokens, minlength=VOCAB)
    assert observed[kept].sum() == draws
    # Chi-square with n − 1 degrees of freedom: mean n − 1, variance 2 (n − 1).
    chi_square = ((observed[kept] - expected) ** 2 / expected).sum()
    assert chi_square < len(kept) - 1 + 5 * math.sqrt(2 * (len(kept) - 1))
    untempered = np.exp(literal_log_softmax(excluded))
    np.testing.assert_allclose(chosen.confidence, untempered[np.asarray(chosen.tokens)], rtol=1e-5)


def test_gumbel_noise_reaches_far_into_both_tails(monkeypatch):
    bits = np.array([0, 1, 2, 1000, 2**31, 2**32 - 2**20, 2**32 - 1], np.uint32)
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: jnp.asarray(bits, dtype))
    noise = np.asarray(prediction._gumbel(jax.random.key(0), bits.shape), np.float64)
    exact = -np.log(-np.log1p(-(bits.astype(np.float64) + 0.5) / 2**32))
    # Where u is a float32 close to 1 the noise is its least, whatever it is exactly: that loses every comparison.
    np.testing.assert_allclose(noise[:-1], exact[:-1], rtol=1e-5)
    assert noise[0] > 22 and -5 < noise[-1] < -2.7


def test_greedy_takes_the_first_of_equals_and_never_the_mask_token():
    logits = jnp.asarray([[0.0, 2.0, 2.0, 5.0], [1.0, 0.0, -jnp.inf, 9.0]], jnp.bfloat16)
    chosen = predict(jax.random.key(0), logits, mask_token_id=MASK)
    np.testing.assert_array_equal(chosen.tokens, [1, 0])
    np.testing.assert_allclose(chosen.confidence, [1 / (2 + math.exp(-2)), 1 / (1 + math.exp(-1))], rtol=1e-6)
    assert chosen.confidence.dtype == jnp.float32 and chosen.tokens.dtype == jnp.int32
    assert np.all(chosen.finite)
    with pytest.raises(ValueError, match="mask_token_id=4 .* 4"):
        predict(jax.random.key(0), logits, mask_token_id=4)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("bad", [[math.nan, 0, 0], [0, math.inf, 0], [-math.inf] * 3])
def test_logits_that_are_no_distribution_show(bad, temperature):
    logits = jnp.asarray([[0.0, 1.0, 2.0], bad], jnp.float32)
    chosen = sample_tokens(jax.random.split(jax.random.key(0), 2), logits, temperature=temperature)
    np.testing.assert_array_equal(chosen.finite, [True, False])
    np.testing.assert_array_equal(np.isnan(chosen.confidence), [False, True])


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9}, {"temperature": 0.9, "top_k": 4, "top_p": 0.9}])
def test_autoregressive_rows_are_independent(options):
    keys = jax.random.split(jax.random.key(5), 8)
    logits = jnp.asarray(np.random.default_rng(5).normal(size=(8, VOCAB)), jnp.float32)
    batch = sample_tokens(keys, logits, **options)
    for i in range(8):
        alone = sample_tokens(keys[i : i + 1], logits[i : i + 1], **options)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i : i + 1], b), batch, alone)


# Sampling strategies.

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
    xt = jnp.asarray(np.where(masked, MASK, tokens), jnp.int32)
    return xt, jnp.asarray(logits, jnp.float32), jax.random.split(jax.random.key(rng.integers(2**32)), batch)


@pytest.mark.parametrize("config", CONFIGS, ids=describe)
@settings(max_examples=8)
@given(seed=seeds, block=st.integers(0, 1000), data=st.data())
def test_step_against_the_literal_one(config, seed, block, data):
    step = data.draw(st.integers(0, config.steps_per_block - 1))
    xt, logits, keys = random_blocks(config, np.random.default_rng(seed))
    result = take_step(config, keys, xt, logits, block, step)
    assert np.all(result.finite)
    for row in range(len(xt)):
        expected, commits, confidence = literal_step(config, keys[row], xt[row], logits[row], block, step)
        np.testing.assert_array_equal(result.xt[row], expected)
        np.testing.assert_array_equal(np.flatnonzero(result.committed[row]), commits)
        np.testing.assert_allclose(result.confidence[row], confidence, rtol=1e-5)


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
