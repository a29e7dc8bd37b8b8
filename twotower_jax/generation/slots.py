"""The table of rows being generated: one compiled shape, in which rows come and go.

A `Slots` is allocated once and given away to every call (donated), so that there is one cache and no copy. Rows are
independent: a slot that is not active takes part in the arithmetic and changes nothing that counts.
"""

import functools
import math
from collections.abc import Collection
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from twotower_jax import randomness, sharding
from twotower_jax.cache import Cache
from twotower_jax.diffusion import Prediction, SamplingConfig, sample_tokens
from twotower_jax.generation.placement import bind_part
from twotower_jax.parameters import Params
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


def end_token_array(ids: Collection[int]) -> np.ndarray:
    """End tokens as a traced argument: (K,) int32, padded with −1, which no token is. K is a power of two and at least
    4, so that programs are compiled for few sizes and not for each set."""
    size = max(4, 1 << max(0, len(ids) - 1).bit_length())
    return np.array([*ids] + [-1] * (size - len(ids)), np.int32)


def ends(tokens: Int[Array, "*rows"], eos: Int[Array, " K"]) -> Bool[Array, "*rows"]:
    """Which of `tokens` (…) int32 end a row, bool (…): those that are among `eos` (K,)."""
    return jnp.any(tokens[..., None] == eos, axis=-1)


class First(NamedTuple):
    """What reading prompts chose: tokens (R,) int32 and whether their logits were numbers, (R,) bool."""

    tokens: jax.Array
    finite: jax.Array


@functools.partial(jax.jit, static_argnames=("model", "batch", "capacity"))
def allocate(*, model: TwoTower, batch: int, capacity: int) -> Slots:
    """B empty slots with room for `capacity` positions each, on the mesh in force."""
    zeros = jnp.zeros(batch, jnp.int32)
    slots = Slots(
        cache=model.context_tower.empty_cache(batch, capacity),
        number=zeros.astype(jnp.uint32),
        token=zeros,
        count=zeros,
        limit=zeros,
        active=zeros.astype(bool),
    )
    return laid_out(model, slots)


def _axes(model: TwoTower) -> Slots:
    """The logical axes of every array of a table."""
    rows = ("batch",)
    return Slots(cache=model.context_tower.cache_axes(), number=rows, token=rows, count=rows, limit=rows, active=rows)


def laid_out(model: TwoTower, slots: Slots) -> Slots:
    """The table as it lies on the mesh in force: rows over the devices of the batch, states by heads over "tensor"."""
    return jax.tree.map(sharding.constrain, slots, _axes(model))


def cache_bytes(model: TwoTower, batch: int, capacity: int, mesh: Mesh | None = None) -> int:
    """Size of what `allocate` allocates on each device, computed without allocating it."""

    def bytes_of(v, axes):
        shape = v.shape
        if mesh is not None:
            shape = NamedSharding(mesh, sharding.spec(axes, shape, mesh.shape)).shard_shape(shape)
        return math.prod(shape) * v.dtype.itemsize

    slots = jax.eval_shape(functools.partial(allocate, model=model, batch=batch, capacity=capacity))
    return sum(jax.tree.leaves(jax.tree.map(bytes_of, slots, _axes(model))))


def row_keys(seed: Integer[Array, ""], number: Integer[Array, " B"]) -> Key[Array, " B"]:
    """Keys (B,) of rows with these numbers (B,), which depend on the seed and the number alone."""
    return jax.vmap(jax.random.fold_in, (None, 0))(randomness.key(seed), number)


def next_keys(
    seed: Integer[Array, ""], number: Integer[Array, " B"], count: Int[Array, " B *tokens"]
) -> Key[Array, " B *tokens"]:
    """Keys of the new tokens with index `count`, of the same shape (B, …) as it."""

    def of_row(key, count):
        return jax.vmap(jax.random.fold_in, (None, 0))(key, count.reshape(-1)).reshape(count.shape)

    return jax.vmap(of_row)(row_keys(seed, number), count)


def choose(
    sampling: SamplingConfig,
    seed: Integer[Array, ""],
    number: Integer[Array, " B"],
    count: Int[Array, " B"],
    logits: Float[Array, "B V"],
) -> Prediction:
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
    seed: Integer[Array, ""],
    eos: Int[Array, " K"],
    *,
    model: TwoTower,
    first: SamplingConfig | None,
) -> tuple[Slots, First]:
    """Reads pieces of prompts into their slots; a slot whose prompt ends becomes active.

    Args:
      seed: () uint32. eos: (K,) int32, see `end_token_array`.
      first: how AR chooses the first new token, from the logits after the prompt. None for modes that do not; `First`
        then says nothing, and the slot's token is the piece's `unread`.
    """
    bound = bind_part(model, params)
    rows = slots.cache.take_rows(piece.slot).clear_rows(piece.first)
    logits, rows = bound.extend(piece.ids, piece.lengths, rows)

    # Prompts that go on have no slot yet, as far as everything but the cache is concerned.
    ready = jnp.where(piece.last, piece.slot, slots.active.shape[0])
    count = jnp.zeros_like(piece.limit)
    if first is not None:
        prediction = choose(first, seed, piece.number, count, logits)
        token, finite = prediction.tokens, prediction.finite
        count += 1
        active = ~ends(token, eos) & (count < piece.limit)
    else:
        token, finite, active = piece.unread, jnp.ones_like(piece.last), jnp.ones_like(piece.last)

    def put(old, new):
        return old.at[ready].set(new, mode="drop")

    slots = Slots(
        cache=slots.cache.put_rows(piece.slot, rows),
        number=put(slots.number, piece.number),
        token=put(slots.token, token),
        count=put(slots.count, count),
        limit=put(slots.limit, piece.limit),
        active=put(slots.active, active),
    )
    return laid_out(model, slots), First(token, finite)


# For a denoiser on devices of its own: what its copy of the table is sent.


@functools.partial(jax.jit, static_argnames="model")
def take_slots(slots: Slots, rows: Int[Array, " R"], *, model: TwoTower) -> Slots:
    """The slots `rows` (R,) int32 as a table of their own; an index out of range gives the last one."""
    part = jax.tree.map(lambda v: jnp.take(v, rows, mode="clip"), slots.replace(cache=None))
    return laid_out(model, part.replace(cache=slots.cache.take_rows(rows)))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="view")
def put_slots(view: Slots, rows: Int[Array, " R"], part: Slots, *, model: TwoTower) -> Slots:
    """The table with the slots `rows` (R,) int32 replaced; none for one out of range. It consumes `view`."""
    new = jax.tree.map(
        lambda v, new: v.at[rows].set(new, mode="drop"), view.replace(cache=None), part.replace(cache=None)
    )
    return laid_out(model, new.replace(cache=view.cache.put_rows(rows, part.cache)))


def newest(model: TwoTower, slots: Slots, before: Int[Array, " B"], width: int) -> Slots:
    """What changed since the cache's lengths were `before` (B,), at most `width` tokens ago: for `absorb`."""
    return slots.replace(cache=model.context_tower.newest(slots.cache, before, width))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="view")
def absorb(view: Slots, news: Slots, *, model: TwoTower) -> Slots:
    """The table after what `newest` tells of it. It consumes `view`."""
    return laid_out(model, news.replace(cache=model.context_tower.absorb(view.cache, news.cache)))
