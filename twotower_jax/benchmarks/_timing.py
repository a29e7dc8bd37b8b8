"""Forms timed by turns, and what the machine does at best in the same turns: for kernels.py and accelerator/."""

import statistics
import time

import jax
import jax.numpy as jnp

from twotower_jax import randomness
from twotower_jax.benchmarks._kernel_forms import Form


class Timed:
    """A form, compiled, and the seconds that its runs took."""

    _ENOUGH = 0.02  # Seconds of work, one run after the other, on an accelerator.

    def __init__(self, form: Form):
        self.form = form
        if form.library is None:
            self.call, self.wait = jax.jit(form.function).lower(*form.arguments).compile(), jax.block_until_ready
            self.temporaries = self.call.memory_analysis().temp_size_in_bytes
        else:
            self.call, self.wait = form.function, form.library.wait
            self.wait(self.call(*form.arguments))  # Its first call compiles and tunes.
            self.temporaries = form.library.temporaries(form.function, form.arguments)
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
        self.wait(self.call(*self.form.arguments))
        start = clock()
        for _ in range(self.calls):
            result = self.call(*self.form.arguments)
        self.wait(result)
        return (clock() - start) / self.calls


def ceilings(dtype: jnp.dtype) -> tuple[Form, Form]:
    """A product of large matrices, a pass over a long array."""
    size, length = (1024, 2**24) if jax.default_backend() == "cpu" else (8192, 2**28)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    keys = jax.random.split(randomness.key(0), 2)
    square, long = jax.random.normal(keys[0], (size, size), dtype), jax.random.normal(keys[1], (length,))
    product = Form("product", "", lambda a: jnp.matmul(a, a, precision=precision), (square,), 2 * size**3)
    return product, Form("copy", "", lambda a: a + 1, (long,), length)
