"""From tokens to vectors and back: embedding lookup, and the head with its log-probabilities.

With a mesh that has "tensor", each device has its share of the vocabulary.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from twotower_jax import sharding
from twotower_jax.config import ModelConfig
from twotower_jax.kernels.numerics.quantized import Quantized
from twotower_jax.layers.common import matmul
from twotower_jax.parameters import COLUMNS, LINEAR, Scope, at_rest, normal, use
from twotower_jax.sharding import TENSOR

_TOKENS = ("batch", "length")
# Logits that may exist at once on a device, 1 GiB in float32.
_MAX_LOGITS = 2**28
_WEIGHT = sharding.AtRest(("embed", "vocab"))


def lookup(table: Float[Array, "V D"] | Quantized, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
    """Rows of a table (V, D) for (B, L) int32 ids: (B, L, D). Ids are in range: the host checks them.

    A quantized table has one scale per row; its rows come in float32, and nothing but them is read.
    """

    def rows(table, ids):
        if isinstance(table, Quantized):
            return _take(table.values, ids).astype(jnp.float32) * _take(table.scales, ids).astype(jnp.float32)
        return _take(table, ids)

    def take(table, ids):
        if sharding.shards(TENSOR) == 1:
            return rows(table, ids)
        place, here = _place_here(table.shape[0], ids)
        return jax.lax.psum(jnp.where(here[..., None], rows(table, place), 0), TENSOR)

    return sharding.local(take, (("vocab", None), _TOKENS), (*_TOKENS, None))(table, ids)


@jax.custom_vjp
def _take(table, ids):
    return jnp.take(table, ids, axis=0, mode="clip")


def _take_forward(table, ids):
    return _take(table, ids), (table, ids)


def _take_backward(residuals, g):
    # A frequent token's gradients are many: summed in float32, whatever the table's dtype.
    table, ids = residuals
    ids = jnp.clip(ids, 0, table.shape[0] - 1)
    return jnp.zeros(table.shape, jnp.float32).at[ids].add(g.astype(jnp.float32)).astype(table.dtype), None


_take.defvjp(_take_forward, _take_backward)


def _place_here(size: int, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The places of ids in this device's share of the vocabulary, and whether they are in it."""
    place = ids - (jax.lax.axis_index(TENSOR) * size if sharding.shards(TENSOR) > 1 else 0)
    return place, (place >= 0) & (place < size)


class Head(nnx.Module):
    """Hidden states to logits, (D, V)."""

    def __init__(self, config: ModelConfig, scope: Scope):
        self.weight = scope.declare(
            "weight",
            (config.hidden_size, config.vocab_size),
            ("embed", "vocab"),
            normal(config.initializer_range),
            layout=LINEAR,
            scales=COLUMNS,
        )

    def __call__(self, h: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """(B, L, D) → (B, L, V) float32"""
        return _logits(h, use(self.weight, h.dtype))

    def log_probabilities(self, h: Float[Array, "B L D"], ids: Int[Array, "B L"]) -> Float[Array, "B L"]:
        """log softmax(logits)[ids], in tiles of positions so that the logits of all of them never exist together.

        Args:
          h: (B, L, D). ids: (B, L) int32, in range.

        Returns:
          (B, L) float32.
        """
        axes = (*_TOKENS, None), _WEIGHT, _TOKENS
        return sharding.local(_log_probabilities, axes, _TOKENS)(h, at_rest(self.weight, h.dtype), ids)

    def divergence(
        self, h: Float[Array, "B L D"], teacher: "Head", taught: Float[Array, "B L D"], temperature: float = 1.0
    ) -> Float[Array, "B L"]:
        """KL(softmax(teacher(taught) / T) ‖ softmax(self(h) / T)) at each position, in tiles like `log_probabilities`.

        The teacher gets no gradient.

        Args:
          h, taught: (B, L, D). temperature: T, positive.

        Returns:
          (B, L) float32, in nats.
        """
        own, theirs = (at_rest(head.weight, x.dtype) for head, x in ((self, h), (teacher, taught)))
        taught, theirs = jax.lax.stop_gradient((taught, theirs))
        axes = (*_TOKENS, None), (*_TOKENS, None), _WEIGHT, _WEIGHT
        divergence = functools.partial(_divergence, temperature)
        return sharding.local(divergence, axes, _TOKENS)(h, taught, own, theirs)


def _logits(h: jax.Array, weight: jax.Array | Quantized) -> jax.Array:
    return matmul(h, weight, jnp.float32)


def _log_probabilities(h, weight, ids):
    return _by_tiles(_tile_log_probabilities, (h, ids), (weight,))


def _divergence(temperature, h, taught, weight, theirs):
    return _by_tiles(functools.partial(_tile_divergence, temperature), (h, taught), (weight, theirs))


def _by_tiles(
    one_tile: Callable[..., jax.Array], tokens: Sequence[jax.Array], weights: Sequence[jax.Array | Quantized]
) -> jax.Array:
    """`one_tile(*tokens, *weights)` of arrays (B, L, …), taken as (T, …) for as many positions as there may be logits
    of at once: (B, L)."""
    shape = tokens[0].shape[:2]
    count = shape[0] * shape[1]
    tile = max(1, _MAX_LOGITS // sum(weight.shape[1] for weight in weights))
    flat = [v.reshape(count, *v.shape[2:]) for v in tokens]
    if count <= tile:
        return one_tile(*flat, *weights).reshape(shape)
    tiles = -(-count // tile)
    tile = -(-count // tiles)
    padding = tiles * tile - count
    flat = [jnp.pad(v, [(0, padding)] + [(0, 0)] * (v.ndim - 1)).reshape(tiles, tile, *v.shape[1:]) for v in flat]
    # The weights go in as float32, so that their gradients are summed over the tiles in float32.
    wide = [weight if isinstance(weight, Quantized) else weight.astype(jnp.float32) for weight in weights]

    @jax.checkpoint
    def one(inputs):
        narrow = (w if isinstance(w, Quantized) else w.astype(v.dtype) for w, v in zip(wide, weights, strict=True))
        return one_tile(*inputs, *narrow)

    return jax.lax.map(one, tuple(flat)).reshape(-1)[:count].reshape(shape)


def _tile_log_probabilities(h: jax.Array, ids: jax.Array, weight: jax.Array | Quantized) -> jax.Array:
    """(T, D) and (T,) → (T,) float32, with this device's share (D, V/n) of the weight."""
    logits = _logits(h, weight)
    place, _ = _place_here(weight.shape[1], ids)
    # Chosen by comparison and not by gather, whose gradient would be a scatter into an array of the logits' size.
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == place[:, None]
    summed, largest = _over_vocabulary()
    high = largest(jax.lax.stop_gradient(jnp.max(logits, axis=-1)))
    normalizer = high + jnp.log(summed(jnp.sum(jnp.exp(logits - high[:, None]), axis=-1)))
    return summed(jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)) - normalizer


def _tile_divergence(
    temperature: float, h: jax.Array, taught: jax.Array, weight: jax.Array | Quantized, theirs: jax.Array | Quantized
) -> jax.Array:
    """(T, D) twice → (T,) float32, with this device's shares (D, V/n) of both weights."""
    summed, largest = _over_vocabulary()

    def log_softmax(logits):
        logits = logits if temperature == 1 else logits / temperature
        high = largest(jax.lax.stop_gradient(jnp.max(logits, axis=-1)))
        return logits - (high + jnp.log(summed(jnp.sum(jnp.exp(logits - high[:, None]), axis=-1))))[:, None]

    expected, found = log_softmax(_logits(taught, theirs)), log_softmax(_logits(h, weight))
    return summed(jnp.sum(jnp.exp(expected) * (expected - found), axis=-1))


def _over_vocabulary():
    """Sum and maximum over the devices that share the vocabulary."""
    if sharding.shards(TENSOR) == 1:
        return (lambda v: v), (lambda v: v)
    return functools.partial(jax.lax.psum, axis_name=TENSOR), functools.partial(jax.lax.pmax, axis_name=TENSOR)
