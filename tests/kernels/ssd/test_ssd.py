"""Every implementation of kernels/ssd/ against the literal recurrence in float64: values, states, every gradient.

The Pallas kernels run in interpret mode. That they compile for the hardware is a command,
`launch/benchmark.py kernel_compile`; that they lower for it is tested in ../test_dispatch.py, and for Triton here.
The interpreters of the GPU kernels call Python for every access to memory, and fill memory with NaN first: they get
fewer and smaller problems, of the same kinds.
"""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from twotower_jax.kernels import ssd, two_tower_ssd
from twotower_jax.kernels.hardware import triton_call
from twotower_jax.kernels.ssd import mosaic_gpu, reference, two_tower_tpu
from twotower_jax.kernels.ssd import triton as ssd_triton

pytestmark = pytest.mark.usefixtures("strict_dtypes")

# Largest difference over the largest entry, in float32 against float64.
TOLERANCE = 3e-6
NAMES = ("x", "dt", "log_decay", "b", "c", "initial_state")


FAST = ("xla", "pallas_tpu_interpret")


@pytest.fixture(params=FAST)
def implementation(request):
    return request.param


def draw(seed, batch, length, heads, head_dim, groups, state, *, decay=1.0):
    """x, dt, log_decay, b, c and an initial state, float64 arrays of float32 values."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32).astype(np.float64)

    dt = np.log1p(np.exp(normal(batch, length, heads) - 1)).astype(np.float32).astype(np.float64)
    rate = decay * rng.uniform(0.2, 2.0, heads).astype(np.float32)
    log_decay = (-dt * rate).astype(np.float32).astype(np.float64)
    return (
        normal(batch, length, heads, head_dim),
        dt,
        log_decay,
        normal(batch, length, groups, state),
        normal(batch, length, groups, state),
        normal(batch, heads, head_dim, state),
    )


def to_float32(arrays):
    return tuple(jax.device_put(np.asarray(v, np.float32)) for v in arrays)


def difference(found, expected):
    """Largest difference over the largest expected entry."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    assert np.all(np.isfinite(found))
    return np.max(np.abs(found - expected), initial=0.0) / max(np.max(np.abs(expected), initial=0.0), 1e-30)


def weighted(outputs):
    """A scalar in which every entry of every output has its own weight."""
    total = 0.0
    for output in outputs:
        weights = np.random.default_rng(output.size).standard_normal(output.shape)
        total += jnp.sum(output * jnp.asarray(weights, output.dtype))
    return total


# What users get, for the tests of extreme decays.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


def with_gradients(function, compiler_options=None):
    """function(*arrays) → outputs, as a compiled (*arrays) → outputs, gradients of a weighted sum of them."""

    def run(*arrays):
        def loss(*arrays):
            outputs = function(*arrays)
            return weighted(outputs), outputs

        gradients, outputs = jax.grad(loss, argnums=tuple(range(len(arrays))), has_aux=True)(*arrays)
        return outputs, gradients

    return jax.jit(run, compiler_options=compiler_options)


class Oracle:
    """A literal function in float64, with its gradients."""

    def __init__(self, function):
        self._run = with_gradients(function)

    def __call__(self, *arrays):
        with jax.enable_x64(True):
            return jax.tree.map(np.asarray, self._run(*(jnp.asarray(v, jnp.float64) for v in arrays)))


recurrence = Oracle(reference.ssd_sequential)


def check_gradients(names, found, expected, tolerance=TOLERANCE):
    """Relative to the gradient in question, or to a tenth of the first one: under strong decay some all but vanish."""
    for name, one, other in zip(names, found, expected, strict=True):
        assert np.all(np.isfinite(one)), name
        scale = max(np.max(np.abs(other)), 0.1 * np.max(np.abs(expected[0])))
        assert np.max(np.abs(np.asarray(one, np.float64) - other)) < 2 * tolerance * scale, name


def chunked(chunk, implementation):
    def run(x, dt, log_decay, b, c, initial_state):
        return ssd(x, dt, log_decay, b, c, initial_state=initial_state, chunk_size=chunk, implementation=implementation)

    return run


# B, L, H, P, G, N, Q. The second is the trap: a partial chunk of 16 under a chunk of 128, seeded.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 8),
    (2, 16, 3, 4, 3, 5, 128),
    (1, 7, 3, 2, 1, 3, 8),
    (2, 8, 4, 3, 2, 5, 8),
    (1, 9, 6, 4, 3, 2, 8),
    (2, 40, 5, 2, 5, 4, 16),
    (1, 64, 7, 3, 1, 4, 32),
    (1, 20, 3, 2, 1, 3, 1),
    (1, 129, 2, 2, 1, 3, 128),
    (1, 24, 6, 80, 2, 128, 8),  # Groups of 240 channels, which a TPU takes as 256.
    (1, 260, 2, 2, 1, 3, 256),
]


# Two tiles per chunk, the last chunk partly filled: heads that share a group, one chunk, and tiles of full size.
# Products take 64 and 64 of a head's 80 places, Triton's tensors 128. Interpreters take their time by programs: no case
# has more rows, heads and tiles than it is about.
GPU_SHAPES = [
    (1, 20, 2, 2, 1, 4, 16),
    (2, 16, 2, 4, 2, 5, 128),
    (1, 129, 2, 2, 1, 3, 128),
    (1, 12, 2, 80, 1, 4, 8),
    (1, 257, 1, 2, 1, 2, 256),
]


# The same with states of Triton's tensors, powers of two, and groups of three heads, which are not one.
TRITON_SHAPES = [(1, 20, 2, 2, 1, 4, 16), (2, 16, 6, 4, 2, 8, 128), (1, 129, 2, 2, 1, 4, 128), *GPU_SHAPES[3:]]


def for_each(fast, of_gpu, of_triton=()):
    """Pairs of an implementation and a problem."""
    pairs = [(name, case) for case in fast for name in FAST]
    pairs += [("mosaic_gpu_interpret", case) for case in of_gpu]
    return pairs + [("triton_interpret", case) for case in of_triton]


@pytest.mark.whole(
    but=[
        "mosaic_gpu_interpret-(1, 12, 2, 80",
        "pallas_tpu_interpret-(1, 24, 6, 80",
        "xla-(2, 40, 5",
        "triton_interpret-(1, 20",
    ]
)
@pytest.mark.parametrize(("implementation", "shape"), for_each(SHAPES, GPU_SHAPES, TRITON_SHAPES), ids=str)
def test_ssd_equals_the_recurrence(implementation, shape):
    *shape, chunk = shape
    arrays = draw(chunk, *shape)
    (y, state), gradients = with_gradients(chunked(chunk, implementation))(*to_float32(arrays))
    (y_expected, state_expected), gradients_expected = recurrence(*arrays)
    assert y.dtype == state.dtype == jnp.float32
    assert difference(y, y_expected) < TOLERANCE
    assert difference(state, state_expected) < TOLERANCE
    check_gradients(NAMES, gradients, gradients_expected)


def test_no_initial_state_is_a_zero_one(implementation):
    arrays = to_float32(draw(0, 1, 20, 2, 3, 1, 4))
    zeros = jnp.zeros_like(arrays[5])
    given = ssd(*arrays[:5], initial_state=zeros, chunk_size=8, implementation=implementation)
    left_out = ssd(*arrays[:5], chunk_size=8, implementation=implementation)
    jax.tree.map(np.testing.assert_array_equal, given, left_out)


@functools.cache
def _compiled(chunk, implementation):
    return jax.jit(chunked(chunk, implementation))


@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    cut=st.integers(0, 40),
    chunk=st.sampled_from([8, 16, 128]),
    implementation=st.sampled_from(["xla", "pallas_tpu_interpret"]),
)
def test_a_state_handed_over_anywhere_continues_the_scan(seed, cut, chunk, implementation):
    """Positions with dt = 0 change nothing, so that the two parts of a sequence have one compiled shape."""
    arrays = to_float32(draw(seed, 1, 40, 3, 2, 1, 3))
    x, dt, log_decay, b, c, initial_state = arrays
    whole, last = _compiled(chunk, implementation)(*arrays)
    first = jnp.arange(40)[:, None] < cut

    def only(keep, state):
        return _compiled(chunk, implementation)(x, jnp.where(keep, dt, 0), jnp.where(keep, log_decay, 0), b, c, state)

    before, middle = only(first, initial_state)
    after, end = only(~first, middle)
    joined = jnp.where(first[..., None], before, after)
    assert difference(joined, whole) < TOLERANCE
    assert difference(end, last) < TOLERANCE


@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    position=st.integers(0, 39),
    implementation=st.sampled_from(["xla", "pallas_tpu_interpret"]),
)
def test_ssd_is_causal(seed, position, implementation):
    x, *rest = to_float32(draw(seed, 1, 40, 3, 2, 1, 3))
    y, _ = _compiled(16, implementation)(x, *rest)
    changed, _ = _compiled(16, implementation)(x.at[:, position].add(1.0), *rest)
    np.testing.assert_array_equal(y[:, :position], changed[:, :position])
    assert np.all(np.any(y[:, position:] != changed[:, position:], axis=(0, 3))[0])


# Many chunks in either implementation, and few.
FORMS = [("xla", 8), ("xla", 128), ("pallas_tpu_interpret", 8), ("pallas_tpu_interpret", 128)]
GPU_FORMS = [("mosaic_gpu_interpret", 16), ("triton_interpret", 16)]


def length_for(form):
    """Three chunks or more of two tiles or more where interpreting takes long."""
    return 150 if form in FORMS else 40


def forms_with(values, of_gpu):
    few = [(form, value) for value in of_gpu for form in GPU_FORMS]
    return [(form, value) for value in values for form in FORMS] + few


@pytest.mark.whole(but=["('xla', 8)", "('pallas_tpu_interpret', 128)"])
@pytest.mark.parametrize(("form", "step"), forms_with([0.0, 1e-6, 50.0, 1e3, 1e6], [0.0, 1e6]), ids=str)
def test_extreme_decays_stay_finite_and_accurate(form, step):
    """All decays equal: from a state that never fades to one that is gone at once; gradients included."""
    arrays = list(draw(3, 1, length_for(form), 2, 2, 1, 4))
    arrays[2] = np.full_like(arrays[2], -np.float32(step))
    (y, state), gradients = _chunked_gradients(*form)(*to_float32(arrays))
    (y_expected, state_expected), gradients_expected = recurrence(*arrays)
    assert difference(y, y_expected) < TOLERANCE
    assert difference(state, state_expected) < TOLERANCE
    check_gradients(NAMES, gradients, gradients_expected)


@functools.cache
def _chunked_gradients(implementation, chunk):
    return with_gradients(chunked(chunk, implementation), OPTIMIZED)


@pytest.mark.whole(but=["xla", "pallas"])
@pytest.mark.parametrize(("form", "large"), forms_with([10.0, 50.0, 1e3, 1e6], [50.0, 1e6]), ids=str)
def test_large_decays_beside_small_ones(form, large):
    """A state forgotten at one step and kept at the next: differences of plain float32 sums lose the small ones."""
    arrays = list(draw(4, 1, length_for(form), 2, 2, 1, 4))
    pick = np.random.default_rng(5).random(arrays[2].shape) < 0.5
    arrays[2] = np.where(pick, -np.float32(large), -np.float32(0.01)).astype(np.float64)
    (y, state), gradients = _chunked_gradients(*form)(*to_float32(arrays))
    (y_expected, state_expected), gradients_expected = recurrence(*arrays)
    assert difference(y, y_expected) < TOLERANCE
    assert difference(state, state_expected) < TOLERANCE
    check_gradients(NAMES, gradients, gradients_expected)


@pytest.mark.whole
def test_a_long_context_with_large_states(implementation):
    """64K tokens and states beyond 1e3, where bfloat16 inside the scan would lose everything."""
    length = 65_536
    rng = np.random.default_rng(0)
    x = (1 + 0.1 * rng.standard_normal((1, length, 1, 2))).astype(np.float32)
    dt = np.full((1, length, 1), 0.5, np.float32)
    log_decay = np.full((1, length, 1), -1e-4, np.float32)
    b = (1 + 0.1 * rng.standard_normal((1, length, 1, 2))).astype(np.float32)
    y, state = _compiled(128, implementation)(x, dt, log_decay, b, b, jnp.zeros((1, 1, 2, 2)))
    expected = np.zeros((2, 2))
    for t in range(length):
        expected = np.exp(np.float64(log_decay[0, t, 0])) * expected + 0.5 * np.outer(x[0, t, 0], b[0, t, 0])
    assert np.min(expected) > 1e3
    assert difference(state[0, 0], expected) < 1e-5
    assert difference(y[0, -1, 0], expected @ b[0, -1, 0]) < 1e-5
    assert np.all(np.isfinite(y))


@pytest.mark.whole(but=["pallas_tpu_interpret"])
@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu_interpret", "mosaic_gpu_interpret", "triton_interpret"])
def test_bfloat16_inputs_are_scanned_in_float32(implementation):
    heads, groups = (4, 2) if implementation in FAST else (2, 1)
    arrays = draw(6, 1, 40, heads, 4, groups, 4)
    x, dt, log_decay, b, c, state = to_float32(arrays)
    x, b, c = (v.astype(jnp.bfloat16) for v in (x, b, c))
    rounded = [np.asarray(v, np.float64) for v in (x, dt, log_decay, b, c, state)]
    (y, last), gradients = with_gradients(chunked(16, implementation))(x, dt, log_decay, b, c, state)
    (y_expected, last_expected), gradients_expected = recurrence(*rounded)
    assert y.dtype == last.dtype == jnp.float32
    assert difference(y, y_expected) < TOLERANCE
    assert difference(last, last_expected) < TOLERANCE
    for name, found, expected in zip(NAMES, gradients, gradients_expected, strict=True):
        assert found.dtype == (jnp.bfloat16 if name in "xbc" else jnp.float32)
        assert difference(found, expected) < (2**-8 if name in "xbc" else 2 * TOLERANCE), name


# Two towers.

TWO_TOWER_NAMES = (*NAMES[:5], "context_x", "context_dt", "context_log_decay", "context_b")


def draw_two_towers(seed, *shape, decay=1.0):
    x, dt, log_decay, b, c, _ = draw(seed, *shape, decay=decay)
    context_x, context_dt, context_log_decay, context_b, _, _ = draw(seed + 1, *shape, decay=decay)
    return x, dt, log_decay, b, c, context_x, context_dt, context_log_decay, context_b


def blocks_of(block, chunk, implementation):
    def run(*arrays):
        return (two_tower_ssd(*arrays, block_size=block, chunk_size=chunk, implementation=implementation),)

    return run


@functools.cache
def blocks_one_by_one(block):
    return Oracle(lambda *arrays: (reference.two_tower_ssd_sequential(*arrays, block_size=block),))


# S, Q, blocks, B, H, P, G, N: dividing pairs and others, S beyond Q, a single block, the last chunk partly filled.
PAIRS = [
    (1, 8, 5, 2, 3, 2, 3, 2),
    (1, 128, 7, 1, 2, 2, 1, 3),
    (2, 16, 11, 1, 3, 2, 1, 2),
    (4, 8, 3, 2, 4, 2, 2, 3),
    (12, 32, 5, 1, 3, 2, 3, 2),
    (16, 32, 5, 1, 5, 1, 5, 2),
    (48, 32, 3, 1, 2, 2, 1, 2),
    (64, 128, 3, 1, 1, 2, 1, 2),
    (64, 8, 1, 1, 2, 1, 1, 2),
    (8, 16, 3, 1, 6, 80, 2, 128),
]


# Blocks inside tiles, across tiles, of two tiles, and as large as a tile of full size.
GPU_PAIRS = [
    (1, 8, 3, 1, 2, 2, 2, 2),
    (4, 8, 3, 1, 4, 2, 2, 3),
    (12, 24, 3, 1, 1, 2, 1, 2),
    (16, 32, 2, 1, 1, 1, 1, 2),
    (64, 128, 3, 1, 1, 2, 1, 2),
    (4, 8, 3, 1, 2, 80, 1, 4),
]


TRITON_PAIRS = [(1, 8, 3, 1, 3, 2, 3, 2), (4, 8, 3, 1, 6, 2, 2, 4), *GPU_PAIRS[2:]]


@pytest.mark.whole(
    but=["mosaic_gpu_interpret-(12, 24, 3", "xla-(12, 32", "pallas_tpu_interpret-(4, 8, 3", "triton_interpret-(12, 24"]
)
@pytest.mark.parametrize(("implementation", "pair"), for_each(PAIRS, GPU_PAIRS, TRITON_PAIRS), ids=str)
def test_two_tower_ssd_equals_block_by_block(implementation, pair):
    block, chunk, blocks, batch, heads, head_dim, groups, state = pair
    arrays = draw_two_towers(block, batch, block * blocks, heads, head_dim, groups, state)
    (y,), gradients = with_gradients(blocks_of(block, chunk, implementation))(*to_float32(arrays))
    (y_expected,), gradients_expected = blocks_one_by_one(block)(*arrays)
    assert y.dtype == jnp.float32
    assert difference(y, y_expected) < TOLERANCE
    check_gradients(TWO_TOWER_NAMES, gradients, gradients_expected)
    if blocks == 1:
        assert not any(np.any(gradient) for gradient in gradients[5:])  # The only block starts from zeros.


def test_the_plain_form_that_stores_a_state_for_each_block():
    arrays = draw_two_towers(0, 2, 33, 4, 3, 2, 2)
    (y,), gradients = with_gradients(blocks_of(3, 8, "stored_states"))(*to_float32(arrays))
    (y_expected,), gradients_expected = blocks_one_by_one(3)(*arrays)
    assert difference(y, y_expected) < TOLERANCE
    check_gradients(TWO_TOWER_NAMES, gradients, gradients_expected)


@functools.cache
def _blocks_of_8_gradients(implementation):
    return with_gradients(blocks_of(8, 32 if implementation in FAST else 16, implementation), OPTIMIZED)


@pytest.mark.whole(but=["pallas_tpu_interpret-0.01"])
@pytest.mark.parametrize(("implementation", "large"), for_each([0.01, 50.0, 1e6], [50.0], [50.0]), ids=str)
def test_two_tower_ssd_with_extreme_decays(implementation, large):
    """Mixed with small ones in both towers, over three chunks or more; `large` = 0.01 mixes nothing."""
    arrays = list(draw_two_towers(0, 1, 72 if implementation in FAST else 40, 2, 2, 1, 2))
    for i in (2, 7):
        pick = np.random.default_rng(i).random(arrays[i].shape) < 0.3
        arrays[i] = np.where(pick, -np.float32(large), -np.float32(0.01)).astype(np.float64)
    (y,), gradients = _blocks_of_8_gradients(implementation)(*to_float32(arrays))
    (y_expected,), gradients_expected = blocks_one_by_one(8)(*arrays)
    assert difference(y, y_expected) < TOLERANCE
    check_gradients(TWO_TOWER_NAMES, gradients, gradients_expected)


@pytest.mark.whole(but=["triton_interpret-context frozen"])
@pytest.mark.parametrize(
    ("implementation", "frozen"),
    [
        ("xla", False),
        ("pallas_tpu_interpret", False),
        ("pallas_tpu_interpret", True),
        ("mosaic_gpu_interpret", True),
        ("triton_interpret", True),
    ],
    ids=lambda v: v if isinstance(v, str) else "context frozen" if v else "both",
)
def test_two_tower_ssd_in_bfloat16(implementation, frozen):
    """The Pallas kernels compute no gradients of a context that nobody differentiates."""
    heads, groups = (4, 2) if implementation in FAST else (2, 1)
    arrays = to_float32(draw_two_towers(6, 1, 40, heads, 4, groups, 4))
    arrays = [v.astype(jnp.bfloat16) if i in (0, 3, 4, 5, 8) else v for i, v in enumerate(arrays)]
    rounded = [np.asarray(v, np.float64) for v in arrays]
    function = blocks_of(8, 16, implementation)
    if frozen:
        (y,), gradients = with_gradients(lambda *own: function(*own, *arrays[5:]))(*arrays[:5])
    else:
        (y,), gradients = with_gradients(function)(*arrays)
    (y_expected,), gradients_expected = blocks_one_by_one(8)(*rounded)
    assert difference(y, y_expected) < TOLERANCE
    for name, array, found, expected in zip(TWO_TOWER_NAMES, arrays, gradients, gradients_expected, strict=False):
        assert found.dtype == array.dtype
        assert difference(found, expected) < (2**-8 if array.dtype == jnp.bfloat16 else 2 * TOLERANCE), name


@pytest.mark.whole
def test_the_tpu_kernels_read_nothing_that_was_not_written():
    """Under the interpreter that simulates a TPU's memories, all of them NaN at first."""
    interpret = pltpu.InterpretParams(uninitialized_memory="nan")
    arrays = draw_two_towers(9, 1, 24, 2, 4, 1, 8)

    def run(*arrays):
        return (two_tower_tpu.two_tower_ssd(*arrays, block_size=4, chunk_size=8, interpret=interpret),)

    (y,), gradients = with_gradients(run)(*to_float32(arrays))
    (y_expected,), gradients_expected = blocks_one_by_one(4)(*arrays)
    assert difference(y, y_expected) < TOLERANCE
    check_gradients(TWO_TOWER_NAMES, gradients, gradients_expected)


@pytest.mark.whole
def test_the_gpu_kernels_await_what_they_read():
    """Under the interpreter's detector of races between the copy engine and the threads, which raises on one."""
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    arrays = to_float32(draw_two_towers(9, 1, 24, 2, 4, 1, 8))
    arrays = [v.astype(jnp.bfloat16) if i in (0, 3, 4, 5, 8) else v for i, v in enumerate(arrays)]
    rounded = [np.asarray(v, np.float64) for v in arrays]

    def run(*arrays):
        return (mosaic_gpu.two_tower_ssd(*arrays, block_size=4, chunk_size=16, interpret=interpret),)

    (y,), gradients = with_gradients(run)(*arrays)
    (y_expected,), gradients_expected = blocks_one_by_one(4)(*rounded)
    assert difference(y, y_expected) < TOLERANCE
    for name, array, found, expected in zip(TWO_TOWER_NAMES, arrays, gradients, gradients_expected, strict=True):
        assert difference(found, expected) < (2**-8 if array.dtype == jnp.bfloat16 else 2 * TOLERANCE), name


def test_two_tower_ssd_refuses_a_length_that_is_no_multiple():
    arrays = to_float32(draw_two_towers(0, 1, 20, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="block_size=8 does not divide the length 20"):
        two_tower_ssd(*arrays, block_size=8)


@pytest.mark.whole
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradient"])
def test_memory_does_not_grow_as_the_block_shrinks(gradients):
    """At S = 4 the states of all blocks would take 4 times those at S = 16, and be most of the memory.

    (Larger blocks take a little less: what no block sees of a chunk is left out.)
    """
    batch, length, heads, head_dim, groups, state = 1, 1024, 2, 64, 1, 128

    def temporaries(block):
        def loss(*arrays):
            return jnp.sum(jnp.square(two_tower_ssd(*arrays, block_size=block, chunk_size=128)))

        function = jax.grad(loss, argnums=tuple(range(9))) if gradients else loss
        shapes = [v.shape for v in draw_two_towers(0, batch, length, heads, head_dim, groups, state)]
        abstract = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return jax.jit(function).lower(*abstract).compile().memory_analysis().temp_size_in_bytes

    memory = {block: temporaries(block) for block in (16, 8, 4)}
    states_at_4 = length // 4 * heads * head_dim * state * 4
    assert max(memory.values()) <= 1.1 * memory[16], memory
    assert memory[4] < states_at_4, memory  # The states alone would not fit.


@pytest.mark.whole(but=["True-100"])
@pytest.mark.parametrize(
    ("both", "capability", "heads", "head_dim"), [(False, 80, 64, 64), (True, 80, 64, 64), (True, 100, 96, 80)]
)
def test_triton_compiles_the_kernels_for_gpus_that_are_not_hopper(both, capability, heads, head_dim, monkeypatch):
    """At the shapes of the 30B model and of Nano 4B, down to machine code.

    Every multiprocessor since Ampere has 100 KiB of shared memory.
    """
    shared = {}

    def compile_only(kernel, grid, inputs, outputs, constants, interpret):
        name = kernel.fn.__name__, constants["READERS_IN_ROWS"] if "BLOCK" in constants else constants["BACKWARD"]
        if name not in shared:
            compiled = triton_call.compiled(kernel, inputs, outputs, constants, capability)
            shared[name] = compiled.metadata.shared
            assert compiled.asm["cubin"]
        return [jnp.zeros(v.shape, v.dtype) for v in outputs]

    monkeypatch.setattr(triton_call, "call", compile_only)
    length, groups, state = 512, 8, 128
    x, b = (jax.ShapeDtypeStruct((1, length, *v), jnp.bfloat16) for v in ((heads, head_dim), (groups, state)))
    steps = jax.ShapeDtypeStruct((1, length, heads), jnp.float32)

    def loss(*arrays):
        if both:
            return jnp.sum(ssd_triton.two_tower_ssd(*arrays, block_size=16))
        return jnp.sum(ssd_triton.ssd(*arrays)[0])

    arrays = (x, steps, steps, b, b) + ((x, steps, steps, b) if both else ())
    jax.eval_shape(jax.grad(loss, argnums=range(len(arrays))), *arrays)
    assert len(shared) == 6
    assert max(shared.values()) < 100 * 1024
