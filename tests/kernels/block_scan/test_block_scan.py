"""Every implementation of kernels/block_scan/ against the literal layer in float64."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh

from twotower_jax import kernels

pytestmark = pytest.mark.usefixtures("strict_dtypes")

TOLERANCE = 3e-6  # Largest difference over the largest entry, in float32 against float64.
GROUPS, EPSILON = 2, 1e-5


@dataclasses.dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    heads: int = 4
    head_dim: int = 8
    state: int = 16
    width: int = 4
    bias: bool = True


def draw(seed, shape: Shape, decay=1.0):
    """The arguments of `block_scan`, float64 arrays of float32 values."""
    rng = np.random.default_rng(seed)

    def normal(*sizes):
        return rng.standard_normal(sizes).astype(np.float32).astype(np.float64)

    s = shape
    inner = s.heads * s.head_dim
    channels = inner + 2 * GROUPS * s.state
    dt = np.log1p(np.exp(normal(s.batch, s.length, s.heads)))
    weights = kernels.BlockWeights(
        normal(s.width, channels), normal(channels) if s.bias else None, normal(s.heads), normal(inner)
    )
    return (
        normal(s.batch, s.length, inner),
        normal(s.batch, s.length, channels),
        dt,
        -dt * decay * rng.uniform(0.2, 2.0, s.heads),
        weights,
        normal(s.batch, s.width, channels),
        10 * normal(s.batch, s.heads, s.head_dim, s.state),
    )


@functools.cache
def compiled(implementation, next_state=True, **tiles):
    function = functools.partial(kernels.block_scan, implementation=implementation)
    if tiles:  # Arguments of an implementation, not of the op.
        function = functools.partial(kernels.OPS["block_scan"].run, implementation, **tiles)
    return jax.jit(functools.partial(function, groups=GROUPS, epsilon=EPSILON, next_state=next_state))


def to_float32(arrays):
    return jax.tree.map(lambda v: jax.device_put(np.asarray(v, np.float32)), arrays)


def check(arrays, implementation, **tiles):
    rounded = jax.tree.map(lambda v: np.asarray(v, np.float32), arrays)
    out, last = compiled(implementation, **tiles)(*jax.tree.map(jnp.asarray, rounded))
    with jax.enable_x64(True):
        expected = compiled("reference")(*jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), rounded))
    for found, other in zip((out, last), expected, strict=True):
        assert found.dtype == jnp.float32
        other = np.asarray(other)
        assert np.max(np.abs(np.asarray(found, np.float64) - other)) < TOLERANCE * np.max(np.abs(other))


@pytest.fixture(params=["xla", "pallas_tpu_interpret"])
def implementation(request):
    return request.param


@pytest.mark.whole(but=["xla-S10", "pallas_tpu_interpret-S16", "pallas_tpu_interpret-S1]"])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(2, 1),
        Shape(1, 7),
        Shape(2, 16),
        Shape(1, 64, bias=False),
        Shape(1, 9, 2, 8, 8, 3),
        Shape(1, 10, head_dim=80, state=64),  # 160 channels per group, padded to whole lanes.
    ],
    ids=lambda s: f"S{s.length}",
)
def test_block_scan_equals_the_literal_layer(shape, implementation):
    check(draw(shape.length, shape), implementation)


@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    decay=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    implementation=st.sampled_from(["xla", "pallas_tpu_interpret"]),
)
@hypothesis.settings(max_examples=12)
def test_block_scan_from_random_states_under_any_decay(seed, decay, implementation):
    check(draw(seed, Shape(2, 16), decay), implementation)


def test_padding_leaves_the_state_as_it_is(implementation):
    """As the shorter block alone would."""
    z, xbc, dt, log_decay, *rest = to_float32(draw(1, Shape(2, 16)))
    real = (jnp.arange(16) < 9)[:, None]
    dt, log_decay = jnp.where(real, dt, 0), jnp.where(real, log_decay, 0)
    out, last = compiled(implementation)(z, xbc, dt, log_decay, *rest)
    short_out, short_last = compiled(implementation)(z[:, :9], xbc[:, :9], dt[:, :9], log_decay[:, :9], *rest)
    np.testing.assert_allclose(out[:, :9], short_out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(last, short_last, rtol=1e-5, atol=1e-5)


def test_the_next_state_may_be_left_out(implementation):
    arrays = to_float32(draw(2, Shape(2, 16)))
    out, last = compiled(implementation, next_state=False)(*arrays)
    assert last is None
    np.testing.assert_array_equal(out, compiled(implementation)(*arrays)[0])


def test_block_scan_in_bfloat16(implementation):
    """Rounded where the layers round: the convolution's output, and the result."""
    arrays = to_float32(draw(3, Shape(2, 16)))
    z, xbc, dt, log_decay, weights, tail, state = arrays
    z, xbc, tail = (v.astype(jnp.bfloat16) for v in (z, xbc, tail))
    out, last = compiled(implementation)(z, xbc, dt, log_decay, weights, tail, state)
    as_float32 = (v.astype(jnp.float32) for v in (z, xbc))
    exact, exact_last = compiled("reference")(*as_float32, dt, log_decay, weights, tail.astype(jnp.float32), state)
    assert out.dtype == jnp.bfloat16
    assert last.dtype == jnp.float32
    for found, expected in ((out, exact), (last, exact_last)):
        error = jnp.linalg.norm(found.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
        assert error < 2**-7


# The Mosaic GPU kernel takes only the shapes of its products, and is interpreted slowly.

GPU = "mosaic_gpu_interpret"


def wide(batch, length, **changes):
    return Shape(batch, length, **{"head_dim": 64, "state": 64} | changes)


@pytest.mark.whole(but=["S17"])
@pytest.mark.parametrize(
    ("shape", "decay"),
    [
        (wide(2, 1), 1.0),
        (wide(1, 16, bias=False), 30.0),
        (wide(1, 17, heads=2, width=2), 1e4),
        (wide(1, 64, heads=2, state=128), 0.0),
        (wide(1, 18, heads=2, head_dim=80), 1.0),  # Heads that are no multiple of a product's rows.
        (wide(1, 33, heads=2, head_dim=144), 1.0),
    ],
    ids=lambda v: f"S{v.length}" if isinstance(v, Shape) else "",
)
def test_block_scan_on_a_gpu_equals_the_literal_layer(shape, decay):
    check(draw(shape.length, shape, decay), GPU)


def test_programs_of_several_heads():
    """As at large batches: two heads of a group share its convolutions."""
    from twotower_jax.kernels.block_scan import mosaic_gpu as block_scan_gpu

    assert block_scan_gpu._heads_per_program(1, 4, 2, 64, programs=1) == 2
    check(draw(5, wide(1, 3)), GPU, programs=1)


def test_block_scan_in_bfloat16_on_a_gpu():
    """Rounded where the layers round, and without a next state."""
    arrays = to_float32(draw(3, wide(2, 16, heads=2)))
    z, xbc, dt, log_decay, weights, tail, state = arrays
    z, xbc, tail = (v.astype(jnp.bfloat16) for v in (z, xbc, tail))
    out, last = compiled(GPU, next_state=False)(z, xbc, dt, log_decay, weights, tail, state)
    expected, _ = compiled("xla", next_state=False)(z, xbc, dt, log_decay, weights, tail, state)
    assert last is None
    assert out.dtype == jnp.bfloat16
    # Both round at the same places, up to ties.
    difference = jnp.linalg.norm(out.astype(jnp.float32) - expected.astype(jnp.float32))
    assert difference < 2**-9 * jnp.linalg.norm(expected.astype(jnp.float32))


def gpu_arguments(length, dtype=jnp.bfloat16, head_dim=64, batch=1):
    """The arguments of one layer of the 30B model, without arrays."""

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype)

    inner = 64 * head_dim
    row = shape(batch, length, 64, dtype=jnp.float32)
    weights = kernels.BlockWeights(shape(4, inner + 2048), shape(inner + 2048), shape(64), shape(inner))
    tokens = shape(batch, length, inner), shape(batch, length, inner + 2048)
    state = shape(batch, 64, head_dim, 128, dtype=jnp.float32)
    return *tokens, row, row, weights, shape(batch, 4, inner + 2048), state


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"length": 65}, "65 tokens is not one of 1 to 64"),
        ({"length": 16, "head_dim": 32}, "heads of 32 with a state of 128"),
        ({"length": 64, "dtype": jnp.float32}, "bytes of shared memory"),
    ],
)
def test_what_a_gpu_cannot_take_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        kernels.chosen("block_scan", *gpu_arguments(**changes), **OPTIONS, implementation="mosaic_gpu")


def test_a_hopper_gpu_takes_the_blocks_of_the_30b_model():
    device = AbstractDevice("NVIDIA H200", 132, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("device",), abstract_device=device)):
        for length in (1, 16, 32, 64):
            for batch in (1, 64):
                arguments = gpu_arguments(length, batch=batch)
                assert kernels.chosen("block_scan", *arguments, **OPTIONS) == ("mosaic_gpu", "made for gpu")


OPTIONS = {"groups": 8, "epsilon": 1e-5, "next_state": True}
