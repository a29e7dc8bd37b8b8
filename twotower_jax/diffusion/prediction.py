"""From logits to a token and the confidence in it, for denoising and for autoregressive decoding alike."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

# Below this, logits / temperature would leave float32; at this, the best token already always wins.
_LEAST_TEMPERATURE = 1e-6


class Prediction(NamedTuple):
    """One token per position.

    tokens           int32
    log_probability  float32, the token's
    """

    tokens: jax.Array
    log_probability: jax.Array

    @property
    def confidence(self) -> jax.Array:
        """float32, the token's probability; NaN where the logits are no distribution (a NaN, a +∞, or all −∞)."""
        return jnp.exp(self.log_probability)

    @property
    def finite(self) -> jax.Array:
        """bool: whether the token means anything. Where false, an argmax over NaN chose it, and it must not be used."""
        return jnp.isfinite(self.confidence)


class Choice(NamedTuple):
    """How each of B rows chooses its tokens: arrays (B,), so that one compiled function serves all.

    temperature  float32, 0 is greedy
    top_k        int32, 0 is no limit
    top_p        float32, 1 is no limit
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array


def check_prediction_settings(temperature: float, top_k: int, top_p: float) -> None:
    """Raises ValueError for settings out of range, and for filters that greedy prediction would ignore."""
    if not math.isfinite(temperature) or (temperature != 0.0 and temperature < _LEAST_TEMPERATURE):
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or a number of at least {_LEAST_TEMPERATURE}")
    if top_k < 0:
        raise ValueError(f"top_k={top_k} must be 0 (no limit) or more")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p} must be more than 0 and at most 1")
    if temperature == 0.0 and (top_k != 0 or top_p != 1.0):
        raise ValueError(f"top_k={top_k} and top_p={top_p} change nothing at temperature={temperature} (greedy)")


def filter_logits(logits: Float[Array, "*rows V"], top_k: int, top_p: float) -> Float[Array, "*rows V"]:
    """Sets to −∞ all but the most probable tokens.

    First the top_k most probable stay (0: all). Then, of the distribution over those, the smallest set of most probable
    tokens that holds at least top_p of the mass (nucleus sampling: Holtzman et al. 2020, arXiv 1904.09751); 1: all.
    Tokens that tie with the last one to stay do so too.

    Args:
        logits: (..., V) float32.

    Raises:
        ValueError: where top_k is more than V.
    """
    vocab = logits.shape[-1]
    if top_k > vocab:
        raise ValueError(f"top_k={top_k} is more than the vocabulary has: {vocab}")
    if top_k:
        least = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if top_p < 1.0:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # The first token always stays: no mass comes before it.
        least = jnp.min(jnp.where(mass_before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def _filter_rows(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """`filter_logits` of rows (B, …, V), each with its own top_k and top_p (B,)."""
    vocab, shape = logits.shape[-1], (-1,) + (1,) * (logits.ndim - 1)
    top_k, top_p = top_k.reshape(shape), top_p.reshape(shape)
    ordered = jnp.sort(logits, axis=-1, descending=True)
    last = jnp.broadcast_to(jnp.clip(top_k - 1, 0, vocab - 1), (*logits.shape[:-1], 1))
    least = jnp.where(top_k > 0, jnp.take_along_axis(ordered, last, axis=-1), -jnp.inf)
    logits, ordered = (jnp.where(v >= least, v, -jnp.inf) for v in (logits, ordered))
    probabilities = jax.nn.softmax(ordered, axis=-1)
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(mass_before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where((logits >= least) | (top_p >= 1.0), logits, -jnp.inf)


def _gumbel(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard Gumbel noise −log(−log(1 − u)), float32, from 32 random bits each.

    jax.random.gumbel uses 23, with which a token of probability below about 1e-7 is never chosen, and a vocabulary of
    131072 can hold a good part of a percent in such tokens. Its mode "high" takes four times as long to compile.
    """
    u = (jax.random.bits(key, shape, jnp.uint32).astype(jnp.float32) + 0.5) * 2.0**-32
    # Rounding may bring u to 1 and the noise to −∞, which would not tell the tokens kept from those filtered out.
    return -jnp.log(-jnp.log1p(-jnp.minimum(u, 1.0 - 2.0**-24)))


def without_token(logits: Float[Array, "*rows V"], token: int) -> Float[Array, "*rows V"]:
    """Logits (..., V) as float32, that of one token −∞."""
    logits = logits.astype(jnp.float32)
    is_token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == token
    return jnp.where(is_token, -jnp.inf, logits)


def _argmax(values: jax.Array) -> jax.Array:
    """The first place of the largest value along the last axis, int32; where a value is NaN, some place.

    In two reductions, each of which a CPU takes many values at a time; jnp.argmax goes through them one by one.
    """
    size = values.shape[-1]
    place = jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    largest = jnp.max(values, axis=-1, keepdims=True)
    return jnp.minimum(jnp.min(jnp.where(values == largest, place, size), axis=-1), size - 1)


def predict(
    key: Key[Array, ""],
    logits: Float[Array, "... V"],
    *,
    mask_token_id: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Prediction:
    """Chooses one token for each position of one row.

    Greedy at temperature 0 (the first of equals); above it a sample from softmax(logits / temperature), filtered, by
    the Gumbel-max trick. The confidence is the token's probability under softmax(logits), neither tempered nor
    filtered: a threshold on it means the same at every temperature.

    Args:
        key: one key. Unused at temperature 0.
        logits: (..., V) of any float dtype; everything is computed in float32.
        mask_token_id: a token that may never be predicted and takes no part in the confidence (the half of MDLM's SUBS
            parameterization that says: no mass on the mask token), or None.
        temperature, top_k, top_p: numbers known when tracing, see `check_prediction_settings` and `filter_logits`.

    Returns:
        A `Prediction` of shape (...).

    Raises:
        ValueError: for settings out of range, or a mask token that the logits do not have.
    """
    check_prediction_settings(temperature, top_k, top_p)
    logits = logits.astype(jnp.float32)
    if mask_token_id is not None:
        if not 0 <= mask_token_id < logits.shape[-1]:
            raise ValueError(f"mask_token_id={mask_token_id} is not in a vocabulary of {logits.shape[-1]}")
        logits = without_token(logits, mask_token_id)
    if temperature == 0.0:
        tokens = _argmax(logits)
    else:
        tokens = _argmax(filter_logits(logits / temperature, top_k, top_p) + _gumbel(key, logits.shape))
    return _of(tokens, logits)


def _of(tokens: jax.Array, logits: jax.Array) -> Prediction:
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return Prediction(tokens, chosen - jax.nn.logsumexp(logits, axis=-1))


def predict_rows(
    keys: Key[Array, " B *positions"],
    logits: Float[Array, " B *dims"],
    choice: Choice,
    *,
    mask_token_id: int | None = None,
) -> Prediction:
    """`predict` of B rows, each with its own key and its own settings, which are arguments and not compiled in.

    What `predict` gives for a row's settings is what the row gets. Noise is drawn only where some row samples, and
    logits are sorted only where some row that samples also filters.

    Args:
        keys: (B,), one per row, or one for each position of every row, (B, S).
        logits: (B, V) or (B, S, V) of any float dtype.
        choice: in range, see `check_prediction_settings`; a top_k of more than V keeps all.
        mask_token_id: as in `predict`.

    Returns:
        A `Prediction` of shape (B,) or (B, S).
    """
    logits = logits.astype(jnp.float32) if mask_token_id is None else without_token(logits, mask_token_id)
    greedy = _argmax(logits)
    samples = choice.temperature > 0.0
    filters = samples & ((choice.top_k > 0) | (choice.top_p < 1.0))

    def each_row(values):
        return values.reshape(-1, *[1] * (logits.ndim - 1))

    def drawn():
        tempered = logits / each_row(jnp.where(samples, choice.temperature, 1.0))
        kept = jax.lax.cond(
            jnp.any(filters), lambda: _filter_rows(tempered, choice.top_k, choice.top_p), lambda: tempered
        )
        draw = functools.partial(_gumbel, shape=logits.shape[keys.ndim :])
        for _ in range(keys.ndim):
            draw = jax.vmap(draw)
        return jnp.where(samples.reshape(-1, *[1] * (greedy.ndim - 1)), _argmax(kept + draw(keys)), greedy)

    return _of(jax.lax.cond(jnp.any(samples), drawn, lambda: greedy), logits)


def most_probable(
    logits: Float[Array, "*rows V"], count: int, mask_token_id: int | None = None
) -> tuple[Int[Array, "*rows n"], Float[Array, "*rows n"]]:
    """The `count` most probable tokens of logits (…, V), best first, and their log-probabilities, (…, count) each.

    `mask_token_id` is as in `predict`.
    """
    logits = logits.astype(jnp.float32) if mask_token_id is None else without_token(logits, mask_token_id)
    values, tokens = jax.lax.top_k(logits, count)
    return tokens.astype(jnp.int32), values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def sample_tokens(
    keys: Key[Array, " B"], logits: Float[Array, "B V"], *, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0
) -> Prediction:
    """Autoregressive decoding: the next token of every row, each from its own key.

    Args:
        keys: (B,) keys; the caller folds in the position, so that no two tokens share one.
        logits: (B, V). No token is excluded.
        temperature, top_k, top_p: as in `predict`.

    Returns:
        A `Prediction` of shape (B,). The caller must look at `finite` before it uses `tokens`.
    """

    def predict_row(key: jax.Array, row: jax.Array) -> Prediction:
        return predict(key, row, temperature=temperature, top_k=top_k, top_p=top_p)

    return jax.vmap(predict_row)(keys, logits)
