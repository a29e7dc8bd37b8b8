"""Times the scans: every implementation that runs here, against simpler forms, and against what the machine can do.

    python launch/benchmark.py kernels                  # the shapes of configs/tiny.py
    python launch/benchmark.py kernels --shape=nano     # one layer of the 30B model, for an accelerator

Everything compared runs in one process, in turns, and the median of the turns counts; on a CPU processor seconds do,
which a busy machine changes less than the time of day. `of matrix rate` is the time that the recurrence's own products
(2 · 2 · B·L·H·P·N operations forward, three times that with gradients) would take at the rate of a large matrix product
of float32 in this run; `of bandwidth` the time that reading every argument and writing every result once would take at
the rate of copying a large array. A form may do more than either counts.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from twotower_jax import kernels


class Shape(NamedTuple):
    """One Mamba layer: B, L, H, P, G, N, S, Q."""

    batch: int
    length: int
    heads: int
    head_dim: int
    groups: int
    state: int
    block: int
    chunk: int


_SHAPES = {
    "tiny": Shape(8, 256, 8, 32, 2, 32, 16, 64),
    "wide": Shape(1, 1024, 16, 64, 2, 128, 16, 128),
    "nano": Shape(1, 8192, 64, 64, 8, 128, 16, 128),
}


class Form(NamedTuple):
    """One way to compute a case.

    Attributes:
      case: what is computed; forms of one case are compared.
      name: of the form. function, arguments: what is timed.
      operations: of the recurrence itself.
    """

    case: str
    name: str
    function: Callable
    arguments: tuple
    operations: int


def define_flags() -> None:
    flags.DEFINE_enum("shape", "tiny", list(_SHAPES), "Of the layer.")
    flags.DEFINE_integer("chunk_size", None, "Q, instead of the shape's.", lower_bound=1)
    flags.DEFINE_integer("turns", 15, "How often each form runs.", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["bfloat16", "float32"], "Of x, B and C.")


def main() -> None:
    values = flags.FLAGS
    shape = _SHAPES[values.shape]
    if values.chunk_size:
        shape = shape._replace(chunk=values.chunk_size)
    forms = list(_forms(shape, jnp.dtype(values.dtype)))
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, {device}, {values.dtype}, {shape}, median of {values.turns} turns\n", flush=True)
    compiled = [(jax.jit(form.function), form.arguments) for form in forms]
    *seconds, product, copy = _medians([*compiled, *_ceilings()], values.turns)
    rate, bandwidth = 2 * _PRODUCT**3 / product, 2 * 4 * _COPIED / copy
    print(f"large matrix product {rate / 1e9:,.0f} GFLOP/s, copy {bandwidth / 1e9:,.1f} GB/s\n")
    print("| case | form | median | against xla | of matrix rate | of bandwidth |")
    print("|---|---|--:|--:|--:|--:|")
    xla = {form.case: t for form, t in zip(forms, seconds, strict=True) if form.name == "xla"}
    for form, t in zip(forms, seconds, strict=True):
        moved = sum(v.nbytes for v in jax.tree.leaves(form.arguments))
        moved += sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(jax.eval_shape(form.function, *form.arguments)))
        fractions = f"{form.operations / rate / t:.1%} | {moved / bandwidth / t:.1%}"
        print(f"| {form.case} | {form.name} | {t * 1e3:.2f} ms | {t / xla[form.case]:.2f} | {fractions} |")


def _forms(s: Shape, dtype: jnp.dtype) -> Iterator[Form]:
    own, context = _arguments(0, s, dtype), _arguments(1, s, dtype)
    state = jnp.ones((s.batch, s.heads, s.head_dim, s.state), jnp.float32)
    operations = 4 * s.batch * s.length * s.heads * s.head_dim * s.state

    for name in _runnable("ssd"):

        def one(*arrays, name=name):
            *arrays, initial = arrays
            return kernels.ssd(*arrays, initial_state=initial, chunk_size=s.chunk, implementation=name)

        yield Form("ssd", name, one, (*own, state), operations)
        yield Form("ssd, gradient", name, _gradient(one, 6), (*own, state), 3 * operations)

    both = []
    for name in _runnable("two_tower_ssd"):

        def two(*arrays, name=name):
            return kernels.two_tower_ssd(*arrays, block_size=s.block, chunk_size=s.chunk, implementation=name)

        both.append((two, name))
    arrays = *own, *context[:4]
    for function, name in both:
        yield Form("two_tower_ssd", name, function, arrays, 2 * operations)
        yield Form("two_tower_ssd, context frozen, gradient", name, _gradient(function, 5), arrays, 4 * operations)
        yield Form("two_tower_ssd, gradient", name, _gradient(function, 9), arrays, 6 * operations)

    block = _block_arguments(s, dtype)
    for name in _runnable("block_scan"):

        def fused(*arrays, name=name):
            return kernels.block_scan(*arrays, groups=s.groups, epsilon=1e-5, implementation=name)[0]

        yield Form(f"block_scan, {s.block} tokens", name, fused, block, operations * s.block // s.length)


def _runnable(op: str) -> list[str]:
    """What runs here: not the interpreter, which says nothing about speed, and no other platform's kernels."""
    foreign = set() if jax.default_backend() == "tpu" else {"pallas_tpu"}
    return [name for name in kernels.implementations(op) if name not in foreign | {"pallas_tpu_interpret"}]


def _gradient(function, count):
    def loss(*arrays):
        return sum(jnp.sum(jnp.square(v)) for v in jax.tree.leaves(function(*arrays)))

    return jax.grad(loss, argnums=tuple(range(count)))


def _arguments(seed: int, s: Shape, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """x, dt, log_decay, b, c."""
    rng = np.random.default_rng(seed)

    def normal(*sizes):
        return jnp.asarray(rng.standard_normal(sizes), dtype)

    dt = jnp.asarray(rng.uniform(0.01, 0.5, (s.batch, s.length, s.heads)), jnp.float32)
    group = s.batch, s.length, s.groups, s.state
    return normal(s.batch, s.length, s.heads, s.head_dim), dt, -dt, normal(*group), normal(*group)


def _block_arguments(s: Shape, dtype: jnp.dtype):
    """Of `block_scan`: as many rows as the shape has, one block of S tokens each."""
    rng = np.random.default_rng(2)

    def normal(*sizes, dtype=dtype):
        return jnp.asarray(rng.standard_normal(sizes), dtype)

    inner, channels = s.heads * s.head_dim, s.heads * s.head_dim + 2 * s.groups * s.state
    dt = jnp.asarray(rng.uniform(0.01, 0.5, (s.batch, s.block, s.heads)), jnp.float32)
    weights = kernels.BlockWeights(normal(4, channels), normal(channels), normal(s.heads), normal(inner))
    state = normal(s.batch, s.heads, s.head_dim, s.state, dtype=jnp.float32)
    per_token = normal(s.batch, s.block, inner), normal(s.batch, s.block, channels)
    return *per_token, dt, -dt, weights, normal(s.batch, 4, channels), state


_PRODUCT, _COPIED = 1024, 2**24


def _ceilings():
    """A product of float32 matrices, and a pass over 64 MiB."""
    square, long = jnp.ones((_PRODUCT, _PRODUCT)), jnp.ones(_COPIED)
    product = jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST))
    return [(product, (square,)), (jax.jit(lambda a: a + 1), (long,))]


def _medians(calls, turns: int) -> list[float]:
    """Seconds of each (function, arguments), run in turns after one run that compiles."""
    for function, arguments in calls:
        jax.block_until_ready(function(*arguments))
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    times = [[] for _ in calls]
    for _ in range(turns):
        for (function, arguments), found in zip(calls, times, strict=True):
            start = clock()
            jax.block_until_ready(function(*arguments))
            found.append(clock() - start)
    return [statistics.median(found) for found in times]
