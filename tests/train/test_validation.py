"""The loss of held-out text: even noise levels, no part for the batch, and a standard error that is one."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from twotower_jax.data import PackedSequences
from twotower_jax.diffusion import MaskedDiffusion
from twotower_jax.diffusion.times import Strata, Stratified, Times, Uniform
from twotower_jax.train.metrics import progress_line
from twotower_jax.train.objectives import BY_ROW, LossSum, make_objective
from twotower_jax.train.placement import Placement
from twotower_jax.train.step import split
from twotower_jax.train.validation import MIN_ROWS, MIN_WINDOWS, Validation


def windows(count: int, length: int = 16, vocab_size: int = 20) -> PackedSequences:
    ids = np.random.default_rng(0).integers(4, vocab_size, count * length)
    return PackedSequences(ids, length, vocab_size)


def levels(rows: int, index: np.ndarray, times: Times = Uniform()) -> np.ndarray:  # noqa: B008
    process = MaskedDiffusion(times=times.for_validation())
    ids = jnp.zeros((len(index), 4), jnp.int32)
    corruption = process.corrupt(
        ids, seed=1, step=0, example_index=jnp.asarray(index, jnp.int32), mask_token_id=3, rows=rows
    )
    return np.asarray(corruption.t)


@pytest.mark.whole
@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_each_row_of_a_validation_has_a_stratum_of_its_own(rows):
    t = levels(rows, np.arange(rows), Uniform(t_min=0.2))
    np.testing.assert_array_equal(np.floor((t - 0.2) / 0.8 * rows), np.arange(rows))
    # Whatever else is in its batch.
    np.testing.assert_array_equal(levels(rows, np.arange(rows)[::-3], Uniform(t_min=0.2)), t[::-3])


def test_other_times_are_validated_as_they_are_trained():
    assert Stratified(0.1).for_validation() == Uniform(0.1).for_validation() == Strata(0.1)

    class Own(Times):
        def draw(self, step_key, row_key, index, *, rows, blocks):
            return jnp.float32(0.5)

    np.testing.assert_array_equal(levels(3, np.arange(3), Own()), 0.5)


@pytest.mark.parametrize("count", [1, 2, 5, 31, 64, 200])
def test_the_rows_of_a_pass_are_numbered_once_and_each_window_sees_all_levels(count):
    validation = Validation(windows(count), types.SimpleNamespace(is_noisy=True), Placement(None, 4), 4)
    index = validation._index(np.arange(validation.rows))
    assert sorted(index) == list(range(validation.rows)) and validation.rows >= MIN_ROWS
    assert validation.rows < MIN_ROWS + count and validation.rows % count == 0
    for window in range(min(count, 5)):  # The n-th draw of a window lies in the n-th part of the levels.
        parts = index[window::count] * validation.draws // validation.rows
        np.testing.assert_array_equal(parts, np.arange(validation.draws))


def test_a_backbone_sees_each_window_once():
    validation = Validation(windows(3), types.SimpleNamespace(is_noisy=False), Placement(None, 4), 4)
    assert (validation.draws, validation.rows) == (1, 3)


@pytest.mark.whole
@pytest.mark.parametrize("objective", ["denoiser", "autoregressive"])
def test_the_batch_has_no_part_in_a_validation(objective, step_config, random_params):
    changes = {} if objective == "autoregressive" else {"variant.context_loss": True, "variant.context": "trained"}
    config = step_config(**{"objective": objective, "model.hybrid_override_pattern": "*E"} | changes)
    objective = make_objective(config, config.model_config(20))
    params = split(objective, random_params(objective.model))
    rows = []
    for batch_size in (24, 5):  # 70 rows of 10 windows, or 10 rows: neither divides them all
        validation = Validation(windows(10), objective, Placement(None, batch_size), batch_size)
        rows.append(validation.run(validation.compiled(4), *params))
    assert rows[0].keys() == rows[1].keys() >= {"loss", "loss_stderr"}
    for name in rows[0]:
        np.testing.assert_allclose(
            np.array(rows[1][name], float), np.array(rows[0][name], float), rtol=1e-5, err_msg=name
        )
    assert 0 < rows[0]["loss_stderr"] < rows[0]["loss"] / 5
    if config.objective == "denoiser":
        assert len(rows[0]["expert_load"]) == 1 and 1 <= rows[0]["expert_load"][0] <= 8 / 3


def simulated(count: int, is_noisy: bool, seed: int) -> dict:
    """A validation of windows whose loss is 3 + noise, plus 4 · level where there is one; sizes vary."""
    rng = np.random.default_rng(seed)
    own, sizes = 3 + 0.5 * rng.standard_normal(count), rng.integers(5, 20, count).astype(float)
    objective = types.SimpleNamespace(is_noisy=is_noisy, weights={"a": 1.0})
    objective.for_validation = lambda: objective
    validation = Validation(windows(count), objective, Placement(None, 8), 8)
    place = 0

    def validate(trained, frozen, ids, counted, index, documents):
        nonlocal place
        window = (place + np.arange(len(ids))) % count
        place += len(ids)
        loss = own[window] + (4 * (index + 0.5) / validation.rows if is_noisy else 0)
        sums = LossSum(np.where(counted, loss * sizes[window], 0), np.where(counted, sizes[window], 0))
        return {"a": LossSum(sums.total.sum(), sums.count.sum()), "a" + BY_ROW: sums}

    return validation.run(validate, {}, {})


@pytest.mark.parametrize(("count", "is_noisy"), [(10, False), (10, True), (80, True)])
def test_the_standard_error_is_how_far_the_loss_varies(count, is_noisy):
    rows = [simulated(count, is_noisy, seed) for seed in range(600)]
    found = np.sqrt(np.mean([row["loss_stderr"] ** 2 for row in rows]))
    spread = np.std([row["loss"] for row in rows])
    np.testing.assert_allclose(found, spread, rtol=0.12)


def test_one_window_has_no_standard_error():
    row = simulated(1, False, 0)
    assert row["loss_stderr"] is None and row["loss"] > 0


def test_little_held_out_text_is_said_and_its_error_is_not_printed():
    def made(count):
        return Validation(windows(count), types.SimpleNamespace(is_noisy=True), Placement(None, 4), 4)

    assert made(MIN_WINDOWS).warning is None
    assert made(2).warning.startswith("warning: 2 windows are held out for validation (32 tokens); a standard error")
    assert made(1).warning.startswith("warning: 1 window is held out for validation (16 tokens)")
    row = {"step": 1, "loss": 2.0, "learning_rate": 0.1, "grad_norm": 1.0, "tokens_per_second": 5.0}
    row |= {"skipped_steps": 0, "validation_loss": 3.0, "validation_loss_stderr": 0.25}
    assert "validation 3.0000 ± 0.2500  " in progress_line(row, 2, 1.0)
    assert "validation 3.0000  " in progress_line(row, 2, 1.0, shows_error=False)
    assert "validation 3.0000  " in progress_line(row | {"validation_loss_stderr": None}, 2, 1.0)
