"""What XLA is told beyond its defaults, where a whole text goes through a model at once."""

import functools
from collections.abc import Callable
from typing import Any

import jax

# XLA's default on CPUs orders operations so that several can run side by side. In the order for the least memory a
# training step has half the temporaries and is faster: pages that nothing touches take no time.
_ON_A_CPU = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


@functools.cache
def compiler_options() -> dict[str, str] | None:
    """For `jax.jit`, on the platform where arrays lie by default, or None. They change no number."""
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda: 0, compiler_options=_ON_A_CPU).lower().compile()
    except jax.errors.JaxRuntimeError:  # An XLA that has no such option.
        return None
    return _ON_A_CPU


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """`jax.jit` with `compiler_options`, asked for in the first call: a module is imported before JAX's devices are."""
    if function is None:
        return functools.partial(jit, **options)

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return jax.jit(function, compiler_options=compiler_options(), **options)

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return compiled()(*arguments, **named)

    return call
