"""The oracle of `kernels.attention`: the whole mask, all scores at a time. Slow."""

import jax
import jax.numpy as jnp

from twotower_jax.kernels.numerics.precision import float32_or_more


def attention_masked(q, key, value, visible):
    """Softmax attention with an explicit mask: q (B, L, H, P), key and value (B, K, T, P), visible (B, L, T)."""
    ratio = q.shape[2] // key.shape[1]
    key, value = (jnp.repeat(v, ratio, axis=1) for v in (key, value))
    scores = jnp.einsum("blhp,bhtp->bhlt", q, key, precision="highest") / q.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhlt,bhtp->blhp", weights, value, precision="highest")


def attention(q, sources, *, own_block=None, block_size=None, tile_size=None):
    """`kernels.attention` with the whole mask, all scores at a time, in float32, or in float64 if it is given that."""
    batch, length = q.shape[:2]
    keys, values, masks = [], [], []
    for source in sources:
        position, stop = jnp.arange(source.key.shape[2], dtype=jnp.int32), source.stop[..., None]
        start = jnp.zeros_like(stop) if source.start is None else source.start[..., None]
        visible = jnp.broadcast_to((position >= start) & (position < stop), (batch, length, position.size))
        seen = jnp.any(visible, axis=1)[:, None, :, None]  # What nobody sees may be NaN.
        keys.append(jnp.where(seen, source.key, 0))
        values.append(jnp.where(seen, source.value, 0))
        masks.append(visible)
    if own_block is not None:
        block = jnp.arange(length) // block_size
        keys.append(own_block[0])
        values.append(own_block[1])
        masks.append(jnp.broadcast_to(block[:, None] == block, (batch, length, length)))
    visible = jnp.concatenate(masks, axis=-1)
    nothing = ~jnp.any(visible, axis=-1)
    arrays = (float32_or_more(v) for v in (q, *(jnp.concatenate(v, axis=2) for v in (keys, values))))
    out = attention_masked(*arrays, visible | nothing[..., None])
    return jnp.where(nothing[..., None, None], 0, out).astype(q.dtype)
