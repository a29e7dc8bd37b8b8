"""Every kernel against float64 on the device, outputs and gradients, in problems of the model's shapes."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax

from twotower_jax import kernels
from twotower_jax.benchmarks import _error_cases as problems
from twotower_jax.benchmarks._error_cases import Case
from twotower_jax.benchmarks._errors import compared, oracle, problem
from twotower_jax.benchmarks.accelerator.units import Scale, Unit

_INTERPRETED = "_interpret"
_SECONDS = 75.0
_FIRST, _LATER = 0, 6


def units(scale: Scale) -> Iterator[tuple[int, Unit]]:
    """With their ranks: ordinary problems in the model's dtype first."""
    for rank, case in _cases(scale):
        case = _here(case)
        for dtype in ("bfloat16", "float32"):
            for name, dtypes in case.implementations.items():
                if dtype not in dtypes:
                    continue
                parameters = {"op": case.op, "problem": case.kind, "implementation": name, "dtype": dtype}
                parameters |= {"model": scale.name, "length": scale.length}
                unit = Unit(
                    "errors",
                    f"{case.op}, {case.kind}, {name}, {dtype}",
                    parameters,
                    _SECONDS * scale.patience,
                    sources(case.op),
                    functools.partial(_errors, case, name, dtype),
                )
                yield rank + _LATER * (dtype != scale.dtype), unit


# Where an op's files are not in a folder of its own name.
_FOLDERS = {"two_tower_ssd": "ssd", "block_causal_conv": "causal_conv", "expert_mlp": "experts"}


def sources(op: str) -> tuple[str, ...]:
    """Folders whose files decide what an op's implementations compute."""
    return f"kernels/{_FOLDERS.get(op, op)}", "kernels/hardware", "kernels/numerics"


def _cases(scale: Scale) -> Iterator[tuple[int, Case]]:
    sizes, length = scale.sizes, scale.length
    # In blocks the GPU kernel takes heads of 64 or more.
    small = scale.name == "tiny"
    of_block = sizes._replace(heads=2, head_dim=64, state=64) if small else sizes
    scans = ("ssd", "two_tower_ssd")
    yield from ((_FIRST, problems.scan(op, "mild decays", sizes, length, 0.0)) for op in scans)
    yield _FIRST, problems.block_scan("mild decays", of_block, sizes.block, 0.0)
    convolutions = ("causal_conv", "block_causal_conv")
    yield from ((_FIRST, problems.convolution(op, "inputs of 1", sizes, length)) for op in convolutions)
    for way in "causal", "blocks after the context", "a block after a cache":
        yield _FIRST, problems.attention(way, sizes, length)
    has_experts = "E" in scale.model.hybrid_override_pattern
    if has_experts:
        yield _FIRST, problems.experts("rows of 1", sizes, 20 if small else 1000)
    yield from ((_LATER, problems.scan(op, "decays of 1e6 beside mild", sizes, length, 1e6)) for op in scans)
    yield _LATER, problems.block_scan("decays of 1e6 beside mild", of_block, 1, 1e6)
    of_documents = {"documents": True}
    if small:  # As long as it takes for documents and scores to matter.
        return
    for op in convolutions:
        yield _LATER, problems.convolution(op, "inputs of 1, documents", sizes, 144, **of_documents)
    yield _LATER, problems.attention("blocks after the context", sizes, length, ", documents", **of_documents)
    yield _LATER, problems.attention("causal", sizes, length, ", scores of 50", 50.0)
    if has_experts:
        yield _LATER, problems.experts("all rows to one of them", sizes, 1000)
        if jax.default_backend() != "tpu":  # where quantized experts are stored in a form of their own
            yield from ((_LATER, problems.experts("rows of 1", sizes, 96, bits)) for bits in (8, 4))


def _here(case: Case) -> Case:
    """The case with the implementations that run on this platform; interpreters where nothing else does."""
    backend = jax.default_backend()
    if backend == "cpu":
        return case
    names = {}
    for name, dtypes in case.implementations.items():
        compiled = name.removesuffix(_INTERPRETED)
        if compiled == problems.RAGGED or kernels.platform_of(case.op, compiled) in (None, backend):
            names[compiled] = dtypes
    gradients = tuple(name.removesuffix(_INTERPRETED) for name in case.gradients)
    return case._replace(implementations=names, gradients=gradients)


# The same problem in all implementations, one after the other.
_last: dict[tuple, tuple] = {}


def _errors(case: Case, name: str, dtype: str) -> dict[str, Any]:
    differentiable = name in case.gradients
    key = case.op, case.kind, dtype, differentiable
    if key not in _last:
        _last.clear()
        arrays = problem(case, dtype, 0)
        _last[key] = arrays, oracle(case, differentiable, arrays)
    outputs, gradients = compared(case, name, *_last[key])
    if not math.isfinite(outputs + gradients):
        raise FloatingPointError(f"not finite: errors of {outputs:.1e} in outputs and {gradients:.1e} in gradients")
    return {"outputs": outputs, "gradients": gradients if differentiable else None}
