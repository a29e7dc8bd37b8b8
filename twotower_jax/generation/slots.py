"""The table of rows being generated: one compiled shape, in which rows come and go.

A `Slots` is allocated once and given away to every call (donated), so that there is one cache and no copy. Rows are
independent: a slot that is not active takes part in the arithmetic and changes nothing that counts.
"""

import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from twotower_jax import randomness, sharding
from twotower_jax.cache import Cache
from twotower_jax.diffusion import Choice, most_probable, predict_rows
from twotower_jax.generation.placement import bind_part
from twotower_jax.memory import sharded_bytes
from twotower_jax.parameters import Params
from twotower_jax.two_tower import TwoTower


@flax.struct.dataclass
class Slots:
    """B rows.

    Attributes:
      cache: the context's memory of each row.
      token: (B,) int32, the newest token, which the cache has not read; unused in diffusion.
      count: (B,) int32, new tokens so far.
      limit: (B,) int32, new tokens wanted.
      active: (B,) bool, whether a row is being generated here.
      last: (B, D), the context's final hidden state at the last token that the cache has read, of rows that are told
        what the context thinks of diffusion's tokens; it says nothing of others.
    """

    cache: Cache
    token: jax.Array
    count: jax.Array
    limit: jax.Array
    active: jax.Array
    last: jax.Array


class Draws(NamedTuple):
    """What decides the tokens of B rows beside their logits: arguments, so that requests may differ.

    Attributes:
      seed, sample: (B,) uint32, from which a row's random keys come, and from nothing else.
      choice: temperature and filters.
    """

    seed: jax.Array
    sample: jax.Array
    choice: Choice


class Given(NamedTuple):
    """What a caller says of W positions to come of B rows.

    Attributes:
      tokens: (B, W) int32, that stand there to begin with; the mask token where nothing is said.
      fixed: (B, W) bool, which of them stay.
      allowed: (B, W, ⌈V/8⌉) uint8, a bit for each token that may stand there, see `allowed_bits`; None where every
        row may have any.
    """

    tokens: jax.Array
    fixed: jax.Array
    allowed: jax.Array | None = None

    def at(self, place: Any) -> "Given":
        """Some of the positions."""
        return Given(*(None if v is None else v[:, place] for v in self))


class Piece(NamedTuple):
    """Pieces of R prompts, as many tokens as one call reads.

    Attributes:
      ids: (R, W) int32, padded on the right. lengths: (R,) int32, real tokens.
      slot: (R,) int32, B (no slot) where the row is padding.
      first, last: (R,) bool, whether the piece begins or ends its prompt.
      limit: (R,) int32. As in `Slots`.
      unread: (R,) int32, the prompt's last token, for the mode that keeps it out of the cache.
      draws, eos: of the rows, as in `modes.Call`. given: of the first new token (R, 1).
    """

    ids: jax.Array
    lengths: jax.Array
    slot: jax.Array
    first: jax.Array
    last: jax.Array
    limit: jax.Array
    unread: jax.Array
    draws: Draws
    eos: jax.Array
    given: Given


def end_token_array(ids: Collection[int]) -> np.ndarray:
    """End tokens as a traced argument: (K,) int32, padded with −1, which no token is. K is a power of two and at least
    4, so that programs are compiled for few sizes and not for each set."""
    size = max(4, 1 << max(0, len(ids) - 1).bit_length())
    return np.array([*ids] + [-1] * (size - len(ids)), np.int32)


def ends(tokens: Int[Array, " B *rows"], eos: Int[Array, "B K"]) -> Bool[Array, " B *rows"]:
    """Which of `tokens` (B, …) int32 end their row, bool (B, …): those that are among its `eos` (B, K)."""
    return jnp.any(tokens[..., None] == jnp.expand_dims(eos, tuple(range(1, tokens.ndim))), axis=-1)


def allowed_bits(ids: Collection[int], vocab_size: int) -> np.ndarray:
    """A set of tokens as bits, (⌈V/8⌉,) uint8."""
    bits = np.zeros(vocab_size, bool)
    bits[ids if isinstance(ids, np.ndarray) else list(ids)] = True
    return np.packbits(bits)


def constrained(logits: Float[Array, "B *rows V"], allowed: Integer[Array, "B *rows bytes"] | None) -> jax.Array:
    """Logits (B, …, V), those of tokens that may not stand there −∞."""
    if allowed is None:
        return logits
    place = jnp.arange(logits.shape[-1])
    bits = jnp.take(allowed, place // 8, axis=-1) >> (7 - place % 8).astype(jnp.uint8)
    return jnp.where(bits & 1 > 0, logits, -jnp.inf)


class Said(NamedTuple):
    """Tokens of rows, of any shape (…), and what the model that said them thought of them.

    Attributes:
      tokens: int32. finite: bool, whether the logits were numbers.
      log_probability: float32, of the token, without temperature and filters.
      top: of the N most probable tokens, best first, numbers and log-probabilities (…, N); None where not asked for.
    """

    tokens: jax.Array
    finite: jax.Array
    log_probability: jax.Array
    top: tuple[jax.Array, jax.Array] | None


@functools.partial(jax.jit, static_argnames=("model", "batch", "capacity"))
def allocate(*, model: TwoTower, batch: int, capacity: int) -> Slots:
    """B empty slots with room for `capacity` positions each, on the mesh in force."""
    zeros = jnp.zeros(batch, jnp.int32)
    slots = Slots(
        cache=model.context_tower.empty_cache(batch, capacity),
        token=zeros,
        count=zeros,
        limit=zeros,
        active=zeros.astype(bool),
        last=jnp.zeros((batch, model.config.hidden_size), model.context_tower.execution.dtype),
    )
    return laid_out(model, slots)


def _axes(model: TwoTower) -> Slots:
    """The logical axes of every array of a table."""
    rows = ("batch",)
    cache = model.context_tower.cache_axes()
    return Slots(cache=cache, token=rows, count=rows, limit=rows, active=rows, last=("batch", None))


def laid_out(model: TwoTower, slots: Slots) -> Slots:
    """The table as it lies on the mesh in force: rows over the devices of the batch, states by heads over "tensor"."""
    return jax.tree.map(sharding.constrain, slots, _axes(model))


def abstract(model: TwoTower, batch: int, capacity: int, mesh: Mesh | None = None) -> Slots:
    """Shapes of what `allocate` allocates and, with a mesh, where they lie on it."""

    def placed(v, axes):
        place = None if mesh is None else NamedSharding(mesh, sharding.spec(axes, v.shape, mesh.shape))
        return jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=place)

    slots = jax.eval_shape(functools.partial(allocate, model=model, batch=batch, capacity=capacity))
    return jax.tree.map(placed, slots, _axes(model))


# To trace the shapes takes a millisecond, and every call of `generate` asks three times.
@functools.lru_cache(maxsize=128)
def cache_bytes(model: TwoTower, batch: int, capacity: int, mesh: Mesh | None = None) -> int:
    """Size of what `allocate` allocates on each device, computed without allocating it."""
    return sum(map(sharded_bytes, jax.tree.leaves(abstract(model, batch, capacity, mesh))))


def row_keys(seed: Integer[Array, "..."], number: Integer[Array, " B"]) -> Key[Array, " B"]:
    """Keys (B,) of rows with these numbers (B,), which depend on the seed, () or (B,), and the number alone."""
    seed = jnp.broadcast_to(seed, number.shape)
    return jax.vmap(lambda seed, number: jax.random.fold_in(randomness.key(seed), number))(seed, number)


def next_keys(
    seed: Integer[Array, "..."], number: Integer[Array, " B"], count: Int[Array, " B *tokens"]
) -> Key[Array, " B *tokens"]:
    """Keys of the new tokens with index `count`, of the same shape (B, …) as it."""

    def of_row(key, count):
        return jax.vmap(jax.random.fold_in, (None, 0))(key, count.reshape(-1)).reshape(count.shape)

    return jax.vmap(of_row)(row_keys(seed, number), count)


def choose(
    draws: Draws,
    count: Int[Array, " B *tokens"],
    logits: Float[Array, "B *tokens V"],
    given: Given,
    alternatives: int = 0,
) -> Said:
    """AR's tokens number `count` (B,) or (B, W) of each row, from logits (B, V) or (B, W, V).

    Args:
      given: of these positions, which are W, or 1.
    """
    given = given if count.ndim > 1 else Given(*(None if v is None else v[:, 0] for v in given))
    logits = constrained(logits, given.allowed)
    prediction = predict_rows(next_keys(draws.seed, draws.sample, count), logits, draws.choice)
    tokens = jnp.where(given.fixed, given.tokens, prediction.tokens)
    return said(logits, tokens, prediction.finite, alternatives)


def said(logits: jax.Array, tokens: jax.Array, finite: jax.Array, alternatives: int) -> Said:
    """Tokens (…) and what their logits (…, V) say of them."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    top = most_probable(logits, alternatives) if alternatives else None
    return Said(tokens, finite, chosen - jax.nn.logsumexp(logits, axis=-1), top)


@functools.partial(jax.jit, static_argnames=("model", "first", "state", "alternatives"), donate_argnames="slots")
def prefill(
    params: Params,
    slots: Slots,
    piece: Piece,
    *,
    model: TwoTower,
    first: bool,
    state: bool,
    alternatives: int = 0,
) -> tuple[Slots, Said | None]:
    """Reads pieces of prompts into their slots; a slot whose prompt ends becomes active.

    Args:
      first: whether to choose the first new token as AR does, from the logits after the prompt; otherwise the slot's
        token is the piece's `unread`.
      state: whether the final state is wanted for `Slots.last`, or for the first token. What of the last layers the
        cache does not need is otherwise not computed.
    """
    bound = bind_part(model, params)
    rows = slots.cache.take_rows(piece.slot).clear_rows(piece.first)
    h, rows = bound.extend_states(piece.ids, piece.lengths, rows)
    last = newest_state(h, piece.lengths) if state else None

    # Prompts that go on have no slot yet, as far as everything but the cache is concerned.
    ready = jnp.where(piece.last, piece.slot, slots.active.shape[0])
    count = jnp.zeros_like(piece.limit)
    if first:
        chosen = choose(piece.draws, count, bound.context_head(last[:, None])[:, 0], piece.given, alternatives)
        token = chosen.tokens
        count += 1
        active = ~ends(token, piece.eos) & (count < piece.limit)
    else:
        chosen, token, active = None, piece.unread, jnp.ones_like(piece.last)

    def put(old, new):
        return old.at[ready].set(new, mode="drop")

    slots = Slots(
        cache=slots.cache.put_rows(piece.slot, rows),
        token=put(slots.token, token),
        count=put(slots.count, count),
        limit=put(slots.limit, piece.limit),
        active=put(slots.active, active),
        last=put(slots.last, last) if state else slots.last,
    )
    return laid_out(model, slots), chosen


def newest_state(h: Float[Array, "B L D"], lengths: Int[Array, " B"]) -> Float[Array, "B D"]:
    """The states, of (B, L, D), of each row's last of `lengths` (B,) real tokens; meaningless where that is 0."""
    return jnp.take_along_axis(h, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]


# For a prefix cache: what a piece of a prompt added to its row.


@functools.partial(jax.jit, static_argnames=("model", "width"))
def piece_of(slots: Slots, rows: Int[Array, " R"], before: Int[Array, " R"], *, model: TwoTower, width: int) -> Cache:
    """What the `width` tokens after the first `before` (R,) added to the slots `rows` (R,), of which they are the
    newest."""
    return model.context_tower.newest(slots.cache.take_rows(rows), before, width)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="slots")
def put_piece(
    slots: Slots, rows: Int[Array, " R"], first: Bool[Array, " R"], piece: Cache, *, model: TwoTower
) -> Slots:
    """The table with a piece of `piece_of` read into the slots `rows` (R,), as the first of their prompts or not. It
    consumes `slots`."""
    part = model.context_tower.absorb(slots.cache.take_rows(rows).clear_rows(first), piece)
    return laid_out(model, slots.replace(cache=slots.cache.put_rows(rows, part)))


# For a denoiser on devices of its own: what its copy of the table is sent.


@functools.partial(jax.jit, static_argnames="model")
def take_slots(slots: Slots, rows: Int[Array, " R"], *, model: TwoTower) -> Slots:
    """The slots `rows` (R,) int32 as a table of their own; an index out of range gives the last one."""
    part = jax.tree.map(lambda v: jnp.take(v, rows, axis=0, mode="clip"), slots.replace(cache=None))
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
