"""The convolutions of a Mamba layer of some channels, for kernel_compile.py: width 4, blocks of 16.

XLA's form stands beside the kernel that is made for the chip: what both take is how one chooses between them.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from twotower_jax import kernels

_WIDTH, _LENGTH, _BLOCK = 4, 8192, 16
Shapes = list[tuple[tuple[int, ...], jnp.dtype]]


def implementations(platform: str) -> tuple[str, str]:
    """What is compared."""
    return "xla", "pallas_tpu" if platform == "tpu" else "mosaic_gpu"


def cases(channels: int, dtype: jnp.dtype, name: str) -> Iterator[tuple[str, Callable, Shapes]]:
    """What is compiled, its function and its shapes, for the implementation of a name."""
    one = functools.partial(kernels.causal_conv, implementation=name)

    def blocks(x, weight, bias, context):
        return kernels.block_causal_conv(x, context, weight, bias, _BLOCK, implementation=name)

    def gradient(function, count):
        def pulled(dy, *arrays):
            rest = arrays[count:]
            return jax.vjp(lambda *wanted: function(*wanted, *rest), *arrays[:count])[1](dy)

        return pulled

    tokens = (1, _LENGTH, channels), dtype
    run = [tokens, ((_WIDTH, channels), dtype), ((channels,), dtype)]
    yield f"causal_conv, {_LENGTH} tokens", one, run
    yield f"causal_conv, {_LENGTH} tokens, gradient", gradient(one, 3), [tokens, *run]
    both = [*run, tokens]
    yield f"block_causal_conv, {_LENGTH} tokens", blocks, both
    yield (
        f"block_causal_conv, {_LENGTH} tokens, gradient, context frozen",
        gradient(blocks, 3),
        [tokens, *both],
    )
    yield f"block_causal_conv, {_LENGTH} tokens, gradient", gradient(blocks, 4), [tokens, *both]
