"""Errors of every implementation of attention against the mask in float64, by norm; kernels run interpreted.

The largest ‖found − exact‖ / ‖exact‖ of the outputs, and of all gradients together, over seeded problems of two rows,
four heads on two of keys, head dim 16: a causal run, blocks of 8 behind the context, both also in documents, and (the
outputs alone) a block behind caches of different lengths.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from twotower_jax import kernels

_BATCH, _HEADS, _KV_HEADS, _HEAD_DIM, _LENGTH, _BLOCK = 2, 4, 2, 16, 136, 8


class _Use(NamedTuple):
    """Queries, sources and own block; `run(implementation, q, key, value, own key, own value)`."""

    name: str
    run: Callable
    queries: int
    differentiable: bool


def define_flags() -> None:
    flags.DEFINE_integer("seeds", 2, "Problems of each kind.", lower_bound=1)


def main() -> None:
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {flags.FLAGS.seeds} seeds\n")
    print("| use | implementation | inputs | outputs | gradients |")
    print("|---|---|---|--:|--:|")
    for use in _uses():
        for name, dtypes in (
            ("xla", (jnp.float32, jnp.bfloat16)),
            ("pallas_tpu_interpret", (jnp.float32, jnp.bfloat16)),
            ("mosaic_gpu_interpret", (jnp.bfloat16,)),
        ):
            for dtype in dtypes:
                worst = np.max([_errors(use, name, dtype, seed) for seed in range(flags.FLAGS.seeds)], axis=0)
                gradients = f"{worst[1]:.1e}" if use.differentiable else ""
                print(f"| {use.name} | {name} | {dtype.__name__} | {worst[0]:.1e} | {gradients} |", flush=True)


def _uses() -> Iterator[_Use]:
    position = jnp.arange(_LENGTH)
    documents = jnp.where(position < 72, 0, 72)

    def causal(start, name, q, key, value, *own):
        return kernels.attention(q, (kernels.Keys(key, value, position + 1, start),), implementation=name)

    def blocks(start, name, q, key, value, *own):
        context = kernels.Keys(key, value, position // _BLOCK * _BLOCK, start)
        return kernels.attention(q, (context,), own_block=own, block_size=_BLOCK, implementation=name)

    def cached(name, q, key, value, *own):
        cache = kernels.Keys(key, value, jnp.array([[130], [17]]))
        own = tuple(v[:, :, :_BLOCK] for v in own)
        return kernels.attention(q, (cache,), own_block=own, block_size=_BLOCK, implementation=name)

    for words, start in (("", None), (", documents", documents)):
        yield _Use(f"causal{words}", functools.partial(causal, start), _LENGTH, True)
        yield _Use(f"blocks{words}", functools.partial(blocks, start), _LENGTH, True)
    yield _Use("a block behind a cache", cached, _BLOCK, False)


def _errors(use: _Use, name: str, dtype, seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    shapes = [(_BATCH, use.queries, _HEADS, _HEAD_DIM), *[(_BATCH, _KV_HEADS, _LENGTH, _HEAD_DIM)] * 4]
    *arrays, weights = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in (*shapes, shapes[0]))

    def outputs(implementation, weights, *arrays):
        def loss(*arrays):
            y = use.run(implementation, *arrays)
            return jnp.sum(y * weights, dtype=jnp.promote_types(y.dtype, jnp.float32)), y

        if not use.differentiable:
            return loss(*arrays)[1], []
        gradients, y = jax.grad(loss, argnums=tuple(range(5)), has_aux=True)(*arrays)
        return y, gradients

    y, gradients = jax.jit(functools.partial(outputs, name))(weights, *arrays)
    with jax.enable_x64(True):
        exact = [np.asarray(v, np.float64) for v in (weights, *arrays)]
        y_exact, gradients_exact = jax.jit(functools.partial(outputs, "reference"))(*exact)
    return _error([y], [y_exact]), _error(gradients, gradients_exact)


def _error(found, exact) -> float:
    def flat(arrays):
        return np.concatenate([np.zeros(1), *(np.asarray(v, np.float64).ravel() for v in arrays)])

    return float(np.linalg.norm(flat(found) - flat(exact)) / max(np.linalg.norm(flat(exact)), 1e-30))
