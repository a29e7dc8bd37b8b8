"""compiling.py: what XLA is told on a CPU."""

import jax
import jax.numpy as jnp
import pytest

from twotower_jax import compiling


@pytest.fixture
def asked_anew():
    compiling.compiler_options.cache_clear()
    yield
    compiling.compiler_options.cache_clear()


def test_the_order_takes_less_memory_and_gives_the_same_numbers():
    def smallest(weights, x):
        return [jnp.sort(x * w, axis=0)[0] for w in weights]  # One after the other, or all sorted first.

    arguments = [jnp.full(64, i + 1.0) for i in range(8)], jnp.cos(jnp.arange(256 * 64.0)).reshape(256, 64)
    options = (None, compiling.compiler_options())
    default, told = (jax.jit(smallest, compiler_options=given).lower(*arguments).compile() for given in options)
    least, other = (compiled.memory_analysis().temp_size_in_bytes for compiled in (told, default))
    assert least < other / 2
    for found, expected in zip(told(*arguments), default(*arguments), strict=True):
        assert jnp.array_equal(found, expected)


def test_a_compiler_without_the_option_is_told_nothing(monkeypatch, asked_anew):
    monkeypatch.setattr(compiling, "_ON_A_CPU", {"xla_cpu_no_such_option": "1"})
    assert compiling.compiler_options() is None


def test_jit_takes_what_jax_takes():
    @compiling.jit(static_argnames="power", donate_argnames="x")
    def of(x, *, power):
        """A power."""
        return x**power

    assert of.__doc__ == "A power."
    x = jnp.full(3, 2.0)
    assert of(x, power=3).tolist() == [8.0] * 3
    assert x.is_deleted()
    assert compiling.jit(lambda x: x + 1)(1) == 2
