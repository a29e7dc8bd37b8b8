"""Terms beside the losses of an objective: their formulas in float64, their gradients, what they leave alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax

from twotower_jax.layers import vocabulary
from twotower_jax.layers.vocabulary import Head
from twotower_jax.parameters import Scope, bind, flatten
from twotower_jax.sharding import MeshShape, make_mesh
from twotower_jax.train.config import check_given
from twotower_jax.train.objectives import Documents, NoiseKey, make_objective
from twotower_jax.train.step import make_validation, merge, split, total_loss
from twotower_jax.train.terms import Distillation

# Distillation.


def distilling(step_config, **changes):
    """An objective with a dense MLP as its only layer, and its config."""
    small = {"model.hybrid_override_pattern": "-", "model.intermediate_size": 12, "distillation.weight": 0.7}
    config = step_config(**small | changes)
    return make_objective(config, config.model_config(40)), config


def test_distillation_is_its_formula(step_config, random_params):
    objective, config = distilling(step_config, **{"distillation.temperature": 2.0})
    plain = dataclasses.replace(objective, distillation=Distillation())
    params = random_params(objective.model)
    ids = jnp.asarray(np.random.default_rng(0).integers(4, 40, (3, 32)), jnp.int32)
    # The last two documents of a row begin at 12 and 20, and four positions of padding end it.
    start = jnp.asarray(np.tile(np.repeat([0, 12, 20], [12, 8, 12]), (3, 1)), jnp.int32)
    documents = Documents(start, jnp.broadcast_to(jnp.arange(32) < 28, (3, 32)))
    examples = objective.examples(ids, jnp.ones(3, bool), NoiseKey(0, 0, jnp.arange(3)), 4, documents)
    masked = np.random.default_rng(1).random((3, 32)) < 0.6
    masked[:, [0, 12]], masked[:, 28:] = True, False
    examples = examples._replace(masked=jnp.asarray(masked), noisy=jnp.where(masked, 3, ids))

    @jax.jit
    def computed(params, examples):
        model = bind(objective.model, params)
        states = model.training_states(ids, examples.noisy, examples.t, 4, examples.start)
        losses = (each.losses_of(params, examples, 4, validating=True) for each in (objective, plain))
        return *losses, model.context_head(states.context), model.denoiser_head(states.denoiser)

    losses, others, teacher, student = jax.tree.map(np.asarray, computed(params, examples))
    teacher, student = (log_softmax(np.float64(logits) / 2, axis=-1) for logits in (teacher, student))
    expected, seen = np.zeros(3), 0
    for row, i in np.argwhere(masked):
        if i not in (0, 12, 20):
            expected[row] += 4 * np.exp(teacher[row, i - 1]) @ (teacher[row, i - 1] - student[row, i])
            seen += 1
    assert 0 < seen < masked.sum()
    np.testing.assert_allclose(losses["distillation_loss_by_row"].total, expected, rtol=1e-5)
    np.testing.assert_allclose(losses["distillation_loss"].total, expected.sum(), rtol=1e-5)
    assert losses["distillation_loss"].count == objective.counts(examples)["distillation_loss"] == seen
    np.testing.assert_array_equal(losses["masked_loss"].total, others["masked_loss"].total)
    total = losses["masked_loss"].mean + 0.7 * losses["distillation_loss"].mean
    np.testing.assert_allclose(total_loss(objective, losses), total, rtol=1e-6)
    assert "distillation_loss" not in others and plain.weights == {"masked_loss": 1.0}
    # Validation names it by row too, which the standard error is made of.
    rows = ids, jnp.ones(3, bool), jnp.arange(3)
    row = jax.eval_shape(make_validation(objective, 4), *split(objective, params), *rows)
    assert row["distillation_loss_by_row"].total.shape == (3,)


def test_distillation_has_the_gradient_of_its_value(step_config, random_params):
    """Against finite differences along it, and none for the head that teaches."""
    objective, config = distilling(step_config, **{"variant.context": "trained", "variant.context_loss": True})
    trained, frozen = split(objective, random_params(objective.model))
    ids = jax.random.randint(jax.random.key(1), (3, 16), 4, 40)
    examples = objective.examples(ids, jnp.ones(3, bool), NoiseKey(0, 5, jnp.arange(3)), 4)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return objective.losses_of(merge(params, frozen), examples, 4)["distillation_loss"].mean

    gradients = loss(trained)[1]
    taught = {path[0] for path, g in flatten(gradients).items() if np.any(g)}
    assert taught == {"denoiser_tower", "denoiser_head", "time"}
    norm = optax.tree.norm(gradients)

    def moved(distance):
        return loss(jax.tree.map(lambda p, g: p + distance / norm * g, trained, gradients))[0]

    np.testing.assert_allclose((moved(0.02) - moved(-0.02)) / 0.04, norm, rtol=2e-2)


@pytest.mark.parametrize("mesh", [{}, {"tensor": 4, "sequence": 2}], ids=["one", "mesh"])
def test_the_divergence_is_exact_in_tiles_and_on_a_mesh(mesh, small_config, monkeypatch):
    head = Head(small_config(vocab_size=40), Scope(("",)))
    rng = np.random.default_rng(0)
    h, taught = (np.float32(rng.standard_normal((2, 8, 16))) for _ in range(2))
    own, theirs = ({"weight": np.float32(rng.standard_normal((16, 40)))} for _ in range(2))

    def divergence(h, own):
        found = bind(head, own).divergence(h, bind(head, theirs), jnp.asarray(taught), 1.5)
        return jnp.sum(found * jnp.cos(jnp.arange(16.0)).reshape(2, 8)), found

    def run():
        return jax.jit(jax.grad(divergence, argnums=(0, 1), has_aux=True))(h, own)

    monkeypatch.setattr(vocabulary, "_MAX_LOGITS", 2 * 40 * 5)  # Five positions at once, where there are sixteen.
    if mesh:
        with jax.set_mesh(make_mesh(MeshShape(**mesh))):
            (of_h, of_own), found = run()
    else:
        (of_h, of_own), found = run()
    p, q = (log_softmax(np.float64(x) @ w["weight"] / 1.5, axis=-1) for x, w in ((taught, theirs), (h, own)))
    np.testing.assert_allclose(found, np.sum(np.exp(p) * (p - q), axis=-1), rtol=1e-5)
    of_logits = (np.exp(q) - np.exp(p)) / 1.5 * np.cos(np.arange(16.0)).reshape(2, 8, 1)
    np.testing.assert_allclose(of_h, of_logits @ own["weight"].T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_own["weight"], np.einsum("bld,blv->dv", h, of_logits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distillation.weight": -1.0}, "distillation: weight=-1.0 must not be negative"),
        ({"distillation.temperature": 0.0}, "distillation: temperature=0.0 must be positive"),
    ],
)
def test_terms_that_make_no_sense_are_refused(changes, message, step_config):
    with pytest.raises(ValueError, match=message):
        step_config(**changes)


def test_a_term_that_changes_nothing_is_refused(step_config):
    temperature = {"distillation.temperature": 2.0}
    with pytest.raises(ValueError, match=r"temperature=2.0 changes nothing with distillation.weight=0; leave it out"):
        check_given(step_config(**temperature), [*temperature])
    weight = {"distillation.weight": 0.5}
    with pytest.raises(ValueError, match="weight=0.5 changes nothing with objective='autoregressive'"):
        check_given(step_config(objective="autoregressive", **weight), [*weight])
