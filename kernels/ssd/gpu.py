"""The SSD scan of one tower on GPUs, forward and backward, with kernels of Pallas Mosaic GPU or of Triton.

The formulas are those of tpu.py; how they are divided into kernels stands in gpu_layout.py:

    h'  states                     w = dt exp(a_Q − a)     y, dx   outputs, by i and by j
    dh  states, backward           e = exp(a)              dC, dB  group_gradients, by i and by j

The gradient of the sums a collects what every exponential multiplies. The states at the edges of chunks, one per chunk,
are kept for the backward pass, and nothing else.
"""

import jax
import jax.numpy as jnp

from twotower_jax.kernels.hardware import versions
from twotower_jax.kernels.numerics.log_decay import Sum, cumulative, in_chunks
from twotower_jax.kernels.ssd.gpu_layout import Decays, Pairs, Programs, ScanTiles, Source, cut_scan

_CAUSAL = (Pairs(),)


class Edges:
    """What connects positions with the edges of their chunk, from sums of log-decays and dt, each (B, H, L).

    Attributes:
      to_edge: exp(a_Q − a). weight: dt · to_edge, of what is written. kept: exp(a_Q), (B, H, L/Q).
    """

    def __init__(self, cut: ScanTiles, sums: Sum, dt: jax.Array):
        last = sums.map(cut.at_edges)
        self.to_edge = jnp.exp(last.map(cut.per_position) - sums)
        self.weight, self.kept = dt * self.to_edge, jnp.exp(last.total)

    def gradients(self, cut: ScanTiles, written, left, grads):
        """The gradients of dt, and of the sums, through the states.

        Args:
          written: (B, H, L), x_j · (g B_j). left, grads: h and g of every chunk, (B, H, L/Q, P, N).
        """
        moved = self.weight * written
        at_edge = cut.sum_chunks(moved) + self.kept * jnp.sum(left * grads, axis=(-2, -1))
        return self.to_edge * written, cut.put_at_edges(at_edge) - moved


def _scan_forward(cut: ScanTiles, x, dt, sums: Sum, b, c, initial):
    edges = Edges(cut, sums, dt)
    left, last = cut.programs.states(cut, x, b, edges.weight, edges.kept, initial)
    source = Source(b, x, Decays(sums, sums, dt))
    y = cut.programs.outputs(cut, c, _CAUSAL, (source,), (jnp.exp(sums.total), left))
    return (y, last), (x, dt, sums, b, c, left)


def _scan_backward(cut, residuals, cotangents):
    (x, dt, sums, b, c, left), (dy, dlast) = residuals, cotangents
    edges, from_start, decays = Edges(cut, sums, dt), jnp.exp(sums.total), Decays(sums, sums, dt)
    grads, dinitial = cut.programs.states(cut, dy, c, from_start, edges.kept, dlast, backward=True)
    readers, writers = (Source(b, x, decays),), (Source(c, dy, decays),)
    dx = cut.programs.outputs(cut, b, _CAUSAL, writers, (edges.weight, grads), readers_in_rows=False)
    dc, (by_reader,), read = cut.programs.group_gradients(
        cut, c, dy, _CAUSAL, readers, (from_start, left), readers_in_rows=True
    )
    db, (by_writer,), written = cut.programs.group_gradients(
        cut, b, x, _CAUSAL, writers, (edges.weight, grads), readers_in_rows=False
    )
    ddt, dsum = edges.gradients(cut, written, left, grads)
    dsum += by_reader.by_decay + from_start * read - by_writer.by_decay
    dsums = Sum(jnp.zeros_like(dsum), dsum)
    return dx.astype(x.dtype), ddt + by_writer.by_step, dsums, db.astype(b.dtype), dc.astype(c.dtype), dinitial


def _scanned(*arguments):
    """y and the last state. The gradient of the sums goes to the fine ones; `cumulative` holds the coarse constant."""
    return _scan_forward(*arguments)[0]


_scan = versions.with_gradient(_scanned, _scan_forward, _scan_backward, (0,), lambda cut: cut.interpret is not None)


def ssd(x, dt, log_decay, b, c, *, initial_state=None, chunk_size=128, programs: Programs, interpret):
    """`kernels.ssd`, same arguments and results, by these programs. `interpret`: None, or how to run them anywhere."""
    batch, length, heads, head_dim = x.shape
    cut = cut_scan(x.shape, b.shape, chunk_size, programs, interpret)
    dt, log_decay = (in_chunks(v.astype(jnp.float32), cut.chunk) for v in (dt, log_decay))
    sums = cumulative(log_decay, cut.chunk).map(cut.per_head)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, head_dim, cut.state), jnp.float32)
    initial = initial_state.astype(jnp.float32)
    y, last = _scan(cut, cut.flat(x), cut.per_head(dt), sums, cut.flat(b), cut.flat(c), initial)
    return y[:, :length].reshape(x.shape), last
