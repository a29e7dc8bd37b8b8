"""kernels/experts/ against every row through every expert, in float64."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from twotower_jax.kernels import expert_mlp
from twotower_jax.kernels.experts import Weights, reference, relu2, sort_by_expert, tiles, xla
from twotower_jax.kernels.experts import ragged_dot as experts_ragged
from twotower_jax.kernels.experts.xla import tile_size
from twotower_jax.layers.common import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("strict_dtypes")

TOLERANCE = 3e-6
D, F = 5, 7
LITERAL = "literal"


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def draw(seed, tokens, choices, experts, biases=True, sides=(D, F)):
    """x, gates and weights."""
    rng, (model, width) = np.random.default_rng(seed), sides
    weights = Weights(
        normal(rng, experts, model, width),
        normal(rng, experts, width, model),
        normal(rng, experts, width) if biases else None,
        normal(rng, experts, model) if biases else None,
    )
    return normal(rng, tokens, model), rng.uniform(0.1, 1, (tokens, choices)).astype(np.float32), weights


def route(seed, tokens, choices, experts, favourites=None):
    """Different experts for each row, all among the first `favourites`."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(favourites or experts)[:choices] for _ in range(tokens)]).astype(np.int32)


@functools.cache
def compiled(form, activation=relu2):
    """(x, gates, weights, indices) → output and the gradients of its weighted sum in the first three.

    `form` is the literal one or the name of an implementation.
    """

    def run(x, gates, weights, indices):
        def loss(x, gates, weights):
            if form == LITERAL:
                y = reference.expert_mlp_dense(x, indices, gates, weights, activation)
            else:
                y = expert_mlp(x, indices, gates, weights, activation=activation, implementation=form)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y

        gradients, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, gates, weights)
        return y, gradients

    return jax.jit(run)


def check(x, gates, weights, indices, activation=relu2, form="xla"):
    """Returns the gradients."""
    y, gradients = compiled(form, activation)(x, gates, weights, indices)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), (x, gates, weights))
        y_expected, gradients_expected = compiled(LITERAL, activation)(*exact, indices)
    assert y.dtype == jnp.float32
    for found, expected in zip(
        jax.tree.leaves((y, gradients)), jax.tree.leaves((y_expected, gradients_expected)), strict=True
    ):
        expected = np.asarray(expected)
        assert found.shape == expected.shape
        np.testing.assert_allclose(
            np.asarray(found, np.float64), expected, atol=TOLERANCE * np.max(np.abs(expected), initial=1e-3)
        )
    return gradients


@pytest.mark.whole(but=["130-2-3-True", "5-1-16"])
@pytest.mark.parametrize("form", ["xla", "ragged_dot"])
# T, k, E: one token; fewer rows than experts; several tiles an expert; one expert; k = E.
@pytest.mark.parametrize(
    "tokens, choices, experts, biases",
    [(1, 3, 8, True), (5, 1, 16, False), (130, 2, 3, True), (130, 2, 3, False), (9, 1, 1, True), (20, 4, 4, False)],
)
def test_random_routing(tokens, choices, experts, biases, form):
    check(*draw(0, tokens, choices, experts, biases), route(1, tokens, choices, experts), form=form)


@pytest.mark.whole(but=["sides1"])
@pytest.mark.parametrize("sides, turned", [((128, 72), (True, False)), ((72, 128), (False, True))])
def test_ragged_dot_takes_matrices_as_a_tpu_lays_them_down(sides, turned):
    """With that side along the lanes which is a multiple of 128: `up` or `down` the other way around."""
    x, gates, weights = draw(0, 20, 2, 3, sides=sides)
    assert tuple(experts_ragged._lies_turned(*w.shape[1:]) for w in weights[:2]) == turned
    check(x, gates, weights, route(1, 20, 2, 3), form="ragged_dot")


@pytest.mark.parametrize("form", ["xla", "ragged_dot", "dense"])
def test_a_choice_of_no_expert_adds_nothing(form):
    """E in place of an expert: as if its gate were 0, with no gradient from there."""
    x, gates, weights = draw(0, 33, 3, 8)
    indices = route(1, 33, 3, 8)
    nobody = np.random.default_rng(2).random((33, 3)) < 0.4
    y, gradients = compiled(form)(x, gates, weights, np.where(nobody, 8, indices).astype(np.int32))
    expected, others = compiled(LITERAL)(x, np.where(nobody, np.float32(0), gates), weights, indices)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert not np.any(np.asarray(gradients[1])[nobody])
    for found, other in zip(jax.tree.leaves(gradients[2]), jax.tree.leaves(others[2]), strict=True):
        np.testing.assert_allclose(found, other, atol=1e-5 * np.max(np.abs(other)))


def test_single_rows_are_as_in_tiles():
    """On a CPU few rows go one by one; a choice of no expert stands among them. The gradients are those of tiles."""
    x, gates, weights = draw(0, 3, 3, 8)
    indices = route(1, 3, 3, 8)
    indices[1, 2] = 8
    forms = (jax.jit(functools.partial(form, relu2)) for form in (xla._row_by_row, xla._by_tiles))

    def loss(form, x, gates, weights):
        y = form(x, indices, gates, weights)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y

    (single, y), (tiled, expected) = (
        jax.grad(functools.partial(loss, form), (0, 1, 2), has_aux=True)(x, gates, weights) for form in forms
    )
    np.testing.assert_allclose(y, expected, atol=TOLERANCE * np.max(np.abs(expected)))
    jax.tree.map(np.testing.assert_array_equal, single, tiled)


@hypothesis.given(seed=st.integers(0, 2**32 - 1), favourites=st.integers(3, 8))
def test_any_skew_of_the_routing(seed, favourites):
    """From even to three experts taking all rows; those that no row chose get no gradient."""
    gradients = check(*draw(seed, 33, 3, 8), route(seed, 33, 3, 8, favourites))
    for gradient in gradients[2]:
        assert not np.any(gradient[favourites:])


def test_all_rows_to_one_expert():
    """The last one, over many tiles, with all others empty."""
    x, gates, weights = draw(0, 130, 1, 3)
    indices = np.full((130, 1), 2, np.int32)
    assert 2 * tile_size(130, 3) < 130
    gradients = check(x, gates, weights, indices)
    for gradient in gradients[2]:
        assert not np.any(gradient[:2])
        assert np.any(gradient[2])


def test_tiles_that_are_not_full():
    """Nobody, one row, as many as a step of a tile has or one more, a whole tile or one more."""
    sizes = np.array([0, 1, 64, 65, 96, 128, 129, 200])
    rows = int(sizes.sum())
    assert tile_size(rows, len(sizes)) == 128
    indices = np.random.default_rng(1).permutation(np.repeat(np.arange(8), sizes)).astype(np.int32)[:, None]
    layout = tiles.in_tiles(jnp.asarray(indices), 8, 128)
    assert [int(n) for n in layout.filled[: layout.used]] == [1, 64, 65, 96, 128, 128, 1, 128, 72]
    check(*draw(0, rows, 1, 8), indices)


@pytest.mark.whole(but=["silu"])
@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - {"relu2"}))
def test_activations(name):
    check(*draw(0, 20, 2, 4), route(1, 20, 2, 4), ACTIVATIONS[name])


def test_an_expert_that_nobody_chose_is_not_read():
    """Its weights may be anything, which a product over all experts would show."""
    x, gates, weights = draw(0, 33, 3, 8)
    indices = route(1, 33, 3, 8, favourites=5)
    y, gradients = compiled("xla")(x, gates, weights, indices)
    poisoned = jax.tree.map(lambda w: np.concatenate([w[:5], np.full_like(w[5:], np.nan)]), weights)
    again, gradients_again = compiled("xla")(x, gates, poisoned, indices)
    jax.tree.map(np.testing.assert_array_equal, (y, gradients), (again, gradients_again))


def test_a_row_of_nan_stays_alone():
    x, gates, weights = draw(0, 33, 3, 8)
    indices = route(1, 33, 3, 8)
    y, _ = compiled("xla")(x, gates, weights, indices)
    x[7] = np.nan
    poisoned, _ = compiled("xla")(x, gates, weights, indices)
    assert np.all(np.isnan(poisoned[7]))
    np.testing.assert_array_equal(np.delete(poisoned, 7, axis=0), np.delete(y, 7, axis=0))


def test_bfloat16_rows_with_float32_weights():
    """As in training: float32 master weights are rounded to the rows' dtype, their gradients come back float32."""
    x, gates, weights = draw(0, 33, 3, 8)
    x, indices = x.astype(jnp.bfloat16), route(1, 33, 3, 8)
    y, gradients = compiled("xla")(x, gates, weights, indices)
    assert y.dtype == gradients[0].dtype == jnp.bfloat16
    assert gradients[1].dtype == jnp.float32
    assert all(gradient.dtype == jnp.float32 for gradient in gradients[2])
    rounded = jax.tree.map(lambda v: np.asarray(v.astype(jnp.bfloat16), np.float32), weights)
    expected = compiled(LITERAL)(np.asarray(x, np.float32), gates, rounded, indices)
    for found, other in zip(jax.tree.leaves((y, gradients)), jax.tree.leaves(expected), strict=True):
        found = np.asarray(found, np.float32)
        # A hidden layer rounded to 8 bits, squared and summed.
        assert np.linalg.norm(found - other) < 0.02 * np.linalg.norm(other)


@pytest.mark.parametrize("rows, experts", [(1, 1), (6, 128), (49152, 128), (10**6, 1)])
def test_tile_size(rows, experts):
    tile = tile_size(rows, experts)
    assert 8 <= tile <= 256
    assert tile & (tile - 1) == 0
    # Near the share of an expert, within those bounds.
    assert tile == 8 or tile < 2 * rows / experts
    assert tile == 256 or tile >= rows / experts


sorted_by_expert = jax.jit(functools.partial(sort_by_expert, num_experts=5))


@hypothesis.given(seed=st.integers(0, 2**32 - 1), rows=st.sampled_from([1, 127, 128, 129, 700]))
def test_sorting_by_counting_is_a_stable_sort(seed, rows):
    expert = np.random.default_rng(seed).integers(0, 6, rows).astype(np.int32)  # 5 experts, and 5 for none
    place, order, sizes = sorted_by_expert(expert)
    np.testing.assert_array_equal(order, np.argsort(expert, kind="stable"))
    np.testing.assert_array_equal(np.asarray(order)[place], np.arange(rows))
    np.testing.assert_array_equal(sizes, np.bincount(expert, minlength=6)[:5])
