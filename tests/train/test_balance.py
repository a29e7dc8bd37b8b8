"""Experts kept evenly busy: the losses and the rule against literal loops, what is counted, what moves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower_jax.config import Variant
from twotower_jax.layers.experts import Router
from twotower_jax.parameters import Scope, bind, flatten
from twotower_jax.sharding import MeshShape, batch_sharding, make_mesh
from twotower_jax.train.config import ADDED, check_given
from twotower_jax.train.objectives import ROUTED, Documents, NoiseKey, make_objective
from twotower_jax.train.setup import settled
from twotower_jax.train.step import abstract_state, make_optimizer, make_step, start_state, tables
from twotower_jax.train.terms import Balance, evenness

ROUTER = {f"router_{field.name}": 0.0 for field in dataclasses.fields(Balance)}
BIAS = ("tower", "segment_0", "layer_0", "mixer", "router", "bias")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def literal_sums(x, weight, measured, count, shares=None):
    """The two losses of one sequence and its shares, by loops, in float64."""
    logits = x @ weight
    scores = sigmoid(logits)
    tokens, chosen, means, z = 0, np.zeros(len(weight[0])), 0.0, 0.0
    for i in np.flatnonzero(measured):
        chosen[np.argsort(-scores[i])[:count]] += 1
        means = means + scores[i] / scores[i].sum()
        z += np.log(np.exp(logits[i]).sum()) ** 2
        tokens += 1
    shares = chosen / max(tokens * count, 1) if shares is None else shares
    return len(chosen) * np.sum(shares * means / max(tokens, 1)), z, shares


def test_the_losses_and_their_gradients_are_literal(small_config, random_params):
    router = Router(small_config("E"), Scope(("",)))
    params = random_params(router)
    rng = np.random.default_rng(1)
    x, measured = np.float32(rng.standard_normal((3, 9, 16))), rng.random((3, 9)) < 0.6
    measured[2] = False  # a row of padding
    weight = np.float64(params["weight"])
    expected = [literal_sums(np.float64(x[row]), weight, measured[row], 3) for row in range(3)]

    @jax.jit
    def losses(weight, x):
        return bind(router, params | {"weight": weight}).sums(x, jnp.asarray(measured))

    balance, z = losses(params["weight"], x)
    np.testing.assert_allclose(balance, [e[0] for e in expected], rtol=1e-5)
    np.testing.assert_allclose(z, [e[1] for e in expected], rtol=1e-5)
    assert balance[2] == z[2] == 0
    # Central differences of the loops, with the shares as they are: they have no gradient.
    direction = rng.standard_normal(weight.shape)

    def slope(which):
        moved = [
            sum(
                literal_sums(np.float64(x[row]), weight + d * direction, measured[row], 3, expected[row][2])[which]
                for row in range(3)
            )
            for d in (1e-5, -1e-5)
        ]
        return (moved[0] - moved[1]) / 2e-5

    for which in range(2):
        gradient = jax.grad(lambda w, which=which: losses(w, x)[which].sum())(params["weight"])
        np.testing.assert_allclose(np.sum(np.asarray(gradient) * direction), slope(which), rtol=1e-4)
    everywhere = bind(router, params).sums(x, None)[0]
    np.testing.assert_allclose(everywhere[0], literal_sums(x[0], weight, np.ones(9, bool), 3)[0], rtol=1e-5)


def test_even_scores_have_a_loss_of_one():
    for load, expected in (([1, 1, 1, 1], 1), ([4, 0, 0, 0], 0), ([1, 1, 0, 0], 0.5), ([0, 0, 0, 0], 0)):
        np.testing.assert_allclose(evenness(np.float32(load)), expected, rtol=1e-6)


@pytest.fixture(scope="module")
def steps(step_config, random_params):
    """Two steps of a backbone of one layer of experts on rows with padding: objective, start, states after each."""

    def run(mesh=None, ids=None, count=2, **changes):
        changes = {"router_bias_rate": 0.5, "router_balance_loss": 0.1, "router_z_loss": 0.01} | changes
        config = step_config(**{"objective": "autoregressive", "model.hybrid_override_pattern": "E"} | changes)
        objective = make_objective(config, config.model_config(40))
        optimizer = make_optimizer(config, tables(objective)[0])
        mesh = None if mesh is None else make_mesh(MeshShape(**mesh))
        state, frozen = start_state(objective, optimizer, random_params(objective.model), mesh)
        ids = np.random.default_rng(0).integers(4, 40, (8, 32)).astype(np.int32) if ids is None else ids
        documents = Documents(np.zeros((8, 32), np.int32), np.broadcast_to(np.arange(32) < 27, (8, 32)))
        states, metrics = [jax.tree.map(np.asarray, state)], []

        def take():
            nonlocal state
            rows = ids, np.arange(8), documents
            if mesh is not None:
                rows = jax.tree.map(lambda v: jax.device_put(v, batch_sharding(mesh, v.ndim)), rows)
            step = jax.jit(make_step(config, objective, optimizer, 4))
            for _ in range(count):
                state, found = step(state, frozen, *rows)
                states.append(jax.tree.map(np.asarray, state))
                metrics.append(jax.tree.map(np.asarray, found))

        if mesh is None:
            take()
        else:
            with jax.set_mesh(mesh):
                take()
        return objective, ids, states, metrics

    @functools.cache
    def plain():
        return run()

    return lambda **changes: run(**changes) if changes else plain()


def test_the_bias_moves_by_the_sign_of_the_load(steps):
    _, ids, states, metrics = steps()
    for before, after, found in zip(states, states[1:], metrics, strict=False):
        layer = before.params["tower"]["segment_0"]["layer_0"]
        embedded = np.float64(before.params["tower"]["embeddings"])[ids]
        x = embedded / np.sqrt(np.mean(embedded**2, axis=-1, keepdims=True) + 1e-5) * layer["norm"]["weight"]
        scores, bias = sigmoid(x @ layer["mixer"]["router"]["weight"]), flatten(before.balanced)[BIAS]
        tokens = np.zeros(8)
        for row in range(8):
            for i in range(27):
                tokens[np.argsort(-(scores[row, i] + bias))[:3]] += 1
        moved = flatten(after.balanced)[BIAS]
        np.testing.assert_array_equal(moved, bias + np.float32(0.5) * np.float32(np.sign(tokens.mean() - tokens)))
        np.testing.assert_allclose(found.losses["expert_load"].total, tokens.max() / tokens.mean(), rtol=1e-6)
        share = tokens[tokens > 0] / tokens.sum()
        np.testing.assert_allclose(found.losses["expert_entropy"].total, -np.sum(share * np.log(share)) / np.log(8))
    assert np.any(moved != bias) and np.any(states[2].params["head"]["weight"] != states[0].params["head"]["weight"])


@pytest.mark.whole
@pytest.mark.parametrize(
    "changes", [{"mesh": {"sequence": 2, "expert": 2, "data": 2}}, {"accumulate": 4}], ids=["mesh", "parts"]
)
def test_devices_and_parts_count_together(steps, changes):
    (_, _, one, expected), (_, _, many, found) = steps(), steps(**changes)
    for a, b in zip(one, many, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a.balanced, b.balanced)
    for a, b in zip(expected, found, strict=True):
        for term in ("router_balance_loss", "router_z_loss"):
            np.testing.assert_allclose(a.losses[term].total, b.losses[term].total, rtol=1e-5)
            assert a.losses[term].count == b.losses[term].count
        np.testing.assert_allclose(a.loss, b.loss, rtol=1e-5)
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=1e-5)


def test_the_losses_count_by_their_weights(steps):
    objective, _, _, (found, _) = steps()
    losses = found.losses
    expected = losses["next_token_loss"].mean + 0.1 * losses["router_balance_loss"].mean
    np.testing.assert_allclose(found.loss, expected + 0.01 * losses["router_z_loss"].mean, rtol=1e-6)
    assert losses["router_balance_loss"].count == 8 and losses["router_z_loss"].count == 8 * 27
    assert objective.for_validation().terms == ("next_token_loss",)


def test_a_step_that_is_not_finite_leaves_the_bias(steps):
    ids = np.full((8, 32), 5, np.int32)
    broken = steps(ids=ids, learning_rate=1e30, final_learning_rate=0.0, warmup_fraction=0.0)
    (_, found), (_, before, after) = broken[3], broken[2]
    assert found.skipped
    jax.tree.map(np.testing.assert_array_equal, before.balanced, after.balanced)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("variant", "moving"),
    [
        (Variant(), {"denoiser_tower"}),
        (Variant(context="trained"), {"denoiser_tower", "context_tower"}),
        (Variant(context="tied"), {"context_tower"}),
    ],
    ids=lambda v: v.context if isinstance(v, Variant) else "",
)
def test_routers_of_towers_that_train_move(variant, moving, step_config, random_params):
    """And the tokens of both passes count where a tower is passed through twice."""
    config = step_config(**{"model.hybrid_override_pattern": "EE", "router_bias_rate": 0.5, "router_balance_loss": 1.0})
    config = dataclasses.replace(config, variant=variant)
    objective = make_objective(config, config.model_config(40))
    optimizer = make_optimizer(config, tables(objective)[0])
    state, frozen = abstract_state(objective, optimizer)
    assert {path[0] for path in flatten(state.balanced)} == moving
    assert not flatten(state.balanced).keys() & flatten(frozen).keys()
    ids = jax.random.randint(jax.random.key(1), (4, 16), 4, 40)
    after, _ = jax.eval_shape(make_step(config, objective, optimizer, 4), state, frozen, ids)
    assert jax.tree.map(lambda v: v.shape, after) == jax.tree.map(lambda v: v.shape, state)
    if variant.context == "tied":
        examples = objective.examples(ids, jnp.ones(4, bool), NoiseKey(0, 0, jnp.arange(4)), 4)
        losses = jax.jit(lambda p: objective.losses_of(p, examples, 4))(random_params(objective.model))
        (tokens,) = flatten(losses[ROUTED].total).values()
        np.testing.assert_array_equal(tokens.sum(axis=-1), [2 * 4 * 16 * 3] * 2)
        assert losses["router_balance_loss"].count == 4


# Settings.


def test_what_is_on_by_default(train_config, tmp_path):
    new = Balance(1e-3, 1e-4, 0.0)
    assert train_config().balance == new and train_config(router_bias_rate=0).balance == Balance(0, 1e-4)
    assert train_config(objective="denoiser").balance == Balance() == train_config(init_from="somewhere").balance
    assert train_config(objective="denoiser", router_bias_rate=0.1).balance == Balance(0.1)
    config = settled(train_config(), tmp_path)
    assert (config.router_bias_rate, config.router_balance_loss, config.router_z_loss) == (1e-3, 1e-4, 0.0)
    assert {name: ADDED[name] for name in ROUTER} == ROUTER
    with pytest.raises(ValueError, match="router_bias_rate=-1.0 must not be negative"):
        train_config(router_bias_rate=-1.0)
    with pytest.raises(ValueError, match=r"router_bias_rate=0.1 changes nothing with a model without experts"):
        check_given(train_config(pattern="-", router_bias_rate=0.1), ["router_bias_rate"])
