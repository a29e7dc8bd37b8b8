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


class Sizes(NamedTuple):
    """What the problems are of.

    Attributes:
      heads, head_dim, groups, state, chunk, block: of the scans, H, P, G, N, Q and S.
      channels: of the convolutions, C. queries, keys, query_dim: of attention, H, K, P.
      experts, choices, width, expert_width: E, k, D, F.
    """

    heads: int = 4
    head_dim: int = 8
    groups: int = 2
    state: int = 16
    chunk: int = 16
    block: int = 8
    channels: int = 128
    queries: int = 4
    keys: int = 2
    query_dim: int = 16
    experts: int = 6
    choices: int = 3
    width: int = 128
    expert_width: int = 192


SMALL = Sizes()

# Scans. Of strong decays a third of the positions decay by so much, beside others that decay mildly.
_DECAYS = {"mild decays": 0.0, "decays of 50 beside mild": 50.0, "decays of 1e6 beside mild": 1e6}
_LENGTHS = (8, 16, 24, 120)
_LONG = 65536


def _scans() -> Iterator[Case]:
    for op in "ssd", "two_tower_ssd":
        for kind, strong in _DECAYS.items():
            for length in _LENGTHS:
                yield scan(op, kind, SMALL, length, strong)
        # As Nano 4B has them: a whole chunk and the beginning of another.
        yield scan(op, "heads of 80, chunks of 256", SMALL._replace(head_dim=80, chunk=256), 264, 0.0)
        # The interpreters of GPU kernels would take hours.
        of_long = {name: ("float32",) for name in (XLA, TPU)}
        long = scan(op, f"{_LONG:,} tokens, slow decays", SMALL._replace(chunk=128), _LONG, None)
        yield long._replace(implementations=of_long, gradients=(XLA, TPU, GPU))


def scan(op: str, kind: str, sizes: Sizes, length: int, strong: float | None) -> Case:
    """A scan of one tower or of two.

    Args:
      op: "ssd" or "two_tower_ssd".
      strong: decays of a third of the positions, 0 for none; None for slow ones everywhere.
    """
    arrays, run = {"ssd": (_one_tower, _ssd), "two_tower_ssd": (_two_towers, _two_tower_ssd)}[op]
    problem = functools.partial(arrays, sizes, length, strong), functools.partial(run, sizes)
    forms = _EVERYWHERE | {TRITON: _BOTH}
    return Case(op, kind, *problem, implementations=forms, gradients=tuple(forms))


def _steps(rng, length: int, heads: int, strong: float | None) -> list[jax.Array]:
    """dt and log-decay; with `strong` None states remember for a thousand positions, and grow."""
    dt = np.log1p(np.exp(rng.standard_normal((1, length, heads)) - 1))
    decay = -dt * (rng.uniform(0.2, 2.0, heads) if strong is not None else 1e-3)
    if strong:
        decay = np.where(rng.random(dt.shape) < 0.3, -strong, decay)
    return [jnp.asarray(dt, jnp.float32), jnp.asarray(decay, jnp.float32)]


def _tower(sizes: Sizes, length: int, strong: float | None, rng, dtype) -> list[jax.Array]:
    """x, dt, log-decay, B, C."""
    steps = _steps(rng, length, sizes.heads, strong)
    x = _normal(rng, dtype, 1, length, sizes.heads, sizes.head_dim)
    b, c = (_normal(rng, dtype, 1, length, sizes.groups, sizes.state) for _ in range(2))
    return [x, *steps, b, c]


def _one_tower(sizes: Sizes, length: int, strong: float | None, rng, dtype) -> list[jax.Array]:
    initial = _normal(rng, jnp.float32, 1, sizes.heads, sizes.head_dim, sizes.state) * rng.choice([0.0, 10.0])
    return [*_tower(sizes, length, strong, rng, dtype), initial]


def _two_towers(sizes: Sizes, length: int, strong: float | None, rng, dtype) -> list[jax.Array]:
    return [*_tower(sizes, length, strong, rng, dtype), *_tower(sizes, length, strong, rng, dtype)[:4]]


def _ssd(sizes: Sizes, name: str, *arrays):
    *arrays, initial = arrays
    return kernels.ssd(*arrays, initial_state=initial, chunk_size=sizes.chunk, implementation=name)


def _two_tower_ssd(sizes: Sizes, name: str, *arrays):
    options = {"block_size": sizes.block, "chunk_size": sizes.chunk, "implementation": name}
    return (kernels.two_tower_ssd(*arrays, **options),)


def _block_scans() -> Iterator[Case]:
    """Two heads of 64 in two groups, or four of 80, state 64: what the GPU kernel takes."""
    sizes = SMALL._replace(heads=2, head_dim=64, state=64)
    for kind, strong in _DECAYS.items():
        for length in 1, 16, 40:
            yield block_scan(kind, sizes, length, strong)
    yield block_scan("heads of 80", sizes._replace(heads=4, head_dim=80), 16, 0.0)


def block_scan(kind: str, sizes: Sizes, length: int, strong: float) -> Case:
    """One block after a state."""
    heads, head_dim, groups, state = sizes.heads, sizes.head_dim, sizes.groups, sizes.state
    inner, channels = heads * head_dim, heads * head_dim + 2 * groups * state

    def arrays(rng, dtype):
        weights = [_normal(rng, dtype, 4, channels), _normal(rng, dtype, channels)]
        weights += [_normal(rng, jnp.float32, heads), _normal(rng, dtype, inner)]
        per_token = _normal(rng, dtype, 1, length, inner), _normal(rng, dtype, 1, length, channels)
        steps, tail = _steps(rng, length, heads, strong), _normal(rng, dtype, 1, 4, channels)
        return [*per_token, *steps, *weights, tail, 10 * _normal(rng, jnp.float32, 1, heads, head_dim, state)]

    def run(name, z, xbc, dt, decay, *rest):
        *weights, tail, state = rest
        arguments = z, xbc, dt, decay, kernels.BlockWeights(*weights), tail, state
        return kernels.block_scan(*arguments, groups=groups, epsilon=1e-5, next_state=True, implementation=name)

    return Case("block_scan", kind, arrays, run, gradients=(XLA,))


def _convolutions() -> Iterator[Case]:
    for op in "causal_conv", "block_causal_conv":
        for kind, scale, documents in (
            ("inputs of 1", 1.0, False),
            ("inputs of 1, documents", 1.0, True),
            ("inputs of 1000", 1000.0, False),
        ):
            for length in 8, 136:
                yield convolution(op, kind, SMALL, length, scale, documents)


def convolution(op: str, kind: str, sizes: Sizes, length: int, scale: float = 1.0, documents: bool = False) -> Case:
    """`op`: "causal_conv" or "block_causal_conv"."""
    channels, width = sizes.channels, 4
    of_op = ("causal_conv", "block_causal_conv").index(op)

    def arrays(rng, dtype):
        inputs = [scale * _normal(rng, dtype, 2, length, channels) for _ in range(1 + of_op)]
        tail = scale * _normal(rng, dtype, 2, width, channels)
        return [*inputs, _normal(rng, dtype, width, channels), _normal(rng, dtype, channels), tail]

    def one(name, x, weight, bias, tail):
        return (kernels.causal_conv(x, weight, bias, tail, _before(documents, x), implementation=name),)

    def blocks(name, x, context, weight, bias, tail):
        seen = _before(documents, x)
        return (kernels.block_causal_conv(x, context, weight, bias, sizes.block, tail, seen, implementation=name),)

    return Case(op, kind, arrays, (one, blocks)[of_op])


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
    for kind, scale, documents in (("", 1.0, False), (", documents", 1.0, True), (", scores of 50", 50.0, False)):
        for way in "causal", "blocks after the context":
            yield attention(way, SMALL, 136, kind, scale, documents)
    yield attention("a block after a cache", SMALL, 136)


def attention(way: str, sizes: Sizes, length: int, kind: str = "", scale: float = 1.0, documents: bool = False) -> Case:
    """Two rows.

    Args:
      way: "causal", "blocks after the context" or "a block after a cache".
      kind: that follows it in words.
    """
    position, block = jnp.arange(length), sizes.block
    start = jnp.where(position < 72, 0, 72) if documents else None
    cached = way == "a block after a cache"

    def arrays(rng, dtype):
        keys = [_normal(rng, dtype, 2, sizes.keys, length, sizes.query_dim) for _ in range(4)]
        return [scale * _normal(rng, dtype, 2, block if cached else length, sizes.queries, sizes.query_dim), *keys]

    def run(name, q, key, value, *own):
        if way == "causal":
            return (kernels.attention(q, (kernels.Keys(key, value, position + 1, start),), implementation=name),)
        context = kernels.Keys(key, value, position // block * block, start)
        if cached:
            context = kernels.Keys(key, value, jnp.array([[length - 6], [17]]))
            own = tuple(v[:, :, :block] for v in own)
        return (kernels.attention(q, (context,), own_block=own, block_size=block, implementation=name),)

    implementations = {XLA: _BOTH, TPU: _BOTH, GPU: ("bfloat16",)}
    gradients = () if cached else (XLA, TPU, GPU)
    return Case("attention", way + kind, arrays, run, implementations=implementations, gradients=gradients)


def _experts() -> Iterator[Case]:
    """90 rows with 3 of 6 experts each, D = 128, F = 192, some choices being of no expert."""
    for kind in "rows of 1", "rows of 1000", "all rows to one of them":
        yield experts(kind, SMALL, 90)
    for bits in 8, 4:
        yield experts("rows of 1", SMALL, 90, bits)


def experts(kind: str, sizes: Sizes, tokens: int, bits: int = 16) -> Case:
    """Tokens through their experts.

    Args:
      kind: "rows of 1", "rows of 1000" or "all rows to one of them".
    """
    count, choices, model, width = sizes.experts, sizes.choices, sizes.width, sizes.expert_width

    def arrays(rng, dtype):
        indices = np.stack([rng.permutation(count)[:choices] for _ in range(tokens)])
        indices = np.where(rng.random(indices.shape) < 0.2, count, indices)
        if kind == "all rows to one of them":
            indices = np.where(np.arange(choices) == 1, count - 1, count) + 0 * indices
        scale = 1000.0 if kind == "rows of 1000" else 1.0
        x = scale * _normal(rng, dtype, tokens, model)
        up, down = _normal(rng, dtype, count, model, width) / 8, _normal(rng, dtype, count, width, model) / 8
        if bits < 16:
            # With such scales, as checkpoints have them, float32 holds value · scale exactly.
            up, down = (quantize(w, bits, 64, scale_dtype=jnp.bfloat16) for w in (up, down))
        gates = jnp.asarray(rng.uniform(0.1, 1, indices.shape), jnp.float32)
        return [x, gates, up, down, jnp.asarray(indices, jnp.int32)]

    def run(name, x, gates, up, down, indices):
        return (kernels.expert_mlp(x, indices, gates, Weights(up, down), activation=relu2, implementation=name),)

    floats = {XLA: _BOTH, TPU: _BOTH, RAGGED: _BOTH, GPU: ("bfloat16",), GROUPED: ("bfloat16",)}
    if bits == 16:
        return Case("expert_mlp", kind, arrays, run, "dense", floats, (XLA, RAGGED, GPU, GROUPED, TPU))
    few = {name: floats[name] for name in (XLA, TPU, GPU)}
    return Case("expert_mlp", f"{kind}, weights in {bits} bits", arrays, run, "dense", few, ())
