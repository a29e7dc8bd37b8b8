"""Speculative decoding: the tokens and the distribution of AR, whatever is drafted, and the cache after it."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes

from twotower_jax.diffusion import Choice, SamplingConfig, sample_step
from twotower_jax.generation import Settings, generate
from twotower_jax.generation.slots import Draws, Given, choose, next_keys
from twotower_jax.parameters import bind
from twotower_jax.two_tower import TwoTower

SAMPLING = SamplingConfig(block_size=8, steps_per_block=3)
AR = Settings(mode="ar", max_new_tokens=15, sampling=SAMPLING, batch_size=32)


@pytest.fixture(scope="module")
def tiny(small_config):
    return TwoTower(small_config("MEM*E", vocab_size=24))


def drafting(draw, model, seed):
    """Parameters whose towers agree more often than by chance: the denoiser's are partly the context's."""
    params = draw(model, seed)
    towers = params["context_tower"], params["denoiser_tower"]
    params["denoiser_tower"] = jax.tree.map(lambda c, d: 0.7 * c + 0.3 * d, *towers)
    return params | {"denoiser_head": params["context_head"]}


def random_prompts(count, vocab, seed):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, rng.integers(1, 60)).tolist() for _ in range(count)]


def run(model, params, prompts, settings):
    return list(generate(model, params, prompts, settings))


def speculative(settings, **changes):
    return dataclasses.replace(settings, mode="speculative", **changes)


@pytest.mark.whole(but=["sampled1-1-64"])
@pytest.mark.parametrize(("models", "count"), [(1, 64), (3, 100)])
@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.5, "top_k": 12, "top_p": 0.9}])
def test_tokens_are_those_of_ar(tiny, random_params, sampled, models, count):
    """Many random prompts, several random models: greedy, and with the same random numbers at a temperature."""
    settings = dataclasses.replace(AR, sampling=dataclasses.replace(SAMPLING, **sampled))
    ends, accepted = set(), 0
    for seed in range(models):
        params, prompts = drafting(random_params, tiny, seed), random_prompts(count, 24, seed)
        expected = run(tiny, params, prompts, settings)
        found = run(tiny, params, prompts, speculative(settings))
        for one, other in zip(expected, found, strict=True):
            assert other.tokens == one.tokens
            assert other.finish_reason == one.finish_reason
            assert other.accepted_draft_tokens < len(other.tokens)
            # Every token is the prompt's, a draft's or a block's last one; a block may be cut.
            assert len(other.tokens) <= 1 + other.accepted_draft_tokens + other.blocks
            assert other.context_evaluations == 1 + other.blocks
            assert other.denoiser_evaluations <= 3 * other.blocks
            ends.add(other.finish_reason)
        accepted += sum(r.accepted_draft_tokens for r in found)
    assert ends == {"eos", "length"}
    assert accepted > models * count // 3  # Rows were rolled back from every kind of place.


@pytest.mark.whole
def test_the_joint_distribution_is_that_of_ar(small_config, random_params):
    """A chi-square test of all sequences of three tokens against the product of AR's exact conditionals."""
    model = TwoTower(small_config("M*", vocab_size=6))
    params = random_params(model, 3)
    prompt, temperature = [5, 1, 4], 1.3
    rows = 3000
    settings = Settings(
        mode="speculative",
        max_new_tokens=3,
        sampling=SamplingConfig(block_size=3, steps_per_block=2, temperature=temperature),
        batch_size=500,
        prefill_chunk=4,
        ignore_eos=True,
        seed=11,
    )
    results = run(model, params, [prompt] * rows, settings)
    sequences = list(itertools.product(range(6), repeat=3))
    observed = np.zeros(len(sequences))
    np.add.at(observed, [sequences.index(tuple(r.tokens)) for r in results], 1)
    # Drafts of every length were accepted, so that accepted, replaced and added tokens are all in the sample.
    assert {r.accepted_draft_tokens for r in results} == {0, 1, 2}

    full = np.array([[*prompt, *s] for s in sequences])
    logits = jax.jit(lambda p, ids: bind(model, p).context_logits(ids))(params, full)
    logp = np.asarray(jax.nn.log_softmax(logits / temperature), np.float64)
    expected = rows * np.exp(np.take_along_axis(logp[:, 2:5], full[:, 3:, None], -1)[..., 0].sum(1))
    assert expected.sum() == pytest.approx(rows, rel=1e-4)

    frequent = expected >= 5  # The rest together is one more cell.
    observed, expected = (np.append(v[frequent], v[~frequent].sum()) for v in (observed, expected))
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert freedom > 50
    # Mean and deviation of the distribution under the hypothesis, which is close to normal at so many degrees.
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.whole
def test_drafts_are_drawn_with_the_random_numbers_of_ar():
    """Where both towers give the same logits, a drafted token is the one that AR will choose."""
    logits = 2 * jax.random.normal(jax.random.key(0), (3, 4, 50))
    sampling = SamplingConfig(block_size=4, steps_per_block=1, temperature=0.8, top_k=20)
    number, count = jnp.arange(3, dtype=jnp.uint32), jnp.array([0, 5, 9])
    keys = next_keys(jnp.uint32(1), number, count[:, None] + jnp.arange(4))
    masks = jnp.full((3, 4), 49)
    step = {"block": count, "step": 0, "mask_token_id": 49}
    row_keys = jax.random.split(jax.random.key(5), 3)
    draft = sample_step(sampling, row_keys, masks, logits, **step, token_keys=keys).xt
    without_mask = logits.at[..., 49].set(-jnp.inf)
    choice = Choice(jnp.full(3, 0.8), jnp.full(3, 20), jnp.ones(3))
    draws = Draws(jnp.ones(3, jnp.uint32), number, choice)
    free = Given(jnp.zeros((3, 1), jnp.int32), jnp.zeros((3, 1), bool))
    for j in range(4):
        expected = choose(draws, count + j, without_mask[:, j], free).tokens
        np.testing.assert_array_equal(draft[:, j], expected)
    assert (sample_step(sampling, row_keys, masks, logits, **step).xt != draft).any()
    with shapes.unchecked(), pytest.raises(ValueError, match="token_keys"):
        sample_step(sampling, row_keys, masks, logits, **step, token_keys=keys[:, 1:])


def test_tolerance_goes_from_ar_to_all_drafts(tiny, random_params):
    params, prompts = drafting(random_params, tiny, 1), random_prompts(32, 24, 9)
    settings = dataclasses.replace(AR, ignore_eos=True)
    accepted = []
    for tolerance in (0.0, 0.5, 1.0):
        results = run(tiny, params, prompts, speculative(settings, tolerance=tolerance))
        accepted.append(sum(r.accepted_draft_tokens for r in results))
    assert accepted[0] < accepted[1] < accepted[2]
    # One token from the prompt, then two blocks of seven, of which the last token is AR's.
    assert all(r.blocks == 2 and r.acceptance_length == 6.5 for r in results)


def test_tolerance_compares_with_the_best_token(tiny, random_params):
    """A kept token that AR would not have said is more than half as probable as the one that AR would have."""
    params, prompts = drafting(random_params, tiny, 1), random_prompts(32, 24, 9)
    settings = dataclasses.replace(AR, ignore_eos=True)
    results = run(tiny, params, prompts, speculative(settings, tolerance=0.5))
    rows = np.zeros((32, 80), np.int32)
    for i, r in enumerate(results):
        rows[i, : len(r.prompt_ids) + 15] = r.prompt_ids + r.tokens
    logits = jax.jit(lambda p, ids: bind(tiny, p).context_logits(ids))(params, rows)
    logp = np.asarray(jax.nn.log_softmax(logits))
    ratios = []
    for i, r in enumerate(results):
        n = len(r.prompt_ids)
        given = logp[i, n - 1 : n + 14]
        ratios += np.exp(given[np.arange(15), r.tokens] - given.max(-1)).tolist()
    assert min(ratios) > 0.5
    assert min(ratios) < 0.95  # Some were not the best.


@pytest.mark.whole
def test_a_mask_token_said_by_ar_is_kept(small_config, random_params):
    """AR may say any token; the denoiser takes this one for an undecided position, and must not replace it."""
    model = TwoTower(small_config("M*", vocab_size=8))
    params = drafting(random_params, model, 0)
    favored = jnp.zeros((16, 8)).at[:, model.config.mask_token_id].set(0.5)
    params["context_head"] = {"weight": params["context_head"]["weight"] + favored}
    settings = dataclasses.replace(AR, sampling=dataclasses.replace(SAMPLING, temperature=2.0), max_new_tokens=9)
    prompts = random_prompts(32, 8, 0)
    expected = [r.tokens for r in run(model, params, prompts, settings)]
    assert sum(tokens.count(model.config.mask_token_id) for tokens in expected) > 20
    assert [r.tokens for r in run(model, params, prompts, speculative(settings))] == expected


@pytest.mark.whole(but=["M*M*"])
@pytest.mark.parametrize("pattern", ["M*E-", "M*M*"])  # Layer by layer, and stacked.
def test_keeping_some_tokens_of_a_pass_is_reading_these(small_config, random_params, pattern):
    model = TwoTower(small_config(pattern))
    params = random_params(model)
    rng = np.random.default_rng(0)
    prompts, lengths = rng.integers(0, 40, (4, 9)), jnp.array([9, 3, 1, 6])
    block, kept = rng.integers(0, 40, (4, 5)), jnp.array([0, 1, 3, 5])

    @jax.jit
    def both(params, prompts, block):
        bound = bind(model, params)
        _, cache = bound.prefill(prompts, lengths, 16)
        logits, memories = bound.verify(block, cache)
        last, extended = bound.extend(block, kept, cache)
        return logits, last, bound.keep(cache, memories, kept), extended

    logits, last, found, expected = both(params, prompts, block)
    np.testing.assert_array_equal(found.lengths, expected.lengths)
    np.testing.assert_allclose(logits[np.arange(1, 4), kept[1:] - 1], last[1:], rtol=0, atol=1e-5)
    valid = np.arange(16) < np.asarray(expected.lengths)[:, None]
    for one, other in zip(jax.tree.leaves(found.layers), jax.tree.leaves(expected.layers), strict=True):
        if one.shape[-2] == 16:  # Keys and values (…, B, K, T, P): what lies beyond the length does not count.
            one, other = (np.where(valid[:, None, :, None], v, 0) for v in (one, other))
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tolerance": 1.5}, "tolerance must lie"),
        ({"mode": "ar", "tolerance": 0.5}, "tolerance=0.5 changes nothing in mode 'ar'"),
        ({"sampling": SamplingConfig(block_size=1, steps_per_block=1)}, "block_size of at least 2"),
    ],
)
def test_settings_that_cannot_be_used(values, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"mode": "speculative"} | values)
