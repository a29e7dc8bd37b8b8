"""One step: the optimizer, what is left out, the objectives under every variant."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from twotower_jax.config import Variant
from twotower_jax.parameters import bind, flatten, parameter_table
from twotower_jax.train.objectives import NoiseKey, make_objective
from twotower_jax.train.placement import Placement
from twotower_jax.train.setup import look
from twotower_jax.train.skips import blame
from twotower_jax.train.start import make_start
from twotower_jax.train.step import (
    abstract_state,
    initial_state,
    make_optimizer,
    make_step,
    merge,
    split,
    tables,
    total_loss,
)

# Optimizer and step.


def test_decay_touches_only_what_the_table_says(train_config, random_params):
    config = train_config(objective="denoiser", learning_rate=0.5, weight_decay=0.1, warmup_fraction=0.0)
    objective = make_objective(config, config.model_config(20))
    trained, _ = split(objective, random_params(objective.model))
    table, frozen = tables(objective)
    optimizer = make_optimizer(config, table)
    zeros = jax.tree.map(np.zeros_like, trained)
    updates, _ = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(zeros, trained)
    for path, update in flatten(updates).items():
        factor = -0.5 * 0.1 if table[path].decay else 0.0
        np.testing.assert_allclose(update, factor * np.asarray(flatten(trained)[path]), rtol=1e-5, err_msg=str(path))
    spared = {path[-1] for path in table if not table[path].decay}
    assert spared == {"weight", "conv_bias", "bias", "A_log", "D", "dt_bias", "norm_weight", "tables"}
    assert all("norm" in path[-2] or path[-2] == "norm_f" for path in table if path[-1] == "weight" and
               not table[path].decay)  # fmt: skip
    assert {path[0] for path in frozen} == {"context_tower", "context_head", "denoiser_tower"}
    assert {path[-2:] for path in frozen if path[0] == "denoiser_tower"} == {("router", "bias")}


def test_frozen_parameters_are_stored_in_the_compute_dtype(train_config, random_params):
    config = train_config(objective="denoiser", dtype="bfloat16")
    objective = make_objective(config, config.model_config(20))
    trained, frozen = split(objective, random_params(objective.model))
    assert {v.dtype for v in flatten(trained).values()} == {jnp.dtype(jnp.float32)}
    table = parameter_table(objective.model)
    for path, array in flatten(frozen).items():
        assert array.dtype == (jnp.float32 if table[path].float32 else jnp.bfloat16), path
    state, abstract_frozen = abstract_state(objective, make_optimizer(config, tables(objective)[0]))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), frozen) == jax.tree.map(
        lambda a: (a.shape, a.dtype), abstract_frozen
    )
    made = jax.eval_shape(lambda p: initial_state(make_optimizer(config, tables(objective)[0]), p), trained)
    assert made == state


def test_the_step_is_adamw_on_the_clipped_gradient(train_config, random_params):
    config = train_config(clip_norm=0.01, warmup_fraction=0.0)
    config = dataclasses.replace(config, model=dict(config.model) | {"hybrid_override_pattern": "-"})
    objective = make_objective(config, config.model_config(20))
    trained, frozen = split(objective, random_params(objective.model))
    optimizer = make_optimizer(config, tables(objective)[0])
    ids = jax.random.randint(jax.random.key(1), (2, 8), 0, 20)
    step = jax.jit(make_step(config, objective, optimizer, 8))
    after, metrics = step(initial_state(optimizer, trained), frozen, ids)

    def loss(params):
        logits = bind(objective.model, merge(params, frozen)).logits(ids)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss))(trained)
    norm = optax.tree.norm(gradients)
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
    assert norm > 1 and metrics.learning_rate == jnp.float32(2e-2) and after.step == 1
    table = parameter_table(objective.model)
    for path, before in flatten(trained).items():
        clipped = flatten(gradients)[path] * (0.01 / norm)
        step = clipped / (jnp.abs(clipped) + 1e-8) + (0.1 if table[path].decay else 0.0) * before
        np.testing.assert_allclose(flatten(after.params)[path], before - 2e-2 * step, rtol=1e-3, atol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(train_config, random_params):
    config = train_config(warmup_fraction=0.5)
    config = dataclasses.replace(config, model=dict(config.model) | {"hybrid_override_pattern": "-"})
    objective = make_objective(config, config.model_config(20))
    trained, frozen = split(objective, random_params(objective.model))
    optimizer = make_optimizer(config, tables(objective)[0])
    # Token 19 breaks whatever row it is in.
    trained["tower"]["embeddings"] = trained["tower"]["embeddings"].at[19].set(jnp.inf)
    ids = jax.random.randint(jax.random.key(1), (6, 8), 0, 19)
    step = jax.jit(make_step(config, objective, optimizer, 8))
    before, metrics = step(initial_state(optimizer, trained), frozen, ids)
    assert not metrics.skipped
    broken = ids.at[2, 3].set(19).at[5, 0].set(19)
    after, metrics = step(before, frozen, broken)
    assert metrics.skipped and not jnp.isfinite(metrics.grad_norm) and after.step == before.step + 1 == 2
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    jax.tree.map(np.testing.assert_array_equal, before.optimizer, after.optimizer)
    # The schedule goes by the updates that were made: the next step has the rate of the one left out.
    _, again = step(after, frozen, ids)
    assert not again.skipped and again.learning_rate == metrics.learning_rate > 0

    noise = functools.partial(NoiseKey, config.seed, 1)
    placement = Placement(None, len(broken))
    batch = placement.batch({"ids": np.asarray(broken)})
    found = blame(objective, noise, 8, before.params, frozen, batch, placement)
    assert found.rows == [2, 5] and found.tokens[5].tolist() == broken[5].tolist()


# Variants.


TWO_LAYERS = {"hybrid_override_pattern": "M*", "hidden_size": 16}
# What no gradient reaches although it trains: the last context layer feeds the denoiser by its keys and values alone.
UNREAD = {
    ("context_tower", "norm_f", "weight"),
    ("context_tower", "segment_0", "layer_1", "mixer", "q_proj", "weight"),
    ("context_tower", "segment_0", "layer_1", "mixer", "o_proj", "weight"),
}


@pytest.mark.whole(but=["frozen-False-False-False"])
@pytest.mark.parametrize(
    ("variant", "frozen", "unread"),
    [
        (Variant(), {"context_tower", "context_head"}, set()),
        (Variant(context="trained"), {"context_head"}, UNREAD),
        (Variant(context="trained", context_loss=True), set(), set()),
        (Variant(context="tied"), {"context_head"}, set()),
        (Variant(context="tied", context_loss=True, bidirectional_mamba=True), set(), set()),
        (Variant(time_conditioning=False), {"context_tower", "context_head"}, set()),
    ],
    ids=lambda value: "-".join(map(str, dataclasses.astuple(value))) if isinstance(value, Variant) else "",
)
def test_every_variant_trains_what_it_should(variant, frozen, unread, train_config, random_params):
    config = train_config(objective="denoiser", warmup_fraction=0.0)
    config = dataclasses.replace(config, variant=variant, model=dict(config.model) | TWO_LAYERS)
    objective = make_objective(config, config.model_config(20))
    trained, rest = split(objective, random_params(objective.model))
    tops = {path[0] for path in parameter_table(objective.model)}
    assert {path[0] for path in flatten(rest)} == frozen
    assert {path[0] for path in flatten(trained)} == tops - frozen
    assert ("time" in tops) == variant.time_conditioning and ("denoiser_tower" in tops) == (variant.context != "tied")

    ids = jax.random.randint(jax.random.key(1), (3, 16), 0, 20)
    noise = NoiseKey(0, 5, jnp.arange(3))

    def loss(params):
        losses = objective.losses(merge(params, rest), ids, jnp.ones(3, bool), noise, 4)
        return total_loss(objective, losses), losses

    loss_and_gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, losses), gradients = loss_and_gradients(trained)
    assert {path for path, g in flatten(gradients).items() if not np.any(g)} == unread
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert ("context_loss" in losses) == variant.context_loss
    np.testing.assert_allclose(value, sum(losses[term].mean for term in objective.terms), rtol=1e-6)
    for part in ("by_noise_level", "by_block_position"):
        np.testing.assert_allclose(losses[part].total.sum(), losses["masked_loss"].total, rtol=1e-5)
        assert losses[part].count.sum() == losses["masked_loss"].count

    # Against finite differences, along the gradient itself.
    norm = optax.tree.norm(gradients)

    def moved(distance):
        return loss_and_gradients(jax.tree.map(lambda p, g: p + distance / norm * g, trained, gradients))[0][0]

    slope = (moved(0.02) - moved(-0.02)) / 0.04
    np.testing.assert_allclose(slope, norm, rtol=2e-2)


def test_rows_of_padding_do_not_count(train_config, random_params):
    config = train_config(objective="denoiser")
    config = dataclasses.replace(config, model=dict(config.model) | {"hybrid_override_pattern": "-"})
    for name in ("denoiser", "autoregressive"):
        objective = make_objective(dataclasses.replace(config, objective=name), config.model_config(20))
        params = random_params(objective.model)
        ids = jax.random.randint(jax.random.key(1), (4, 16), 0, 20)

        def losses(params, ids, counted, objective=objective):
            return objective.losses(params, ids, counted, NoiseKey(1, 0, jnp.arange(len(ids))), 4)

        three = jax.jit(losses)(params, ids[:3], jnp.ones(3, bool))
        padded = jax.jit(losses)(params, ids, jnp.array([True, True, True, False]))
        assert three.keys() == padded.keys()
        close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
        for part in three:
            jax.tree.map(close, padded[part].total, three[part].total)
            jax.tree.map(np.testing.assert_array_equal, padded[part].count, three[part].count)


@pytest.mark.whole
@pytest.mark.parametrize("block_size", [48, 32])
def test_documents_of_a_curriculum_do_not_see_one_another(block_size, step_config, random_params, tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{word} " * 20}) + "\n" for word in ("a", "b")))
    config = step_config(
        **{
            "data": str(tmp_path / "text.jsonl"),
            "vocab_size": 300,
            "validation_fraction": 0.0,
            "sequence_length": 192,
            "reset_at_documents": True,
            "block_size": None,
            "block_curriculum": ((0.0, 48), (0.5, 32)),
            "model.hybrid_override_pattern": "M*",
        }
    )
    start = make_start(config, look(config, tmp_path / "run"))
    (window,) = [start.training[i] for i in range(len(start.training))]
    begins = np.unique(window["document_start"])
    second = begins[1]
    assert len(begins) == 2 and second % 96 == 0
    model, params = start.objective.model, random_params(start.objective.model)
    counted = window["counted"]
    assert counted[:second].any() and counted[second:].any()

    @jax.jit
    def outputs(clean, noisy, document_start):
        states = bind(model, params).training_states(clean, noisy, jnp.full(1, 0.5), block_size, document_start)
        return states.denoiser[0], states.context[0]

    def changes(of, starts):
        """Where the outputs change with the tokens at `of`."""
        clean, noisy = window["ids"][None], np.where(np.arange(192) % 3 == 0, 3, window["ids"])[None]
        other = [np.where(of, 7 + np.arange(192) % 50, ids) for ids in (clean, noisy)]
        pairs = zip(outputs(clean, noisy, starts[None]), outputs(*other, starts[None]), strict=True)
        return np.any([np.any(np.asarray(a) != np.asarray(b), axis=1) for a, b in pairs], axis=0)

    first = np.arange(192) < second
    for of in (first, ~first):
        changed = changes(of, window["document_start"])
        assert changed[of].any() and not changed[~of].any()
    # Blocks that hold parts of two documents would show the second one to the first.
    shifted = np.where(np.arange(192) < 112, 0, 112).astype(np.int32)
    assert changes(np.arange(192) >= 112, shifted)[:112].any()
