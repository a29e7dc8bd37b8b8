"""Errors of every implementation of every op against float64, by norm.

    python launch/benchmark.py kernel_errors
    python launch/benchmark.py kernel_errors --op=expert_mlp --seeds=3

The largest ‖found − exact‖ / ‖exact‖ over seeded problems of one kind (_error_cases.py). Exact is the literal maths in
float64, of the same inputs. Of outputs and gradients the worst array counts; a gradient is measured against at least a
hundredth of the largest one, since some vanish under strong decay. The kernels run interpreted, those for GPUs slowly.
"""

import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from twotower_jax import kernels
from twotower_jax.benchmarks._error_cases import GPU, GROUPED, RAGGED, TPU, TRITON, XLA, Case, cases

_IMPLEMENTATIONS = [XLA, TPU, GPU, TRITON, GROUPED, RAGGED]


def define_flags() -> None:
    flags.DEFINE_integer("seeds", 1, "Problems of each kind.", lower_bound=1)
    flags.DEFINE_multi_enum("op", list(kernels.OPS), list(kernels.OPS), "May be given several times.")
    flags.DEFINE_multi_enum("implementation", _IMPLEMENTATIONS, _IMPLEMENTATIONS, "May be given several times.")


def main() -> None:
    values = flags.FLAGS
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {values.seeds} problems of each kind and length\n")
    print("| op | problems | implementation | inputs | outputs | gradients |")
    print("|---|---|---|---|--:|--:|")
    wanted = (case for case in cases() if case.op in values.op)
    for (op, kind), group in itertools.groupby(wanted, lambda case: (case.op, case.kind)):
        group = list(group)
        for name, dtypes in group[0].implementations.items():
            for dtype in dtypes if name in values.implementation else ():
                found = [errors(case, name, dtype, seed) for case in group for seed in range(values.seeds)]
                outputs, gradients = np.max(found, axis=0)
                gradients = f"{gradients:.1e}" if name in group[0].gradients else ""
                print(f"| {op} | {kind} | {name} | {dtype} | {outputs:.1e} | {gradients} |", flush=True)


def errors(case: Case, name: str, dtype: str, seed: int) -> tuple[float, float]:
    """Errors of one problem's outputs and of its gradients (0 where there are none)."""
    rng = np.random.default_rng([seed, zlib.crc32(f"{case.op}, {case.kind}".encode())])
    arrays = case.arrays(rng, jnp.dtype(dtype))
    differentiable = name in case.gradients
    found = _run(case, name, differentiable, arrays)
    with jax.enable_x64(True):
        exact = _run(case, case.exact, differentiable, jax.tree.map(_widened, arrays))
    return _worst(found[0], exact[0], 0), _worst(found[1], exact[1], 0.01)


def _widened(v: jax.Array) -> np.ndarray:
    whole = jnp.issubdtype(v.dtype, jnp.integer)
    # The scales of quantized matrices stay as they are: they are no argument of their own.
    return np.asarray(v) if whole else np.asarray(v, np.float64)


def _run(case: Case, name: str, differentiable: bool, arrays: list) -> tuple[list, list]:
    """The outputs, and the gradients of a weighted sum of them in all floating-point arguments."""
    floating = [i for i, v in enumerate(arrays) if jnp.issubdtype(jax.tree.leaves(v)[0].dtype, jnp.floating)]

    def loss(*arrays):
        outputs = case.run(name, *arrays)
        rng = np.random.default_rng(0)
        total = 0
        for v in outputs:
            # Numbers of 8 bits, which are the same in every dtype.
            weights = jnp.asarray(rng.standard_normal(v.shape), jnp.bfloat16).astype(v.dtype)
            total += jnp.sum(v * weights, dtype=jnp.promote_types(v.dtype, jnp.float32))
        return total, outputs

    if not differentiable:
        return jax.jit(lambda *arrays: case.run(name, *arrays))(*arrays), []
    gradients, outputs = jax.jit(jax.grad(loss, argnums=floating, has_aux=True))(*arrays)
    return outputs, gradients


def _worst(found, exact, least: float) -> float:
    """The largest error, each array's norm counting as at least so much of the largest one."""
    norms = [np.linalg.norm(b) for b in exact]
    floor = max([1e-30, *(least * norm for norm in norms)])
    differences = (np.linalg.norm(np.asarray(a, np.float64) - np.asarray(b)) for a, b in zip(found, exact, strict=True))
    return max((d / max(norm, floor) for d, norm in zip(differences, norms, strict=True)), default=0.0)
