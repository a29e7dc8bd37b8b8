"""Checks, while tests run, that arrays have the shapes and kinds of dtype that signatures say.

`install` has jaxtyping wrap the functions of these modules as they are imported; the package itself checks nothing. It
happens while functions are traced, so that compiled programs are the same.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
from beartype import BeartypeConf, beartype

# Not `layers.registry`, which looks at the frame that calls it.
MODULES = (
    *("cache", "layer", "stack", "tower", "two_tower"),
    *(
        f"layers.{name}"
        for name in ("attention", "common", "expert_parallel", "experts", "mamba", "mixer", "mlp")
        + ("sequence_parallel", "time_conditioning", "vocabulary")
    ),
    "diffusion",
    *(f"generation.{name}" for name in ("modes", "score", "slots", "speculative")),
)

# A whole number may stand for a float.
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def install() -> None:
    """Before the package is imported."""
    jaxtyping.install_import_hook([f"twotower_jax.{name}" for name in MODULES], "shapes.check")


def check(function: Callable) -> Callable:
    """`function` with its arguments and result checked, if its signature says a shape; else as it is."""
    if not any("jaxtyping." in repr(a) for a in function.__annotations__.values()):
        return function
    checked = _checked(function)

    @functools.wraps(function)
    def with_jax_arrays(*args, **named):
        return checked(*map(_jax_array, args), **{name: _jax_array(value) for name, value in named.items()})

    return with_jax_arrays


def _jax_array(value: Any) -> Any:
    """A NumPy array as one of JAX's, which takes it for one; made outside of any trace, so that none sees it."""
    if not isinstance(value, np.ndarray | np.generic):
        return value
    with jax.ensure_compile_time_eval():
        return jnp.asarray(value)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """What a user sees, who has the package's own errors and not these."""
    before: Any = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
