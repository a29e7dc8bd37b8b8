"""The three likelihoods against literal sums over everything that there is, on models small enough for that."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower_jax.diffusion import SamplingConfig
from twotower_jax.evaluation import likelihood
from twotower_jax.evaluation.likelihood import Pair, blockwise_scores, bound_scores, context_scores
from twotower_jax.generation import score_ar
from twotower_jax.parameters import bind
from twotower_jax.two_tower import TwoTower

SIZE, MASK = 3, 3
TOKENS = (0, 1, 2, 4)  # without the mask token


@pytest.fixture(scope="module")
def tiny(small_config, random_params):
    """Five tokens, of which one is the mask."""
    model = TwoTower(small_config("M*", vocab_size=5))
    return model, random_params(model)


@pytest.fixture(scope="module")
def denoise(tiny):
    """log p of every token at each position of a block after a context, tokens and masks as they are: (S, V)."""
    model, params = tiny

    @jax.jit
    def of(context, length, block):
        _, cache = bind(model, params).prefill(context, length, 8)
        t = jnp.mean(block == MASK, axis=1, dtype=jnp.float32)
        logits = bind(model, params).denoise(block, t, cache).at[..., MASK].set(-jnp.inf)
        return jax.nn.log_softmax(logits, axis=-1)[0]

    known = {}

    def remembered(context, block):
        key = tuple(context), tuple(block)
        if key not in known:
            padded = jnp.array([[*context, *[0] * (8 - len(context))]], jnp.int32)
            found = of(padded, jnp.array([len(context)], jnp.int32), jnp.array([block], jnp.int32))
            known[key] = np.asarray(found, np.float64)
        return known[key]

    return remembered


def scores(function, tiny, pairs, **options):
    found = {}
    function(*tiny, pairs, found.__setitem__, **options)
    return [found[number] for number in range(len(pairs))]


def literal_bound(denoise, context, tokens):
    """−Σ_k (1/k) E[Σ over k masked of −log p], all sets of k, block by block."""
    total = 0.0
    for start in range(0, len(tokens), SIZE):
        part = tokens[start : start + SIZE]
        for k in range(1, len(part) + 1):
            sets = list(itertools.combinations(range(len(part)), k))
            for chosen in sets:
                block = [MASK if i in chosen else part[i] for i in range(len(part))] + [MASK] * (SIZE - len(part))
                logprobs = denoise([*context, *tokens[:start]], block)
                total += sum(logprobs[i, part[i]] for i in chosen) / k / len(sets)
    return total


@pytest.mark.whole
def test_the_bound_is_the_mean_over_all_masks(tiny, denoise):
    pairs = [Pair((1, 2), (4, 0, 1, 2, 2)), Pair((1,), (0, 4, 4, 1)), Pair((4, 4, 1), (2,))]
    found = scores(bound_scores, tiny, pairs, block_size=SIZE, samples=400, batch_size=2)
    for pair, scored in zip(pairs, found, strict=True):
        expected = literal_bound(denoise, pair.context, pair.continuation)
        assert abs(scored.log_likelihood - expected) <= 4 * scored.standard_error + 1e-5
    assert found[0].standard_error > 0
    # One token in one block: there is one mask, and nothing to estimate.
    assert found[2].standard_error < 1e-6
    assert found[2].log_likelihood == pytest.approx(denoise([4, 4, 1], [MASK] * SIZE)[0, 2], abs=1e-5)


def test_the_choices_of_a_question_share_their_draws(tiny):
    first, second = (likelihood._masks(7, (1, 2), 0, count, 40, SIZE) for count in (3, 2))
    assert (first.sum(axis=1) >= 1).all() and not second[:, 2].any()
    # The same order of positions: whoever is masked first of two is masked first of three, but for the third.
    both = first[:, :2].any(axis=1) & (first[:, :2].sum(axis=1) == 1) & (second.sum(axis=1) == 1)
    assert both.sum() > 3 and (first[both, :2] == second[both, :2]).all()
    assert not (likelihood._masks(7, (1, 3), 0, 3, 40, SIZE) == first).all()
    assert not (likelihood._masks(8, (1, 2), 0, 3, 40, SIZE) == first).all()
    level = likelihood._masks(0, (5,), 0, 3, 6000, SIZE).sum(axis=1)
    assert np.bincount(level, minlength=4)[1:] == pytest.approx(2000, abs=200)
    # Equal choices differ by nothing, whatever the noise.
    a, b = scores(bound_scores, tiny, [Pair((1, 2), (4, 0))] * 2, block_size=SIZE, samples=2)
    assert a == b


def literal_blockwise(denoise, context, tokens, threshold, steps):
    """log p along the order in which greedy decoding commits, and whether it gives these tokens."""
    total, greedy = 0.0, True
    for start in range(0, len(tokens), SIZE):
        part = tokens[start : start + SIZE]
        undecided = list(range(len(part)))
        for step in range(steps):
            if not undecided:
                break
            block = [MASK if i in undecided else part[i] for i in range(len(part))] + [MASK] * (SIZE - len(part))
            logprobs = denoise([*context, *tokens[:start]], block)
            ranked = sorted(undecided, key=lambda i, logprobs=logprobs: (-logprobs[i].max(), i))
            sure = sum(logprobs[i].max() > math.log(threshold) for i in undecided)
            for i in ranked[: max(sure, -(-len(undecided) // (steps - step)))]:
                total += logprobs[i, part[i]]
                greedy &= bool(logprobs[i].argmax() == part[i])
                undecided.remove(i)
    return total, greedy


@pytest.mark.whole
@pytest.mark.parametrize(("threshold", "steps"), [(1.0, 3), (0.4, 3), (1.0, 2)])
def test_blockwise_is_a_distribution_over_all_continuations(tiny, denoise, threshold, steps):
    """One token more than a block: 4⁴ continuations, whose probabilities add up to 1."""
    everything = [Pair((1, 2), tokens) for tokens in itertools.product(TOKENS, repeat=SIZE + 1)]
    sampling = SamplingConfig(block_size=SIZE, steps_per_block=steps, confidence_threshold=threshold)
    found = scores(blockwise_scores, tiny, everything, sampling=sampling, batch_size=64)
    assert sum(math.exp(one.log_likelihood) for one in found) == pytest.approx(1.0, abs=1e-5)
    assert sum(one.greedy for one in found) == 1
    for pair, one in list(zip(everything, found, strict=True))[::29]:
        expected = literal_blockwise(denoise, pair.context, pair.continuation, threshold, steps)
        assert (one.log_likelihood, one.greedy) == (pytest.approx(expected[0], abs=1e-5), expected[1])


def test_blockwise_refuses_what_has_no_order(tiny):
    with pytest.raises(ValueError, match="do not follow from the predictions alone"):
        scores(blockwise_scores, tiny, [Pair((1,), (2,))], sampling=SamplingConfig(strategy="posterior"))


@pytest.mark.whole
def test_the_context_scores_as_score_ar_does_whatever_the_batch(small_config, random_params):
    model = TwoTower(small_config("*", vocab_size=5))
    tiny, rng = (model, random_params(model)), np.random.default_rng(0)
    pairs = [
        Pair(tuple(rng.choice(TOKENS, a).tolist()), tuple(rng.choice(TOKENS, b).tolist()))
        for a, b in ((1, 1), (5, 2), (40, 2), (3, 0), (7, 2))
    ]
    # Four choices of one question, and one that is asked twice.
    pairs += [Pair((1, 2, 4), (token,)) for token in TOKENS] + [pairs[1]]
    found = scores(context_scores, tiny, pairs, batch_size=3)
    for order in (list(reversed(range(len(pairs)))),):
        again = scores(context_scores, tiny, [pairs[i] for i in order], batch_size=8)
        for i, one in zip(order, again, strict=True):
            assert one == (pytest.approx(found[i].log_likelihood, abs=1e-5), found[i].greedy, 0.0)
    rows = score_ar(*tiny, [[*pair.context, *pair.continuation] for pair in pairs])
    for pair, row, one in zip(pairs, rows, found, strict=True):
        assert one.log_likelihood == pytest.approx(row[len(pair.context) - 1 :].sum(), abs=1e-5)
    assert sum(one.greedy for one in found[5:9]) == 1
    assert sum(math.exp(one.log_likelihood) for one in found[5:9]) < 1  # the mask token has the rest


def test_what_cannot_be_scored_is_named(tiny):
    for pair, message in ((Pair((), (1,)), "pair 1: the context is empty"), (Pair((1,), (5,)), "pair 1: id 5")):
        with pytest.raises(ValueError, match=message):
            scores(context_scores, tiny, [pair])
    with pytest.raises(ValueError, match="at least 2"):
        scores(bound_scores, tiny, [Pair((1,), (2,))], block_size=2, samples=1)
