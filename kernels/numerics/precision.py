"""Which precision oracles compute in."""

import jax
import jax.numpy as jnp


def float32_or_more(v: jax.Array) -> jax.Array:
    """float32 of a narrower float type; float32 and float64 as they are: what oracles compute in."""
    return v if jnp.finfo(v.dtype).bits >= 32 else v.astype(jnp.float32)
