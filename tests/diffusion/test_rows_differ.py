"""Settings as arguments, one value per row: what each row gets is what the same settings give when compiled in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower_jax.diffusion import Choice, SamplingConfig, per_row, predict, predict_rows, sample_step
from twotower_jax.diffusion.prediction import most_probable

MASK, VOCAB, SIZE = 3, 50, 6
# Temperature, top_k, top_p.
SETTINGS = [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.9), (0.3, 20, 0.6), (3.0, 1, 1.0), (1e-6, 50, 0.5)]
TEMPERATURE, TOP_K, TOP_P = zip(*SETTINGS, strict=True)
CHOICE = Choice(np.float32(TEMPERATURE), np.int32(TOP_K), np.float32(TOP_P))


@pytest.fixture(scope="module")
def logits():
    """With ties, and one row of one sure token."""
    values = 3 * jax.random.normal(jax.random.key(0), (len(SETTINGS), SIZE, VOCAB))
    return jnp.round(values, 1).at[:, 1, 7].set(200.0)


@pytest.mark.whole(but=["False"])
@pytest.mark.parametrize("per_position", [False, True])
def test_rows_choose_as_their_settings_say(logits, per_position):
    keys = jax.random.split(jax.random.key(1), logits.shape[: 1 + per_position])
    found = jax.jit(lambda k, v, c: predict_rows(k, v, c, mask_token_id=MASK))(keys, logits, CHOICE)
    for i, (temperature, top_k, top_p) in enumerate(SETTINGS):

        def one(key, logits, options=(temperature, top_k, top_p)):
            temperature, top_k, top_p = options
            return predict(key, logits, mask_token_id=MASK, temperature=temperature, top_k=top_k, top_p=top_p)

        expected = jax.jit(jax.vmap(one) if per_position else one)(keys[i], logits[i])
        np.testing.assert_array_equal(found.tokens[i], expected.tokens)
        np.testing.assert_array_equal(found.confidence[i], expected.confidence)
    assert len({tuple(row) for row in np.asarray(found.tokens).tolist()}) == len(SETTINGS)


def test_where_nobody_samples_everybody_is_greedy(logits):
    greedy = CHOICE._replace(temperature=np.zeros(len(SETTINGS), np.float32))
    keys = jax.random.split(jax.random.key(1), len(SETTINGS))
    found = predict_rows(keys, logits, greedy, mask_token_id=MASK)
    np.testing.assert_array_equal(found.tokens, jnp.argmax(logits.at[..., MASK].set(-jnp.inf), axis=-1))


RULES = [
    ("confidence", {}),
    ("posterior", {"schedule": "cosine"}),
    ("predict_and_noise", {"schedule": "exponential"}),
    ("remasking", {"doubt_threshold": 0.9}),
    ("entropy_bounded", {}),
    ("factor", {}),
]


@pytest.mark.whole
@pytest.mark.parametrize(("name", "options"), RULES, ids=[name for name, _ in RULES])
def test_steps_are_a_rows_own(logits, name, options):
    """T as an argument, step for step: a third of all steps of rows that have 1 … 7 of them."""
    rows, steps = len(SETTINGS), np.arange(1, len(SETTINGS) + 1)
    keys, half = jax.random.split(jax.random.key(2), rows), jnp.arange(SIZE) % 2 == 0
    xt, at = jnp.where(half, MASK, jnp.full((rows, SIZE), 9)), steps // 3
    configs = [SamplingConfig(SIZE, int(t), name, strategy_options=options, temperature=0.7, top_k=9) for t in steps]
    choice = Choice(*(jnp.full(rows, v) for v in (jnp.float32(0.7), 9, jnp.float32(1.0))))
    here = {"block": 2, "mask_token_id": MASK}

    @jax.jit
    def together(keys, xt, logits, at, steps):
        rule = per_row(configs[0].rule, rows)
        return sample_step(configs[0], keys, xt, logits, step=at, strategy=rule, choice=choice, steps=steps, **here)

    found = together(keys, xt, logits, at, steps)
    for i, config in enumerate(configs):
        expected = sample_step(config, keys[i : i + 1], xt[i : i + 1], logits[i : i + 1], step=int(at[i]), **here)
        np.testing.assert_array_equal(found.xt[i], expected.xt[0])
        np.testing.assert_array_equal(found.committed[i], expected.committed[0])
    assert found.committed.any() and (found.xt[1:] == MASK).any()


def test_the_most_probable_tokens(logits):
    tokens, log_probabilities = most_probable(logits, 4, MASK)
    expected = np.array(jax.nn.log_softmax(logits.at[..., MASK].set(-jnp.inf)))
    np.testing.assert_allclose(log_probabilities, -np.sort(-expected)[..., :4], rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(expected, np.asarray(tokens), -1), log_probabilities, atol=1e-5)
    assert not (tokens == MASK).any()
