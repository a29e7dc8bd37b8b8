"""The SSD scans of two towers in their dual form (see `kernels.ssd`) as Pallas TPU kernels, forward and backward.

As in tpu.py a grid step takes a chunk of R heads, and the state that goes from chunk to chunk is the context's: one
a chunk, none a block. Inside a chunk position i reads each j ≤ i once, from the denoiser where j lies in i's own block
and from the context where it lies in an earlier one. So both towers share one triangle of scores and decays: where the
block of j is i's, B, x, dt and the sums q of the denoiser stand in it, elsewhere those of the context.

q_i, the decay from the start of the chunk to i, is the context's up to the block's left edge and the denoiser's from
there. Within a block the first part cancels, so that q_i − q_j is the denoiser's own decay.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl

from twotower_jax.kernels.hardware import tpu
from twotower_jax.kernels.hardware.tpu_layout import Layout, chunk_length, layout
from twotower_jax.kernels.hardware.tpu_layout import unsupported as _unsupported_blocks
from twotower_jax.kernels.numerics.log_decay import Sum, cumulative, in_chunks, query_sums
from twotower_jax.kernels.numerics.split import for_products


class _Chunk:
    """What both kernels need of a chunk: the decays of its positions, and which of them see which."""

    def __init__(self, cut: Layout, block_size: int, dt, query: Sum, context_dt, context: Sum):
        self.cut, self.dt, self.query, self.context_dt, self.context = cut, dt, query, context_dt, context
        self.to_edge = jnp.exp(context.map(tpu.last) - context)
        columns = tpu.columns(*query, jnp.exp(query.total), context_dt * self.to_edge)
        self.query_column, self.from_start, self.weight = Sum(*columns[:2]), columns[2], columns[3]
        self.kept = tpu.across_states(jnp.exp(tpu.last(context.total)), cut.head_dim, cut.state)
        i, j = tpu.positions(cut.chunk)
        self.visible, self.before = j <= i, j < i
        self.same_block = i // block_size == j // block_size

    def mix(self, own, context):
        """(Q, Q) that holds the denoiser's where j lies in i's block, and the context's elsewhere."""
        return jnp.where(self.same_block, own, context)

    def split(self, mixed):
        """The two parts of `mix`, zero outside their places."""
        return jnp.where(self.same_block, mixed, 0.0), jnp.where(self.same_block, 0.0, mixed)

    def decay(self, r: int) -> jax.Array:
        """(Q, Q) of head r: from j to i."""
        keys = Sum(*(self.mix(a[r : r + 1], b[r : r + 1]) for a, b in zip(self.query, self.context, strict=True)))
        difference = self.query_column.map(lambda v: v[:, r : r + 1]) - keys
        # Masked before the exponential, which would overflow above the diagonal.
        return jnp.exp(jnp.where(self.visible, difference, -jnp.inf))

    def step_size(self, r: int) -> jax.Array:
        """(Q, Q) of head r: dt of j."""
        return self.mix(self.dt[r : r + 1], self.context_dt[r : r + 1])


def _load(cut: Layout, block_size: int, refs):
    """The chunk's products' operands, and the rest."""
    x_ref, b_ref, c_ref, context_x_ref, context_b_ref, *row_refs = refs
    x, context_x = x_ref[cut.of_heads], context_x_ref[cut.of_heads]
    b, c, context_b = b_ref[...], c_ref[...], context_b_ref[...]
    dt, query_coarse, query_fine, context_dt, coarse, fine = (ref[...] for ref in row_refs)
    chunk = _Chunk(cut, block_size, dt, Sum(query_coarse, query_fine), context_dt, Sum(coarse, fine))
    return x, b, c, context_x, context_b, chunk


_INPUTS = 11


def _forward_kernel(*refs, cut: Layout, block_size: int):
    inputs, (y_ref, *left_ref, state_ref) = refs[:_INPUTS], refs[_INPUTS:]

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = jnp.zeros_like(state_ref)

    state = state_ref[...]
    for ref in left_ref:
        ref[...] = state
    x, b, c, context_x, context_b, chunk = _load(cut, block_size, inputs)
    scores = chunk.mix(tpu.dot(c, b, tpu.NT), tpu.dot(c, context_b, tpu.NT))
    y = []
    for r in range(cut.heads):
        own, context = chunk.split(scores * chunk.decay(r) * chunk.step_size(r))
        own_x, before_x = tpu.head(x, r, cut.head_dim), tpu.head(context_x, r, cut.head_dim)
        y.append(tpu.dot(own, own_x) + tpu.dot(context, before_x))
    across = tpu.dot(c, state, tpu.NT) * tpu.across_heads(chunk.from_start, cut.head_dim)
    y_ref[cut.of_heads] = jnp.concatenate(y, axis=1) + across
    weighted = context_x.astype(jnp.float32) * tpu.across_heads(chunk.weight, cut.head_dim)
    state_ref[...] = chunk.kept * state + tpu.dot(weighted, context_b, tpu.TN)


def _inputs(cut: Layout, order, arrays):
    """The arrays with the blocks that a step sees of them, in the order of `_load`."""
    wide, rows, group = cut.inner(order), cut.rows(order), cut.group(order)
    return list(zip((wide, group, group, wide, group, *(rows,) * 6), arrays, strict=True))


def _run_forward(cut: Layout, block_size: int, arrays, keep_states: bool):
    """y (B, L, H/R·W), and with keep_states the context's states at left edges, one a chunk."""
    batch, length, _ = arrays[0].shape

    def order(k):
        return k

    outputs = [(cut.inner(order), arrays[0].shape, jnp.float32)]
    if keep_states:
        shape = (batch, cut.blocks, length // cut.chunk, cut.heads * cut.head_dim, cut.state)
        outputs.append((cut.chunk_state(order), shape, jnp.float32))
    kernel = functools.partial(_forward_kernel, cut=cut, block_size=block_size)
    return cut.call(kernel, batch, length, _inputs(cut, order, arrays), outputs)


def _backward_kernel(*refs, cut: Layout, block_size: int):
    """Gradients of the denoiser's arrays, and of the context's where there are outputs for them."""
    inputs, (left_ref, dy_ref), (*outputs, grad_ref) = refs[:_INPUTS], refs[_INPUTS : _INPUTS + 2], refs[_INPUTS + 2 :]
    dx_ref, ddt_ref, dinside_ref, dquery_ref, db_ref, dc_ref, *context_outputs = outputs
    left, dy = left_ref[...], dy_ref[cut.of_heads]
    x, b, c, context_x, context_b, chunk = _load(cut, block_size, inputs)
    head_dim = cut.head_dim

    # Through the state at the left edge.
    dy_start = dy * tpu.across_heads(chunk.from_start, head_dim)
    read = tpu.sums_of_heads(dy_start * tpu.dot(c, left, tpu.NT), head_dim)

    # Inside the chunk.
    scores = chunk.mix(tpu.dot(c, b, tpu.NT), tpu.dot(c, context_b, tpu.NT))
    dscores = jnp.zeros_like(scores)
    dx, ddt, own_row, own_column, row = [], [], [], [], []
    context_dx, context_ddt, column = [], [], []
    for r in range(cut.heads):
        decay, step_size = chunk.decay(r), chunk.step_size(r)
        dy_head = tpu.head(dy, r, head_dim)
        own_x, before_x = tpu.head(x, r, head_dim), tpu.head(context_x, r, head_dim)
        dmixed = chunk.mix(tpu.dot(dy_head, own_x, tpu.NT), tpu.dot(dy_head, before_x, tpu.NT))
        dscores += dmixed * decay * step_size
        own, context = chunk.split(scores * decay * step_size)
        dx.append(tpu.dot(own, dy_head, tpu.TN))
        own_by_step, by_step = chunk.split(scores * decay * dmixed)
        # The diagonal does not decay: left out rather than left to cancel.
        own_by_decay, by_decay = jnp.where(chunk.before, own_by_step * step_size, 0.0), by_step * step_size
        ddt.append(jnp.sum(own_by_step, axis=0, keepdims=True))
        own_row.append(jnp.sum(own_by_decay, axis=1, keepdims=True))
        own_column.append(jnp.sum(own_by_decay, axis=0, keepdims=True))
        row.append(jnp.sum(by_decay, axis=1, keepdims=True))
        if context_outputs:
            context_dx.append(tpu.dot(context, dy_head, tpu.TN))
            context_ddt.append(jnp.sum(by_step, axis=0, keepdims=True))
            column.append(jnp.sum(by_decay, axis=0, keepdims=True))
    own_dscores, context_dscores = chunk.split(dscores)
    dx_ref[cut.of_heads] = jnp.concatenate(dx, axis=1).astype(dx_ref.dtype)
    ddt_ref[...] = jnp.concatenate(ddt, axis=0)
    inside, query = tpu.rows(jnp.concatenate(own_row, axis=1), jnp.concatenate(row, axis=1) + read)
    dinside_ref[...] = inside - jnp.concatenate(own_column, axis=0) + query
    dquery_ref[...] = query
    db_ref[...] = tpu.dot(own_dscores, c, tpu.TN)
    dc_ref[...] = tpu.dot(own_dscores, b) + tpu.dot(context_dscores, context_b) + tpu.dot(dy_start, left)
    if not context_outputs:
        return

    @pl.when(pl.program_id(2) == 0)
    def _():
        grad_ref[...] = jnp.zeros_like(grad_ref)

    # Through the state at the right edge.
    context_dx_ref, context_ddt_ref, dsum_ref, context_db_ref = context_outputs
    grad = grad_ref[...]
    pulled = tpu.dot(context_b, grad, tpu.NT)
    x_float, weights = context_x.astype(jnp.float32), tpu.across_heads(chunk.weight, head_dim)
    (written,) = tpu.rows(tpu.sums_of_heads(x_float * pulled, head_dim))
    context_dx = jnp.concatenate(context_dx, axis=1) + weights * pulled
    context_dx_ref[cut.of_heads] = context_dx.astype(context_dx_ref.dtype)
    context_ddt_ref[...] = jnp.concatenate(context_ddt, axis=0) + chunk.to_edge * written
    moved = chunk.context_dt * chunk.to_edge * written
    state_kept = tpu.sums_of_states(chunk.kept * grad * left, head_dim)
    at_edge = tpu.at_last(jnp.sum(moved, axis=1, keepdims=True) + state_kept, cut.chunk)
    dsum_ref[...] = at_edge - jnp.concatenate(column, axis=0) - moved
    context_db_ref[...] = tpu.dot(context_dscores, c, tpu.TN) + tpu.dot(x_float * weights, grad)
    grad_ref[...] = chunk.kept * grad + tpu.dot(dy_start, c, tpu.TN)


def _run_backward(cut: Layout, block_size: int, arrays, left, dy, context_too: bool):
    """Gradients of x, dt, the sums in the block, the sums before it, b, c; then of the context's x, dt, sums, b."""
    batch, length, _ = dy.shape

    def order(k):
        return length // cut.chunk - 1 - k

    wide = (cut.inner(order), dy.shape, arrays[0].dtype)
    row = (cut.rows(order), arrays[5].shape, jnp.float32)
    part = (cut.group_parts(order), (batch, length, cut.blocks * cut.state), jnp.float32)
    inputs = [*_inputs(cut, order, arrays), (cut.chunk_state(order), left), (cut.inner(order), dy)]
    outputs = [wide, row, row, row, part, part] + ([wide, row, row, part] if context_too else [])
    kernel = functools.partial(_backward_kernel, cut=cut, block_size=block_size)
    return cut.call(kernel, batch, length, inputs, outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(cut: Layout, block_size: int, denoiser, context):
    """y (B, L, H/R·W).

    Args:
      denoiser: x, b, c, dt, the coarse sums q, and the fine ones as two arrays: of the block, and before it.
      context: x, b, dt, coarse, fine. The gradients of sums go to the fine parts, as in tpu.py.
    """
    (y,) = _run_forward(cut, block_size, _arrays(denoiser, context), keep_states=False)
    return y


def _arrays(denoiser, context):
    x, b, c, dt, coarse, inside, before = denoiser
    context_x, context_b, *context_rows = context
    return x, b, c, context_x, context_b, dt, coarse, inside + before, *context_rows


def _scan_forward(cut, block_size, denoiser, context):
    context_too = any(v.perturbed for v in context) or denoiser[6].perturbed
    denoiser, context = jax.tree.map(lambda v: v.value, (denoiser, context), is_leaf=lambda v: hasattr(v, "perturbed"))
    arrays = _arrays(denoiser, context)
    y, left = _run_forward(cut, block_size, arrays, keep_states=True)
    # Whether the context's gradients are wanted is a fact of the trace, which only a structure can carry.
    return y, (arrays, left, () if context_too else None)


def _scan_backward(cut, block_size, residuals, dy):
    arrays, left, context_too = residuals
    x, b, c, context_x, context_b, dt, coarse, _, _, _, _ = arrays
    if isinstance(dy, SymbolicZero):
        dy = jnp.zeros(dy.aval.shape, dy.aval.dtype)
    dx, ddt, dinside, dbefore, db, dc, *of_context = _run_backward(
        cut, block_size, arrays, left, dy, context_too is not None
    )
    denoiser = dx, cut.sum_parts(db, b.dtype), cut.sum_parts(dc, c.dtype), ddt, jnp.zeros_like(coarse), dinside, dbefore
    if not of_context:
        zeros = jnp.zeros_like(dt)
        return denoiser, (jnp.zeros_like(context_x), jnp.zeros_like(context_b), zeros, zeros, zeros)
    context_dx, context_ddt, dsum, context_db = of_context
    return denoiser, (context_dx, cut.sum_parts(context_db, context_b.dtype), context_ddt, jnp.zeros_like(dsum), dsum)


_scan.defvjp(_scan_forward, _scan_backward, symbolic_zeros=True)


def unsupported(
    x, dt, log_decay, b, c, context_x, context_dt, context_log_decay, context_b, *, block_size, chunk_size=128
) -> str | None:
    """Why the hardware cannot run `two_tower_ssd` on these shapes, or None."""
    return _unsupported_blocks(x.shape, b.shape, chunk_length(x.shape[1], chunk_size, False, block_size))


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
    interpret=False,
):
    """`kernels.two_tower_ssd`, same arguments and results. `interpret` runs it on any backend, with any shapes."""
    batch, length, heads, head_dim = x.shape
    chunk = chunk_length(length, chunk_size, interpret, block_size)
    cut = layout(x.shape, b.shape, chunk, interpret)
    dt, log_decay, context_dt, context_log_decay = (
        in_chunks(v.astype(jnp.float32), chunk) for v in (dt, log_decay, context_dt, context_log_decay)
    )
    context_sum = cumulative(context_log_decay, chunk)
    inside, before = query_sums(log_decay, context_sum, block_size)

    def wide(v):
        return cut.flat(in_chunks(for_products(v), chunk).reshape(batch, -1, heads, head_dim))

    def flat(v):
        return in_chunks(for_products(v), chunk).reshape(batch, -1, v.shape[2] * v.shape[3])

    def rows(*arrays):
        return (cut.to_rows(v.reshape(batch, -1, heads)) for v in arrays)

    denoiser = wide(x), flat(b), flat(c), *rows(dt, inside.coarse + before.coarse, inside.fine, before.fine)
    context = wide(context_x), flat(context_b), *rows(context_dt, *context_sum)
    return cut.heads_of(_scan(cut, block_size, denoiser, context)[:, :length])
