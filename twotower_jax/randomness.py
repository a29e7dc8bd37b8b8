"""Where random keys come from: every one of the program is made here, so that its bits are the same everywhere."""

import jax

IMPLEMENTATION = "threefry2x32"


def key(seed: int | jax.Array) -> jax.Array:
    """The key of a seed, of JAX's Threefry generator whatever JAX_DEFAULT_PRNG_IMPL says.

    The other generators give other numbers, and under vmap such that depend on the size of the batch.

    Args:
      seed: an integer, or a scalar in jit.
    """
    return jax.random.key(seed, impl=IMPLEMENTATION)
