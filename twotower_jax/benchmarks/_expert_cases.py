"""The expert products to compile for chips that are not there, at the shapes of the 30B model.

128 experts of 2688 × 1856, six a token. TPUs have quantized ones 1920 wide, padded with zeros, since their compiler
would copy an array whose last dimension is no multiple of 128.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from twotower_jax import kernels
from twotower_jax.kernels.experts import Weights, relu2
from twotower_jax.kernels.quantized import Quantized

_EXPERTS, _MODEL, _WIDTH, _PADDED, _CHOICES = 128, 2688, 1856, 1920, 6
_GROUP = 64
_ROWS = (96, 1024)
_MANY = 8192


def cases(platform: str) -> Iterator[tuple[str, object, list, str]]:
    """(name, function, shapes, implementation) of each."""
    few, many = ("pallas_tpu", "ragged_dot") if platform == "tpu" else ("mosaic_gpu", "mosaic_gpu_grouped")
    for tokens in _ROWS:
        for bits in 16, 8, 4:
            width = _PADDED if platform == "tpu" and bits < 16 else _WIDTH
            name = f"expert_mlp, {tokens} tokens, {bits} bits, {width} wide"
            yield name, _forward(few, bits), _shapes(tokens, _CHOICES, width, bits), few
    for width in (_WIDTH, _PADDED) if platform == "tpu" else (_WIDTH,):
        for tokens, choices in (_MANY, _CHOICES), (_MANY * _CHOICES, 1):
            name = f"expert_mlp, {tokens} tokens × {choices}, {width} wide"
            shapes = _shapes(tokens, choices, width, 16)
            yield name, _forward(many, 16), shapes, many
            yield f"{name}, gradient", _gradient(many), shapes, many


def _forward(implementation: str, bits: int):
    def run(x, indices, gates, *weights):
        if bits < 16:
            weights = [Quantized(*weights[i : i + 2], bits) for i in (0, 2)]
        return kernels.expert_mlp(x, indices, gates, Weights(*weights), activation=relu2, implementation=implementation)

    return run


def _gradient(implementation: str):
    def loss(x, indices, gates, up, down):
        y = _forward(implementation, 16)(x, indices, gates, up, down)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    return jax.grad(loss, argnums=(0, 2, 3, 4))


def _shapes(tokens: int, choices: int, width: int, bits: int) -> list:
    shapes = [((tokens, _MODEL), jnp.bfloat16), ((tokens, choices), jnp.int32), ((tokens, choices), jnp.float32)]
    for rows, columns in (_MODEL, width), (width, _MODEL):
        if bits == 16:
            shapes.append(((_EXPERTS, rows, columns), jnp.bfloat16))
        else:
            shapes.append(((_EXPERTS, rows * bits // 8, columns), jnp.int8))
            shapes.append(((_EXPERTS, rows // _GROUP, columns), jnp.bfloat16))
    return shapes
