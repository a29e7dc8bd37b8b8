"""The SSD scan of one tower as Pallas TPU kernels, forward and backward.

One grid step takes a chunk of Q positions of R heads of one group; the state goes from chunk to chunk in scratch
memory, forward through the sequence, its gradient backward. With a the sums of log-decays from the start of the chunk,
h the state at its left edge and g the gradient of the state at its right edge:

    L_ij = exp(a_i − a_j) for j ≤ i      e_i = exp(a_i)      w_j = dt_j exp(a_Q − a_j)      K = dy xᵀ

    y    = (C Bᵀ ∘ L ∘ dt) x + e ∘ C hᵀ                   dx = (C Bᵀ ∘ L ∘ dt)ᵀ dy + w ∘ B gᵀ
    h'   = exp(a_Q) h + (w ∘ x)ᵀ B                        dC = (K ∘ L ∘ dt) B + (e ∘ dy) h
    dh   = exp(a_Q) g + (e ∘ dy)ᵀ C                       dB = (K ∘ L ∘ dt)ᵀ C + (w ∘ x) g

summed over the heads of a group for B and C. The gradient of a collects what every exponential above multiplies. The
forward pass keeps the state at each chunk's left edge for the backward one, and nothing else.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from twotower_jax.kernels.hardware import tpu
from twotower_jax.kernels.hardware.tpu_layout import Layout, chunk_length, layout
from twotower_jax.kernels.hardware.tpu_layout import unsupported as _unsupported_blocks
from twotower_jax.kernels.numerics.log_decay import Sum, cumulative, in_chunks
from twotower_jax.kernels.numerics.split import for_products


class Chunk:
    """The decays of a chunk's positions: dt (R, Q), and the sums of log-decays from the chunk's start."""

    def __init__(self, cut: Layout, dt: jax.Array, sums: Sum):
        self.cut, self.dt, self.sums = cut, dt, sums
        self.to_edge = jnp.exp(sums.map(tpu.last) - sums)
        columns = tpu.columns(*sums, jnp.exp(sums.total), dt * self.to_edge)
        self.sums_column, self.from_start, self.weight = Sum(*columns[:2]), columns[2], columns[3]
        self.kept = tpu.across_states(jnp.exp(tpu.last(sums.total)), cut.head_dim, cut.state)
        i, j = tpu.positions(cut.chunk)
        self.visible, self.before = j <= i, j < i

    def decay(self, r: int) -> jax.Array:
        """(Q, Q) of head r: from j to i."""
        difference = self.sums_column.map(lambda v: v[:, r : r + 1]) - self.sums.map(lambda v: v[r : r + 1])
        # Masked before the exponential, which would overflow above the diagonal.
        return jnp.exp(jnp.where(self.visible, difference, -jnp.inf))

    def output(self, x: jax.Array, b: jax.Array, c: jax.Array, state: jax.Array) -> jax.Array:
        """y (Q, R·P) from x (Q, R·P), b and c (Q, N), and the state at the left edge (R·P, N)."""
        head_dim, scores = self.cut.head_dim, tpu.dot(c, b, tpu.NT)
        within = [
            tpu.dot(scores * self.decay(r) * self.dt[r : r + 1], tpu.head(x, r, head_dim))
            for r in range(self.cut.heads)
        ]
        across = tpu.dot(c, state, tpu.NT) * tpu.across_heads(self.from_start, head_dim)
        return jnp.concatenate(within, axis=1) + across

    def next_state(self, x: jax.Array, b: jax.Array, state: jax.Array) -> jax.Array:
        """The state at the right edge, (R·P, N)."""
        weighted = x.astype(jnp.float32) * tpu.across_heads(self.weight, self.cut.head_dim)
        return self.kept * state + tpu.dot(weighted, b, tpu.TN)


def _forward_kernel(
    x_ref, dt_ref, coarse_ref, fine_ref, b_ref, c_ref, initial_ref,
    y_ref, last_ref, *rest, cut: Layout,
):  # fmt: skip
    *left_ref, state_ref = rest
    step, steps = pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _():
        state_ref[...] = initial_ref[...]

    state = state_ref[...]
    for ref in left_ref:
        ref[...] = state
    x, b, c = x_ref[cut.of_heads], b_ref[...], c_ref[...]
    chunk = Chunk(cut, dt_ref[...], Sum(coarse_ref[...], fine_ref[...]))
    y_ref[cut.of_heads] = chunk.output(x, b, c, state)
    state_ref[...] = chunk.next_state(x, b, state)

    @pl.when(step == steps - 1)
    def _():
        last_ref[...] = state_ref[...]


def _run_forward(cut: Layout, x, dt, coarse, fine, b, c, initial, keep_states: bool):
    """y (B, L, H/R·W), the last state (B, H/R, R·P, N), and with keep_states those at left edges, one a chunk."""
    batch, length, _ = x.shape

    def order(k):
        return k

    wide, rows, group, state = cut.inner(order), cut.rows(order), cut.group(order), cut.one_state()
    outputs = [(wide, x.shape, jnp.float32), (state, initial.shape, jnp.float32)]
    if keep_states:
        shape = (*initial.shape[:2], length // cut.chunk, *initial.shape[2:])
        outputs.append((cut.chunk_state(order), shape, jnp.float32))
    inputs = [(wide, x), (rows, dt), (rows, coarse), (rows, fine), (group, b), (group, c), (state, initial)]
    return cut.call(functools.partial(_forward_kernel, cut=cut), batch, length, inputs, outputs)


def _backward_kernel(
    x_ref, dt_ref, coarse_ref, fine_ref, b_ref, c_ref, left_ref, dy_ref, dlast_ref,
    dx_ref, ddt_ref, dsum_ref, db_ref, dc_ref, dinitial_ref, grad_ref, *, cut: Layout,
):  # fmt: skip
    step, steps = pl.program_id(2), pl.num_programs(2)

    @pl.when(step == 0)
    def _():
        grad_ref[...] = dlast_ref[...]

    grad, left = grad_ref[...], left_ref[...]
    x, b, c, dy = x_ref[cut.of_heads], b_ref[...], c_ref[...], dy_ref[cut.of_heads]
    chunk = Chunk(cut, dt_ref[...], Sum(coarse_ref[...], fine_ref[...]))

    # Through the states at both edges.
    dy_start = dy * tpu.across_heads(chunk.from_start, cut.head_dim)
    pulled = tpu.dot(b, grad, tpu.NT)  # B gᵀ
    x_float, weights = x.astype(jnp.float32), tpu.across_heads(chunk.weight, cut.head_dim)
    read = tpu.sums_of_heads(dy_start * tpu.dot(c, left, tpu.NT), cut.head_dim)  # e_i dy_i·(h C_i)
    written = tpu.sums_of_heads(x_float * pulled, cut.head_dim)  # x_j·(g B_j)
    state_kept = tpu.sums_of_states(chunk.kept * grad * left, cut.head_dim)  # exp(a_Q) ⟨g, h⟩

    # Inside the chunk.
    scores = tpu.dot(c, b, tpu.NT)
    dscores = jnp.zeros_like(scores)
    dx, ddt, by_row, by_column = [], [], [], []
    for r in range(cut.heads):
        decay, step_size = chunk.decay(r), chunk.dt[r : r + 1]
        dy_head = tpu.head(dy, r, cut.head_dim)
        dmixed = tpu.dot(dy_head, tpu.head(x, r, cut.head_dim), tpu.NT)  # K
        dx.append(tpu.dot(scores * decay * step_size, dy_head, tpu.TN))
        dscores += dmixed * decay * step_size
        by_step = scores * decay * dmixed
        ddt.append(jnp.sum(by_step, axis=0, keepdims=True))
        # The diagonal does not decay: left out rather than left to cancel.
        by_decay = jnp.where(chunk.before, by_step * step_size, 0.0)
        by_row.append(jnp.sum(by_decay, axis=1, keepdims=True))
        by_column.append(jnp.sum(by_decay, axis=0, keepdims=True))

    dx_ref[cut.of_heads] = (jnp.concatenate(dx, axis=1) + weights * pulled).astype(dx_ref.dtype)
    dc_ref[...] = tpu.dot(dscores, b) + tpu.dot(dy_start, left)
    db_ref[...] = tpu.dot(dscores, c, tpu.TN) + tpu.dot(x_float * weights, grad)
    into, written = tpu.rows(jnp.concatenate(by_row, axis=1) + read, written)
    ddt_ref[...] = jnp.concatenate(ddt, axis=0) + chunk.to_edge * written
    moved = chunk.dt * chunk.to_edge * written
    at_edge = tpu.at_last(jnp.sum(moved, axis=1, keepdims=True) + state_kept, cut.chunk)
    dsum_ref[...] = into - jnp.concatenate(by_column, axis=0) - moved + at_edge
    grad_ref[...] = chunk.kept * grad + tpu.dot(dy_start, c, tpu.TN)

    @pl.when(step == steps - 1)
    def _():
        dinitial_ref[...] = grad_ref[...]


def _run_backward(cut: Layout, x, dt, coarse, fine, b, c, left, dy, dlast):
    """Gradients of x, dt, the sums, b and c (parts of it, see `Layout.group_parts`), and the initial state."""
    batch, length, _ = x.shape

    def order(k):
        return length // cut.chunk - 1 - k

    wide, rows, group, state = cut.inner(order), cut.rows(order), cut.group(order), cut.one_state()
    inputs = [(wide, x), (rows, dt), (rows, coarse), (rows, fine), (group, b), (group, c)]
    inputs += [(cut.chunk_state(order), left), (wide, dy), (state, dlast)]
    row = (rows, dt.shape, jnp.float32)
    part = (cut.group_parts(order), (batch, length, cut.blocks * cut.state), jnp.float32)
    outputs = [(wide, x.shape, x.dtype), row, row, part, part, (state, dlast.shape, jnp.float32)]
    return cut.call(functools.partial(_backward_kernel, cut=cut), batch, length, inputs, outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(cut: Layout, x, dt, coarse, fine, b, c, initial):
    """y and the last state. The gradient of coarse + fine goes to `fine`; `coarse` is a constant to `cumulative`."""
    y, last = _run_forward(cut, x, dt, coarse, fine, b, c, initial, keep_states=False)
    return y, last


def _scan_forward(cut, *inputs):
    y, last, left = _run_forward(cut, *inputs, keep_states=True)
    return (y, last), (*inputs[:-1], left)


def _scan_backward(cut, residuals, cotangents):
    x, dt, coarse, fine, b, c, left = residuals
    dx, ddt, dsum, db, dc, dinitial = _run_backward(cut, *residuals, *cotangents)
    return dx, ddt, jnp.zeros_like(coarse), dsum, cut.sum_parts(db, b.dtype), cut.sum_parts(dc, c.dtype), dinitial


_scan.defvjp(_scan_forward, _scan_backward, optimize_remat=True)


def unsupported(x, dt, log_decay, b, c, *, initial_state=None, chunk_size=128) -> str | None:
    """Why the hardware cannot run `ssd` on these shapes, or None."""
    return _unsupported_blocks(x.shape, b.shape, chunk_length(x.shape[1], chunk_size, False))


def ssd(x, dt, log_decay, b, c, *, initial_state=None, chunk_size=128, interpret=False):
    """`kernels.ssd`, same arguments and results. `interpret` runs it on any backend, with any shapes."""
    batch, length, heads, head_dim = x.shape
    state = b.shape[3]
    chunk = chunk_length(length, chunk_size, interpret)
    cut = layout(x.shape, b.shape, chunk, interpret)
    dt, log_decay = (in_chunks(v.astype(jnp.float32), chunk) for v in (dt, log_decay))
    rows = (cut.to_rows(v.reshape(batch, -1, heads)) for v in (dt, *cumulative(log_decay, chunk)))
    x = cut.flat(in_chunks(for_products(x), chunk).reshape(batch, -1, heads, head_dim))
    b, c = (in_chunks(for_products(v), chunk).reshape(batch, -1, v.shape[2] * v.shape[3]) for v in (b, c))
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, head_dim, state), jnp.float32)
    initial = initial_state.astype(jnp.float32).reshape(batch, cut.blocks, -1, state)
    y, last = _scan(cut, x, *rows, b, c, initial)
    return cut.heads_of(y[:, :length]), last.reshape(batch, heads, head_dim, state)
