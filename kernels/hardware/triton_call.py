"""How Triton kernels are called from JAX: compiled through jax-triton, or interpreted on a CPU."""

import contextlib
import threading
import types
from typing import Any

import jax
import numpy as np

from twotower_jax.kernels.hardware import versions

# Names that Triton has for the types of arrays here.
_TYPES = {"float32": "fp32", "bfloat16": "bf16"}
# No tiles are loaded ahead: several programs share a multiprocessor, and wait for memory in turn.
_WARPS, _STAGES = 8, 1
# PTX of CUDA 12.8, which knows all chips up to Blackwell: by default that of Triton's own assembler, which may be
# newer than what JAX calls.
_OPTIONS = {"enable_fp_fusion": True, "ptx_version": 87}


def call(kernel, grid: tuple[int, ...], inputs: list[jax.Array], outputs, constants: dict[str, Any], interpret: bool):
    """Runs a `triton.jit` function, whose arguments are pointers to the inputs, then to the outputs, then constants.

    Args:
      outputs: list of `jax.ShapeDtypeStruct`.
      interpret: with Triton's interpreter, in NumPy, on any backend.

    Returns:
      list of arrays.
    """
    if interpret:
        return jax.pure_callback(
            lambda *arrays: _interpreted(kernel, grid, arrays, outputs, constants), outputs, *inputs
        )
    return versions.jax_triton().triton_call(
        *inputs,
        kernel=kernel,
        out_type=outputs,
        grid=grid,
        num_warps=_WARPS,
        num_stages=_STAGES,
        backend_options=_OPTIONS,
        **constants,
    )


def compiled(kernel, inputs, outputs, constants: dict[str, Any], capability: int):
    """The kernel compiled for GPUs of a compute capability such as 80, which need not be there: Triton's own object."""
    import triton
    from triton.backends.compiler import GPUTarget

    types_of = [f"*{_TYPES[str(v.dtype)]}" for v in (*inputs, *outputs)]
    signature = dict(zip(kernel.arg_names, types_of, strict=False)) | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types_of))}  # As jax-triton says of every array.
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": _WARPS, "num_stages": _STAGES, **_OPTIONS}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _interpreted(kernel, grid, inputs, outputs, constants) -> list[np.ndarray]:
    from triton.runtime.interpreter import InterpretedFunction

    results = [np.full(v.shape, np.nan, v.dtype) for v in outputs]  # No test is to pass on what was not written.
    arrays = [np.ascontiguousarray(v) for v in inputs] + results
    with _interpreted_helpers(kernel), np.errstate(all="ignore"):
        InterpretedFunction(kernel.fn)[grid](*map(_pointer, arrays), **constants)
    return results


_ONE_AT_A_TIME = threading.Lock()


@contextlib.contextmanager
def _interpreted_helpers(kernel):
    """Puts, for the time of one call, what the interpreter can run in the place of functions that the kernel calls."""
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    names = kernel.fn.__globals__
    helpers = {name: v for name, v in names.items() if isinstance(v, triton.JITFunction) and v.fn.__globals__ is names}
    with _ONE_AT_A_TIME:
        names.update({name: InterpretedFunction(helper.fn).rewrite() for name, helper in helpers.items()})
        try:
            yield
        finally:
            names.update(helpers)


def _pointer(array: np.ndarray):
    """What the interpreter asks of a tensor that lies in the memory of the host already."""
    pointer = types.SimpleNamespace(
        dtype=_TYPES[str(array.dtype)],
        data_ptr=lambda: array.ctypes.data,
        untyped_storage=lambda: pointer,
        new_empty=lambda *_, **__: pointer,
        storage_offset=lambda: 0,
        size=lambda: array.shape,
        stride=lambda: array.strides,
        set_=lambda *_: None,
        copy_=lambda _: None,
        cpu=lambda: pointer,
    )
    return pointer
