"""From logits to a token and the confidence in it, for denoising and for autoregressive decoding alike."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

# Below this, logits / temperature would leave float32; at this, the best token already always wins.
_LEAST_TEMPERATURE = 1e-6


class Prediction(NamedTuple):
    """One token per position.

    tokens      int32
    confidence  float32, the token's probability; NaN where the logits are no distribution (a NaN, a +∞, or all −∞)
    """

    tokens: jax.Array
    confidence: jax.Array

    @property
    def finite(self) -> jax.Array:
        """bool: whether the token means anything. Where false, an argmax over NaN chose it, and it must not be used."""
        return jnp.isfinite(self.confidence)


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
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    confidence = jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1))
    return Prediction(tokens, confidence)


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
