"""What generation takes of one device that is not there: its three functions, compiled for it."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from twotower_jax.config import ModelConfig
from twotower_jax.execution import Execution
from twotower_jax.generation.rehearsal import abstract_params
from twotower_jax.parameters import bind, parameter_table
from twotower_jax.planning import checks
from twotower_jax.planning.hardware import GIB, Hardware
from twotower_jax.planning.plan import HEADROOM, compile_or_refuse
from twotower_jax.planning.predict import Prediction, as_figures, predict
from twotower_jax.planning.rates import RATES
from twotower_jax.quantization import Method
from twotower_jax.sharding import MeshShape, make_mesh
from twotower_jax.train.flops import tower_flops
from twotower_jax.two_tower import TwoTower

EVALUATION = "denoiser evaluation"


class Function(NamedTuple):
    """One compiled function.

    Attributes:
      temporaries: bytes that it needs beside weights and cache. compile_seconds: that compiling took.
      kernel_flops: what its kernels compute. predicted: how long a call takes; None where the rates are not known.
      refused: why the compiler made no program, in its words: all of it does not fit.
    """

    name: str
    temporaries: int
    compile_seconds: float
    kernel_flops: float = 0.0
    predicted: Prediction | None = None
    refused: str | None = None


class ServingPlan(NamedTuple):
    """Both towers in bfloat16 or quantized on one device, `batch` rows of `capacity` positions. Bytes.

    Attributes:
      weights, cache: what stays. functions: what each needs for a while; the largest counts.
      processor_seconds: that compiling took on all cores. gates: the checks of all functions.
    """

    hardware: str
    batch: int
    capacity: int
    block_size: int
    weights: int
    cache: int
    memory: int
    functions: list[Function]
    processor_seconds: float
    gates: list[checks.Check]
    peak_flops: float
    method: str | None = None

    @property
    def total(self) -> int:
        return self.weights + self.cache + max(function.temporaries for function in self.functions)

    @property
    def fits(self) -> bool:
        return self.total <= (1 - HEADROOM) * self.memory

    def block_seconds(self, evaluations: int) -> float | None:
        """Predicted, for a block of every row: evaluations of the denoiser, then the extension of the cache."""
        _, evaluation, extension = (function.predicted for function in self.functions)
        return evaluation and extension and evaluations * evaluation.seconds + extension.seconds


def plan_serving(
    model_config: ModelConfig,
    hardware: Hardware,
    *,
    batch: int,
    capacity: int,
    block_size: int,
    quantize: Method | None = None,
    keep: Callable[[str], None] = lambda text: None,
) -> ServingPlan:
    """Compiles prefill of a prompt's piece, a denoiser's evaluation and the extension of the cache for one device.

    Args:
      keep: called with each compiled program, empty where there is none.
    """
    mesh = make_mesh(MeshShape(), list(hardware.devices)[:1])
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    # As generate.py has it on an accelerator: a scan over stacked layers would copy each layer's experts.
    model = TwoTower(model_config, execution=Execution(dtype=jnp.bfloat16, scan_layers=False))

    def abstract(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    table, platform = parameter_table(model), hardware.devices[0].platform
    params = abstract_params(model, quantize, jnp.dtype(jnp.bfloat16), lambda parameter: here, platform)
    cache = jax.tree.map(
        lambda leaf: abstract(leaf.shape, leaf.dtype),
        jax.eval_shape(lambda: model.context_tower.empty_cache(batch, capacity)),
    )
    piece, block = abstract((1, min(256, capacity)), jnp.int32), abstract((batch, block_size), jnp.int32)
    one_row = jax.tree.map(
        lambda leaf: abstract(leaf.shape, leaf.dtype),
        jax.eval_shape(lambda: model.context_tower.empty_cache(1, capacity)),
    )
    lengths, t = abstract((batch,), jnp.int32), abstract((batch,), jnp.float32)
    calls = {
        "prefill of a piece of one row": (
            lambda p, *a: bind(model, p).extend(*a),
            (piece, abstract((1,), jnp.int32), one_row),
        ),
        EVALUATION: (lambda p, *a: bind(model, p).denoise(*a), (block, t, cache)),
        "extension by a block": (lambda p, *a: bind(model, p).extend(*a), (block, lengths, cache)),
    }
    functions, copies, used = [], [], time.process_time()
    rates = RATES.get(hardware.name.partition(":")[0])
    resident = _bytes((params, cache))
    with jax.set_mesh(mesh):
        for name, (function, arguments) in calls.items():
            started = time.monotonic()
            # What extends a cache is given the old one to write into.
            donated = () if name == EVALUATION else (len(arguments),)
            compiled, peak, refused = compile_or_refuse(
                jax.jit(function, donate_argnums=donated).lower(params, *arguments)
            )
            seconds, program = time.monotonic() - started, compiled.as_text() if compiled else ""
            keep(program)
            tokens = arguments[0].shape[0] * arguments[0].shape[1]
            kernel_flops = tokens * tower_flops(model_config, capacity, in_kernels=True)
            predicted = predict(program, rates, hardware.peak_flops, kernel_flops) if program and rates else None
            copies += checks.weight_copies(program, table.values(), mesh.shape).found
            if compiled:
                needed = compiled.memory_analysis()
                temporaries = needed.temp_size_in_bytes + needed.output_size_in_bytes - needed.alias_size_in_bytes
            else:
                temporaries = max(0, peak - resident)
            functions.append(Function(name, temporaries, seconds, kernel_flops, predicted, refused))
    used = time.process_time() - used
    return ServingPlan(
        hardware=hardware.name,
        batch=batch,
        capacity=capacity,
        block_size=block_size,
        weights=_bytes(params),
        cache=_bytes(cache),
        memory=hardware.memory,
        functions=functions,
        processor_seconds=used,
        gates=[checks.Check(checks.WEIGHT_COPIES, sorted(set(copies)))],
        peak_flops=hardware.peak_flops,
        method=None if quantize is None else quantize.name,
    )


def describe(plan: ServingPlan) -> str:
    """Some lines."""
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines = [
        f"{plan.hardware}: both towers in {plan.method or 'bfloat16'} on one device, {plan.batch} rows of "
        f"{plan.capacity} positions, blocks of {plan.block_size}",
        f"  GiB: weights {plan.weights / GIB:.2f}, caches {plan.cache / GIB:.2f}, in all {plan.total / GIB:.2f} of "
        f"{plan.memory / GIB:.0f}: {verdict} with {HEADROOM:.0%} to stay free",
    ]
    for function in plan.functions:
        needs = f"{function.temporaries / GIB:.2f} GiB more"
        lines.append(f"  {function.name}: {needs}, compiled in {function.compile_seconds:.0f} s")
        if found := function.predicted:
            lines.append(f"    predicted {1e3 * found.seconds:.2f} ms, limited by {found.limit}")
        if function.refused:
            lines.append(f"    the compiler makes no program: {function.refused}")
    return "\n".join([*lines, *checks.describe(plan.gates)])


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def as_json(plan: ServingPlan) -> dict[str, Any]:
    """All figures, JSON values."""
    functions = [function._asdict() | {"predicted": as_figures(function.predicted)} for function in plan.functions]
    more = {"total": plan.total, "fits": plan.fits, "functions": functions}
    return plan._asdict() | more | {"gates": {check.name: check.found for check in plan.gates}}
