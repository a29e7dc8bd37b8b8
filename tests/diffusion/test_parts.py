"""What an experimenter may choose of diffusion: times, weights, complementary masks, and the newer strategies."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower_jax.diffusion import (
    SCHEDULES,
    STRATEGIES,
    TIMES,
    WEIGHTS,
    MaskedDiffusion,
    SamplingConfig,
    masked_loss_sum,
    sample_step,
)

MASK, VOCAB = 3, 13


def corrupt(process, ids, step=11, block_size=None):
    index = jnp.arange(len(ids))
    return _corrupt(process, ids, index, step, block_size)


@functools.partial(jax.jit, static_argnames=("process", "block_size"))
def _corrupt(process, ids, index, step, block_size):
    return process.corrupt(ids, seed=7, step=step, example_index=index, mask_token_id=MASK, block_size=block_size)


def ids_of(batch, length):
    return jnp.asarray(np.random.default_rng(0).integers(4, VOCAB, (batch, length)), jnp.int32)


# Training.


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("complementary", [False, True])
def test_the_elbo_weight_makes_the_loss_the_bound(schedule, complementary):
    """Over three tokens, for any table of log p(token | which others are masked): the bound is the mean over all
    orders of the sum of −log p, whatever the schedule. The expectation over times is a quadrature, that over masks an
    enumeration.
    """
    length, rng = 3, np.random.default_rng(1)
    masks = list(itertools.product([False, True], repeat=length))
    table = {mask: rng.uniform(0.1, 3.0, length) for mask in masks}
    bound = 0.0
    for order in itertools.permutations(range(length)):
        hidden = [True] * length
        for i in order:
            bound += table[tuple(hidden)][i] / math.factorial(length)
            hidden[i] = False

    nodes, node_weights = np.polynomial.legendre.leggauss(64)
    t = jnp.asarray((nodes + 1) / 2, jnp.float32)
    shape = SCHEDULES[schedule]
    level, rate, weigh = shape.mask_probability(t), shape.rate(t), WEIGHTS["elbo"]
    kinds = [(np.asarray(weigh(rate, level)), False)]
    if complementary:
        kinds.append((np.asarray(weigh(rate, 1.0 - level)), True))
    level, expected = np.asarray(level, np.float64), 0.0
    for weight, other in kinds:
        for mask in masks:
            chance = np.prod([level if m else 1 - level for m in mask], axis=0)
            seen = tuple(not m for m in mask) if other else mask
            loss = sum(table[seen][i] for i in range(length) if seen[i])
            expected += np.sum(node_weights / 2 * chance * weight.astype(np.float64)) * loss / len(kinds)
    np.testing.assert_allclose(expected, bound, rtol=2e-4)


def test_drawn_noise_has_the_bound_for_its_mean():
    """By Monte Carlo, through the very process and sum that training uses: each token costs 1, so the bound is 1."""
    process = MaskedDiffusion(weight=WEIGHTS["elbo"], times=TIMES["stratified"])
    drawn = corrupt(process, jnp.full((4096, 16), 5, jnp.int32))
    every = jnp.ones(drawn.masked.shape, bool)
    found = masked_loss_sum(
        jnp.full(drawn.masked.shape, -1.0), drawn.masked, drawn.token_weight, process.counted(drawn.masked, every)
    )
    assert found.count == 4096 * 16
    np.testing.assert_allclose(found.mean, 1.0, atol=0.04)


def test_weights_of_the_levels():
    level, rate = jnp.asarray([0.0, 0.01, 0.5, 1.0], jnp.float32), jnp.ones(4, jnp.float32)
    np.testing.assert_array_equal(WEIGHTS["flat"](rate, level), 1.0)
    np.testing.assert_allclose(WEIGHTS["elbo"](rate, level), [0, 100, 2, 1], rtol=1e-6)
    np.testing.assert_allclose(WEIGHTS["bounded_elbo"](rate, level), [0, 10, 2, 1], rtol=1e-6)


@pytest.mark.parametrize("batch", [1, 5, 8])
def test_stratified_times_cover_every_stratum_once(batch):
    for step in range(20):
        t = np.asarray(corrupt(MaskedDiffusion(times=TIMES["stratified"]), ids_of(batch, 4), step=step).t)
        strata = np.floor((t - 1e-3) / (1 - 1e-3) * batch + 1e-4).astype(int)
        assert sorted(strata) == list(range(batch))


def test_times_per_block_are_each_blocks_own():
    drawn = corrupt(MaskedDiffusion(times=TIMES["per_block"]), ids_of(64, 400), block_size=100)
    assert drawn.t.shape == drawn.weight.shape == (64, 4)
    rates = np.asarray(drawn.masked).reshape(64, 4, 100).mean(axis=2)
    t = np.asarray(drawn.t)
    assert np.all(np.abs(rates - t) < 5 * np.sqrt(t * (1 - t) / 100) + 0.02)
    assert len(np.unique(t)) == 256


@pytest.mark.whole(but=["stratified", "per_block"])
@pytest.mark.parametrize("times", TIMES)
def test_complementary_masks_cover_every_token_once(times):
    process, ids = MaskedDiffusion(times=TIMES[times], complementary=True), ids_of(3, 8)
    drawn, plain = corrupt(process, ids, block_size=4), corrupt(MaskedDiffusion(times=TIMES[times]), ids, block_size=4)
    first, second = np.asarray(drawn.masked[::2]), np.asarray(drawn.masked[1::2])
    np.testing.assert_array_equal(first, plain.masked)
    np.testing.assert_array_equal(second, ~first)
    np.testing.assert_allclose(drawn.t[1::2], 1 - np.asarray(plain.t), rtol=1e-6)
    np.testing.assert_array_equal(drawn.noisy_ids, np.where(drawn.masked, MASK, np.repeat(ids, 2, axis=0)))


def test_parts_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="schedule='linear' is no NoiseSchedule"):
        MaskedDiffusion(schedule="linear")
    with pytest.raises(ValueError, match="t_min=1.0"):
        type(TIMES["uniform"])(1.0)


# Sampling.


def literal(name, knobs, probabilities, xt, steps, step):
    """The new block's committed and re-masked positions, one by one."""
    undecided = [i for i in range(len(xt)) if xt[i] == MASK]
    best = {i: probabilities[i].max() for i in range(len(xt))}
    required = math.ceil(len(undecided) / (steps - step))
    if step == steps - 1:
        return set(undecided), set()
    surest = sorted(undecided, key=lambda i: (-best[i], i))
    again = set()
    if name == "entropy_bounded":
        entropy = {i: -sum(p * math.log(p) for p in probabilities[i] if p > 0) for i in undecided}
        surest = sorted(undecided, key=lambda i: (entropy[i], i))
        n = 0
        while n < len(surest):
            chosen = [entropy[i] for i in surest[: n + 1]]
            if sum(chosen) - max(chosen) > knobs["entropy_bound"]:
                break
            n += 1
    elif name == "factor":
        allowed = [n for n, i in enumerate(surest, 1) if (n + 1) * (1 - best[i]) < knobs["factor"]]
        n = max(allowed, default=0)
    else:
        n = sum(best[i] > knobs["confidence_threshold"] for i in undecided)
    n = max(n, required)
    if name == "remasking":
        doubt = {i: probabilities[i][xt[i]] for i in range(len(xt)) if xt[i] != MASK}
        low = sorted((i for i in doubt if doubt[i] < knobs["doubt_threshold"]), key=lambda i: (doubt[i], i))
        again = set(low[: max(0, n - 1)])
    return set(surest[:n]), again


KNOBS = {
    "entropy_bounded": {"entropy_bound": 1.5},
    "factor": {"factor": 2.0},
    "remasking": {"confidence_threshold": 0.4, "doubt_threshold": 0.3},
}


@pytest.mark.parametrize("name", KNOBS)
def test_strategies_do_what_their_papers_say(name):
    size, steps, rng, moved = 12, 5, np.random.default_rng(3), 0
    config = SamplingConfig(size, steps, name, strategy_options=KNOBS[name])
    take = jax.jit(
        lambda keys, xt, logits, step: sample_step(config, keys, xt, logits, block=0, step=step, mask_token_id=3)
    )
    for trial in range(20):
        masked = rng.random((4, size)) < rng.choice([0.3, 0.7, 1.0], (4, 1))
        masked[:, 0] = True
        xt = np.where(masked, MASK, rng.integers(4, VOCAB, masked.shape)).astype(np.int32)
        logits = (rng.normal(size=(4, size, VOCAB)) * rng.choice([0.5, 2.0, 6.0], (4, size, 1))).astype(np.float32)
        result = take(jax.random.split(jax.random.key(0), 4), xt, logits, trial % steps)
        shown = np.where(np.arange(VOCAB) == MASK, -np.inf, logits.astype(np.float64))
        p = np.exp(shown - shown.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        for row in range(4):
            commit, again = literal(name, KNOBS[name], p[row], xt[row], steps, trial % steps)
            expected = [MASK if i in again else p[row, i].argmax() if i in commit else xt[row, i] for i in range(size)]
            np.testing.assert_array_equal(result.xt[row], expected)
            np.testing.assert_array_equal(np.flatnonzero(result.committed[row]), sorted(commit))
            moved += len(again)
    assert (moved > 0) == (name == "remasking")


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_ends_in_time_and_keeps_what_was_given(name):
    size, steps, rng = 8, 6, np.random.default_rng(4)
    config = SamplingConfig(size, steps, name)
    keys = jax.random.split(jax.random.key(0), 3)
    xt = jnp.full((3, size), MASK, jnp.int32).at[:, 0].set(9)
    fixed = xt != MASK
    take = jax.jit(
        lambda xt, logits, step: sample_step(
            config, keys, xt, logits, block=0, step=step, mask_token_id=MASK, fixed=fixed
        )
    )
    for step in range(steps):
        xt = take(xt, jnp.asarray(rng.normal(size=(3, size, VOCAB)) * 4, jnp.float32), step).xt
        assert np.all(xt[:, 0] == 9)
    assert not np.any(xt == MASK)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("factor", {"fctor": "1"}, "fctor='1' changes nothing with strategy='factor': its knobs are factor"),
        ("factor", {"factor": "x"}, "factor='x' of strategy='factor' must be float"),
        ("factor", {"factor": -1}, "factor=-1.0 must be between 0"),
        ("entropy_bounded", {"entropy_bound": math.inf}, "entropy_bound=inf"),
        ("remasking", {"doubt_threshold": 2}, "doubt_threshold=2.0 must be between 0 and 1"),
    ],
)
def test_knobs_are_checked(name, options, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(strategy=name, strategy_options=options)
