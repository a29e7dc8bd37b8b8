"""What `benchmarks/kernels.py` times: every op at the shapes of one model, in each form that runs here."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from twotower_jax import kernels, randomness
from twotower_jax.benchmarks._kernel_goals import ONE_MATRIX
from twotower_jax.benchmarks._mamba_ssm import MambaSSM
from twotower_jax.benchmarks._shapes import demo_config, nano_config
from twotower_jax.config import ModelConfig
from twotower_jax.kernels.experts import Weights, relu2
from twotower_jax.kernels.numerics.quantized import group_size, quantize


class Shape(NamedTuple):
    """One layer of each kind: B, L, S, Q, the cache's T; of Mamba H, P, G, N; D, E, k, F; of attention H, K, P."""

    batch: int
    length: int
    block: int
    chunk: int
    cache: int
    heads: int
    head_dim: int
    groups: int
    state: int
    width: int
    experts: int
    choices: int
    expert_width: int
    query_heads: int
    kv_heads: int
    query_dim: int

    @classmethod
    def of(cls, model: ModelConfig, batch: int, length: int, block: int, cache: int) -> "Shape":
        """The layers of a model."""
        return cls(
            *(batch, length, block, model.chunk_size, cache),
            *(model.mamba_num_heads, model.mamba_head_dim, model.n_groups, model.ssm_state_size),
            *(model.hidden_size, model.n_routed_experts, model.num_experts_per_tok, model.moe_intermediate_size),
            *(model.num_attention_heads, model.num_key_value_heads, model.head_dim),
        )


# By name.
SHAPES: dict[str, Callable[[], Shape]] = {
    "tiny": lambda: Shape.of(demo_config(), 8, 256, 16, 256),
    "wide": lambda: Shape(1, 1024, 16, 128, 1024, 16, 64, 2, 128, 512, 32, 4, 256, 8, 2, 64),
    "nano": lambda: Shape.of(nano_config(), 1, 8192, 16, 4096),
}


class Form(NamedTuple):
    """One way to compute a case.

    Attributes:
      case: what is computed; forms of one case are compared.
      name: of the form. function, arguments: what is timed.
      operations: that the case needs, additions and multiplications.
      moved: bytes that it must read and write; None for all arguments and results once.
      library: whose function it is, if not JAX's: it runs as it is, and is waited for by `library.wait`.
    """

    case: str
    name: str
    function: Callable
    arguments: tuple
    operations: float
    moved: int | None = None
    library: MambaSSM | None = None

    @property
    def must_move(self) -> int:
        """Bytes that must be read and written."""
        if self.moved is not None:
            return self.moved
        results = jax.tree.leaves(jax.eval_shape(self.function, *self.arguments))
        return sum(v.size * v.dtype.itemsize for v in [*jax.tree.leaves(self.arguments), *results])


# cuDNN's attention, by way of jax.nn.
CUDNN = "cudnn"


def forms(
    shape: Shape,
    dtype: jnp.dtype,
    ops: list[str],
    skip: list[str],
    mamba_ssm: MambaSSM | None = None,
    refused: dict[str, str] | None = None,
) -> Iterator[Form]:
    """The forms of the named ops but those called `skip`, each made when it is asked for.

    Args:
      refused: takes up why implementations cannot take the shapes, by name.
    """
    for op in ops:
        first = []
        for form in MAKERS[op](shape, dtype, _Names(op, skip, {} if refused is None else refused)):
            first = [*first, form][:2]
            yield form
        if op == "ssd" and mamba_ssm is not None and first:
            yield from _ssd_by_mamba_ssm(mamba_ssm, shape, *first)


class _Names:
    """The implementations of an op that run here: not the interpreters, and no other platform's kernels."""

    def __init__(self, op: str, skip: list[str], refused: dict[str, str]):
        self.op, self.skip, self.refused = op, skip, refused

    def __call__(self, *args, **kwargs) -> list[str]:
        """Those that take these arguments."""
        return [name for name in kernels.implementations(self.op) if self._runs(name, args, kwargs)]

    def _runs(self, name, args, kwargs) -> bool:
        # The plain product of jax.lax is what other kernels are measured against, wherever it runs.
        platform = None if name == "ragged_dot" else kernels.platform_of(self.op, name)
        if name in self.skip or name.endswith("_interpret") or platform not in (None, jax.default_backend()):
            return False
        try:
            kernels.chosen(self.op, *args, implementation=name, **kwargs)
        except ValueError as error:
            self.refused[name] = str(error)
            return False
        return True


def gradient(function, count):
    """The gradients of the sum of all squares in the first `count` arguments."""

    def loss(*arrays):
        return sum(jnp.sum(jnp.square(v.astype(jnp.float32))) for v in jax.tree.leaves(function(*arrays)))

    return jax.grad(loss, argnums=tuple(range(count)))


# Scans. 2 · 2 · B·L·H·P·N operations are the recurrence's own products.


def _ssd(s: Shape, dtype, names: _Names) -> Iterator[Form]:
    own = _scan_arguments(0, s, dtype)
    state = jnp.ones((s.batch, s.heads, s.head_dim, s.state), jnp.float32)
    operations = 4 * s.batch * s.length * s.heads * s.head_dim * s.state
    for name in names(*own, chunk_size=s.chunk):

        def one(*arrays, name=name):
            *arrays, initial = arrays
            return kernels.ssd(*arrays, initial_state=initial, chunk_size=s.chunk, implementation=name)

        yield Form("ssd", name, one, (*own, state), operations)
        yield Form("ssd, gradient", name, gradient(one, 6), (*own, state), 3 * operations)


def _ssd_by_mamba_ssm(library: MambaSSM, s: Shape, forward: Form, gradient: Form) -> Iterator[Form]:
    """The same two cases; its chunks are 256 by default, so that these are tried beside the shape's."""
    x, dt, _, b, c, initial = forward.arguments
    tensors = library.tensors(x, dt, -jnp.ones(s.heads, jnp.float32), b, c, initial)
    for chunk in dict.fromkeys((s.chunk, 256)):
        name = f"mamba_ssm, chunks of {chunk}"
        for form, function in (forward, library.forward(chunk)), (gradient, library.gradient(chunk)):
            yield Form(form.case, name, function, tensors, form.operations, form.must_move, library)


def _two_tower_ssd(s: Shape, dtype, names: _Names) -> Iterator[Form]:
    arrays = *_scan_arguments(0, s, dtype), *_scan_arguments(1, s, dtype)[:4]
    operations = 4 * s.batch * s.length * s.heads * s.head_dim * s.state
    sizes = {"block_size": s.block, "chunk_size": s.chunk}
    for name in names(*arrays, **sizes):

        def two(*arrays, name=name):
            return kernels.two_tower_ssd(*arrays, **sizes, implementation=name)

        yield Form("two_tower_ssd", name, two, arrays, 2 * operations)
        yield Form("two_tower_ssd, context frozen, gradient", name, gradient(two, 5), arrays, 4 * operations)
        yield Form("two_tower_ssd, gradient", name, gradient(two, 9), arrays, 6 * operations)


def _block_scan(s: Shape, dtype, names: _Names) -> Iterator[Form]:
    """As many rows as the shape has, one block of S tokens each, and the next state of it."""
    rng = np.random.default_rng(2)
    inner, channels = s.heads * s.head_dim, s.heads * s.head_dim + 2 * s.groups * s.state
    dt = _uniform(rng, s.batch, s.block, s.heads)
    weights = kernels.BlockWeights(
        _normal(rng, dtype, 4, channels),
        _normal(rng, dtype, channels),
        _normal(rng, dtype, s.heads),
        _normal(rng, dtype, inner),
    )
    state = _normal(rng, jnp.float32, s.batch, s.heads, s.head_dim, s.state)
    per_token = _normal(rng, dtype, s.batch, s.block, inner), _normal(rng, dtype, s.batch, s.block, channels)
    arrays = *per_token, dt, -dt, weights, _normal(rng, dtype, s.batch, 4, channels), state
    operations = 4 * s.batch * s.block * s.heads * s.head_dim * s.state
    for wanted in (False, True):
        options = {"groups": s.groups, "epsilon": 1e-5, "next_state": wanted}
        for name in names(*arrays, **options):

            def fused(*arrays, name=name, options=options):
                return kernels.block_scan(*arrays, **options, implementation=name)

            case = f"block_scan, {s.block} tokens{', and the next state' if wanted else ''}"
            yield Form(case, name, fused, arrays, operations)


def _scan_arguments(seed: int, s: Shape, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """x, dt, log_decay, b, c."""
    rng = np.random.default_rng(seed)
    dt = _uniform(rng, s.batch, s.length, s.heads)
    group = s.batch, s.length, s.groups, s.state
    x = _normal(rng, dtype, s.batch, s.length, s.heads, s.head_dim)
    return x, dt, -dt, _normal(rng, dtype, *group), _normal(rng, dtype, *group)


def _causal_conv(s: Shape, dtype, names: _Names) -> Iterator[Form]:
    rng = np.random.default_rng(3)
    channels = s.heads * s.head_dim + 2 * s.groups * s.state
    x, context = (_normal(rng, dtype, s.batch, s.length, channels) for _ in range(2))
    weight, bias = _normal(rng, dtype, 4, channels), _normal(rng, dtype, channels)
    operations = 8 * x.size
    for name in names(x, weight, bias):

        def whole(x, weight, bias, name=name):
            return kernels.causal_conv(x, weight, bias, implementation=name)

        def blocks(x, context, weight, bias, name=name):
            return kernels.block_causal_conv(x, context, weight, bias, s.block, implementation=name)

        yield Form("causal_conv", name, whole, (x, weight, bias), operations)
        yield Form("causal_conv, gradient", name, gradient(whole, 3), (x, weight, bias), 3 * operations)
        arrays = x, context, weight, bias
        yield Form("block_causal_conv", name, blocks, arrays, operations)
        yield Form("block_causal_conv, gradient", name, gradient(blocks, 4), arrays, 3 * operations)


def _attention(s: Shape, dtype, names: _Names) -> Iterator[Form]:
    rng = np.random.default_rng(4)
    q = _normal(rng, dtype, s.batch, s.length, s.query_heads, s.query_dim)
    key, value, own_key, own_value = (_normal(rng, dtype, s.batch, s.kv_heads, s.length, s.query_dim) for _ in range(4))
    position = jnp.arange(s.length)
    # Half of all pairs, two products each.
    pairs = s.batch * s.query_heads * s.query_dim * s.length**2 / 2
    causal, edge = position[None] + 1, (position // s.block * s.block)[None]
    for name in names(q, (kernels.Keys(key, value, causal),)):

        def run(q, key, value, name=name):
            return kernels.attention(q, (kernels.Keys(key, value, causal),), implementation=name)

        yield Form("attention, causal", name, run, (q, key, value), 4 * pairs)
        yield Form("attention, causal, gradient", name, gradient(run, 3), (q, key, value), 12 * pairs)
    if jax.default_backend() == "gpu" and CUDNN not in names.skip:

        def cudnn(q, key, value):
            return jax.nn.dot_product_attention(q, key, value, is_causal=True, implementation="cudnn")

        apart = q, jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
        yield Form("attention, causal", CUDNN, cudnn, apart, 4 * pairs)
        yield Form("attention, causal, gradient", CUDNN, gradient(cudnn, 3), apart, 12 * pairs)
    own = {"own_block": (own_key, own_value), "block_size": s.block}
    for name in names(q, (kernels.Keys(key, value, edge),), **own):

        def two(q, own_key, own_value, key, value, name=name):
            sources, own = (kernels.Keys(key, value, edge),), (own_key, own_value)
            return kernels.attention(q, sources, own_block=own, block_size=s.block, implementation=name)

        arrays = q, own_key, own_value, key, value
        yield Form("attention, blocks after their context", name, two, arrays, 4 * pairs)
        yield Form("attention, blocks after their context, gradient", name, gradient(two, 5), arrays, 12 * pairs)
    rows = 8
    q = _normal(rng, dtype, rows, s.block, s.query_heads, s.query_dim)
    cache = tuple(_normal(rng, dtype, rows, s.kv_heads, s.cache, s.query_dim) for _ in range(2))
    own_pair = tuple(_normal(rng, dtype, rows, s.kv_heads, s.block, s.query_dim) for _ in range(2))
    lengths = jnp.full((rows, 1), s.cache - s.block, jnp.int32)
    operations = 4 * rows * s.query_heads * s.query_dim * s.block * s.cache
    own = {"own_block": own_pair, "block_size": s.block}
    for name in names(q, (kernels.Keys(*cache, lengths),), **own):

        def block(q, cache, own_pair, lengths, name=name):
            sources = (kernels.Keys(*cache, lengths),)
            return kernels.attention(q, sources, own_block=own_pair, block_size=s.block, implementation=name)

        case = f"attention, {rows} rows, {s.block} tokens after {s.cache}"
        yield Form(case, name, block, (q, cache, own_pair, lengths), operations)


# Experts. Two products of D × F a row.


def _experts(s: Shape, dtype, names: _Names) -> Iterator[Form]:
    rng = np.random.default_rng(5)
    weights = Weights(
        _normal(rng, dtype, s.experts, s.width, s.expert_width), _normal(rng, dtype, s.experts, s.expert_width, s.width)
    )

    def routed(tokens):
        indices = np.stack([rng.permutation(s.experts)[: s.choices] for _ in range(tokens)]).astype(np.int32)
        return _normal(rng, dtype, tokens, s.width), jnp.asarray(indices), _uniform(rng, tokens, s.choices)

    tokens = s.batch * s.length
    x, indices, gates = routed(tokens)
    operations = 4 * tokens * s.choices * s.width * s.expert_width
    case = f"expert_mlp, {tokens * s.choices} rows"
    for name in names(x, indices, gates, weights, activation=relu2):

        def many(x, gates, weights, name=name, indices=indices):
            return kernels.expert_mlp(x, indices, gates, weights, implementation=name)

        yield Form(case, name, many, (x, gates, weights), operations)
        yield Form(f"{case}, gradient", name, gradient(many, 3), (x, gates, weights), 3 * operations)

    def plain(x, up, down):
        rows = jnp.repeat(x, s.choices, axis=0)
        precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
        return jnp.matmul(relu2(jnp.matmul(rows, up, precision=precision)), down, precision=precision)

    arrays = x, weights.up[0], weights.down[0]
    yield Form(case, ONE_MATRIX, plain, arrays, operations)
    yield Form(f"{case}, gradient", ONE_MATRIX, gradient(plain, 3), arrays, 3 * operations)

    x, indices, gates = routed(s.block)
    touched = np.unique(np.asarray(indices)).size
    operations = 4 * s.block * s.choices * s.width * s.expert_width
    for bits in (None, 8, 4):
        stored = weights if bits is None else _quantized(weights, bits)
        moved = sum(v.nbytes for v in jax.tree.leaves(stored)) * touched // s.experts
        kind = "" if bits is None else f", int{bits}"
        case = f"expert_mlp, {s.block * s.choices} rows of {touched} experts{kind}"
        for name in names(x, indices, gates, stored, activation=relu2):

            def few(x, indices, gates, weights, name=name):
                return kernels.expert_mlp(x, indices, gates, weights, implementation=name)

            yield Form(case, name, few, (x, indices, gates, stored), operations, moved)


def _quantized(weights: Weights, bits: int) -> Weights:
    def shrink(w):
        return quantize(w, bits, group_size(w.shape[-2], bits))

    return Weights(shrink(weights.up), shrink(weights.down))


def _normal(rng, dtype, *sizes) -> jax.Array:
    # On the device: the experts of one layer of the 30B model are more than a billion numbers.
    return jax.random.normal(randomness.key(rng.integers(2**31)), sizes, dtype)


def _uniform(rng, *sizes) -> jax.Array:
    return jnp.asarray(rng.uniform(0.01, 0.5, sizes), jnp.float32)


# The ops that can be asked for, and what yields their forms.
MAKERS = {
    "ssd": _ssd,
    "two_tower_ssd": _two_tower_ssd,
    "block_scan": _block_scan,
    "causal_conv": _causal_conv,  # And block_causal_conv.
    "attention": _attention,
    "expert_mlp": _experts,
}
