"""Checks, while tests run, that arrays have the shapes and kinds of dtype that signatures say.

`install` has jaxtyping wrap the functions of these modules as they are imported; the package itself checks nothing. It
happens while functions are traced, so that compiled programs are the same.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
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
    return _checked(function) if any("jaxtyping." in repr(a) for a in function.__annotations__.values()) else function


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """What a user sees, who has the package's own errors and not these."""
    before: Any = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
