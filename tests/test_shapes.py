"""The shapes in signatures are checked where tests run."""

import importlib

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
import shapes

from twotower_jax import randomness
from twotower_jax.diffusion import next_tokens, sample_tokens
from twotower_jax.execution import Execution
from twotower_jax.layers.vocabulary import lookup
from twotower_jax.parameters import bind
from twotower_jax.two_tower import Backbone


@pytest.mark.parametrize(
    "call",
    [
        lambda: next_tokens(jnp.zeros((2, 3), jnp.int32), jnp.ones(3, bool)),  # three rows, and not two
        lambda: next_tokens(jnp.zeros((2, 3), jnp.int32), jnp.ones(2, jnp.int32)),  # no bool
        lambda: sample_tokens(randomness.key(0), jnp.zeros((1, 4))),  # one key, and not one per row
        lambda: lookup(jnp.zeros((5, 4)), jnp.zeros(3, jnp.int32)),  # no batch
    ],
)
def test_a_wrong_shape_is_refused(call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


def test_methods_of_modules_are_checked(small_config, random_params):
    model = Backbone(small_config("M"), Execution())
    model = bind(model, random_params(model))
    assert jax.jit(lambda ids: model.logits(ids))(jnp.zeros((1, 2), jnp.int32)).shape == (1, 2, 40)
    with pytest.raises(jaxtyping.TypeCheckError):
        model.tower.extend(jnp.zeros((2, 3), jnp.int32), jnp.zeros(1, jnp.int32), capacity=3)


@pytest.mark.parametrize("name", shapes.MODULES)
def test_all_listed_modules_exist(name):
    importlib.import_module(f"twotower_jax.{name}")


def test_unchecked_leaves_the_packages_own_errors():
    with shapes.unchecked(), pytest.raises(TypeError, match="shape"):
        next_tokens(jnp.zeros((2, 3), jnp.int32), jnp.ones(3, bool))
    with pytest.raises(jaxtyping.TypeCheckError):
        next_tokens(jnp.zeros((2, 3), jnp.int32), jnp.ones(3, bool))
