"""The simulation of quorums, against what can be said by hand, and what a run counts."""

import pytest

from twotower_jax.benchmarks.serving_engine import run, simulate
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation import Settings, generate, scheduling
from twotower_jax.two_tower import TwoTower


def test_rows_that_are_equally_fast_gain_nothing():
    """A block of each row for five evaluations and one pass; alone, a row never waits."""
    for quorum in (lambda alive: alive, lambda alive: 1, scheduling.quorum):
        assert simulate([5], 8, quorum, 0.5) == pytest.approx(1 / 5.5)
    assert simulate([2, 4], 1, scheduling.quorum, 1.0) == pytest.approx(1 / 4, rel=0.05)


def test_two_rows_of_two_speeds():
    """Together: 4 or 8 of 4 and 8, three times of four 8. One by one: a pass for each block, which stops the other."""
    every = simulate([4, 8], 2, lambda alive: alive, 1.0)
    assert every == pytest.approx(1 / (0.25 * 5 + 0.75 * 9), rel=0.05)
    # A pass for nearly every block, of which a row takes 6 evaluations and sees two passes, its own and another's.
    assert 1 / 8 <= simulate([4, 8], 2, lambda alive: 1, 1.0) < 1 / 7


def test_the_quorum():
    assert [scheduling.quorum(alive) for alive in (1, 2, 3, 4, 8, 16, 64)] == [1, 2, 2, 2, 3, 6, 24]


def test_a_run_counts_what_its_rows_count(small_config, random_params):
    model = TwoTower(small_config("M*", vocab_size=40))
    params, prompts = random_params(model), [[5 + i] for i in range(8)]
    sampling = SamplingConfig(block_size=4, steps_per_block=4, confidence_threshold=0.3)
    settings = Settings(max_new_tokens=16, sampling=sampling, batch_size=4, ignore_eos=True)
    done = run(model, params, prompts, settings, 64)
    results = list(generate(model, params, prompts, settings))
    assert done.used == sum(map(sum, done.counts)) <= 4 * done.made
    for counts, result, number in zip(done.counts, results, range(8), strict=True):
        assert len(counts) == (16 - 4 * (number % 3)) // 4
        assert sum(counts) <= result.denoiser_evaluations
