"""The problems of kernel_errors.py: every op, ordinary and extreme, small enough for the interpreters."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from twotower_jax import kernels
from twotower_jax.kernels.experts import Weights, relu2
from twotower_jax.kernels.numerics.quantized import quantize

XLA, TPU, GPU = "xla", "pallas_tpu_interpret", "mosaic_gpu_interpret"
TRITON, GROUPED, RAGGED = "triton_interpret", "mosaic_gpu_grouped_interpret", "ragged_dot"
_BOTH = ("float32", "bfloat16")
_EVERYWHERE = {XLA: _BOTH, TPU: _BOTH, GPU: _BOTH}


class Case(NamedTuple):
    """One kind of problem of one op.

    Attributes:
      op: its name. kind: in words.
      arrays: (rng, dtype) → the arguments, one row of the table being the worst of `problems` draws.
      run: (implementation, *arguments) → its outputs; of float64 arguments the oracle is `exact`.
      exact: the implementation that is the oracle.
      implementations: those that are measured, each with the dtypes of its inputs.
      gradients: those that have gradients, in all floating-point arguments.
    """

    op: str
    kind: str
    arrays: Callable
    run: Callable
    exact: str = "reference"
    implementations: dict[str, tuple[str, ...]] = _EVERYWHERE
    gradients: tuple[str, ...] = (XLA, TPU, GPU)


def cases() -> Iterator[Case]:
    """All of them, op by op."""
    yield from _scans()
    yield from _block_scans()
    yield from _convolutions()
    yield from _attention()
    yield from _experts()


def _normal(rng: np.random.Generator, dtype, *sizes: int) -> jax.Array:
    return jnp.asarray(rng.standard_normal(sizes), dtype)


# Scans. Of strong decays a third of the positions decay by so much, beside others that decay mildly.
_HEADS, _HEAD_DIM, _GROUPS, _STATE, _CHUNK, _BLOCK = 4, 8, 2, 16, 16, 8
_DECAYS = {"mild decays": 0.0, "decays of 50 beside mild": 50.0, "decays of 1e6 beside mild": 1e6}
_LENGTHS = (8, 16, 24, 120)
_LONG = 65536


def _scans() -> Iterator[Case]:
    for op in "ssd", "two_tower_ssd":
        arrays = {"ssd": _one_tower, "two_tower_ssd": _two_towers}[op]
        run = functools.partial({"ssd": _ssd, "two_tower_ssd": _two_tower_ssd}[op], _CHUNK)
        for kind, strong in _DECAYS.items():
            for length in _LENGTHS:
                forms = _EVERYWHERE | {TRITON: _BOTH}
                problem = functools.partial(arrays, length, strong), run
                yield Case(op, kind, *problem, implementations=forms, gradients=tuple(forms))
        # As Nano 4B has them: a whole chunk and the beginning of another.
        problem = functools.partial(arrays, 264, 0.0, head_dim=80), functools.partial(run.func, 256)
        forms = _EVERYWHERE | {TRITON: _BOTH}
        yield Case(op, "heads of 80, chunks of 256", *problem, implementations=forms, gradients=tuple(forms))
        # The interpreters of GPU kernels would take hours.
        of_long = {name: ("float32",) for name in (XLA, TPU)}
        long = functools.partial(arrays, _LONG, None), functools.partial(run.func, 128)
        yield Case(op, f"{_LONG:,} tokens, slow decays", *long, implementations=of_long)


def _steps(rng, length: int, heads: int, strong: float | None) -> list[jax.Array]:
    """dt and log-decay; with `strong` None states remember for a thousand positions, and grow."""
    dt = np.log1p(np.exp(rng.standard_normal((1, length, heads)) - 1))
    decay = -dt * (rng.uniform(0.2, 2.0, heads) if strong is not None else 1e-3)
    if strong:
        decay = np.where(rng.random(dt.shape) < 0.3, -strong, decay)
    return [jnp.asarray(dt, jnp.float32), jnp.asarray(decay, jnp.float32)]


def _tower(rng, length: int, strong: float | None, dtype, head_dim: int) -> list[jax.Array]:
    """x, dt, log-decay, B, C."""
    steps = _steps(rng, length, _HEADS, strong)
    x = _normal(rng, dtype, 1, length, _HEADS, head_dim)
    b, c = (_normal(rng, dtype, 1, length, _GROUPS, _STATE) for _ in range(2))
    return [x, *steps, b, c]


def _one_tower(length: int, strong: float | None, rng, dtype, head_dim: int = _HEAD_DIM) -> list[jax.Array]:
    initial = _normal(rng, jnp.float32, 1, _HEADS, head_dim, _STATE) * rng.choice([0.0, 10.0])
    return [*_tower(rng, length, strong, dtype, head_dim), initial]


def _two_towers(length: int, strong: float | None, rng, dtype, head_dim: int = _HEAD_DIM) -> list[jax.Array]:
    return [*_tower(rng, length, strong, dtype, head_dim), *_tower(rng, length, strong, dtype, head_dim)[:4]]


def _ssd(chunk: int, name: str, *arrays):
    *arrays, initial = arrays
    return kernels.ssd(*arrays, initial_state=initial, chunk_size=chunk, implementation=name)


def _two_tower_ssd(chunk: int, name: str, *arrays):
    return (kernels.two_tower_ssd(*arrays, block_size=_BLOCK, chunk_size=chunk, implementation=name),)


def _block_scans() -> Iterator[Case]:
    """Two heads of 64 in two groups, or four of 80, state 64: what the GPU kernel takes."""
    groups, state = 2, 64

    def arrays(length, strong, rng, dtype, heads=2, head_dim=64):
        inner, channels = heads * head_dim, heads * head_dim + 2 * groups * state
        weights = [_normal(rng, dtype, 4, channels), _normal(rng, dtype, channels)]
        weights += [_normal(rng, jnp.float32, heads), _normal(rng, dtype, inner)]
        per_token = _normal(rng, dtype, 1, length, inner), _normal(rng, dtype, 1, length, channels)
        steps, tail = _steps(rng, length, heads, strong), _normal(rng, dtype, 1, 4, channels)
        return [*per_token, *steps, *weights, tail, 10 * _normal(rng, jnp.float32, 1, heads, head_dim, state)]

    def run(name, z, xbc, dt, decay, *rest):
        *weights, tail, state = rest
        arguments = z, xbc, dt, decay, kernels.BlockWeights(*weights), tail, state
        return kernels.block_scan(*arguments, groups=groups, epsilon=1e-5, next_state=True, implementation=name)

    for kind, strong in _DECAYS.items():
        for length in 1, 16, 40:
            yield Case("block_scan", kind, functools.partial(arrays, length, strong), run, gradients=(XLA,))
    of_80 = functools.partial(arrays, 16, 0.0, heads=4, head_dim=80)
    yield Case("block_scan", "heads of 80", of_80, run, gradients=(XLA,))


def _convolutions() -> Iterator[Case]:
    channels, width = 128, 4

    def arrays(count, length, scale, rng, dtype):
        inputs = [scale * _normal(rng, dtype, 2, length, channels) for _ in range(count)]
        tail = scale * _normal(rng, dtype, 2, width, channels)
        return [*inputs, _normal(rng, dtype, width, channels), _normal(rng, dtype, channels), tail]

    def one(before, name, x, weight, bias, tail):
        return (kernels.causal_conv(x, weight, bias, tail, _before(before, x), implementation=name),)

    def blocks(before, name, x, context, weight, bias, tail):
        seen = _before(before, x)
        return (kernels.block_causal_conv(x, context, weight, bias, _BLOCK, tail, seen, implementation=name),)

    for op, run, count in ("causal_conv", one, 1), ("block_causal_conv", blocks, 2):
        for kind, scale, documents in (
            ("inputs of 1", 1.0, False),
            ("inputs of 1, documents", 1.0, True),
            ("inputs of 1000", 1000.0, False),
        ):
            for length in 8, 136:
                made = functools.partial(arrays, count, length, scale)
                yield Case(op, kind, made, functools.partial(run, documents))


def _before(documents: bool, x: jax.Array) -> jax.Array | None:
    """Documents of 8 to 24 positions, as `causal_conv` takes them."""
    if not documents:
        return None
    starts = np.cumsum([0, 8, 24, 16, 8] * 3)
    position = np.arange(x.shape[1], dtype=np.int32)
    start = starts[np.searchsorted(starts, position, "right") - 1]
    return jnp.broadcast_to(jnp.asarray(position - start, jnp.int32), x.shape[:2])


def _attention() -> Iterator[Case]:
    """Two rows of 136 tokens, four heads on two of keys, of 16."""
    length, position = 136, jnp.arange(136)
    documents = jnp.where(position < 72, 0, 72)
    implementations = {XLA: _BOTH, TPU: _BOTH, GPU: ("bfloat16",)}

    def arrays(queries, scale, rng, dtype):
        keys = [_normal(rng, dtype, 2, 2, length, 16) for _ in range(4)]
        return [scale * _normal(rng, dtype, 2, queries, 4, 16), *keys]

    def causal(start, name, q, key, value, *own):
        return (kernels.attention(q, (kernels.Keys(key, value, position + 1, start),), implementation=name),)

    def blocks(start, name, q, key, value, *own):
        context = kernels.Keys(key, value, position // _BLOCK * _BLOCK, start)
        return (kernels.attention(q, (context,), own_block=own, block_size=_BLOCK, implementation=name),)

    def cached(name, q, key, value, *own):
        cache = kernels.Keys(key, value, jnp.array([[130], [17]]))
        own = tuple(v[:, :, :_BLOCK] for v in own)
        return (kernels.attention(q, (cache,), own_block=own, block_size=_BLOCK, implementation=name),)

    for kind, scale, start in (
        ("", 1.0, None),
        (", documents", 1.0, documents),
        (", scores of 50", 50.0, None),
    ):
        for name, run in ("causal", causal), ("blocks after the context", blocks):
            made = functools.partial(arrays, length, scale)
            yield Case("attention", name + kind, made, functools.partial(run, start), implementations=implementations)
    made = functools.partial(arrays, _BLOCK, 1.0)
    yield Case(
        "attention", "a block after a cache", made, cached, implementations=implementations, gradients=(),
    )  # fmt: skip


def _experts() -> Iterator[Case]:
    """90 rows with 3 of 6 experts each, D = 128, F = 192, some choices being of no expert."""
    experts, model, width, tokens, choices = 6, 128, 192, 90, 3

    def arrays(bits, kind, rng, dtype):
        indices = np.stack([rng.permutation(experts)[:choices] for _ in range(tokens)])
        indices = np.where(rng.random(indices.shape) < 0.2, experts, indices)
        if kind == "all rows to one of them":
            indices = np.where(np.arange(choices) == 1, experts - 1, experts) + 0 * indices
        scale = 1000.0 if kind == "rows of 1000" else 1.0
        x = scale * _normal(rng, dtype, tokens, model)
        up, down = _normal(rng, dtype, experts, model, width) / 8, _normal(rng, dtype, experts, width, model) / 8
        if bits < 16:
            # With such scales, as checkpoints have them, float32 holds value · scale exactly.
            up, down = (quantize(w, bits, 64, scale_dtype=jnp.bfloat16) for w in (up, down))
        gates = jnp.asarray(rng.uniform(0.1, 1, indices.shape), jnp.float32)
        return [x, gates, up, down, jnp.asarray(indices, jnp.int32)]

    def run(name, x, gates, up, down, indices):
        return (kernels.expert_mlp(x, indices, gates, Weights(up, down), activation=relu2, implementation=name),)

    floats = {XLA: _BOTH, TPU: _BOTH, RAGGED: _BOTH, GPU: ("bfloat16",), GROUPED: ("bfloat16",)}
    few = {name: floats[name] for name in (XLA, TPU, GPU)}
    for kind in "rows of 1", "rows of 1000", "all rows to one of them":
        made = functools.partial(arrays, 16, kind)
        yield Case("expert_mlp", kind, made, run, "dense", floats, (XLA, RAGGED, GPU, GROUPED, TPU))
    for bits in 8, 4:
        made = functools.partial(arrays, bits, "rows of 1")
        yield Case("expert_mlp", f"rows of 1, weights in {bits} bits", made, run, "dense", few, ())
