"""Every kernel's time, beside those of XLA's form and of what libraries have, in turns with a product and a copy."""

import functools
import importlib.util
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from twotower_jax import kernels
from twotower_jax.benchmarks._kernel_forms import CUDNN, MAKERS, forms
from twotower_jax.benchmarks._kernel_goals import ONE_MATRIX
from twotower_jax.benchmarks._mamba_ssm import MambaSSM
from twotower_jax.benchmarks._timing import Timed, ceilings
from twotower_jax.benchmarks.accelerator.errors import sources
from twotower_jax.benchmarks.accelerator.units import Scale, Unit

_SECONDS = 100.0
_FIRST, _LATER = 1, 7
_MAMBA_SSM = "mamba_ssm"
# Too slow, or too large, to be compared with at a model's shapes.
_LEFT_OUT = ("reference", "dense")


def units(scale: Scale) -> Iterator[tuple[int, Unit]]:
    """With their ranks: what the platform would choose, XLA's form and the plainest product first."""
    for op in MAKERS:
        if op == "expert_mlp" and "E" not in scale.model.hybrid_override_pattern:
            continue
        for later, name in _names(op):
            unit = Unit(
                "speed",
                f"{op}, {name}",
                {"op": op, "form": name, "model": scale.name, "dtype": scale.dtype, "shape": scale.shape._asdict()},
                _SECONDS * scale.patience,
                (*sources(op), "twotower_jax/benchmarks/_kernel_forms.py"),
                functools.partial(_times, scale, op, name),
            )
            yield _LATER if later else _FIRST, unit


def _names(op: str) -> Iterator[tuple[bool, str]]:
    """The forms of an op that may run here, and whether they can wait."""
    backend = jax.default_backend()
    own = [name for name in kernels.implementations(op) if kernels.platform_of(op, name) == backend]
    yield from ((False, name) for name in [*own[:1], "xla"])
    if op == "expert_mlp":
        yield from ((False, name) for name in [*own[1:], ONE_MATRIX, "ragged_dot"])
        return
    if op == "attention" and backend == "gpu":
        yield False, CUDNN
    if op == "ssd" and backend == "gpu" and importlib.util.find_spec(_MAMBA_SSM) is not None:
        yield False, _MAMBA_SSM
    if "stored_states" in kernels.implementations(op):
        yield False, "stored_states"
    yield from ((True, name) for name in own[1:])


@functools.cache
def _ceilings(dtype: str) -> tuple[Timed, Timed]:
    product, copy = ceilings(jnp.dtype(dtype))
    return Timed(product), Timed(copy)


def measured_ceilings(dtype: str, turns: int) -> tuple[float, float]:
    """FLOP/s of a large matrix product, and bytes a second of a copy, now."""
    product, copy = _ceilings(dtype)
    product.seconds, copy.seconds = [], []
    for _ in range(turns):
        product.run()
        copy.run()
    return product.form.operations / product.median, copy.form.must_move / copy.median


def _times(scale: Scale, op: str, name: str) -> dict[str, Any]:
    library = MambaSSM() if name == _MAMBA_SSM else None
    others = [one for one in kernels.implementations(op) if one != name and (library is None or one != "xla")]
    wanted, refused = [], {}
    for form in forms(scale.shape, jnp.dtype(scale.dtype), [op], others, library, refused):
        if form.name.split(",")[0] == name.split(",")[0]:
            wanted.append(form)
    if not wanted:
        raise ValueError(refused.get(name, f"{name} takes none of these shapes"))
    product, copy = _ceilings(scale.dtype)
    product.seconds, copy.seconds = [], []
    cases, timed = [], []
    for form in wanted:
        # One that does not compile, or does not fit, leaves the others.
        try:
            timed.append(Timed(form))
        except jax.errors.JaxRuntimeError as error:
            cases.append({"case": form.case, "form": form.name, "error": str(error).splitlines()[0][:200]})
    for _ in range(scale.turns):
        for one in (product, copy, *timed):
            one.run()
    for one in timed:
        form = one.form
        found = {"case": form.case, "form": form.name, "seconds": one.median, "temporaries": one.temporaries}
        cases.append(found | {"operations": form.operations, "must_move": form.must_move})
    rate = product.form.operations / product.median
    return {"cases": cases, "rate": rate, "bandwidth": copy.form.must_move / copy.median}
