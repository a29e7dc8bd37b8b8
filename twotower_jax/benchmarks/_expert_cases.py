"""The expert products to compile for chips that are not there, at the shapes of the 30B model.

128 experts of 2688 × 1856, six a token. TPUs have quantized ones as `experts_tpu.stored` makes them, 1920 wide.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from twotower_jax import kernels
from twotower_jax.kernels.experts import Weights, relu2
from twotower_jax.kernels.experts.tpu import stored
from twotower_jax.kernels.numerics.quantized import Quantized

_EXPERTS, _MODEL, _WIDTH, _CHOICES = 128, 2688, 1856, 6
_GROUP = 64
_ROWS = (96, 1024)
_MANY = 8192


def cases(platform: str) -> Iterator[tuple[str, object, list, str]]:
    """(name, function, shapes, implementation) of each."""
    few, many = ("pallas_tpu", "ragged_dot") if platform == "tpu" else ("mosaic_gpu", "mosaic_gpu_grouped")
    for tokens in _ROWS:
        for bits in 16, 8, 4:
            weights = _weights(_WIDTH, bits, platform)
            name = f"expert_mlp, {tokens} tokens, {bits} bits, {weights.up.shape[2]} wide"
            yield name, _forward(few, weights), _shapes(tokens, _CHOICES, weights), few
    weights = _weights(_WIDTH, 16, platform)
    for tokens, choices in (_MANY, _CHOICES), (_MANY * _CHOICES, 1):
        name, shapes = f"expert_mlp, {tokens} tokens × {choices}, {_WIDTH} wide", _shapes(tokens, choices, weights)
        yield name, _forward(many, weights), shapes, many
        yield f"{name}, gradient", _gradient(many, weights), shapes, many


def _forward(implementation: str, weights: Weights):
    structure = jax.tree.structure(weights)

    def run(x, indices, gates, *arrays):
        weights = jax.tree.unflatten(structure, arrays)
        return kernels.expert_mlp(x, indices, gates, weights, activation=relu2, implementation=implementation)

    return run


def _gradient(implementation: str, weights: Weights):
    def loss(*arguments):
        return jnp.sum(jnp.square(_forward(implementation, weights)(*arguments).astype(jnp.float32)))

    return jax.grad(loss, argnums=(0, 2, 3, 4))


def _shapes(tokens: int, choices: int, weights: Weights) -> list:
    shapes = [((tokens, _MODEL), jnp.bfloat16), ((tokens, choices), jnp.int32), ((tokens, choices), jnp.float32)]
    return shapes + [(v.shape, v.dtype) for v in jax.tree.leaves(weights)]


def _weights(width: int, bits: int, platform: str) -> Weights:
    """Without arrays; quantized ones as the platform's kernel reads them."""

    def matrix(rows, columns, width_axis):
        if bits == 16:
            return jax.ShapeDtypeStruct((_EXPERTS, rows, columns), jnp.bfloat16)
        q = Quantized(
            jax.ShapeDtypeStruct((_EXPERTS, rows * bits // 8, columns), jnp.int8),
            jax.ShapeDtypeStruct((_EXPERTS, rows // _GROUP, columns), jnp.bfloat16),
            bits,
        )
        return jax.eval_shape(lambda q: stored(q, width_axis), q) if platform == "tpu" else q

    return Weights(matrix(_MODEL, width, -1), matrix(width, _MODEL, -2))
