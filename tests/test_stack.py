"""How a pattern of layers is split into stretches, and what of it is traced."""

import doctest

import hypothesis
import jax
import jax.numpy as jnp
import pytest
from hypothesis import strategies as st

from twotower_jax import stack
from twotower_jax.execution import Execution
from twotower_jax.layer import Layer
from twotower_jax.layers import registry
from twotower_jax.parameters import bind, parameter_table, unflatten
from twotower_jax.stack import Stretch, segments
from twotower_jax.two_tower import TwoTower

pytestmark = pytest.mark.usefixtures("strict_dtypes")

NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"


@hypothesis.given(
    units=st.lists(st.tuples(st.text("ME*-", min_size=1, max_size=4), st.integers(1, 4)), min_size=1, max_size=3)
)
def test_segments_spell_the_pattern(units):
    pattern = "".join(unit * repeats for unit, repeats in units)
    found = segments(pattern)
    assert "".join(s.unit * s.repeats for s in found) == pattern
    start = 0
    for s in found:
        assert s.start == start
        start += len(s.unit) * s.repeats
    # No worse than the way it was made.
    assert sum(len(s.unit) for s in found) <= sum(len(unit) for unit, _ in units)
    assert segments(pattern, scan_layers=False) == tuple(Stretch(kind, 1, i) for i, kind in enumerate(pattern))


def test_the_example_in_the_docstring():
    result = doctest.testmod(stack)
    assert result.attempted and not result.failed


def test_segments_of_the_release():
    found = segments(NANO)
    assert "".join(s.unit * s.repeats for s in found) == NANO
    # spec/model.md splits it into 7 + 9 + 2 layers; MEMEM*E five times, ME three times, M*E, ME four times is better.
    assert sum(len(s.unit) for s in found) == 14
    assert len(segments("M" * 100)) == 1


def test_what_is_traced_does_not_grow_with_depth(small_config):
    def equations(repeats):
        model = TwoTower(small_config("M*E" * repeats))
        params = unflatten(
            {path: jax.ShapeDtypeStruct(p.shape, jnp.float32) for path, p in parameter_table(model).items()}
        )
        ids, t = jax.ShapeDtypeStruct((1, 8), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.float32)
        jaxpr = jax.make_jaxpr(lambda p, ids, t: bind(model, p).training_logits(ids, ids, t, 4))(params, ids, t)
        return str(jaxpr).count("\n")

    assert equations(2) == equations(30)


def test_layers_one_by_one_are_traced_once_for_each_kind(small_config, monkeypatch):
    model, traced = TwoTower(small_config("M*M-M*-M"), execution=Execution(scan_layers=False)), []

    def causal(layer, *arguments, plain=Layer.causal, **options):
        traced.append(type(layer.mixer))
        return plain(layer, *arguments, **options)

    def trace():
        traced.clear()
        params = unflatten(
            {path: jax.ShapeDtypeStruct(p.shape, jnp.float32) for path, p in parameter_table(model).items()}
        )
        ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        jax.make_jaxpr(lambda p, ids: bind(model, p).context_logits(ids))(params, ids)
        return traced

    monkeypatch.setattr(Layer, "causal", causal)
    assert trace() == (once := [registry.kind(letter) for letter in "M*-"])
    # A layer with a setting of its own is not like the others.
    model.context_tower.segments[4].layers[0].norm.epsilon = 0.1
    assert trace() == [*once, registry.kind("M")]


def test_what_is_not_traced_may_be_looked_at(small_config, random_params, monkeypatch):
    model, seen = TwoTower(small_config("--"), execution=Execution(scan_layers=False)), []

    def causal(layer, h, *arguments, plain=Layer.causal, **options):
        seen.append(float(h[0, 0, 0]))
        return plain(layer, h, *arguments, **options)

    monkeypatch.setattr(Layer, "causal", causal)
    bind(model, random_params(model)).context_logits(jnp.zeros((1, 2), jnp.int32))
    assert len(seen) == 2
