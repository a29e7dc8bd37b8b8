"""Times the ops: every implementation that runs here, against simpler forms, and against what the machine can do.

    python launch/benchmark.py kernels                                    # the shapes of configs/tiny.py
    python launch/benchmark.py kernels --shape=nano --dtype=bfloat16      # layers of the 30B model, for an accelerator

Everything compared runs in one process, in turns, and the median of the turns counts. On a CPU these are processor
seconds on one thread, which a busy machine changes less than the time of day; on an accelerator the time of some calls
behind one another, so that the gaps between them do not count. `of matrix rate` is the time that the case's own
operations would take at the rate of a large matrix product of the same dtype in this run; `of bandwidth` the time that
reading what must be read and writing what must be written once would take at the rate of copying a large array. A form
may do more than either counts. Temporaries are what the compiled form needs beside arguments and results.
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import flags

from twotower_jax.benchmarks._kernel_forms import MAKERS, SHAPES, Form, forms
from twotower_jax.benchmarks._one_thread import use_one_thread


def define_flags() -> None:
    flags.DEFINE_enum("shape", "tiny", list(SHAPES), "Of the layers.")
    flags.DEFINE_integer("chunk_size", None, "Q, instead of the shape's.", lower_bound=1)
    flags.DEFINE_integer("turns", 15, "How often each form runs.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["bfloat16", "float32"], "Of activations and weights.")
    flags.DEFINE_list("op", list(MAKERS), "Which ops.")
    flags.DEFINE_list(
        "skip",
        None,
        "Implementations to leave out; default: with --shape=nano reference and dense, which take too much.",
    )


def main() -> None:
    use_one_thread()
    values = flags.FLAGS
    shape, dtype = SHAPES[values.shape], jnp.dtype(values.dtype)
    if values.chunk_size:
        shape = shape._replace(chunk=values.chunk_size)
    if unknown := sorted(set(values.op) - set(MAKERS)):
        raise ValueError(f"--op: there is no op {unknown[0]!r}; there are {', '.join(MAKERS)}")
    skip = values.skip if values.skip is not None else (["reference", "dense"] if values.shape == "nano" else [])
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, {device}, {values.dtype}, {shape}, median of {values.turns} turns\n", flush=True)
    ceilings = _ceilings(dtype)
    product, copy = (_Timed(function, arguments) for function, arguments, _ in ceilings)
    cases: dict[str, list[tuple[Form, _Timed]]] = {}
    for op in values.op:
        for form in forms(shape, dtype, [op], skip):
            cases.setdefault(form.case, []).append((form, _Timed(form.function, form.arguments)))
    everything = [product, copy, *(timed for case in cases.values() for _, timed in case)]
    for _ in range(values.turns):
        for timed in everything:
            timed.run()
    rate, bandwidth = ceilings[0][2] / product.median, ceilings[1][2] / copy.median
    print(f"large matrix product {rate / 1e9:,.0f} GFLOP/s, copy {bandwidth / 1e9:,.1f} GB/s\n")
    print("| case | form | median | against xla | of matrix rate | of bandwidth | temporaries |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for case in cases.values():
        xla = [timed.median for form, timed in case if form.name == "xla"]
        for form, timed in case:
            against = f"{timed.median / xla[0]:.2f}" if xla else ""
            fractions = f"{form.operations / rate / timed.median:.1%} | {_moved(form) / bandwidth / timed.median:.1%}"
            print(
                f"| {form.case} | {form.name} | {timed.median * 1e3:.3f} ms | {against} | {fractions} | "
                f"{timed.temporaries / 2**20:,.1f} MiB |"
            )


def _moved(form: Form) -> int:
    """Bytes that must be read and written."""
    if form.moved is not None:
        return form.moved
    results = jax.tree.leaves(jax.eval_shape(form.function, *form.arguments))
    return sum(v.size * v.dtype.itemsize for v in [*jax.tree.leaves(form.arguments), *results])


class _Timed:
    """A compiled function with its arguments, and the seconds that its runs took."""

    _ENOUGH = 0.02  # Seconds of work behind one another, on an accelerator.

    def __init__(self, function, arguments):
        self.compiled = jax.jit(function).lower(*arguments).compile()
        self.arguments = arguments
        self.temporaries = self.compiled.memory_analysis().temp_size_in_bytes
        self.seconds: list[float] = []
        self.on_cpu = jax.default_backend() == "cpu"
        self.calls = 1
        self._timed()
        if not self.on_cpu:
            self.calls = max(1, int(self._ENOUGH / self._timed()))

    def run(self) -> None:
        """One turn."""
        self.seconds.append(self._timed())

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def _timed(self) -> float:
        clock = time.process_time if self.on_cpu else time.perf_counter
        # Not counted: what the form before has left of memory and caches is not this one's.
        jax.block_until_ready(self.compiled(*self.arguments))
        start = clock()
        for _ in range(self.calls):
            result = self.compiled(*self.arguments)
        jax.block_until_ready(result)
        return (clock() - start) / self.calls


def _ceilings(dtype: jnp.dtype) -> tuple[tuple[Callable, tuple, int], tuple[Callable, tuple, int]]:
    """A product of large matrices and its operations, a pass over a long array and its bytes."""
    size, length = (1024, 2**24) if jax.default_backend() == "cpu" else (8192, 2**28)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    keys = jax.random.split(jax.random.key(0), 2)
    square, long = jax.random.normal(keys[0], (size, size), dtype), jax.random.normal(keys[1], (length,))
    product = (lambda a: jnp.matmul(a, a, precision=precision)), (square,), 2 * size**3
    return product, ((lambda a: a + 1), (long,), 2 * long.nbytes)
