"""Losses and their sums against literal NumPy versions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes

from literal_diffusion import VOCAB, literal_log_softmax
from twotower_jax.diffusion import (
    LossSum,
    loss_by_block_position,
    loss_by_noise_level,
    masked_loss_sum,
    next_tokens,
    token_log_probabilities,
)

pytestmark = pytest.mark.usefixtures("strict_arithmetic")


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
