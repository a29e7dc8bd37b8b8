"""What the Pallas TPU kernels compute with: exact products of small matrices, and moves between rows and columns.

A kernel takes one chunk of Q positions of R heads at a time. Per-head numbers (step sizes, sums of log-decays) come as
rows (R, Q), positions along the lanes; heads of x stand side by side in (Q, R·P); states one below another, (R·P, N).
"""

import jax
import jax.numpy as jnp

from twotower_jax.kernels.numerics.split import parts

# For the contraction of dot: rows with columns, rows with rows, columns with columns.
NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))


def dot(a: jax.Array, b: jax.Array, contract: tuple[tuple[int], tuple[int]] = NN) -> jax.Array:
    """Product of two matrices as exact as float32 allows, in as few passes of the matrix unit as that takes.

    The unit multiplies bfloat16. Two bfloat16 matrices take one pass; a float32 one and a bfloat16 one three, since
    24 bits are three times 8; two float32 ones six, by `Precision.HIGHEST`.
    """

    def once(a, b, precision=None):
        return jax.lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)

    if a.dtype == b.dtype == jnp.bfloat16:
        return once(a, b)
    if b.dtype == jnp.bfloat16:
        return sum(once(part, b) for part in reversed(parts(a)))
    if a.dtype == jnp.bfloat16:
        return sum(once(a, part) for part in reversed(parts(b)))
    return once(a, b, jax.lax.Precision.HIGHEST)


def columns(*rows: jax.Array) -> list[jax.Array]:
    """Each (R, Q) as (Q, R)."""
    stacked = jnp.concatenate(rows, axis=0).T
    count = rows[0].shape[0]
    return [stacked[:, i * count : (i + 1) * count] for i in range(len(rows))]


def rows(*columns: jax.Array) -> list[jax.Array]:
    """Each (Q, R) as (R, Q)."""
    stacked = jnp.concatenate(columns, axis=1).T
    count = columns[0].shape[1]
    return [stacked[i * count : (i + 1) * count] for i in range(len(columns))]


def last(row: jax.Array) -> jax.Array:
    """(R, Q) → (R, 1), the last position's."""
    return row[:, -1:]


def at_last(column: jax.Array, length: int) -> jax.Array:
    """(R, 1) → (R, Q): the numbers at the last position, zeros before it."""
    shape = (column.shape[0], length)
    position = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return jnp.where(position == length - 1, jnp.broadcast_to(column, shape), 0.0)


def positions(length: int) -> tuple[jax.Array, jax.Array]:
    """i and j at every place of (Q, Q)."""
    shape = (length, length)
    return jax.lax.broadcasted_iota(jnp.int32, shape, 0), jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def head(x: jax.Array, r: int, head_dim: int) -> jax.Array:
    """(Q, R·P) → (Q, P), of head r."""
    return x[:, r * head_dim : (r + 1) * head_dim]


def across_heads(column: jax.Array, head_dim: int) -> jax.Array:
    """(Q, R) → (Q, R·P): each head's number at each of its places."""
    length, heads = column.shape
    return jnp.concatenate([jnp.broadcast_to(column[:, r : r + 1], (length, head_dim)) for r in range(heads)], axis=1)


def across_states(numbers: jax.Array, head_dim: int, state: int) -> jax.Array:
    """(R, 1) → (R·P, N): each head's number at each place of its state."""
    heads = numbers.shape[0]
    return jnp.concatenate([jnp.broadcast_to(numbers[r : r + 1], (head_dim, state)) for r in range(heads)], axis=0)


def sums_of_heads(x: jax.Array, head_dim: int) -> jax.Array:
    """(Q, R·P) → (Q, R): the sum over each head's places."""
    heads = x.shape[1] // head_dim
    return jnp.concatenate([jnp.sum(head(x, r, head_dim), axis=1, keepdims=True) for r in range(heads)], axis=1)


def sums_of_states(x: jax.Array, head_dim: int) -> jax.Array:
    """(R·P, N) → (R, 1): the sum over each head's state."""
    by_place = jnp.sum(x, axis=1, keepdims=True)
    heads = [by_place[r : r + head_dim] for r in range(0, x.shape[0], head_dim)]
    return jnp.concatenate([jnp.sum(v, axis=0, keepdims=True) for v in heads], axis=0)
