"""What the Mosaic GPU kernels of a few rows share: exact products of a warpgroup, and tiled shared memory.

The matrix unit multiplies bfloat16. A float32 operand is cut into three bfloat16 parts whose sum it is, so that a
product of it with a bfloat16 operand takes three passes, and of two float32 operands six, as in tpu.py.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu


def parts(x: jax.Array) -> list[jax.Array]:
    """bfloat16 arrays whose sum is x: x itself if it is one, else three, the largest first."""
    if x.dtype == jnp.bfloat16:
        return [x]
    found = []
    for _ in range(3):
        # The upper half of the bits is a bfloat16 number. Not a cast and its inverse, which a compiler may drop.
        bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        part = lax.bitcast_convert_type(bits, jnp.float32)
        found.append(part.astype(jnp.bfloat16))
        x = x - part
    return found


def add_products(accumulator, a: list, b: list) -> None:
    """accumulator += Σ a · Σ b, of the parts of each that matter in float32; waits for the result."""
    for i, one in enumerate(a):
        for j, other in enumerate(b):
            if i + j < 3:
                plgpu.wgmma(accumulator, one, other)
    plgpu.wgmma_wait(0)


def tiled(shape: tuple[int, int], swizzle: int) -> plgpu.SMEM:
    """Shared memory of a bfloat16 matrix, laid out as the matrix unit reads it."""
    return plgpu.SMEM(
        shape,
        jnp.bfloat16,
        transforms=(plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)),
    )
