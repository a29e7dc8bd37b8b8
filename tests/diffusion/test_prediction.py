"""Predicted tokens: filters, temperatures and random draws against literal NumPy versions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from literal_diffusion import MASK, VOCAB, literal_filter, literal_log_softmax
from twotower_jax.diffusion import predict, prediction, sample_tokens

pytestmark = pytest.mark.usefixtures("strict_arithmetic")


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


@pytest.mark.whole(but=["options0", "options2"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9}, {"temperature": 0.9, "top_k": 4, "top_p": 0.9}])
def test_autoregressive_rows_are_independent(options):
    keys = jax.random.split(jax.random.key(5), 8)
    logits = jnp.asarray(np.random.default_rng(5).normal(size=(8, VOCAB)), jnp.float32)
    batch = sample_tokens(keys, logits, **options)
    for i in range(8):
        alone = sample_tokens(keys[i : i + 1], logits[i : i + 1], **options)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i : i + 1], b), batch, alone)
