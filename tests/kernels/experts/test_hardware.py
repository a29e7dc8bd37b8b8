"""The hardware kernels of kernels/experts/, interpreted, and quantized experts, against experts one by one, float64.

bfloat16 results are compared with float64 arithmetic that rounds where every form rounds: the hidden layer before and
after the activation, each expert's output, and the sum. What is left is a rounding that falls the other way.
"""

import dataclasses
import functools

import hypothesis
import interpreters
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from twotower_jax import kernels
from twotower_jax.kernels import expert_mlp
from twotower_jax.kernels.experts import Weights, relu2
from twotower_jax.kernels.experts import mosaic_gpu as experts_gpu
from twotower_jax.kernels.experts import mosaic_gpu_grouped as experts_grouped_gpu
from twotower_jax.kernels.experts import tpu as experts_tpu
from twotower_jax.kernels.experts.mosaic_gpu_products import BLOCK, Groups, outer, product
from twotower_jax.kernels.experts.touched import touched_experts
from twotower_jax.kernels.numerics.quantized import Quantized, dequantize, padded, quantize

pytestmark = pytest.mark.usefixtures("strict_dtypes")

E, D, F = 6, 128, 192  # D and F take several tiles of the GPU kernels, the last not full.
TPU, GPU, GROUPED = "pallas_tpu_interpret", "mosaic_gpu_interpret", "mosaic_gpu_grouped_interpret"
FORMS = [(TPU, jnp.float32), (TPU, jnp.bfloat16), (GPU, jnp.bfloat16), (GROUPED, jnp.bfloat16)]
T, K = 90, 3  # Several tiles an expert, the last not full.
# Relative to the norm: float32 sums in another order; single numbers rounded to the other neighbor.
TOLERANCE = {jnp.float32: 1e-6, jnp.bfloat16: 5e-4}


@functools.cache
def draw(dtype, bits=16, width=F):
    """Weights of E experts, quantized if `bits` is 8 or 4."""
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((E, D, width)) / 8, rng.standard_normal((E, width, D)) / 8
    up, down = (jax.device_put(np.asarray(w, dtype)) for w in (up, down))
    if bits == 16:
        return Weights(up, down)
    # One program, and not one for each of its operations.
    return jax.jit(lambda *matrices: Weights(*(quantize(w, bits, 64, scale_dtype=jnp.bfloat16) for w in matrices)))(
        up, down
    )


_dequantized = jax.jit(dequantize, static_argnums=1)


def rows(seed, tokens, choices, dtype, favourites=E, nobody=0.2):
    """x, indices and gates; some choices are of no expert."""
    rng = np.random.default_rng(seed)
    indices = np.stack([rng.permutation(favourites)[:choices] for _ in range(tokens)])
    indices = np.where(rng.random(indices.shape) < nobody, E, indices).astype(np.int32)
    x = jax.device_put(np.asarray(rng.standard_normal((tokens, D)), dtype))
    return x, indices, rng.uniform(0.1, 1, indices.shape).astype(np.float32)


def one_by_one(x, indices, gates, weights):
    """Every expert's rows in a loop, in float64, rounded to x's dtype as the module says."""

    def rounded(v):
        return np.asarray(v.astype(x.dtype), np.float64)

    up, down = (
        np.asarray(_dequantized(w, jnp.float32) if isinstance(w, Quantized) else w, np.float64) for w in weights[:2]
    )
    total, rows = np.zeros(x.shape), np.asarray(x, np.float64)
    for expert in range(E):
        token, choice = np.nonzero(np.asarray(indices) == expert)
        hidden = rounded(np.square(np.maximum(rounded(rows[token] @ up[expert]), 0)))
        np.add.at(total, token, gates[token, choice, None] * rounded(hidden @ down[expert]))
    return rounded(total)


@functools.cache
def compiled(form):
    return jax.jit(functools.partial(expert_mlp, activation=relu2, implementation=form))


def distance(found, expected):
    return np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected)


def check(form, dtype, arguments, weights, meant=None):
    """`meant`: the weights that those stand for, if not themselves."""
    y = compiled(form)(*arguments, weights)
    assert y.dtype == dtype and y.shape == arguments[0].shape
    assert distance(y, one_by_one(*arguments, meant or weights)) < TOLERANCE[dtype]


@pytest.mark.whole(but=["mosaic_gpu_interpret-bfloat16"])
@pytest.mark.parametrize("form, dtype", FORMS)
@hypothesis.settings(max_examples=5)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), favourites=st.integers(3, E), nobody=st.sampled_from([0, 0.3, 0.9]))
def test_any_routing(form, dtype, seed, favourites, nobody):
    arguments = rows(seed, T, K, dtype, favourites, nobody)
    if np.any(arguments[1] < E):
        check(form, dtype, arguments, draw(dtype))


@pytest.mark.whole(but=["tpu_interpret"])
@pytest.mark.parametrize("form, dtype", [(TPU, jnp.float32), (GPU, jnp.bfloat16)])
def test_one_row(form, dtype):
    check(form, dtype, rows(0, 1, 1, dtype, nobody=0), draw(dtype))


@pytest.mark.parametrize("form, dtype", FORMS)
def test_all_rows_to_one_expert(form, dtype):
    """The last one, more rows than a tile has, with all others empty."""
    x, indices, gates = rows(3, T, K, dtype)
    indices[:] = E
    indices[:, 1] = E - 1
    check(form, dtype, (x, indices, gates), draw(dtype))


@pytest.mark.parametrize("form, dtype", FORMS)
def test_no_row_has_an_expert(form, dtype):
    x, indices, gates = rows(3, T, K, dtype, nobody=1)
    assert not np.any(np.asarray(compiled(form)(x, indices, gates, draw(dtype)), np.float32))


@pytest.mark.whole(but=["tpu_interpret-float32", "[mosaic_gpu_interpret"])
@pytest.mark.parametrize("form, dtype", FORMS)
def test_experts_and_rows_do_not_touch_each_other(form, dtype):
    """What nobody chose may be anything, and so may one row."""
    x, indices, gates = rows(5, T, K, dtype, favourites=4)
    weights = draw(dtype)
    y = np.asarray(compiled(form)(x, indices, gates, weights), np.float32)
    poisoned = jax.tree.map(lambda w: w.at[4:].set(np.nan), weights)
    np.testing.assert_array_equal(np.asarray(compiled(form)(x, indices, gates, poisoned), np.float32), y)
    indices[7] = [0, 1, 2]
    y = np.asarray(compiled(form)(x, indices, gates, weights), np.float32)
    again = np.asarray(compiled(form)(x.at[7].set(np.nan), indices, gates, weights), np.float32)
    assert np.all(np.isnan(again[7]))
    np.testing.assert_array_equal(np.delete(again, 7, axis=0), np.delete(y, 7, axis=0))


@pytest.mark.whole(but=["xla", "bfloat16-4-8", "bfloat16-4-4"])
@pytest.mark.parametrize(
    "form, dtype, up, down",
    [
        ("xla", jnp.bfloat16, 8, 4),
        (TPU, jnp.float32, 8, 4),
        (TPU, jnp.bfloat16, 4, 8),
        (GPU, jnp.bfloat16, 8, 8),
        (GPU, jnp.bfloat16, 4, 4),
        (GPU, jnp.bfloat16, 16, 8),
    ],
)
def test_quantized(form, dtype, up, down):
    """XLA and the TPU kernel round a weight to the rows' dtype, the GPU kernel does not."""
    weights = Weights(draw(dtype, up).up, draw(dtype, down).down)
    meant = None if form == GPU else Weights(*(_dequantized(w, dtype) for w in weights[:2]))
    check(form, dtype, rows(T, T, K, dtype), weights, meant)


@pytest.mark.whole
def test_quantized_experts_as_tpus_store_them():
    """Wider by zeros, with rows of scales after the last; the same results as before, to the last bit.

    F = 320: 384 as stored, which is one tile more than the groups of down that mean anything.
    """
    plain = Weights(draw(jnp.bfloat16, 8, 320).up, draw(jnp.bfloat16, 4, 320).down)
    stored = jax.jit(lambda w: Weights(experts_tpu.stored(w.up, -1), experts_tpu.stored(w.down, -2)))(plain)
    assert stored.up.shape == (E, D, 384) and stored.down.shape == (E, 384, D)
    assert stored.up.scales.shape == (E, 16, 384) and stored.down.scales.shape == (E, 16, D)
    for one, other in zip(stored[:2], plain[:2], strict=True):
        assert one.group == other.group == 64 and one.spare > 0
        whole, meant = (np.asarray(_dequantized(w, jnp.float32)) for w in (one, other))
        np.testing.assert_array_equal(whole[tuple(slice(n) for n in other.shape)], meant)
        assert np.count_nonzero(whole) == np.count_nonzero(meant)
    # What stands for nothing may be anything.
    odd = Weights(
        *(dataclasses.replace(q, scales=q.scales.at[:, q.groups :].set(jnp.nan)) for q in (stored.up, stored.down))
    )
    arguments = rows(1, 20, 2, jnp.bfloat16)
    meant = Weights(*(_dequantized(w, jnp.bfloat16) for w in plain[:2]))
    for form in TPU, "xla":
        check(form, jnp.bfloat16, arguments, odd, meant)
    check(GPU, jnp.bfloat16, arguments, odd, plain)
    np.testing.assert_array_equal(
        np.asarray(compiled(TPU)(*arguments, odd), np.float32), np.asarray(compiled(TPU)(*arguments, plain), np.float32)
    )


def test_zeros_after_a_matrix_are_whole_groups():
    matrix = draw(jnp.float32, 8).down
    with pytest.raises(ValueError, match="32 rows of zeros are no whole groups of 64"):
        padded(matrix, rows=32)
    odd = quantize(jnp.ones((1, 100, 128)), 8, 50)  # 28 more rows would not be.
    assert experts_tpu.stored(odd, -2) is odd


@pytest.mark.whole(but=["[4]"])
@pytest.mark.parametrize("bits", [16, 4])
def test_tpu_tiles_of_a_width_that_they_do_not_divide(bits):
    """F = 832: a tile of 512 and 320 more or, where up is read flipped, two of 416."""
    check(TPU, jnp.float32, rows(0, 20, 2, jnp.float32), draw(jnp.float32, bits, 832))


@pytest.mark.whole(but=["mosaic_gpu_grouped_interpret-bfloat16"])
@pytest.mark.parametrize("form, dtype", [form for form in FORMS if form != (TPU, jnp.bfloat16)])
def test_gradients(form, dtype):
    """Those of the rows, the gates and both matrices; experts without rows get zeros."""
    x, indices, gates = rows(9, T, K, dtype, favourites=E - 1)
    indices, weights = jnp.asarray(indices), draw(dtype)
    toward = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), dtype)

    def loss(x, gates, weights, mlp):
        return jnp.sum(mlp(x, indices, gates, weights).astype(toward.dtype) * toward)

    mlp = functools.partial(expert_mlp, activation=relu2, implementation=form)
    gradient = jax.grad(functools.partial(loss, mlp=mlp), argnums=(0, 1, 2))
    found = jax.jit(gradient)(x, gates, weights)

    def literal(x, indices, gates, weights):
        y = 0
        for expert in range(E):
            gate = jnp.sum(jnp.where(indices == expert, gates, 0), axis=1)
            y += gate[:, None] * (jnp.square(jax.nn.relu(x @ weights.up[expert])) @ weights.down[expert])
        return y

    with jax.enable_x64(True):
        toward = jnp.asarray(toward, jnp.float64)
        exact = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), (x, gates, weights))
        gradient = jax.grad(functools.partial(loss, mlp=literal), argnums=(0, 1, 2))
        expected = jax.jit(gradient)(*exact)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # In bfloat16 three roundings of numbers that are multiplied: of rows, of the hidden layer, of its gradient.
        assert distance(one, np.asarray(other)) < (1e-6 if dtype == jnp.float32 else 1e-2)
    assert not np.any(np.asarray(found[2].up[E - 1], np.float32))
    assert found[1].dtype == jnp.float32 and found[0].dtype == found[2].up.dtype == dtype


@pytest.mark.whole
@pytest.mark.parametrize("form, dtype", [("xla", jnp.float32), (TPU, jnp.float32), (GPU, jnp.bfloat16)])
def test_quantized_experts_have_the_gradients_of_what_they_stand_for_in_rows_and_gates(form, dtype):
    x, indices, gates = rows(9, 4, 3, dtype)
    weights = draw(jnp.float32, 8)
    toward = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)

    def loss(x, gates, weights, form):
        return jnp.sum(compiled(form)(x, indices, gates, weights).astype(jnp.float32) * toward)

    gradient = jax.grad(loss, argnums=(0, 1))
    whole = Weights(*(None if w is None else dequantize(w, jnp.float32) for w in weights))
    found, expected = gradient(x, gates, weights, form), gradient(x.astype(jnp.float32), gates, whole, "xla")
    for one, other in zip(found, expected, strict=True):
        assert distance(one, np.asarray(other, np.float64)) < (1e-5 if dtype == jnp.float32 else 2e-2)


@pytest.mark.whole
@hypothesis.settings(max_examples=4)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), empty=st.sampled_from([0.0, 0.5, 0.9]))
def test_grouped_products(seed, empty):
    """Both products and the sum of outer ones, over groups of any numbers of blocks."""
    rng = np.random.default_rng(seed)
    total, groups, summed, columns = 7, 5, 128, 256
    cuts = np.sort(rng.integers(0, total + 1, groups - 1))
    count = np.diff(np.concatenate([[0], cuts, [total]]))
    count = np.where(rng.random(groups) < empty, 0, count).astype(np.int32)
    first = (np.cumsum(count) - count).astype(np.int32)
    a, b, matrices = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for shape in [(total * BLOCK, summed), (total * BLOCK, columns), (groups, summed, columns)]
    )
    blocks = np.repeat(np.arange(groups), count)
    used = blocks.size * BLOCK
    found = grouped(a, b, matrices, Groups(jnp.asarray(first), jnp.asarray(count)))
    a, b, matrices = (np.asarray(v, np.float64) for v in (a, b, matrices))
    by_block = a[:used].reshape(-1, BLOCK, summed)
    expected = np.einsum("brk,bkn->brn", by_block, matrices[blocks]).reshape(used, columns)
    flipped = np.einsum("brn,bkn->brk", b[:used].reshape(-1, BLOCK, columns), matrices[blocks]).reshape(used, summed)
    sums = np.stack([a[f : f + n].T @ b[f : f + n] for f, n in zip(first * BLOCK, count * BLOCK, strict=True)])
    for one, other in zip((found[0][:used], found[1][:used], found[2]), (expected, flipped, sums), strict=True):
        # bfloat16 rounds by at most 2^-8.
        np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=2.0**-8, atol=1e-4)


@jax.jit
def grouped(a, b, matrices, groups):
    return (
        product(a, matrices, groups, interpret=True),
        product(b, matrices, groups, transposed=True, interpret=True),
        outer(a, b, groups, interpret=True),
    )


@pytest.mark.whole
@pytest.mark.parametrize("module, bits", [(experts_gpu, 4), (experts_grouped_gpu, 16)])
def test_no_races_on_gpus(module, bits):
    """Copies, products and stores keep their order: the interpreter compares vector clocks."""
    x, indices, gates = rows(9, 20, 2, jnp.bfloat16)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    run = jax.jit(functools.partial(module.expert_mlp, activation=relu2, interpret=interpret))
    y = run(x, indices, gates, draw(jnp.bfloat16, bits))
    assert distance(y, one_by_one(x, indices, gates, draw(jnp.bfloat16, bits))) < TOLERANCE[jnp.bfloat16]
    assert not interpreters.races_found()


@pytest.mark.whole
@hypothesis.given(seed=st.integers(0, 2**32 - 1), nobody=st.sampled_from([0, 0.5, 1]))
def test_touched_experts(seed, nobody):
    """The experts with rows, in order; after them the last one again, without rows."""
    _, indices, _ = rows(seed, 4, 2, jnp.float32, nobody=nobody)
    found = jax.tree.map(np.asarray, touched_experts(jnp.asarray(indices), E))
    sizes = np.bincount(indices.reshape(-1), minlength=E + 1)[:E]
    expected = np.nonzero(sizes)[0]
    assert found.used == expected.size
    np.testing.assert_array_equal(found.expert[: found.used], expected)
    np.testing.assert_array_equal(found.count, np.pad(sizes[expected], (0, E - expected.size)))
    assert found.used == 0 or np.all(found.expert[found.used :] == expected[-1])
    for expert, first, count in zip(found.expert, found.first, found.count, strict=True):
        chosen = indices.reshape(-1)[found.order[first : first + count]]
        assert np.all(chosen == expert)


def arguments(tokens, dtype=jnp.bfloat16, model=2688, width=1856, bits=16, experts=128, biases=False):
    """Shapes alone."""
    shape = jax.ShapeDtypeStruct
    up, down = shape((experts, model, width), dtype), shape((experts, width, model), dtype)
    if bits != 16:
        up, down = (
            Quantized(
                shape((experts, w.shape[1] * bits // 8, w.shape[2]), jnp.int8),
                shape((experts, w.shape[1] // 64, w.shape[2]), jnp.float32),
                bits,
            )
            for w in (up, down)
        )
    extra = (shape((experts, width), dtype), None) if biases else ()
    x, gates = shape((tokens, model), dtype), shape((tokens, 6), jnp.float32)
    return x, shape((tokens, 6), jnp.int32), gates, Weights(up, down, *extra)


@pytest.mark.parametrize(
    "values, reason",
    [
        ({"tokens": 96}, None),
        ({"tokens": 1024}, None),
        ({"tokens": 1025}, "more than 1024"),
        ({"tokens": 96, "bits": 8, "width": 1920}, None),
        ({"tokens": 1024, "bits": 4, "width": 1920}, None),
        ({"tokens": 96, "bits": 8}, "store them as experts.tpu.stored"),
        ({"tokens": 96, "biases": True}, "biases"),
        ({"tokens": 96, "model": 2700}, "multiples of 128"),
    ],
)
def test_what_the_tpu_kernel_takes(values, reason):
    problem = experts_tpu.unsupported(*arguments(**values), activation=relu2)
    assert problem is None if reason is None else reason in problem


@pytest.mark.parametrize(
    "values, few, many",
    [
        ({"tokens": 96}, None, None),
        ({"tokens": 8192}, "more than 1024", None),
        ({"tokens": 8192, "bits": 8}, None, "quantized"),
        ({"tokens": 96, "dtype": jnp.float32}, "not bfloat16", "not bfloat16"),
        ({"tokens": 96, "biases": True}, "biases", "biases"),
        ({"tokens": 96, "width": 1850}, "multiples of 64", "multiples of 64"),
    ],
)
def test_what_the_gpu_kernels_take(values, few, many, monkeypatch):
    for module, reason in (experts_gpu, few), (experts_grouped_gpu, many):
        monkeypatch.setattr(module, "not_hopper", lambda: None)
        problem = module.unsupported(*arguments(**values), activation=relu2)
        assert problem is None if reason is None else reason in problem


def test_a_cpu_is_no_hopper():
    with pytest.raises(ValueError, match="cannot run as 'mosaic_gpu': made for NVIDIA Hopper"):
        kernels.chosen("expert_mlp", *arguments(96), activation=relu2, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="cannot run as 'ragged_dot': quantized"):
        kernels.chosen("expert_mlp", *arguments(96, bits=8), activation=relu2, implementation="ragged_dot")
    assert kernels.chosen("expert_mlp", *arguments(96, bits=8), activation=relu2).implementation == "xla"
