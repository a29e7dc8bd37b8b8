"""What JAX from 0.11.2 on does not have everywhere, or keeps to itself: the one place of the package for such names.

`tests/support/interpreters.py` is that of the tests.
"""

import functools
import inspect
from collections.abc import Callable

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu


def store(ref, value: jax.Array) -> None:
    """From registers to memory, not by the widest stores, in a Mosaic GPU kernel.

    `plgpu.store` came with JAX 0.12.0. Before it an assignment stores in this way; its old value, which nothing reads,
    the compiler leaves out.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def with_gradient(
    function: Callable, forward: Callable, backward: Callable, nondiff_argnums: tuple[int, ...], interpreted: Callable
) -> Callable:
    """A function with its gradient, of which remat keeps and computes no more than it must.

    JAX before 0.12 refuses that to what calls back, as the interpreter of Mosaic GPU kernels does: there, and then, it
    runs the forward pass whole.

    Args:
      forward, backward, nondiff_argnums: as `jax.custom_vjp` has them.
      interpreted: whether the first argument says that kernels are interpreted.
    """

    def made(optimize_remat: bool) -> Callable:
        found = jax.custom_vjp(function, nondiff_argnums=nondiff_argnums)
        found.defvjp(forward, backward, optimize_remat=optimize_remat)
        return found

    optimized = made(True)
    if jax.__version_info__ >= (0, 12):
        return optimized
    plain = made(False)
    return lambda how, *arguments: (plain if interpreted(how) else optimized)(how, *arguments)


@functools.cache
def jax_triton():
    """The module. Its releases 0.4.0 and 0.4.1 tell JAX which results are unused in the way that JAX had before 0.12.

    Nothing is changed under JAX 0.11, nor with a release of jax-triton that knows the newer way.
    """
    import jax_triton
    from jax._src.interpreters import partial_eval
    from jax_triton.triton_lib import triton_kernel_call_p

    rules, default = partial_eval.dce_rules, partial_eval._default_dce_rule
    theirs = rules[triton_kernel_call_p]
    if len(inspect.signature(theirs).parameters) < len(inspect.signature(default).parameters):
        rules[triton_kernel_call_p] = lambda used, live, equation: theirs(used, equation)
    return jax_triton
