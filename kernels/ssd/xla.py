"""The SSD scans as XLA compiles them, on any platform: ssd.py says what they compute.

| maths | code | |
|---|---|---|
| a_i | `sums` | inclusive sums of dt·A from the start of the chunk (or block), a `Sum` |
| A^c | `context_sums` | the same of the context, from the start of the chunk |
| a_i + A^c_{e-1} | `query` | back to the start of the chunk, through both towers |
| Σ over a chunk | `_within_chunk` | Q × Q scores |
| Σ before a chunk | `_across_chunks` | through the state at the chunk's left edge |
"""

import jax
import jax.numpy as jnp

from twotower_jax.kernels.numerics.log_decay import Sum, cumulative, in_chunks, query_sums

# The reference computes in float64. Products of float32 must not be rounded to bfloat16 (TPU) or TF32 (GPU).
_PRECISION = jax.lax.Precision.HIGHEST


def _einsum(spec: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(spec, *operands, precision=_PRECISION, preferred_element_type=jnp.float32)


def _heads_first(x: jax.Array, groups: int) -> jax.Array:
    """(B, c, Q, H, …) → (B, c, G, R, Q, …), R = H/G: group g serves heads g·R … (g+1)·R − 1.

    The products run over positions, head by head; with heads last, the Q × Q arrays would be transposed for each.
    """
    x = x.reshape(*x.shape[:3], groups, -1, *x.shape[4:])
    return jnp.moveaxis(x, 2, 4)


def _groups_first(x: jax.Array) -> jax.Array:
    """(B, c, Q, G, N) → (B, c, G, Q, N)."""
    return jnp.moveaxis(x, 2, 3)


def _chunk_states(x, sums, b):
    """What each chunk adds to the state, decayed to the chunk's right edge.

    Args:
      x: (B, c, G, R, Q, P), already multiplied by dt. sums: (B, c, G, R, Q). b: (B, c, G, Q, N).

    Returns:
      (B, c, G, R, P, N)
    """
    to_edge = jnp.exp(sums.map(lambda v: v[..., -1:]) - sums)
    return _einsum("bcgrqp,bcgqn->bcgrpn", x * to_edge[..., None], b)


def _states_at_left_edges(chunk_states, chunk_decay, initial_state):
    """Runs the recurrence over chunks.

    Args:
      chunk_states: (B, c, G, R, P, N). chunk_decay: (B, c, G, R), the log-decay over each whole chunk.
      initial_state: (B, G, R, P, N).

    Returns:
      the state at each chunk's left edge, (B, c, G, R, P, N), and the state after the last chunk, (B, G, R, P, N).
    """
    if chunk_states.shape[1] == 1:
        return initial_state[:, None], jnp.exp(chunk_decay[:, 0])[..., None, None] * initial_state + chunk_states[:, 0]

    def step(state, chunk):
        added, log_decay = chunk
        return jnp.exp(log_decay)[..., None, None] * state + added, state

    last, left = jax.lax.scan(step, initial_state, (jnp.moveaxis(chunk_states, 1, 0), jnp.moveaxis(chunk_decay, 1, 0)))
    return jnp.moveaxis(left, 0, 1), last


def _within_chunk(c, b, x, query, key, mask):
    """Σ_j exp(query_i − key_j) (C_i·B_j) x_j over the positions j of the same chunk that `mask` lets through.

    i and j may run over different parts of the chunk.
    """
    difference = query.map(lambda v: v[..., :, None]) - key.map(lambda v: v[..., None, :])  # (B, c, G, R, i, j)
    # Masked before the exponential: above the diagonal it would overflow, and inf·0 has no gradient.
    decay = jnp.exp(jnp.where(mask, difference, -jnp.inf))
    scores = _einsum("bcgin,bcgjn->bcgij", c, b)
    return _einsum("bcgrij,bcgrjp->bcgrip", scores[:, :, :, None] * decay, x)


def _across_chunks(c, states, log_decay):
    """exp(log_decay_i) h C_i with h the state at the left edge of i's chunk."""
    return _einsum("bcgqn,bcgrpn->bcgrqp", c, states) * jnp.exp(log_decay)[..., None]


def _positions_first(y: jax.Array, length: int) -> jax.Array:
    """(B, c, G, R, Q, P) → (B, L, H, P)."""
    y = jnp.moveaxis(y, 4, 2)
    return y.reshape(y.shape[0], y.shape[1] * y.shape[2], -1, y.shape[-1])[:, :length]


def _one_position(x, dt, log_decay, b, c, state):
    """The recurrence itself, for sequences of one position: every state is read and written once, in its place.

    x (B, H, P), dt and log_decay (B, H), b and c (B, G, N), state (B, H, P, N).
    """
    # B and C are small. Repeated for every head they leave states in their own order, which a CPU takes many at a time.
    b, c = (jnp.repeat(v, x.shape[1] // b.shape[1], axis=1) for v in (b, c))
    state = jnp.exp(log_decay)[..., None, None] * state + (x * dt[..., None])[..., None] * b[:, :, None]
    return _einsum("bhpn,bhn->bhp", state, c), state


def ssd(x, dt, log_decay, b, c, *, initial_state=None, chunk_size=128):
    """`kernels.ssd`, same arguments and results."""
    batch, length, heads, head_dim = x.shape
    groups, state_size = b.shape[2:]
    if length == 1 and initial_state is not None:
        one = (v[:, 0].astype(jnp.float32) for v in (x, dt, log_decay, b, c))
        y, last = _one_position(*one, initial_state.astype(jnp.float32))
        return y[:, None], last
    chunk = min(chunk_size, length)
    x, dt, log_decay, b, c = (in_chunks(v.astype(jnp.float32), chunk) for v in (x, dt, log_decay, b, c))
    x, b, c = _heads_first(x * dt[..., None], groups), _groups_first(b), _groups_first(c)
    sums = cumulative(log_decay, chunk).map(lambda v: _heads_first(v, groups))
    chunk_states = _chunk_states(x, sums, b)
    y = _within_chunk(c, b, x, sums, sums, jnp.tril(jnp.ones((chunk, chunk), bool)))
    if initial_state is None and chunk == length:
        # Nothing lies before. A state of zeros would exist once per block in `two_tower_ssd`, and dominate its memory.
        last = chunk_states[:, 0]
    else:
        if initial_state is None:
            initial_state = jnp.zeros((batch, heads, head_dim, state_size), jnp.float32)
        seed = initial_state.astype(jnp.float32).reshape(batch, groups, -1, head_dim, state_size)
        left, last = _states_at_left_edges(chunk_states, sums.total[..., -1], seed)
        y += _across_chunks(c, left, sums.total)
    return _positions_first(y, length), last.reshape(batch, heads, head_dim, state_size)


def two_tower_ssd(
    x,
    dt,
    log_decay,
    b,
    c,
    context_x,
    context_dt,
    context_log_decay,
    context_b,
    *,
    block_size,
    chunk_size=128,
):
    """`kernels.two_tower_ssd`, same arguments and results."""
    batch, length, heads, head_dim = x.shape
    groups = b.shape[2]
    blocks = length // block_size

    def split(v):
        return v.reshape(batch * blocks, block_size, *v.shape[2:])

    own, _ = ssd(*map(split, (x, dt, log_decay, b, c)), chunk_size=chunk_size)
    y = own.reshape(x.shape)

    # A block must not straddle two chunks: its positions share the context they see.
    chunk = block_size * min(max(1, chunk_size // block_size), blocks)
    log_decay, c, context_x, context_dt, context_log_decay, context_b = (
        in_chunks(v.astype(jnp.float32), chunk)
        for v in (log_decay, c, context_x, context_dt, context_log_decay, context_b)
    )
    context_x, context_b, c = (
        _heads_first(context_x * context_dt[..., None], groups),
        _groups_first(context_b),
        _groups_first(c),
    )
    context_sums = cumulative(context_log_decay, chunk)
    # From position i back to its block's left edge by the denoiser's decay, from there by the context's.
    query = [a + b for a, b in zip(*query_sums(log_decay, context_sums, block_size), strict=True)]
    query, context_sums = (Sum(*v).map(lambda v: _heads_first(v, groups)) for v in (query, context_sums))
    seed = jnp.zeros((batch, groups, heads // groups, head_dim, context_b.shape[-1]), jnp.float32)
    chunk_states = _chunk_states(context_x, context_sums, context_b)
    left, _ = _states_at_left_edges(chunk_states, context_sums.total[..., -1], seed)
    context = _across_chunks(c, left, query.total)
    if chunk > block_size:
        # A chunk's first block sees nothing of its chunk, and no block sees the last one.
        position = jnp.arange(chunk - block_size)
        before_block = position[None, :] < (position[:, None] // block_size + 1) * block_size
        later, earlier = slice(block_size, None), slice(None, -block_size)
        within = _within_chunk(
            c[..., later, :],
            context_b[..., earlier, :],
            context_x[..., earlier, :],
            query.map(lambda v: v[..., later]),
            context_sums.map(lambda v: v[..., earlier]),
            before_block,
        )
        context += jnp.pad(within, [(0, 0)] * 4 + [(block_size, 0), (0, 0)])
    return y + _positions_first(context, length)
