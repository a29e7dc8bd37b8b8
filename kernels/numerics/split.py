"""Float32 as bfloat16 parts: how products stay as exact as float32 on units that multiply bfloat16."""

import jax
import jax.numpy as jnp

# 24 bits of a float32 are three times 8.
PARTS = 3


def for_products(x: jax.Array) -> jax.Array:
    """As bfloat16 if it is, otherwise as float32: what the kernels multiply."""
    return x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)


def parts(x: jax.Array) -> list[jax.Array]:
    """Three bfloat16 arrays whose sum is x (float32), the largest first."""
    found = []
    for _ in range(PARTS):
        # The upper half of the bits is a bfloat16 number. Not a cast and its inverse, which a compiler may drop.
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        part = jax.lax.bitcast_convert_type(bits, jnp.float32)
        found.append(part.astype(jnp.bfloat16))
        x = x - part
    return found
