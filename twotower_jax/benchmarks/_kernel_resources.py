"""What a GPU kernel takes of a multiprocessor: registers and spilled bytes by ptxas, shared memory by its compiler.

Mosaic GPU prints both where MOSAIC_GPU_DUMP_PTXAS and MOSAIC_GPU_DUMP_RESOURCES are set, straight to the descriptors of
the process. Triton tells the shared memory; the rest is read from the machine code by its own cuobjdump.
"""

import contextlib
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

_BLOCK = re.compile(r"Compiling entry function '(\w+)'.*?(?=Compiling entry function|\Z)", re.DOTALL)


class Resources(NamedTuple):
    """What one kernel takes.

    Attributes:
      kernel: its name. registers: a thread. spilled: bytes a thread stores and loads for want of them.
      shared: bytes a thread block; None where nothing said so.
    """

    kernel: str
    registers: int
    spilled: int
    shared: int | None


@contextlib.contextmanager
def of_mosaic() -> Iterator[list[Resources]]:
    """A list that has the kernels which were compiled within, once it is left."""
    os.environ.update(MOSAIC_GPU_DUMP_PTXAS="1", MOSAIC_GPU_DUMP_RESOURCES="1")
    found: list[Resources] = []
    with tempfile.TemporaryFile() as file:
        kept = [(stream, os.dup(stream.fileno())) for stream in (sys.stdout, sys.stderr)]
        for stream, _ in kept:
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
        try:
            yield found
        finally:
            for stream, copy in kept:
                stream.flush()
                os.dup2(copy, stream.fileno())
                os.close(copy)
            file.seek(0)
            found += parsed(file.read().decode(errors="replace"))


def parsed(said: str) -> list[Resources]:
    """What was printed. Shared memory is told in the order of the kernels; where one is missing, of none."""
    blocks = [(match[1], match[0]) for match in _BLOCK.finditer(said)]
    shared: list[int | None] = [int(size) for size in re.findall(r"smem_scratch_bytes=(\d+)", said)]
    if len(shared) != len(blocks):
        shared = [None] * len(blocks)
    return [
        Resources(
            name.removesuffix("_kernel").removesuffix("_mosaic_gpu"),
            int(re.search(r"Used (\d+) registers", text)[1]),
            sum(map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text).groups())),
            size,
        )
        for (name, text), size in zip(blocks, shared, strict=True)
    ]


def of_triton(function: Callable, shapes: list, capability: int) -> list[Resources]:
    """The kernels of a function whose scans are in Triton, each once, compiled for a compute capability such as 90."""
    import triton

    from twotower_jax.kernels.hardware import triton_call

    reader = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found: dict[str, Resources] = {}

    def compile_only(kernel: Any, grid: Any, inputs: Any, outputs: Any, constants: dict, interpret: bool) -> list:
        compiled = triton_call.compiled(kernel, inputs, outputs, constants, capability)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            said = subprocess.run([reader, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        used = {key: int(size) for key, size in re.findall(r"(REG|LOCAL|STACK):(\d+)", said)}
        words = [name.lower() for name in ("BACKWARD", "ADDED", "THROUGH") if constants.get(name) is True]
        name = ", ".join([kernel.fn.__name__, *words])
        spilled = used.get("STACK", 0) + used.get("LOCAL", 0)
        found[name] = Resources(name, used["REG"], spilled, compiled.metadata.shared)
        return [jnp.zeros(v.shape, v.dtype) for v in outputs]

    with mock.patch.object(triton_call, "call", compile_only):
        jax.eval_shape(function, *(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes))
    return list(found.values())
