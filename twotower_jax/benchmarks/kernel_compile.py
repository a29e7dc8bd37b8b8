"""Compiles the ops for chips that are not there, at the shapes of a model.

    python launch/benchmark.py kernel_compile --topology=v5p:2x2x1
    python launch/benchmark.py kernel_compile --op=ssd,two_tower_ssd
    python launch/benchmark.py kernel_compile --layers=nano4b
    python launch/benchmark.py kernel_compile --topology=h200:1 --resources

What is compiled is what runs there: Pallas kernels for TPUs (package `libtpu`) and, for h200:1, for NVIDIA Hopper
(packages `jax-cuda13-plugin` and `jax-cuda13-pjrt`), where the scans of other GPUs are compiled as well (package
`jax-triton`). A row per kernel: seconds to compile, and its temporary memory, which for gradients holds what the
forward pass keeps. Experts are those of the 30B model, the only one that has any. Exit status 1 if anything does not
compile. With --resources a second table says what GPU kernels take of a multiprocessor (_kernel_resources.py).
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from twotower_jax import kernels
from twotower_jax.benchmarks import _attention_cases, _convolution_cases, _expert_cases
from twotower_jax.benchmarks._kernel_resources import Resources, of_mosaic, of_triton
from twotower_jax.benchmarks._shapes import LAYERS, LayerShape
from twotower_jax.planning import hardware

_LENGTH = 8192


class Case(NamedTuple):
    """A function and what it takes.

    Attributes:
      name: of the row.
      function: of flat arrays, as the layers have them: heads side by side.
      shapes: (shape, dtype) of each argument.
    """

    name: str
    function: Callable
    shapes: list[tuple[tuple[int, ...], jnp.dtype]]


def define_flags() -> None:
    flags.DEFINE_list(
        "topology", ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"], "What to compile for; see launch/compile.py."
    )
    flags.DEFINE_multi_enum("dtype", ["bfloat16"], ["bfloat16", "float32"], "Of x, B and C; may be given twice.")
    flags.DEFINE_enum("layers", "nano30b", list(LAYERS), "The model whose layers are compiled.")
    flags.DEFINE_multi_integer(
        "chunk_size", [], "Q, a multiple of 128; may be given several times. Default: the model's."
    )
    flags.DEFINE_list("op", [], "Only what begins with one of these: ssd, two_tower_ssd, block_scan, attention …")
    flags.DEFINE_bool("resources", False, "Tell what GPU kernels take of a multiprocessor as well.")
    flags.DEFINE_bool("compare", False, "Compile XLA's convolutions as well, which takes minutes on TPUs.")


def main() -> None:
    values = flags.FLAGS
    devices = [hardware.find(topology).devices[0] for topology in values.topology]
    print(f"jax {jax.__version__}\n")
    print("| chip | implementation | op | dtype | chunk | compiled in | temporaries |")
    print("|---|---|---|---|--:|--:|--:|")
    layer = LAYERS[values.layers]
    chunks = values.chunk_size or [layer.chunk]
    failures, count = 0, 0
    resources: dict[tuple[str, Resources], str] = {}
    for device in devices:
        for case, *row in _everything(layer, device.platform, values.dtype, chunks, values.compare):
            if values.op and not case.name.startswith(tuple(values.op)):
                continue
            count += 1
            with of_mosaic() if values.resources else contextlib.nullcontext([]) as found:
                result = _compile(case, device)
            if values.resources and row[0] == "triton":
                with jax.sharding.use_abstract_mesh(Mesh(np.array([device]), ("device",)).abstract_mesh):
                    found = of_triton(case.function, case.shapes, round(10 * float(device.compute_capability)))
            for kernel in found:
                resources.setdefault((row[0], kernel), case.name)
            failures += result.startswith("FAILED")
            print(f"| {' | '.join(map(str, (device.device_kind, row[0], case.name, *row[1:], result)))} |", flush=True)
    if not count:
        raise ValueError(f"--op={','.join(values.op)}: no case begins so")
    if resources:
        print("\n| implementation | kernel | first compiled for | registers | spilled, bytes | shared memory |")
        print("|---|---|---|--:|--:|--:|")
        for (name, kernel), case in resources.items():
            shared = "" if kernel.shared is None else f"{kernel.shared / 1024:.1f} KiB"
            print(f"| {name} | {kernel.kernel} | {case} | {kernel.registers} | {kernel.spilled} | {shared} |")
    if failures:
        sys.exit(1)


def _everything(
    layer: LayerShape, platform: str, dtypes: list[str], chunks: list[int], compare: bool
) -> Iterator[tuple[Case, str, str, int | str]]:
    """Cases, each with its implementation, the dtype and, of scans, the chunk."""
    of_scans = "pallas_tpu" if platform == "tpu" else "mosaic_gpu"
    for name in dtypes:
        dtype = jnp.dtype(name)
        for chunk in chunks:
            for case in _cases(layer, dtype, chunk, of_scans):
                yield case, of_scans, name, chunk
            for case in _cases(layer, dtype, chunk, "triton") if platform == "gpu" else ():
                if not case.name.startswith("block_scan"):
                    yield case, "triton", name, chunk
        of_attention = _attention_cases.implementation(platform, dtype)
        for case in _attention_cases.cases(layer, dtype, of_attention):
            yield Case(*case), of_attention, name, ""
        for implementation in _convolution_cases.implementations(platform)[0 if compare else 1 :]:
            for case in _convolution_cases.cases(layer.channels, dtype, implementation):
                yield Case(*case), implementation, name, ""
    for *case, implementation in _expert_cases.cases(platform) if layer is LAYERS["nano30b"] else ():
        yield Case(*case), implementation, "bfloat16", ""


def _cases(layer: LayerShape, dtype: jnp.dtype, chunk_size: int, implementation: str) -> Iterator[Case]:
    """The scans of one Mamba layer."""
    heads, head_dim, groups, state = layer.heads, layer.head_dim, layer.groups, layer.state

    def inputs(batch, length):
        inner, group = ((batch, length, heads * head_dim), dtype), ((batch, length, groups * state), dtype)
        row = (batch, length, heads), jnp.float32
        return [inner, row, row, group, group]

    def split(arrays):
        sizes = {heads * head_dim: (heads, head_dim), groups * state: (groups, state)}
        return [v.reshape(*v.shape[:2], *sizes[v.shape[2]]) if v.shape[2] in sizes else v for v in arrays]

    def one(*arrays):
        *arrays, initial = arrays
        y, last = kernels.ssd(
            *split(arrays), initial_state=initial, chunk_size=chunk_size, implementation=implementation
        )
        return y.reshape(*y.shape[:2], -1), last

    def two(*arrays):
        y = kernels.two_tower_ssd(*split(arrays), block_size=16, chunk_size=chunk_size, implementation=implementation)
        return y.reshape(*y.shape[:2], -1)

    def gradient(function, count):
        def loss(*arrays):
            return sum(jnp.sum(jnp.square(v)) for v in jax.tree.leaves(function(*arrays)))

        return jax.grad(loss, argnums=tuple(range(count)))

    def block(z, xbc, dt, log_decay, *rest):
        *weights, tail, initial = rest
        weights = kernels.BlockWeights(*weights)
        arguments = z, xbc, dt, log_decay, weights, tail, initial
        return kernels.block_scan(
            *arguments, groups=groups, epsilon=1e-5, next_state=True, implementation=implementation
        )

    def block_inputs(batch, length):
        inner, channels = layer.inner, layer.channels
        row = (batch, length, heads), jnp.float32
        per_token = [((batch, length, inner), dtype), ((batch, length, channels), dtype), row, row]
        weights = [((4, channels), dtype), ((channels,), dtype), ((heads,), jnp.float32), ((inner,), dtype)]
        return [*per_token, *weights, ((batch, 4, channels), dtype), ((batch, heads, head_dim, state), jnp.float32)]

    long, initial = inputs(1, _LENGTH), ((1, heads, head_dim, state), jnp.float32)
    context = [v for i, v in enumerate(long) if i != 4]
    yield Case(f"ssd, {_LENGTH} tokens", one, [*long, initial])
    yield Case(f"ssd, {_LENGTH} tokens, gradient", gradient(one, 6), [*long, initial])
    yield Case("ssd, 8 × 16 tokens", one, [*inputs(8, 16), ((8, *initial[0][1:]), jnp.float32)])
    yield Case("block_scan, 64 × 16 tokens", block, block_inputs(64, 16))
    yield Case("block_scan, 1 × 1 token", block, block_inputs(1, 1))
    yield Case(f"two_tower_ssd, {_LENGTH} tokens", two, [*long, *context])
    yield Case(f"two_tower_ssd, {_LENGTH} tokens, gradient, context frozen", gradient(two, 5), [*long, *context])
    yield Case(f"two_tower_ssd, {_LENGTH} tokens, gradient", gradient(two, 9), [*long, *context])


def _compile(case: Case, device) -> str:
    mesh = Mesh(np.array([device]), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in case.shapes]
    start = time.perf_counter()
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            compiled = jax.jit(case.function).lower(*arguments).compile()
    except Exception as error:  # Whatever a compiler says is the result.
        return f"FAILED: {str(error).splitlines()[0]} | "
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return f"{time.perf_counter() - start:.1f} s | {temporaries / 2**20:.1f} MiB"
