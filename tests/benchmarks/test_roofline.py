"""The measurement of generation against its roofline: bytes counted by hand, and routing that is even."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import run_command
from twotower_jax.benchmarks._roofline import Pass, even_routing, pass_bytes, random_params
from twotower_jax.benchmarks._shapes import nano_config
from twotower_jax.generation.slots import cache_bytes
from twotower_jax.parameters import bind, count, initialize, parameter_table
from twotower_jax.two_tower import TwoTower


def test_bytes_of_a_pass_of_the_published_model():
    """At batch 64 AR reads all of its tower but the embedding, and each row's cache; a block reads its states once."""
    model = TwoTower(nano_config())
    table = parameter_table(model)
    assert count(table) == 63_185_902_848
    tower = {path: p for path, p in table.items() if path[0] in ("context_tower", "context_head")}
    embedding = 131072 * 2688
    weights = 2 * (count(tower) - embedding) + 2 * sum(math.prod(p.shape) for p in tower.values() if p.float32)
    ar = pass_bytes(model, jnp.bfloat16, Pass("context_tower", 64, 1, 1, 0, extends=False))
    # Without the rows' own numbers and newest hidden states; convolutions are float32 here, bfloat16 there.
    state = cache_bytes(model, 64, 0) - 64 * (4 + 4 + 4 + 4 + 1 + 2688 * 4)
    state -= 64 * 23 * 4 * 6144 * 2
    assert ar == weights + 64 * 2688 * 2 + state + 64 * 131072 * 4
    # Six of 128 experts at batch 1; keys are 6 layers × 2 × 2 heads × 128 numbers a position.
    alone = pass_bytes(model, jnp.bfloat16, Pass("context_tower", 1, 1, 1, 0, extends=False))
    experts = 2 * sum(math.prod(p.shape) for p in tower.values() if "experts" in p.axes)
    assert ar - alone == pytest.approx(experts * 122 / 128 + 63 * (2688 * 2 + state / 64 + 131072 * 4))
    longer = pass_bytes(model, jnp.bfloat16, Pass("context_tower", 1, 1, 1, 100, extends=False))
    assert longer - alone == 100 * 6 * 2 * 2 * 128 * 2
    written = pass_bytes(model, jnp.bfloat16, Pass("context_tower", 1, 1, 1, 0, extends=True))
    assert written - alone == state / 64 + 6 * 2 * 2 * 128 * 2


@pytest.mark.whole
def test_even_routing_is_even(small_config):
    model = TwoTower(small_config("E*"))
    params = random_params(model, jnp.float32)

    @jax.jit
    def evaluate(params):
        bound = bind(model, params)
        cache = bound.prefill(jnp.full((2, 3), 5), jnp.array([3, 2]), 8)[1]
        return bound.denoise_with_routing(jnp.full((2, 4), 3), jnp.ones(2), cache)[1]

    with even_routing():
        experts = evaluate(params)
    assert (np.bincount(np.asarray(experts).reshape(-1)) == 2 * 4 * 3 / 8).all()
    assert all(len(set(chosen)) == 3 for chosen in np.asarray(experts).reshape(-1, 3).tolist())


@pytest.mark.whole
def test_parameters_are_those_of_initialize(small_config):
    model = TwoTower(small_config("M"))
    found = random_params(model, jnp.float32)
    expected = jax.jit(lambda key: initialize(parameter_table(model), key))(jax.random.key(0))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.whole
def test_the_command_says_how_near_the_roofline_is():
    flags = ["--roofline", "--batches=2", "--new_tokens=64", "--repeats=1"]
    run = run_command("benchmark", "generation", *flags)
    assert run.returncode == 0, run.stderr
    rows = re.findall(r"^\| 2 \| (.*?) \| ([\d.,]+) \| ([\d,]+) \| ([\d.]+) \| \d+% \| ([\d.]+) \|$", run.stdout, re.M)
    assert [row[0] for row in rows] == ["ar", "diffusion, 3.33 tokens per evaluation"]
    for _, milliseconds, rate, _, _ in rows:
        taken, rate = (float(v.replace(",", "")) for v in (milliseconds, rate))
        assert rate == pytest.approx(2 * 16 / taken * 1000, rel=0.02)
    ar, diffusion = (float(row[1].replace(",", "")) for row in rows)
    assert float(rows[1][4]) == pytest.approx(ar / diffusion, abs=0.02)
