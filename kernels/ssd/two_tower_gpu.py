"""The SSD scans of two towers in their dual form (see `kernels.ssd`) on GPUs, forward and backward.

The kernels are those of one tower (gpu_layout.py). The state that goes from chunk to chunk is the context's: one a
chunk, none a block. Inside a chunk position i reads from two sources, from the denoiser what lies in i's own block and
from the context what lies in earlier ones; tiles in which a source has nothing are passed over.

q_i, the decay from the start of the chunk to i, is the context's up to the block's left edge and the denoiser's from
there. Within a block the first part cancels, so that q_i − q_j is the denoiser's own decay.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from twotower_jax.kernels.numerics.log_decay import Sum, cumulative, in_chunks, query_sums
from twotower_jax.kernels.ssd.gpu import Edges
from twotower_jax.kernels.ssd.gpu_layout import Cut, Decays, Pairs, Programs, Source, cut_scan


def _pairs(block_size: int) -> tuple[Pairs, Pairs]:
    """Of the denoiser and of the context."""
    return Pairs(block_size, own=True), Pairs(block_size, own=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(cut: Cut, block_size: int, denoiser, context):
    """y (B, L, H·P).

    Args:
      denoiser: x, b, c, dt, the coarse sums q, and the fine ones as two arrays: of the block, and before it.
      context: x, b, dt, coarse, fine. The gradients of sums go to the fine parts, as in gpu.py.
    """
    return _run_forward(cut, block_size, denoiser, context)[0]


def _decays(denoiser, context) -> tuple[Decays, Decays]:
    """Between the denoiser's readers and the writers of either tower."""
    _, _, _, dt, coarse, inside, before = denoiser
    _, _, context_dt, *context_sums = context
    query = Sum(coarse, inside + before)
    return Decays(query, query, dt), Decays(query, Sum(*context_sums), context_dt)


def _run_forward(cut: Cut, block_size: int, denoiser, context):
    """y, and the context's states at left edges, one a chunk."""
    (x, b, c, *_), (context_x, context_b, *_) = denoiser, context
    own, before = _decays(denoiser, context)
    edges = Edges(cut, before.writers, before.dt)
    left, _ = cut.programs.states(cut, context_x, context_b, edges.weight, edges.kept, _no_state(cut))
    sources = Source(b, x, own), Source(context_b, context_x, before)
    return cut.programs.outputs(cut, c, _pairs(block_size), sources, (jnp.exp(own.readers.total), left)), left


def _no_state(cut: Cut) -> jax.Array:
    return jnp.zeros((cut.batch, cut.heads, cut.head_dim, cut.state), jnp.float32)


def _scan_forward(cut, block_size, denoiser, context):
    context_too = any(v.perturbed for v in context) or denoiser[6].perturbed
    denoiser, context = jax.tree.map(lambda v: v.value, (denoiser, context), is_leaf=lambda v: hasattr(v, "perturbed"))
    y, left = _run_forward(cut, block_size, denoiser, context)
    # Whether the context's gradients are wanted is a fact of the trace, which only a structure can carry.
    return y, (denoiser, context, left, () if context_too else None)


def _scan_backward(cut, block_size, residuals, dy):
    denoiser, context, left, context_too = residuals
    (x, b, c, _, coarse, _, _), (context_x, context_b, context_dt, *_) = denoiser, context
    if isinstance(dy, SymbolicZero):
        dy = jnp.zeros(dy.aval.shape, dy.aval.dtype)
    own, before = _decays(denoiser, context)
    own_pairs, before_pairs = _pairs(block_size)
    from_start = jnp.exp(own.readers.total)

    # The denoiser's.
    writers = (Source(c, dy, own),)
    dx = cut.programs.outputs(cut, b, (own_pairs,), writers, None, readers_in_rows=False)
    sources = Source(b, x, own), Source(context_b, context_x, before)
    dc, (own_reader, reader), read = cut.programs.group_gradients(
        cut, c, dy, _pairs(block_size), sources, (from_start, left), readers_in_rows=True
    )
    db, (own_writer,), _ = cut.programs.group_gradients(cut, b, x, (own_pairs,), writers, None, readers_in_rows=False)
    dbefore = reader.by_decay + from_start * read
    dinside = own_reader.by_decay - own_writer.by_decay + dbefore
    of_denoiser = (
        dx.astype(x.dtype),
        db.astype(b.dtype),
        dc.astype(c.dtype),
        own_writer.by_step,
        jnp.zeros_like(coarse),
        dinside,
        dbefore,
    )
    if context_too is None:
        return of_denoiser, jax.tree.map(jnp.zeros_like, context)

    # The context's.
    edges = Edges(cut, before.writers, context_dt)
    grads, _ = cut.programs.states(cut, dy, c, from_start, edges.kept, _no_state(cut), backward=True)
    writers, through = (Source(c, dy, before),), (edges.weight, grads)
    context_dx = cut.programs.outputs(cut, context_b, (before_pairs,), writers, through, readers_in_rows=False)
    context_db, (writer,), written = cut.programs.group_gradients(
        cut, context_b, context_x, (before_pairs,), writers, through, readers_in_rows=False
    )
    context_ddt, dsum = edges.gradients(cut, written, left, grads)
    of_context = (
        context_dx.astype(context_x.dtype),
        context_db.astype(context_b.dtype),
        context_ddt + writer.by_step,
        jnp.zeros_like(dsum),
        dsum - writer.by_decay,
    )
    return of_denoiser, of_context


_scan.defvjp(_scan_forward, _scan_backward, symbolic_zeros=True)


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
    programs: Programs,
    interpret,
):
    """`kernels.two_tower_ssd`, same arguments and results, by these programs; `interpret` as in gpu.py."""
    cut = cut_scan(x.shape, b.shape, chunk_size, programs, interpret, block_size)
    dt, log_decay, context_dt, context_log_decay = (
        in_chunks(v.astype(jnp.float32), cut.chunk) for v in (dt, log_decay, context_dt, context_log_decay)
    )
    context_sum = cumulative(context_log_decay, cut.chunk)
    inside, before = query_sums(log_decay, context_sum, block_size)
    of_query = map(cut.per_head, (dt, inside.coarse + before.coarse, inside.fine, before.fine))
    denoiser = *map(cut.flat, (x, b, c)), *of_query
    context = *map(cut.flat, (context_x, context_b)), *map(cut.per_head, (context_dt, *context_sum))
    return _scan(cut, block_size, denoiser, context)[:, : x.shape[1]].reshape(x.shape)
