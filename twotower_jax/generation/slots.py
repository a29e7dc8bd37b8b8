"""The table of rows being generated: one compiled shape, in which rows come and go.

A `Slots` is allocated once and given away to every call (donated), so that there is one cache and no copy. Rows are
independent: a slot that is not active takes part in the arithmetic and changes nothing that counts.
"""

import functools
import math
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from twotower_jax.diffusion import Prediction, SamplingConfig, sample_tokens
from twotower_jax.parameters import Params, bind
from twotower_jax.tower import Cache
from twotower_jax.two_tower import TwoTower


@flax.struct.dataclass
class Slots:
    """B rows.

    Attributes:
      cache: the context's memory of each row.
      number: (B,) uint32, the row's number, from which its randomness comes.
      token: (B,) int32, the newest token, which the cache has not read; unused in diffusion.
      count: (B,) int32, new tokens so far.
      limit: (B,) int32, new tokens wanted.
      active: (B,) bool, whether a row is being generated here.
    """

    cache: Cache
    number: jax.Array
    token: jax.Array
    count: jax.Array
    limit: jax.Array
    active: jax.Array


class Piece(NamedTuple):
    """Pieces of R prompts, as many tokens as one call reads.

    Attributes:
      ids: (R, W) int32, padded on the right. lengths: (R,) int32, real tokens.
      slot: (R,) int32, B (no slot) where the row is padding.
      first, last: (R,) bool, whether the piece begins or ends its prompt.
      number: (R,) uint32. limit: (R,) int32. As in `Slots`.
      unread: (R,) int32, the prompt's last token, for the mode that keeps it out of the cache.
    """

    ids: jax.Array
    lengths: jax.Array
    slot: jax.Array
    first: jax.Array
    last: jax.Array
    number: jax.Array
    limit: jax.Array
    unread: jax.Array


class First(NamedTuple):
    """What reading prompts chose: tokens (R,) int32 and whether their logits were numbers, (R,) bool."""

    tokens: jax.Array
    finite: jax.Array


@functools.partial(jax.jit, static_argnames=("model", "batch", "capacity"))
def allocate(*, model: TwoTower, batch: int, capacity: int) -> Slots:
    """B empty slots with room for `capacity` positions each."""
    zeros = jnp.zeros(batch, jnp.int32)
    return Slots(
        cache=model.context_tower.empty_cache(batch, capacity),
        number=zeros.astype(jnp.uint32),
        token=zeros,
        count=zeros,
        limit=zeros,
        active=zeros.astype(bool),
    )


def cache_bytes(model: TwoTower, batch: int, capacity: int) -> int:
    """Size of what `allocate` allocates, computed without allocating it."""
    slots = jax.eval_shape(functools.partial(allocate, model=model, batch=batch, capacity=capacity))
    return sum(math.prod(v.shape) * v.dtype.itemsize for v in jax.tree.leaves(slots))


def row_keys(seed: jax.Array, number: jax.Array) -> jax.Array:
    """Keys (B,) of rows with these numbers (B,): of nothing but the seed and the number."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), number)


def next_keys(seed: jax.Array, number: jax.Array, count: jax.Array) -> jax.Array:
    """Keys of the new tokens with index `count`, of the same shape (B, …) as it."""

    def of_row(key, count):
        return jax.vmap(jax.random.fold_in, (None, 0))(key, count.reshape(-1)).reshape(count.shape)

    return jax.vmap(of_row)(row_keys(seed, number), count)


def choose(sampling: SamplingConfig, seed: jax.Array, number: jax.Array, count: jax.Array, logits) -> Prediction:
    """AR's next token: number `count` (B,) of each row, from logits (B, V)."""
    return sample_tokens(
        next_keys(seed, number, count),
        logits,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
    )


@functools.partial(jax.jit, static_argnames=("model", "first"), donate_argnames="slots")
def prefill(
    params: Params,
    slots: Slots,
    piece: Piece,
    seed: jax.Array,
    eos: jax.Array,
    *,
    model: TwoTower,
    first: SamplingConfig | None,
) -> tuple[Slots, First]:
    """Reads pieces of prompts into their slots; a slot whose prompt ends becomes active.

    Args:
      seed: () uint32. eos: () int32, the token that ends a row, or −1.
      first: how AR chooses the first new token, from the logits after the prompt. None for modes that do not; `First`
        then says nothing, and the slot's token is the piece's `unread`.
    """
    bound = bind(model, params)
    tower = bound.context_tower
    rows = tower.clear_rows(tower.take_rows(slots.cache, piece.slot), piece.first)
    logits, rows = bound.extend(piece.ids, piece.lengths, rows)

    # Prompts that go on have no slot yet, as far as everything but the cache is concerned.
    ready = jnp.where(piece.last, piece.slot, slots.active.shape[0])
    count = jnp.zeros_like(piece.limit)
    if first is not None:
        prediction = choose(first, seed, piece.number, count, logits)
        token, finite = prediction.tokens, prediction.finite
        count += 1
        active = (token != eos) & (count < piece.limit)
    else:
        token, finite, active = piece.unread, jnp.ones_like(piece.last), jnp.ones_like(piece.last)

    def put(old, new):
        return old.at[ready].set(new, mode="drop")

    slots = Slots(
        cache=tower.put_rows(slots.cache, piece.slot, rows),
        number=put(slots.number, piece.number),
        token=put(slots.token, token),
        count=put(slots.count, count),
        limit=put(slots.limit, piece.limit),
        active=put(slots.active, active),
    )
    return slots, First(token, finite)
