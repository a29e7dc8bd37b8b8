"""Errors of every implementation of every op against float64, by norm.

    python launch/benchmark.py kernel_errors
    python launch/benchmark.py kernel_errors --op=expert_mlp --seeds=3

The largest ‖found − exact‖ / ‖exact‖ over seeded problems of one kind (_error_cases.py). Exact is the literal maths in
float64, of the same inputs. Of outputs and gradients the worst array counts; a gradient is measured against at least a
hundredth of the largest one, since some vanish under strong decay. The kernels run interpreted, those for GPUs slowly.
"""

import itertools

import jax
import numpy as np
from absl import flags

from twotower_jax import kernels
from twotower_jax.benchmarks._error_cases import GPU, GROUPED, RAGGED, TPU, TRITON, XLA, cases
from twotower_jax.benchmarks._errors import errors

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
