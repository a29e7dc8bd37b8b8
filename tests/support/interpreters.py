"""The interpreter of Mosaic GPU kernels, without what it spends most of its time on, and the races that it finds.

It calls Python for every access to memory, with a dozen numbers that say where and by whom. JAX makes an array on a
device of each, and the interpreter a Python number of that array again: nine tenths of such a call. `install` hands the
numbers over as they come. What is computed, and which races are found, stays the same.

The one place of the tests for names that JAX keeps to itself, which 0.11.2 and 0.12.0 have alike; that of the package
is `kernels/hardware/versions.py`.
"""

import functools
import inspect
from typing import Any

import numpy as np
from jax._src import callback as callbacks

_MODULE = "jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks"
_PARAMETERS = ["args", "result_avals", "callback", "sharding", "ordered"]


def install() -> None:
    """Before anything is interpreted. Under a JAX that calls back in another way, nothing changes but the time."""
    called = getattr(callbacks, "io_callback_impl", None)
    if called is None or list(inspect.signature(called).parameters) != _PARAMETERS:
        return

    @functools.wraps(called)
    def io_callback_impl(*args: Any, callback: Any, **named: Any) -> Any:
        function = getattr(callback, "callback_func", None)
        if getattr(getattr(function, "func", function), "__module__", None) != _MODULE:
            return called(*args, callback=callback, **named)
        return [np.asarray(value) for value in callback(*map(_argument, args))]

    callbacks.io_callback_impl = io_callback_impl


def races_found() -> bool:
    """Whether the interpreter's detector has found any, since JAX was started."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    return interpret_pallas_call.get_races().races_found


def forget_races() -> None:
    """As if none had been found."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    interpret_pallas_call.get_races().races_found = False


def _argument(value: np.ndarray) -> int | np.ndarray:
    """A whole number, or a copy: the memory of what is handed over belongs to the caller."""
    return int(value) if value.ndim == 0 and value.dtype.kind == "i" else np.array(value)
