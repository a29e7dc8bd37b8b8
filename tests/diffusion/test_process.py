"""Schedules and corruption against literal NumPy versions."""

import functools
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shapes
from hypothesis import given, settings
from hypothesis import strategies as st

from literal_diffusion import LITERAL_MASK_PROBABILITY, MASK, VOCAB, seeds
from twotower_jax.diffusion import SCHEDULES, MaskedDiffusion
from twotower_jax.diffusion.times import Uniform

pytestmark = pytest.mark.usefixtures("strict_arithmetic")

# Schedules.


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_its_formula_and_rises_from_exactly_zero_to_exactly_one(name):
    t = np.linspace(0, 1, 4097, dtype=np.float32)
    probability = np.asarray(SCHEDULES[name].mask_probability(jnp.asarray(t)))
    assert probability.dtype == np.float32
    assert probability[0] == 0.0 and probability[-1] == 1.0
    assert np.all(np.diff(probability) > 0)
    np.testing.assert_allclose(probability, LITERAL_MASK_PROBABILITY[name](t.astype(np.float64)), rtol=1e-6)


def test_unknown_schedule_names_the_known_ones():
    with pytest.raises(ValueError, match="'sigmoid'.*linear, cosine, exponential"):
        SCHEDULES["sigmoid"]


# Corruption.


@functools.partial(jax.jit, static_argnames=("seed", "schedule", "t_min"))
def corrupt_examples(ids, index, *, seed=7, step=11, schedule="linear", t_min=1e-3):
    process = MaskedDiffusion(SCHEDULES[schedule], Uniform(t_min))
    return process.corrupt(ids, seed=seed, step=step, example_index=index, mask_token_id=MASK)


def clean_ids(batch, length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(4, VOCAB, (batch, length)), jnp.int32)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_corruption_masks_at_the_rate_it_states(schedule):
    batch, length = 400, 1000
    ids = clean_ids(batch, length)
    noisy, masked, t, _ = corrupt_examples(ids, np.arange(batch, dtype=np.int32), schedule=schedule)
    assert (noisy.dtype, masked.dtype, t.dtype) == (jnp.int32, jnp.bool_, jnp.float32)
    np.testing.assert_array_equal(noisy, np.where(masked, MASK, ids))
    # Each row's count is Binomial(L, t): 5 standard deviations a row, 4 for the mean over all rows of the deviations.
    t, counts = np.asarray(t, np.float64), np.asarray(masked).sum(axis=1)
    deviations = (counts - length * t) / np.sqrt(length * t * (1 - t) + 1)
    assert np.abs(deviations).max() < 5 and abs(deviations.mean()) < 4 / math.sqrt(batch)
    # Neighbors are independent: given t, the chance that both are masked is t².
    both = (np.asarray(masked)[:, 1:] & np.asarray(masked)[:, :-1]).mean(axis=1)
    assert abs((both - t**2).mean()) < 4 / math.sqrt(batch * length)


def test_time_is_uniform_from_t_min_to_one():
    batch = 4000
    ids = jnp.zeros((batch, 1), jnp.int32)
    t = np.sort(np.asarray(corrupt_examples(ids, np.arange(batch, dtype=np.int32), t_min=0.25).t))
    assert t[0] >= 0.25 and t[-1] <= 1.0
    # Kolmogorov-Smirnov at a level of about 1e-4.
    empirical = np.arange(1, batch + 1) / batch
    assert np.abs(empirical - (t - 0.25) / 0.75).max() < 2.2 / math.sqrt(batch)


@settings(max_examples=20)
@given(seeds, st.permutations(range(6)))
def test_corruption_of_an_example_does_not_depend_on_its_batch(seed, order):
    ids, index = clean_ids(6, 9, seed), np.random.default_rng(seed).integers(2**31, size=6, dtype=np.int32)
    whole = corrupt_examples(ids, index)
    shuffled = corrupt_examples(np.asarray(ids)[order], index[order])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a)[order], b), whole, shuffled)
    alone = corrupt_examples(ids[2:3], index[2:3])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a)[2:3], b), whole, alone)


def test_corruption_differs_by_seed_step_and_example_and_is_the_same_without_jit():
    ids, index = clean_ids(1, 64), np.int32([5])
    reference = corrupt_examples(ids, index)
    for other in [
        corrupt_examples(ids, index + 1),
        corrupt_examples(ids, index, seed=8),
        corrupt_examples(ids, index, step=12),
    ]:
        assert other.t[0] != reference.t[0] and np.any(other.masked != reference.masked)
    eager = MaskedDiffusion().corrupt(ids, seed=7, step=11, example_index=index, mask_token_id=MASK)
    jax.tree.map(np.testing.assert_array_equal, reference, eager)


@pytest.mark.whole
def test_corruption_does_not_depend_on_the_mesh():
    # In a process of its own, since a test cannot add devices to a running one.
    program = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from twotower_jax.diffusion import MaskedDiffusion
ids = jnp.arange(64, dtype=jnp.int32).reshape(8, 8) + 4
index = jnp.arange(100, 108, dtype=jnp.int32)
def noise(ids, index, step):
    return MaskedDiffusion().corrupt(ids, seed=1, step=step, example_index=index, mask_token_id=3)
expected = noise(ids, index, 2)
for shape in (4, 1), (2, 2), (1, 4):
    mesh = jax.make_mesh(shape, ("data", "length"))
    spread = jax.device_put(ids, NamedSharding(mesh, PartitionSpec("data", "length")))
    spread_index = jax.device_put(index, NamedSharding(mesh, PartitionSpec("data")))
    result = jax.jit(noise)(spread, spread_index, jnp.int32(2))
    assert len(result.noisy_ids.devices()) == 4
    jax.tree.map(np.testing.assert_array_equal, expected, result)
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t_min": 1.0}, "t_min=1.0"),
        ({"t_min": -0.1}, "t_min=-0.1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"seed": -1}, "seed=-1"),
        ({"index": np.int32([0, 1, 2])}, r"\(2, 4\) and \(3,\)"),
    ],
)
def test_corruption_refuses(options, message):
    with shapes.unchecked(), pytest.raises(ValueError, match=message):
        corrupt_examples(clean_ids(2, 4), **({"index": np.int32([0, 1])} | options))
