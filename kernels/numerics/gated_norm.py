"""RMSNorm over groups of channels, and the gated form of it that ends a Mamba-2 layer."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*leading C"], weight: Float[Array, " C"], epsilon: float, groups: int = 1
) -> Float[Array, "*leading C"]:
    """RMSNorm over `groups` equal parts of the last axis (Zhang & Sennrich 2019, arXiv 1910.07467).

    Runs in float32 and multiplies by the weight there, as the published code does; the result has x's dtype.
    """
    parts = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, -1)
    parts = parts * jax.lax.rsqrt(jnp.mean(jnp.square(parts), axis=-1, keepdims=True) + epsilon)
    return (parts.reshape(x.shape) * weight.astype(jnp.float32)).astype(x.dtype)


def gated_norm(
    y: Float[Array, "B L H P"],
    z: Float[Array, "B L HP"],
    weight: Float[Array, " HP"],
    epsilon: float,
    groups: int,
) -> Float[Array, "B L HP"]:
    """rms_norm(y ∘ SiLU(z)), gate before norm (Dao & Gu 2024, arXiv 2405.21060).

    Args:
      y: (B, L, H, P) float32. z: (B, L, H·P). weight: (H·P,).
      epsilon, groups: of the norm.

    Returns:
      (B, L, H·P) in z's dtype.
    """
    gated = y.reshape(z.shape) * jax.nn.silu(z.astype(jnp.float32))
    return rms_norm(gated, weight, epsilon, groups).astype(z.dtype)
