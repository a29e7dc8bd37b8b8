"""Attention in parts, for kernels of one source of keys (the GPU's): how parts are combined, and the gradient.

Each part, a source or the own block, gives its normalized output o_s and the logarithm of its weights' sum, lse_s. The
whole is exact (Dao et al. 2022, arXiv 2205.14135, section 3.1):

    lse = log Σ_s exp(lse_s)        o = Σ_s exp(lse_s − lse) o_s

and so is the gradient, part by part, from the lse and the δ of the whole; nothing of the forward pass is kept but o and
lse:

    p = exp(s − lse)    δ = Σ do ∘ o    dv = pᵀ do    ds = p ∘ (do vᵀ − δ)    dq = ds k / √P    dk = dsᵀ q / √P

Parts of few keys (a block, the tokens just read) are small products, left to XLA. Rows are those of xla.py:
the R queries that share a key-value head at L positions, so that a kernel sees single heads, (N, M, P) with N = B·K and
M = L·R, and reads each tile of keys once for all R.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from twotower_jax.kernels.attention import xla
from twotower_jax.kernels.hardware import versions

# Sources of no more keys are left to XLA.
FEW = 128


class Ranges(NamedTuple):
    """The limits of rows.

    Attributes:
      start, stop: (B, M) int32: row i sees the keys start ≤ j < stop.
    """

    start: jax.Array
    stop: jax.Array


class Kernels(NamedTuple):
    """What a platform gives. Hashable; both take q (N, M, P), k and v (N, T, P) and `Ranges`.

    Attributes:
      forward: (q, k, v, ranges, out_dtype) → o (N, M, P), lse (N, M) float32; 0 and −1e30 for rows that see nothing.
      backward: (q, k, v, ranges, do, lse, delta) → dq float32, dk, dv; do (N, M, P) in q's dtype.
      few: sources of no more keys are left to XLA.
      interpreted: whether an interpreter runs them.
    """

    forward: Callable
    backward: Callable
    few: int = FEW
    interpreted: bool = False


def combine(outs, lses):
    """The output (…, P) and lse of the whole, from those of its parts."""
    if len(outs) == 1:
        return outs[0], lses[0]
    top = functools.reduce(jnp.maximum, lses)
    shares = [jnp.exp(lse - top) for lse in lses]
    total = sum(shares)
    out = sum((share / total)[..., None] * out for share, out in zip(shares, outs, strict=True))
    return out, top + jnp.log(total)


def combine_stacked(outs: jax.Array, lses: jax.Array):
    """`combine` of parts along axis 1: (N, parts, M, P) and (N, parts, M)."""
    if outs.shape[1] == 1:
        return outs[:, 0], lses[:, 0]
    top = jnp.max(lses, axis=1, keepdims=True)
    shares = jnp.exp(lses - top)
    total = jnp.sum(shares, axis=1, keepdims=True)
    return jnp.sum((shares / total)[..., None] * outs, axis=1), (top + jnp.log(total))[:, 0]


def spans(limits: jax.Array, keys: int, tiles: int) -> jax.Array:
    """(B, tiles, 2) int32: for each of `tiles` tiles of keys, from which tile of rows, and before which, some see it.

    Args:
      limits: (B, tiles of rows, 4), the least and greatest start and stop of each.
      keys: of a tile.
    """
    begin = jnp.arange(tiles)[:, None] * keys
    meet = (limits[:, None, :, 0] < begin + keys) & (limits[:, None, :, 3] > begin)  # (B, tiles, tiles of rows)
    some = jnp.any(meet, axis=-1)
    end = jnp.where(some, meet.shape[-1] - jnp.argmax(meet[..., ::-1], axis=-1), 0)
    return jnp.stack([jnp.where(some, jnp.argmax(meet, axis=-1), 0), end], axis=-1).astype(jnp.int32)


def _dense_forward(q, key, value, seen):
    """One part as XLA computes it: (…, M, P), (…, T, P), seen broadcastable to (…, M, T) or None for all."""
    s = xla.scores(q, key)
    if seen is not None:
        s = jnp.where(seen, s, xla.MASKED)
    top = jnp.max(s, axis=-1, keepdims=True)
    p = jnp.exp(s - top)
    if seen is not None:
        p = jnp.where(seen, p, 0.0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    some = jnp.where(total > 0, total, 1.0)
    return xla.weighted(p, value) / some, jnp.where(total > 0, top + jnp.log(some), xla.MASKED)[..., 0]


def _dense_backward(q, key, value, seen, do, lse, delta):
    p = jnp.exp(xla.scores(q, key) - lse[..., None])
    if seen is not None:
        p = jnp.where(seen, p, 0.0)

    def product(spec, *arrays):
        arrays = (v.astype(q.dtype) for v in arrays)
        return jnp.einsum(spec, *arrays, precision=xla.precision(q.dtype), preferred_element_type=jnp.float32)

    scale = q.shape[-1] ** -0.5
    ds = p * (product("...mp,...tp->...mt", do, value) - delta[..., None])
    dq, dk = product("...mt,...tp->...mp", ds, key), product("...mt,...mp->...tp", ds, q)
    return dq * scale, dk * scale, product("...mt,...mp->...tp", p, do)


class _Part(NamedTuple):
    """How one source is computed, from rows (B, K, M, P)."""

    forward: Callable
    backward: Callable


def _source_part(kernels: Kernels, source, length: int) -> _Part:
    key, value = (xla.reachable(v, source.stop) for v in (source.key, source.value))
    batch, _, count, _ = key.shape
    if count <= kernels.few:

        def seen(rows):
            return jnp.repeat(xla.visible(source), rows.shape[2] // length, axis=1)[:, None]

        return _Part(
            lambda q, dtype: _dense_forward(q, key, value, seen(q)),
            lambda q, *rest: _dense_backward(q, key, value, seen(q), *rest),
        )

    def flat(v):
        return v.reshape(-1, *v.shape[2:])

    def ranges(rows):
        stop = jnp.minimum(source.stop, count)
        start = jnp.zeros_like(stop) if source.start is None else jnp.maximum(source.start, 0)
        ratio = rows.shape[2] // length
        return Ranges(*(jnp.repeat(jnp.broadcast_to(v, (batch, length)), ratio, axis=1) for v in (start, stop)))

    def forward(q, dtype):
        # The kernels themselves keep what no row sees out of their sums.
        out, lse = kernels.forward(flat(q), flat(source.key), flat(source.value), ranges(q), dtype)
        return out.reshape(q.shape), lse.reshape(q.shape[:3])

    def backward(q, *rest):
        found = kernels.backward(flat(q), flat(source.key), flat(source.value), ranges(q), *map(flat, rest))
        return tuple(v.reshape(like.shape) for v, like in zip(found, (q, key, value), strict=True))

    return _Part(forward, backward)


def _own_part(own, blocks: int) -> _Part:
    key, value = (xla.in_blocks(v, blocks) for v in own)

    def cut(v):  # Rows, or one number per row.
        return v.reshape(*v.shape[:2], blocks, -1, *v.shape[3:])

    def forward(q, dtype):
        out, lse = _dense_forward(cut(q), key, value, None)
        return out.reshape(q.shape), lse.reshape(q.shape[:3])

    def backward(q, do, lse, delta):
        found = _dense_backward(cut(q), key, value, None, *map(cut, (do, lse, delta)))
        return tuple(v.reshape(like.shape) for v, like in zip(found, (q, *own), strict=True))

    return _Part(forward, backward)


def _parts(kernels, blocks, length, sources, own):
    parts = [_source_part(kernels, source, length) for source in sources]
    return parts if own is None else [*parts, _own_part(own, blocks)]


def _forward(kernels, blocks, length, q, sources, own):
    parts = _parts(kernels, blocks, length, sources, own)
    # Rounded once: what is still to be summed stays in float32.
    dtype = q.dtype if len(parts) == 1 else jnp.float32
    out, lse = combine(*zip(*(part.forward(q, dtype) for part in parts), strict=True))
    return out.astype(q.dtype), lse


def _forward_rule(kernels, blocks, length, q, sources, own):
    out, lse = _forward(kernels, blocks, length, q, sources, own)
    return out, (q, sources, own, out, lse)


def _backward_rule(kernels, blocks, length, residuals, do):
    q, sources, own, out, lse = residuals
    delta = jnp.sum(do.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    found = [part.backward(q, do, lse, delta) for part in _parts(kernels, blocks, length, sources, own)]
    dq = sum(dq for dq, *_ in found).astype(q.dtype)
    of_keys = [(dk.astype(q.dtype), dv.astype(q.dtype)) for _, dk, dv in found]
    dsources = tuple(
        s._replace(key=dk, value=dv, stop=None, start=None) for s, (dk, dv) in zip(sources, of_keys, strict=False)
    )
    return dq, dsources, None if own is None else of_keys[-1]


def _attended(*arguments):
    """Rows (B, K, M, P) to rows."""
    return _forward(*arguments)[0]


_attend = versions.with_gradient(
    _attended, _forward_rule, _backward_rule, (0, 1, 2), lambda kernels: kernels.interpreted
)


def attention(kernels: Kernels, q, sources, *, own_block=None, block_size=None):
    """`kernels.attention` by a platform's kernels."""
    length = q.shape[1]
    kv_heads = (own_block[0] if own_block else sources[0].key).shape[1]
    blocks = length // block_size if own_block else 1
    rows = _attend(kernels, blocks, length, xla.to_rows(q, kv_heads), sources, own_block)
    return xla.from_rows(rows, length)


def unsupported(q, sources, own_block, unit: int) -> str | None:
    """Why kernels cannot take these arrays, or None; `unit` divides the head dim."""
    dtypes = {q.dtype, *(v.dtype for s in sources for v in s[:2]), *(v.dtype for v in own_block or ())}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        return f"queries, keys and values are {', '.join(sorted(map(str, dtypes)))}, not all bfloat16 or all float32"
    if q.shape[3] % unit:
        return f"the head dim {q.shape[3]} is not a multiple of {unit}"
    if all(s.key.shape[2] <= FEW for s in sources):
        return f"no source has more than {FEW} keys, which XLA does as well"
    return None
