"""What every layer uses: RMSNorm, linear maps, activations."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from twotower_jax import sharding
from twotower_jax.adapted import Adapted
from twotower_jax.kernels.dispatch import platform
from twotower_jax.kernels.experts import relu2
from twotower_jax.kernels.numerics.gated_norm import rms_norm
from twotower_jax.kernels.numerics.quantized import Quantized, as_array
from twotower_jax.parameters import COLUMNS, LINEAR, Initializer, Scope, constant, use

# By the names of published configurations, where "gelu" is the exact one.
ACTIVATIONS = {
    "relu2": relu2,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


class RMSNorm(nnx.Module):
    """`rms_norm` with its weight, (D,)."""

    def __init__(self, width: int, epsilon: float, scope: Scope, axis: str | None = "embed"):
        self.epsilon = epsilon
        self.weight = scope.declare("weight", (width,), (axis,), constant(1.0), decay=False)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms_norm(x, use(self.weight), self.epsilon)


def precision_of(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """The precision of products: float32 stays float32 on hardware whose default is to round it to bfloat16 or TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def matmul(
    x: Float[Array, "... fan_in"],
    w: Float[Array, "fan_in fan_out"] | Quantized | Adapted,
    dtype: DTypeLike | None = None,
) -> Float[Array, "... fan_out"]:
    """x · w in `dtype`, or x's; with a matrix (K, N) that may be quantized, or have a low-rank update beside it.

    With one scale per column the product is (x · values) · scales: the values are whole numbers that bfloat16
    holds exactly, so that only the result is rounded, and what is read from memory are the values.

    An update is added as scale · (x · a) · b, in float32 before the sum is rounded.
    """
    dtype, precision = dtype or x.dtype, precision_of(x.dtype)
    if isinstance(w, Adapted):
        update = matmul(matmul(w.seen(x), w.a), w.b, jnp.float32)
        return (matmul(x, w.base, jnp.float32) + w.scale * update).astype(dtype)
    if isinstance(w, Quantized) and w.bits == 8 and w.scales.shape[-2] == 1:
        y = jnp.matmul(x, w.values.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)
        return (y * w.scales[0].astype(jnp.float32)).astype(dtype)
    rows = _as_rows(x)
    y = jnp.matmul(rows, as_array(w, x.dtype), precision=precision, preferred_element_type=dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _as_rows(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """(R, D) of float32 on a CPU that has all rows, otherwise x itself.

    The gradient of a weight is then a product of two matrices as they lie. Of (B, L, …) XLA first copies one of them,
    transposed, into an order that its products on CPUs take at half the speed. The numbers are the same.
    """
    rows_are_here = not sharding.dividing("batch", "length")
    if x.ndim < 3 or x.dtype != jnp.float32 or platform() != "cpu" or not rows_are_here:
        return x
    return x.reshape(-1, x.shape[-1])


def _as_is(columns: jax.Array) -> jax.Array:
    return columns


class Linear(nnx.Module):
    """x · weight + bias, weight (in, out), bias (out,) or none.

    `scales` None keeps the weight from ever being quantized.
    """

    def __init__(
        self,
        scope: Scope,
        shape: tuple[int, int],
        axes: tuple[str | None, str | None],
        init: Initializer,
        bias: bool,
        scales: str | None = COLUMNS,
    ):
        self.weight = scope.declare("weight", shape, axes, init, layout=LINEAR, scales=scales, adaptable=True)
        self.bias = scope.declare("bias", shape[1:], axes[1:], constant(0.0), decay=False) if bias else None

    def __call__(
        self, x: Float[Array, "... fan_in"], arrange: Callable[[jax.Array], jax.Array] = _as_is
    ) -> Float[Array, "... fan_out"]:
        """(…, in) → (…, out); `arrange` reorders the columns of weight and bias, and so those of the result."""
        weight = use(self.weight, x.dtype)
        weight = weight.arranged(arrange) if isinstance(weight, Adapted) else jax.tree.map(arrange, weight)
        y = matmul(x, weight)
        return y if self.bias is None else y + arrange(use(self.bias, y.dtype))
