"""Errors of every implementation of the scans against the literal recurrence in float64, by norm.

For each op and implementation the largest ‖found − exact‖ / ‖exact‖ over seeded problems: lengths around the edges of
chunks, seeded and not, three kinds of decay. Of outputs and gradients the worst array counts; a gradient is measured
against at least a hundredth of the largest one, since under strong decay some vanish. Pallas kernels run
interpreted, those for GPUs slowly.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from twotower_jax import kernels

_HEADS, _HEAD_DIM, _GROUPS, _STATE, _CHUNK, _BLOCK = 4, 8, 2, 16, 16, 8
_LENGTHS = (8, 16, 24, 120)
_IMPLEMENTATIONS = ["xla", "pallas_tpu_interpret", "mosaic_gpu_interpret"]
# A fraction of positions decays by so much, the others mildly.
_DECAYS = {"mild": 0.0, "strong beside mild": 50.0, "total beside mild": 1e6}


def define_flags() -> None:
    flags.DEFINE_integer("seeds", 2, "Problems of each kind.", lower_bound=1)
    flags.DEFINE_multi_enum("implementation", _IMPLEMENTATIONS, _IMPLEMENTATIONS, "May be given several times.")


def main() -> None:
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {flags.FLAGS.seeds} seeds\n")
    print("| op | implementation | inputs | decays | outputs | gradients |")
    print("|---|---|---|---|--:|--:|")
    for op in ("ssd", "two_tower_ssd"):
        for name in flags.FLAGS.implementation:
            for dtype in (jnp.float32, jnp.bfloat16):
                for decays in _DECAYS:
                    outputs, gradients = _worst(op, name, dtype, decays)
                    print(
                        f"| {op} | {name} | {dtype.__name__} | {decays} | {outputs:.1e} | {gradients:.1e} |", flush=True
                    )


def _worst(op: str, name: str, dtype, decays: str) -> tuple[float, float]:
    worst = np.zeros(2)
    for length in _LENGTHS:
        for arrays in _problems(op, length, decays, dtype):
            found = _run(op, name, length)(*arrays)
            with jax.enable_x64(True):
                exact = _run(op, "reference", length)(*(np.asarray(v, np.float64) for v in arrays))
            worst = np.maximum(worst, [_outputs_error(found[0], exact[0]), _gradients_error(found[1], exact[1])])
    return tuple(worst)


@functools.cache
def _run(op: str, name: str, length: int):
    """The op's outputs, and the gradients of a weighted sum of them, in float32 (or float64)."""

    def outputs(*arrays):
        if op == "ssd":
            *arrays, initial = arrays
            return kernels.ssd(*arrays, initial_state=initial, chunk_size=_CHUNK, implementation=name)
        return (kernels.two_tower_ssd(*arrays, block_size=_BLOCK, chunk_size=_CHUNK, implementation=name),)

    def loss(*arrays):
        found = outputs(*arrays)
        weights = np.random.default_rng(length)
        return sum(jnp.sum(v * weights.standard_normal(v.shape).astype(v.dtype)) for v in found), found

    def run(*arrays):
        gradients, found = jax.grad(loss, argnums=tuple(range(len(arrays))), has_aux=True)(*arrays)
        return found, gradients

    return jax.jit(run)


def _problems(op: str, length: int, decays: str, dtype) -> Iterator[list[jax.Array]]:
    for seed in range(flags.FLAGS.seeds):
        rng = np.random.default_rng([seed, length])

        def tower(rng=rng):
            dt = np.log1p(np.exp(rng.standard_normal((1, length, _HEADS)) - 1))
            strong = rng.random(dt.shape) < (0.3 if _DECAYS[decays] else 0.0)
            decay = np.where(strong, -_DECAYS[decays], -dt * rng.uniform(0.2, 2.0, _HEADS))
            x = rng.standard_normal((1, length, _HEADS, _HEAD_DIM))
            b, c = rng.standard_normal((2, 1, length, _GROUPS, _STATE))
            wide = (jnp.asarray(v, dtype) for v in (x, b, c))
            narrow = (jnp.asarray(v, jnp.float32) for v in (dt, decay))
            x, b, c, dt, decay = *wide, *narrow
            return [x, dt, decay, b, c]

        if op == "ssd":
            initial = rng.standard_normal((1, _HEADS, _HEAD_DIM, _STATE)) * rng.choice([0.0, 10.0])
            yield [*tower(), jnp.asarray(initial, jnp.float32)]
        else:
            yield [*tower(), *tower()[:4]]


def _difference(found, exact) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - np.asarray(exact)))


def _outputs_error(found, exact) -> float:
    return max(_difference(a, b) / max(np.linalg.norm(b), 1e-30) for a, b in zip(found, exact, strict=True))


def _gradients_error(found, exact) -> float:
    largest = max(np.linalg.norm(b) for b in exact)
    pairs = zip(found, exact, strict=True)
    return max(_difference(a, b) / max(np.linalg.norm(b), 0.01 * largest) for a, b in pairs)
