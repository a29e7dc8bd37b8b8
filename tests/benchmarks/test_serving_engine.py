"""What a run of the measurement counts."""

import pytest

from twotower_jax.benchmarks.serving_engine import run
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation import Settings, generate
from twotower_jax.two_tower import TwoTower


@pytest.mark.whole
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
