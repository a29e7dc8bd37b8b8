"""Which experts a token goes to, decided in more bits than float32 has, as the published code decides in float64.

Scores of two experts are often closer than float32 resolves. Where float64 is native, on CPUs, the decision is made in
it; everywhere else on pairs of float32 (`double_float`), whose errors near 2⁻³⁵ leave the same choice wherever two
scores differ by more than that.
"""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from twotower_jax.kernels.numerics import double_float


def choose_experts(
    x: Float[Array, "T D"],
    weight: Float[Array, "D E"],
    bias: Float[Array, " E"],
    *,
    count: int,
    groups: int = 1,
    kept_groups: int = 1,
    arithmetic: str | None = None,
) -> Int32[Array, "T k"]:
    """The experts of each token by sigmoid(x · weight) + bias, best first; the lower number wins a tie.

    Args:
      x: (T, D) of any float dtype. weight: (D, E) float32. bias: (E,) float32.
      count: k, experts per token.
      groups: G equal groups of consecutive experts; with more than one, the scores outside the `kept_groups` groups
        whose best two sum highest become 0 before the choice (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
      arithmetic: "float64" or "pairs"; None takes what suits the platform that the program is compiled for.

    Returns:
      (T, k) int32
    """
    in_float64, in_pairs = _choices(count, groups, kept_groups)
    if arithmetic is not None:
        return {"float64": in_float64, "pairs": in_pairs}[arithmetic](x, weight, bias)
    # The platform is known when the program is compiled, and so only one of the two is.
    return jax.lax.platform_dependent(x, weight, bias, cpu=in_float64, default=in_pairs)


@functools.cache
def _choices(count: int, groups: int, kept_groups: int):
    """The same two functions for the same options, so that JAX traces them once, and not in every layer."""
    options = {"count": count, "groups": groups, "kept_groups": kept_groups}

    def in_float64(x, weight, bias):
        with jax.enable_x64(True):
            x, weight, bias = (v.astype(jnp.float64) for v in (x, weight, bias))
            return _choose(_FLOAT64, x, weight, bias, **options).astype(jnp.int32)

    def in_pairs(x, weight, bias):
        return _choose(_PAIRS, x, weight, bias, **options)

    return in_float64, in_pairs


def _choose(a, x, weight, bias, *, count, groups, kept_groups):
    scores = a.sigmoid(a.dot(x, weight))
    scores = a.add(scores, a.number(jnp.broadcast_to(bias, (x.shape[0], weight.shape[1]))))
    if groups > 1:
        scores = _keep_best_groups(a, scores, groups, kept_groups)
    return a.top_k(scores, count)


def _keep_best_groups(a, scores: Any, groups: int, kept_groups: int) -> Any:
    """Sets to 0 the scores outside the `kept_groups` groups whose best two sum highest."""
    grouped = jax.tree.map(lambda v: v.reshape(v.shape[0], groups, -1), scores)
    best = a.top_k(grouped, 2)
    first, second = (
        jax.tree.map(lambda v, i=i: jnp.take_along_axis(v, best[..., i : i + 1], axis=-1)[..., 0], grouped)
        for i in range(2)
    )
    kept = a.top_k(a.add(first, second), kept_groups)
    keep = jnp.any(kept[..., None] == jnp.arange(groups, dtype=jnp.int32), axis=-2)
    return jax.tree.map(lambda v: jnp.where(keep[..., None], v, 0.0).reshape(v.shape[0], -1), grouped)


def _largest(x: jax.Array, k: int) -> jax.Array:
    """Indices (…, k) int32 of the k largest along the last axis, largest first; the lower index wins a tie."""
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    chosen = []
    for _ in range(k):
        best = x == jnp.max(x, axis=-1, keepdims=True)
        pick = jnp.min(jnp.where(best, index, jnp.int32(x.shape[-1])), axis=-1, keepdims=True)
        chosen.append(pick)
        x = jnp.where(index == pick, -jnp.inf, x)
    return jnp.concatenate(chosen, axis=-1)


# What `_choose` computes with: numbers made of float32 arrays, their sums and sigmoids, products, and the largest.
_FLOAT64 = types.SimpleNamespace(
    number=lambda v: v, add=jnp.add, sigmoid=jax.nn.sigmoid, dot=jnp.matmul, top_k=_largest
)
_PAIRS = types.SimpleNamespace(
    number=lambda v: (v, jnp.zeros_like(v)),
    add=double_float.add,
    sigmoid=double_float.sigmoid,
    dot=double_float.dot,
    top_k=double_float.top_k,
)
