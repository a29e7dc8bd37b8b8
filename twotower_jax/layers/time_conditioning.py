"""Time conditioning of the denoiser: adaLN-single (Chen et al. 2023, arXiv 2310.00426, section 2.3)."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from twotower_jax.config import ModelConfig
from twotower_jax.layers.common import Linear
from twotower_jax.parameters import Initializer, Scope, constant, normal

NUM_SINUSOIDS = 256
_MAX_PERIOD = 10_000.0
_SCALE = 1000.0


class Modulation(NamedTuple):
    """What one layer gets of the time: each (B, 1, D), or (B, L, D) where every block has a time of its own."""

    shift: jax.Array
    scale: jax.Array
    gate: jax.Array

    def modulate(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return x * (1 + self.scale) + self.shift


def sinusoids(t: Float[Array, "*times"], dtype: DTypeLike) -> Float[Array, "*times 256"]:
    """Times (B,) or (B, L/S) in [0, 1] to (…, 256) [cos | sin] features.

    t and 1000·t are rounded to the compute dtype first (in bfloat16 937.5 becomes 936): the release was trained so.
    """
    half = NUM_SINUSOIDS // 2
    frequencies = jnp.exp(-math.log(_MAX_PERIOD) * jnp.arange(half, dtype=jnp.float32) / half)
    # An explicit rounding: a cast to bfloat16 and back is what a compiler may remove.
    info = jnp.finfo(dtype)

    def rounded(v):
        return jax.lax.reduce_precision(v, info.nexp, info.nmant)

    angles = rounded(rounded(t.astype(jnp.float32)) * _SCALE)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1).astype(dtype)


class TimeConditioning(nnx.Module):
    """Noise level t to a modulation for each layer.

    A fresh module gives every layer shift 0, scale 0, gate 1 whatever t is, so that a denoiser converted from a
    backbone computes exactly what the backbone computes. (The published code draws the tables from N(0, 1/D) instead:
    `table_init=normal(D ** -0.5)`.)
    """

    def __init__(self, config: ModelConfig, scope: Scope, dtype: jnp.dtype, table_init: Initializer | None = None):
        width, std = config.hidden_size, config.initializer_range
        self.dtype = dtype
        embedder = scope.child("t_embedder").child("mlp")

        def linear(scope: Scope, shape: tuple[int, int], axes: tuple[str | None, str | None], init: Initializer):
            # Never quantized: one in 2,000 of the release's parameters, and what they give enters every layer.
            return Linear(scope, shape, axes, init, bias=True, scales=None)

        self.mlp_0 = linear(embedder.child("0"), (NUM_SINUSOIDS, width), (None, "embed"), normal(std))
        self.mlp_2 = linear(embedder.child("2"), (width, width), ("embed", None), normal(std))
        self.block = linear(scope.child("t_block").child("1"), (width, 3 * width), ("embed", None), constant(0.0))
        # One (3, D) table per layer, in the order of the layers.
        prefix = f"{scope.prefixes[0]}scale_shift_tables."
        prefixes = tuple(f"{prefix}{i}" for i in range(config.num_hidden_layers))
        layers = dataclasses.replace(scope, prefixes=prefixes, stacked=True)
        self.tables = layers.declare("", (3, width), (None, "embed"), table_init or _identity_table, decay=False)

    def embed(self, t: Float[Array, "*times"]) -> Float[Array, "*times D"]:
        """(B,) → (B, D), or (B, L/S) → (B, L/S, D), the output of `t_embedder`."""
        return self.mlp_2(jax.nn.silu(self.mlp_0(sinusoids(t, self.dtype))))

    def __call__(self, t: Float[Array, "*times"]) -> Float[Array, "*times width"]:
        """(B,) → (B, 3·D), or (B, L/S) → (B, L/S, 3·D), the output of `t_block`, shared by all layers."""
        return self.block(jax.nn.silu(self.embed(t)))


def modulation(
    table: Float[Array, "3 D"], block: Float[Array, "*times 3*D"], block_size: int | None = None
) -> Modulation:
    """A layer's modulation from its table (3, D) and the shared (B, 3·D), or (B, L/S, 3·D), one per block."""
    if block.ndim == 3:
        parts = table.astype(block.dtype) + block.reshape(*block.shape[:2], 3, -1)
        return Modulation(*(jnp.repeat(parts[:, :, i], block_size, axis=1) for i in range(3)))
    parts = table.astype(block.dtype) + block.reshape(block.shape[0], 3, -1)
    return Modulation(*(parts[:, i, None] for i in range(3)))


def _identity_table(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    row = jnp.array([0.0, 0.0, 1.0], jnp.float32)[:, None]
    return jnp.broadcast_to(row, shape)
