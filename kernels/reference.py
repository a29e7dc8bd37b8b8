"""Oracles of the kernels: each op as literally as its maths allows, for tests and for reading. Slow."""

import jax
import jax.numpy as jnp


def ssd_sequential(x, dt, log_decay, b, c, initial_state=None):
    """The recurrence of `ssd`, one position after the other: h = exp(dt A) h + dt x Bᵀ, y = h C.

    Arguments and results as in `kernels.ssd`; runs in the dtype of x.
    """
    heads, groups = x.shape[2], b.shape[2]
    b, c = (jnp.repeat(v, heads // groups, axis=2) for v in (b, c))
    if initial_state is None:
        initial_state = jnp.zeros((*x.shape[:1], *x.shape[2:], b.shape[-1]), x.dtype)

    def step(h, inputs):
        x, dt, log_decay, b, c = inputs
        h = jnp.exp(log_decay)[..., None, None] * h + jnp.einsum("bh,bhp,bhn->bhpn", dt, x, b, precision="highest")
        return h, jnp.einsum("bhpn,bhn->bhp", h, c, precision="highest")

    last, y = jax.lax.scan(step, initial_state, jax.tree.map(lambda v: jnp.moveaxis(v, 1, 0), (x, dt, log_decay, b, c)))
    return jnp.moveaxis(y, 0, 1), last


def two_tower_ssd_sequential(
    x, dt, log_decay, b, c, context_x, context_dt, context_log_decay, context_b, *, block_size
):
    """One block after the other: the denoiser's block from the context's state, then the context's block onto it."""

    def in_blocks(v):
        return jnp.moveaxis(v.reshape(v.shape[0], -1, block_size, *v.shape[2:]), 1, 0)

    def step(state, block):
        own, context = block
        y, _ = ssd_sequential(*own, state)
        _, state = ssd_sequential(*context, state)
        return state, y

    own = map(in_blocks, (x, dt, log_decay, b, c))
    context = map(in_blocks, (context_x, context_dt, context_log_decay, context_b, context_b))
    zeros = jnp.zeros((*x.shape[:1], *x.shape[2:], b.shape[-1]), x.dtype)
    _, y = jax.lax.scan(step, zeros, (tuple(own), tuple(context)))
    return jnp.moveaxis(y, 0, 1).reshape(x.shape)


def ssd(x, dt, log_decay, b, c, *, initial_state=None, chunk_size=None):
    """`kernels.ssd` by the recurrence, in float32, or in float64 if it is given that."""
    arrays = map(_float32_or_more, (x, dt, log_decay, b, c))
    return ssd_sequential(*arrays, None if initial_state is None else _float32_or_more(initial_state))


def two_tower_ssd(*arrays, block_size, chunk_size=None):
    """`kernels.two_tower_ssd` by the recurrence, in float32, or in float64 if it is given that."""
    return two_tower_ssd_sequential(*map(_float32_or_more, arrays), block_size=block_size)


def _float32_or_more(v):
    return v if jnp.finfo(v.dtype).bits >= 32 else v.astype(jnp.float32)


def causal_conv(x, weight, bias, tail=None, before=None):
    """`kernels.causal_conv` as a sum over the window of each position, in float32, or in float64 if given that."""
    width, length = weight.shape[0], x.shape[1]
    if tail is None:
        tail = jnp.zeros((x.shape[0], width - 1, x.shape[2]), x.dtype)
    weight = _float32_or_more(weight)
    inputs = _float32_or_more(jnp.concatenate([tail[:, tail.shape[1] - (width - 1) :].astype(x.dtype), x], axis=1))
    windows = inputs[:, jnp.arange(length)[:, None] + jnp.arange(width)]  # (B, L, K, C)
    if before is not None:
        distance = jnp.arange(width)[::-1]
        windows = jnp.where((before[..., None] >= distance)[..., None], windows, 0)
    total = jnp.einsum("blkc,kc->blc", windows, weight.astype(windows.dtype), precision="highest")
    if bias is not None:
        total += bias.astype(total.dtype)
    return jax.nn.silu(total).astype(x.dtype)


def block_causal_conv(x, context, weight, bias, block_size, tail=None, before=None):
    """`kernels.block_causal_conv`, one block after the other, each after all of the context before it."""
    if tail is None:
        tail = jnp.zeros((x.shape[0], weight.shape[0] - 1, x.shape[2]), x.dtype)
    context = jnp.concatenate([tail.astype(context.dtype), context], axis=1)
    out = []
    for e in range(0, x.shape[1], block_size):
        seen = None if before is None else before[:, e : e + block_size]
        out.append(causal_conv(x[:, e : e + block_size], weight, bias, context[:, : tail.shape[1] + e], seen))
    return jnp.concatenate(out, axis=1)


def block_scan(z, xbc, dt, log_decay, weights, tail, state, *, groups, epsilon, next_state):
    """`kernels.block_scan` step by step, in the dtype of z."""
    batch, length, inner = z.shape
    heads, head_dim, state_size = state.shape[1:]
    width = weights.conv_weight.shape[0]
    inputs = jnp.concatenate([tail[:, tail.shape[1] - (width - 1) :], xbc], axis=1)
    windows = jnp.stack([inputs[:, i : i + width] for i in range(length)], axis=1)  # (B, S, K, C)
    total = jnp.einsum("bskc,kc->bsc", windows, weights.conv_weight, precision="highest")
    xbc = jax.nn.silu(total if weights.conv_bias is None else total + weights.conv_bias)
    x = xbc[..., :inner].reshape(batch, length, heads, head_dim)
    b, c = jnp.moveaxis(xbc[..., inner:].reshape(batch, length, 2, groups, state_size), 2, 0)
    y, last = ssd_sequential(x, dt, log_decay, b, c, state)
    gated = (y + weights.skip[:, None] * x).reshape(z.shape) * jax.nn.silu(z)
    parts = gated.reshape(batch, length, groups, -1)
    normed = parts / jnp.sqrt(jnp.mean(parts**2, axis=-1, keepdims=True) + epsilon)
    return normed.reshape(z.shape) * weights.norm, last if next_state else None


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
    arrays = (_float32_or_more(v) for v in (q, *(jnp.concatenate(v, axis=2) for v in (keys, values))))
    out = attention_masked(*arrays, visible | nothing[..., None])
    return jnp.where(nothing[..., None, None], 0, out).astype(q.dtype)


def expert_mlp_dense(x, indices, gates, weights, activation):
    """Every row through every expert, the unchosen ones weighted with zero."""
    dense = (
        jnp.zeros((x.shape[0], weights.up.shape[0]), x.dtype).at[jnp.arange(x.shape[0])[:, None], indices].set(gates)
    )
    hidden = jnp.einsum("td,edf->tef", x, weights.up, precision="highest")
    if weights.up_bias is not None:
        hidden += weights.up_bias
    out = jnp.einsum("tef,efd->ted", activation(hidden), weights.down, precision="highest")
    if weights.down_bias is not None:
        out += weights.down_bias
    return jnp.einsum("ted,te->td", out, dense, precision="highest")
