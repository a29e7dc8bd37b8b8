"""Arithmetic on unevaluated sums of two float32, for decisions that must not depend on float32 rounding.

The published router computes in float64, which TPUs lack. A number here is a pair (high, low) with |low| at most half
a unit in the last place of high: about 48 bits. The building blocks are exact sums and products after Dekker (1971)
and Knuth (TAOCP 2, section 4.2.2); they remain so under the fused multiply-adds that compilers introduce.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

Pair = tuple[jax.Array, jax.Array]


def two_sum(a: jax.Array, b: jax.Array) -> Pair:
    """a + b exactly, as a pair (Knuth)."""
    high = a + b
    rest = high - a
    return high, (a - (high - rest)) + (b - rest)


def two_product(a: jax.Array, b: jax.Array) -> Pair:
    """a · b exactly, as a pair (Dekker); a and b within ±2¹¹⁵."""
    high = a * b
    a_high, a_low = _halves(a)
    b_high, b_low = _halves(b)
    return high, ((a_high * b_high - high) + a_high * b_low + a_low * b_high) + a_low * b_low


def _halves(a: jax.Array) -> Pair:
    """a as a sum of two numbers of at most 12 bits each."""
    # Rounding by an explicit operation: (4097·a) − (4097·a − a) is what a compiler may fold away.
    high = jax.lax.reduce_precision(a, exponent_bits=8, mantissa_bits=11)
    return high, a - high


def add(a: Pair, b: Pair) -> Pair:
    """Sum of two pairs."""
    high, low = two_sum(a[0], b[0])
    return two_sum(high, low + (a[1] + b[1]))


def multiply(a: Pair, b: Pair) -> Pair:
    """Product of two pairs."""
    high, low = two_product(a[0], b[0])
    return two_sum(high, low + (a[0] * b[1] + a[1] * b[0]))


def dot(x: jax.Array, w: jax.Array) -> Pair:
    """x · w for float32 matrices, with an error below 2⁻³⁵ of max|x| · Σ|w| (of a row and a column).

    Each row of x and column of w is cut into two slices on grids so coarse that the products of slices are integers
    whose sum stays below 2²⁴, and a rest. The slices' matrix products are exact in float32, in whatever order they
    are summed, and also on hardware that multiplies in bfloat16; the rest is smaller by the bits of both slices, so
    that ordinary precision suffices for it. (Ozaki et al. 2012, Numer. Algorithms 59, with two slices.)

    Args:
      x: (T, D). w: (D, E).

    Returns:
      a pair of (T, E).
    """
    bits = (24 - math.ceil(math.log2(max(x.shape[1], 2)))) // 2
    bits = min(bits, 8)  # What bfloat16 holds.
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    # The barrier keeps XLA from merging the slicing with the products, which takes TPU's compiler half a minute.
    x_1, x_2, x_rest = jax.lax.optimization_barrier(_slices(x, bits, axis=1))
    w_1, w_2, w_rest = jax.lax.optimization_barrier(_slices(w, bits, axis=0))
    first = jnp.matmul(x_1, w_1)
    second = two_sum(jnp.matmul(x_1, w_2), jnp.matmul(x_2, w_1))
    high = jax.lax.Precision.HIGH
    rest = jnp.matmul(x_1 + x_2, w_rest, precision=high) + jnp.matmul(x_rest, w, precision=high)
    # x_2·w_2 is exact as well, but as small as the rest.
    return add(add((first, jnp.zeros_like(first)), second), two_sum(rest, jnp.matmul(x_2, w_2)))


def _slices(x: jax.Array, bits: int, axis: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x as two slices of `bits` bits below the power of two above its largest entry along `axis`, and the rest."""
    # No mantissa bits: the nearest power of two. Entries below 2⁻⁶⁰ are zero for every purpose here.
    largest = jnp.clip(jnp.max(jnp.abs(x), axis=axis, keepdims=True), 2.0**-60, 2.0**100)
    above = 2 * jax.lax.reduce_precision(largest, exponent_bits=8, mantissa_bits=0)

    def on_grid(v, bits):
        return jnp.round(v * (2.0**bits / above)) * (above * 2.0**-bits)

    first = on_grid(x, bits)
    second = on_grid(x - first, 2 * bits)
    return first, second, x - first - second


# ln 2 in parts of 12 bits, so that multiples of them up to 2¹² are exact.
def _parts(value: float, count: int) -> list[np.float32]:
    parts = []
    for _ in range(count):
        mantissa, exponent = math.frexp(value)
        part = math.ldexp(round(mantissa * 2**12), exponent - 12)
        parts.append(np.float32(part))
        value -= part
    return parts


_LN2 = _parts(math.log(2), 4)
_SQUARINGS = 5


def exp(x: Pair) -> Pair:
    """eˣ of a pair with |x| ≤ 87.

    x = n ln 2 + 2⁵ s; the Taylor series of eˢ − 1 at |s| ≤ 0.011, squared five times without ever adding the 1.
    """
    n = jnp.round(x[0] * np.float32(1 / math.log(2)))
    s = x
    for part in _LN2:
        s = add(s, (-n * part, jnp.zeros_like(n)))
    s = tuple(v * np.float32(2**-_SQUARINGS) for v in s)
    # Terms from s³/6 on are below 2⁻¹⁵ of s: float32 gives them to 2⁻³⁹.
    square = multiply(s, s)
    tail = s[0] * s[0] * s[0] * (1 / 6 + s[0] * (1 / 24 + s[0] * (1 / 120)))
    minus_one = add(add(s, (0.5 * square[0], 0.5 * square[1])), (tail, jnp.zeros_like(tail)))
    for _ in range(_SQUARINGS):  # (1 + m)² − 1 = 2m + m²
        minus_one = add((2 * minus_one[0], 2 * minus_one[1]), multiply(minus_one, minus_one))
    total = add(_one_like(n), minus_one)
    # 2ⁿ by its bits; n stays within ±126.
    power = jax.lax.bitcast_convert_type((n.astype(jnp.int32) + 127) << 23, jnp.float32)
    # The barrier keeps XLA from computing all this again for each of its uses.
    return jax.lax.optimization_barrier(tuple(v * power for v in total))


def _one_like(v: jax.Array) -> Pair:
    """1 as a pair, and no constant to the compiler: that of jaxlib 0.11.2 takes (1 + m) − 1 for m."""
    return jax.lax.optimization_barrier(jnp.ones_like(v)), jnp.zeros_like(v)


def sigmoid(x: Pair) -> Pair:
    """1 / (1 + e⁻ˣ) of a pair; the argument is clipped to ±80, beyond which no float32 score differs."""
    inside = jnp.abs(x[0]) <= 80
    x = jnp.clip(x[0], -80, 80), jnp.where(inside, x[1], 0)
    power = exp((-x[0], -x[1]))
    denominator = add(_one_like(power[0]), power)
    quotient = 1 / denominator[0]
    # One Newton step: what is missing of quotient · denominator = 1.
    product = multiply((quotient, jnp.zeros_like(quotient)), denominator)
    missing = add(_one_like(quotient), (-product[0], -product[1]))
    return jax.lax.optimization_barrier(two_sum(quotient, quotient * missing[0]))


def top_k(x: Pair, k: int) -> jax.Array:
    """Indices (…, k) of the k largest pairs along the last axis, largest first; the lower index wins a tie."""
    high, low = x
    index = jax.lax.broadcasted_iota(jnp.int32, high.shape, high.ndim - 1)
    chosen = []
    for _ in range(k):
        best = high == jnp.max(high, axis=-1, keepdims=True)
        finest = jnp.max(jnp.where(best, low, -jnp.inf), axis=-1, keepdims=True)
        pick = jnp.min(jnp.where(best & (low == finest), index, high.shape[-1]), axis=-1, keepdims=True)
        chosen.append(pick)
        high = jnp.where(index == pick, -jnp.inf, high)
    return jnp.concatenate(chosen, axis=-1)
