"""The prefix cache: the same tokens with and without, tails that cost what they are, and a limit in bytes."""

import dataclasses

import numpy as np
import pytest

from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation import Engine, PrefixCache, Settings, tower_meshes
from twotower_jax.generation.engine import in_order, iter_steps
from twotower_jax.generation.prefix_cache import borders
from twotower_jax.sharding import MeshShape
from twotower_jax.two_tower import TwoTower

CHUNK = 8
SETTINGS = Settings(
    max_new_tokens=9,
    sampling=SamplingConfig(block_size=4, steps_per_block=3, confidence_threshold=0.3),
    batch_size=2,
    prefill_chunk=CHUNK,
    ignore_eos=True,
)
SHARED = list(range(5, 31))
# Two that begin alike for three pieces, one for one piece, one that ends with a piece, and one that is its first part.
PROMPTS = [SHARED, SHARED[:24] + [33, 34, 35], SHARED[:9] + [36] * 9, SHARED[:16], SHARED[:8], SHARED]


@pytest.fixture(scope="module")
def tiny(small_config, random_params):
    model = TwoTower(small_config("M*", vocab_size=40))
    return model, random_params(model)


def run(tiny, prompts, settings, cache, **options):
    engine = Engine(*tiny, settings, capacity=128, slots=2, prefix_cache=cache, **options)
    numbers = [engine.submit(prompt) for prompt in prompts]
    results = list(in_order(progress for steps in iter_steps(engine) for progress in steps))
    assert len(results) == len(numbers)
    return results


@pytest.mark.whole(but=["diffusion"])
@pytest.mark.parametrize("mode", ["diffusion", "ar", "mock_ar"])
def test_results_are_those_without_it(tiny, mode):
    settings = dataclasses.replace(SETTINGS, mode=mode)
    cache = PrefixCache(2**30)
    expected = run(tiny, PROMPTS, settings, None)
    assert run(tiny, PROMPTS, settings, cache) == expected
    assert run(tiny, PROMPTS, settings, cache) == expected  # Now all of them are known.
    read = sum(len(p) - (mode == "mock_ar") for p in PROMPTS)
    assert cache.queries == 2 * read
    # The second time every prompt but for its last piece, which ends after its last token but one.
    least = sum((len(p) - 1 - (mode == "mock_ar")) // CHUNK * CHUNK for p in PROMPTS)
    assert least < cache.hits < 2 * least
    held = len({border for p in PROMPTS for border in borders(np.int32(p[: len(p) - (mode == "mock_ar")]), CHUNK)})
    assert len(cache) == held


@pytest.mark.whole
def test_results_are_those_without_it_with_the_towers_apart(tiny):
    cache, placement = PrefixCache(2**30), tower_meshes(MeshShape(), apart=True)
    expected = run(tiny, PROMPTS, SETTINGS, None)
    for _ in range(2):
        assert run(tiny, PROMPTS, SETTINGS, cache, placement=placement) == expected


def test_what_is_used_least_recently_goes_first(tiny):
    whole = PrefixCache(2**30)
    run(tiny, PROMPTS[:1], SETTINGS, whole)
    assert len(whole) == 3
    piece = whole.bytes // 3
    small = PrefixCache(3 * piece)
    expected = run(tiny, PROMPTS, SETTINGS, None)
    other = [39] * 9
    for prompts in (PROMPTS, [other, *PROMPTS[:2]], PROMPTS):
        results = run(tiny, prompts, SETTINGS, small)
        assert results[-1] == (expected[-1] if prompts is PROMPTS else expected[1])
        assert len(small) <= 3 and small.bytes == len(small) * piece
    # What is left of a prompt is its beginning: no piece is without those before it.
    run(tiny, PROMPTS[:1], SETTINGS, small)
    hits = small.hits
    run(tiny, [other], SETTINGS, small)
    run(tiny, PROMPTS[:1], SETTINGS, small)
    assert small.hits == hits + 16
    # One piece alone is more than this.
    least = PrefixCache(1)
    assert run(tiny, PROMPTS, SETTINGS, least) == expected
    assert (len(least), least.bytes, least.hits) == (0, 0, 0)
    with pytest.raises(ValueError, match="at least 1 byte, not 0"):
        PrefixCache(0)


def test_a_border_is_told_by_all_before_it():
    ids = np.arange(32, dtype=np.int32)
    assert len(borders(ids, 8)) == 4 and borders(ids[:31], 8) == borders(ids, 8)[:3]
    other = ids.copy()
    other[0] = 9
    assert not set(borders(other, 8)) & set(borders(ids, 8))
