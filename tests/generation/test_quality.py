"""Quality numbers: likelihoods against their definitions, the bound against its exact expectation, repetition."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower_jax.generation.quality import (
    Estimate,
    generated_likelihoods,
    mean_estimate,
    nll_bound,
    repetition,
    text_likelihood,
)
from twotower_jax.generation.score import score_ar
from twotower_jax.parameters import bind
from twotower_jax.two_tower import TwoTower

MASK = 3


@pytest.fixture(scope="module")
def tiny(small_config, random_params):
    model = TwoTower(small_config("M*", vocab_size=12))
    return model, random_params(model)


@pytest.mark.whole
def test_the_bound_is_what_its_expectation_says(tiny):
    """All masks of all counts of two blocks of three, with equal weight for every count and every mask of a count."""
    model, params = tiny
    row = [5, 9, 4, 11, 0, 7]
    masks = [m for m in itertools.product([False, True], repeat=3) if any(m)]
    masked = np.array([[*m, *m] for m in masks])
    counts = masked[:, :3].sum(1)
    ids = np.tile(row, (len(masks), 1))

    @jax.jit
    def log_probabilities(params, noisy, t):
        logits, _ = bind(model, params).training_logits(ids, noisy, t, 3)
        return jax.nn.log_softmax(logits.at[..., MASK].set(-jnp.inf))

    logp = np.asarray(log_probabilities(params, np.where(masked, MASK, ids), np.float32(counts / 3)))
    losses = np.where(masked, -np.take_along_axis(logp, ids[..., None], -1)[..., 0], 0).sum(1)
    # Block 2 does not see block 1's noise, so that one mask for both gives the sum of both expectations.
    exact = np.mean([(losses[counts == n] * 3 / n).mean() for n in (1, 2, 3)]) / 6

    [estimate] = nll_bound(model, params, [[*row, 5, 5]], block_size=3, samples=400, batch_size=100)
    assert estimate.tokens == 6
    assert 0 < estimate.standard_error < 0.1
    assert abs(estimate.mean - exact) < 4 * estimate.standard_error
    # The same draws, whatever is computed beside them.
    both = nll_bound(model, params, [row, [4] * 12], block_size=3, samples=400, batch_size=100)
    assert both[0].mean == pytest.approx(estimate.mean, rel=1e-5)


def test_a_denoiser_that_knows_nothing_has_the_bound_of_a_uniform_guess(tiny):
    model, params = tiny
    blank = params | {"denoiser_head": {"weight": jnp.zeros_like(params["denoiser_head"]["weight"])}}
    [estimate] = nll_bound(model, blank, [[5, 6, 7, 8]], block_size=3, samples=4, batch_size=4)
    assert estimate.mean == pytest.approx(np.log(11), rel=1e-5)
    assert estimate.standard_error < 1e-5


def test_errors_of_independent_rows_add_in_squares():
    whole = mean_estimate([Estimate(2.0, 0.3, 10), Estimate(5.0, 0.2, 20)])
    assert whole.mean == pytest.approx(4.0)
    assert whole.standard_error == pytest.approx(5 / 30)
    assert whole.tokens == 30


def test_likelihoods_count_the_tokens_they_should(tiny):
    rows = [([4, 5, 6], [7, 8]), ([9], [10, 11, 4, 5])]
    whole = [[*prompt, *tokens] for prompt, tokens in rows]
    scores = score_ar(*tiny, whole)
    new = generated_likelihoods(*tiny, rows)
    assert [n.tokens for n in new] == [2, 4]
    assert new[0].log_likelihood == pytest.approx(scores[0][2:].sum(), rel=1e-5)
    assert new[1].perplexity == pytest.approx(np.exp(-scores[1].mean()), rel=1e-5)
    text = text_likelihood(*tiny, whole)
    assert text.tokens == 8
    assert text.log_likelihood == pytest.approx(sum(s.sum() for s in scores), rel=1e-5)


@pytest.mark.parametrize(
    ("tokens", "distinct", "loop", "collapsed"),
    [
        ([], (1.0, 1.0, 1.0), 0, False),
        ([1, 2, 3, 4], (1.0, 1.0, 1.0), 0, False),
        ([1, 1, 1, 1], (0.25, 1 / 3, 0.5), 4, False),
        ([9, 1, 2, 1, 2, 1, 8], (4 / 7, 4 / 6, 4 / 5), 5, False),
        ([1, 2, 3, 1, 2, 9], (4 / 6, 4 / 5, 1.0), 0, False),  # Less than two periods.
        (list(range(9)) + [3, 4, 5] * 3, (0.5, 10 / 17, 11 / 16), 9, True),
        (list(range(16)), (1.0, 1.0, 1.0), 0, False),
    ],
)
def test_repetition(tokens, distinct, loop, collapsed):
    found = repetition(tokens)
    assert found.distinct == pytest.approx(distinct)
    assert (found.loop, found.collapsed) == (loop, collapsed)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([[4, 5]], {}, "row 1 is shorter than a block of 3"),
        ([[4, 5, MASK]], {}, "row 1 holds the mask token 3"),
        ([[4, 5, 99]], {}, "id 99"),
        ([[4, 5, 6]], {"samples": 1}, "samples=1 must be at least 2"),
    ],
)
def test_rows_without_a_bound(tiny, rows, options, message):
    with pytest.raises(ValueError, match=message):
        nll_bound(*tiny, rows, block_size=3, **options)
