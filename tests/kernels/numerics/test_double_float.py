"""kernels/numerics/double_float.py against exact fractions and float64, and the router that decides with it.

Compiled as users compile it, since what could go wrong is a compiler's freedom with floating point. Error bounds stated
here are what was measured, rounded up: dot 2⁻³⁶ of max|x|·Σ|w| at widths up to 2688, exp and sigmoid 2⁻³⁸ relative
for arguments within ±60. Beyond, the low part of e⁻ˣ is too small for float32, and what is left is 1e-26 of a score.
"""

import functools
from fractions import Fraction

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from twotower_jax.kernels.numerics import double_float
from twotower_jax.kernels.numerics.choice import choose_experts
from twotower_jax.layers.experts import Router
from twotower_jax.parameters import Scope, bind

pytestmark = pytest.mark.usefixtures("strict_dtypes")

two_sum = jax.jit(double_float.two_sum)
two_product = jax.jit(double_float.two_product)
exp = jax.jit(double_float.exp)
sigmoid = jax.jit(double_float.sigmoid)
dot = jax.jit(double_float.dot)


def value(pair):
    """A pair as one float64, which holds it to 2⁻⁵³."""
    return np.asarray(pair[0], np.float64) + np.asarray(pair[1], np.float64)


def as_pair(x):
    """The pair nearest to float64 numbers."""
    high = x.astype(np.float32)
    return high, (x - high).astype(np.float32)


def spread(seed, size, exponents):
    """Float32 numbers of all signs and of many magnitudes."""
    rng = np.random.default_rng(seed)
    return np.ldexp(rng.uniform(-1, 1, size), rng.integers(-exponents, exponents + 1, size)).astype(np.float32)


def assert_normalized(high, low):
    assert np.all(np.abs(low) <= np.spacing(np.abs(high)) / 2)


def test_two_sum_is_exact():
    a, b = spread(0, 5000, 20), spread(1, 5000, 20)
    b[:1000] = -a[:1000] * (1 + spread(2, 1000, 3) * np.float32(1e-5))  # Close to cancelling.
    b[1000:1100] = -a[1000:1100]
    high, low = map(np.asarray, two_sum(a, b))
    assert_normalized(high, low)
    for i in range(len(a)):
        assert Fraction(float(high[i])) + Fraction(float(low[i])) == Fraction(float(a[i])) + Fraction(float(b[i]))


def test_two_product_is_exact():
    a, b = spread(0, 50_000, 25), spread(1, 50_000, 25)
    high, low = map(np.asarray, two_product(a, b))
    assert_normalized(high, low)
    # 48 bits fit float64.
    np.testing.assert_array_equal(value((high, low)), a.astype(np.float64) * b.astype(np.float64))


@pytest.mark.parametrize("name, function", [("add", np.add), ("multiply", np.multiply)])
def test_arithmetic_of_pairs(name, function):
    a, b = spread(0, 20_000, 10), spread(1, 20_000, 10)
    a = a.astype(np.float64) * (1 + np.random.default_rng(2).uniform(-1, 1, a.shape) * 2.0**-25)
    b = b.astype(np.float64) * (1 + np.random.default_rng(3).uniform(-1, 1, b.shape) * 2.0**-25)
    pair_a, pair_b = as_pair(a), as_pair(b)
    high, low = map(np.asarray, jax.jit(getattr(double_float, name))(pair_a, pair_b))
    assert_normalized(high, low)
    expected = function(value(pair_a), value(pair_b))
    scale = np.abs(value(pair_a)) + np.abs(value(pair_b)) if name == "add" else np.abs(expected)
    assert np.max(np.abs(value((high, low)) - expected) / scale) < 2.0**-45


@pytest.mark.parametrize("width", [1, 3, 64, 2688])
@pytest.mark.parametrize("kind", ["normal", "outlier", "bfloat16", "tiny"])
def test_dot(width, kind):
    rng = np.random.default_rng(width)
    x, w = rng.standard_normal((64, width)).astype(np.float32), 0.02 * rng.standard_normal((width, 48))
    w = w.astype(np.float32)
    if kind == "outlier":
        # One entry of each row a thousand times the others: their slices are coarse.
        x[np.arange(64), rng.integers(0, width, 64)] *= 1e3
    elif kind == "bfloat16":
        x, w = (np.asarray(jnp.bfloat16(v), np.float32) for v in (x, w))
    elif kind == "tiny":
        x[:32] *= np.float32(2.0**-50)
        x[40] = 0
    expected = x.astype(np.float64) @ w.astype(np.float64)
    scale = np.max(np.abs(x), axis=1, keepdims=True) * np.sum(np.abs(w), axis=0, dtype=np.float64)
    found = value(dot(x, w))
    # Rows of zeros and entries below 2⁻⁶⁰ count as zero.
    assert np.all(np.abs(found - expected) <= 2.0**-36 * scale + 2.0**-90)
    assert not np.any(found[np.all(x == 0, axis=1)])
    if kind == "normal" and width > 3:
        # Plain float32 is far from that.
        assert np.max(np.abs(np.matmul(x, w) - expected)) > 100 * np.max(np.abs(found - expected))


def test_exp():
    x = np.concatenate([np.linspace(-60, 60, 20_001), np.linspace(-1, 1, 20_001), [0.0, np.log(2), -np.log(2)]])
    pair = as_pair(x)
    assert np.max(np.abs(value(exp(pair)) / np.exp(value(pair)) - 1)) < 2.0**-38
    pair = as_pair(np.linspace(-87, 87, 20_001))
    assert np.max(np.abs(value(exp(pair)) / np.exp(value(pair)) - 1)) < 2.0**-23


def test_exp_uses_the_low_part():
    x = np.full(1000, 1.5) + np.linspace(-1, 1, 1000) * 2.0**-25
    pair = as_pair(x)
    assert len(np.unique(pair[0])) <= 3
    assert np.max(np.abs(value(exp(pair)) / np.exp(value(pair)) - 1)) < 2.0**-38


def test_sigmoid():
    x = np.concatenate([np.linspace(-60, 60, 20_001), np.linspace(-8, 8, 20_001), [0.0]])
    pair = as_pair(x)
    exact = value(pair)
    expected = np.where(exact < 0, np.exp(exact), 1) / (1 + np.exp(-np.abs(exact)))
    found = value(sigmoid(pair))
    assert np.max(np.abs(found / expected - 1)) < 2.0**-38


def test_sigmoid_far_out():
    x = np.array([-np.inf, -1e30, -100, -80, 80, 100, 1e30, np.inf], np.float32)
    found = value(sigmoid((x, np.zeros_like(x))))
    assert np.all((found >= 0) & (found <= 1))
    assert np.all(found[:4] < 1e-30)
    np.testing.assert_array_equal(found[4:], 1)


_top_k = jax.jit(double_float.top_k, static_argnums=1)


@hypothesis.given(
    highs=st.lists(st.integers(-2, 2), min_size=9, max_size=9),
    lows=st.lists(st.integers(-2, 2), min_size=9, max_size=9),
    k=st.sampled_from([1, 4, 9]),
)
def test_top_k_with_ties(highs, lows, k):
    """By value, then by the lower index."""
    high, low = np.float32(highs), np.float32(lows) * np.float32(2.0**-30)
    expected = np.lexsort((np.arange(9), -low, -high))[:k]
    np.testing.assert_array_equal(_top_k((high, low), k), expected)


def test_top_k_of_many_axes():
    pair = as_pair(np.random.default_rng(0).standard_normal((3, 4, 10)))
    np.testing.assert_array_equal(_top_k(pair, 3), np.argsort(-value(pair), axis=-1)[..., :3])


# The router, in float64 as the published code has it (spec/model.md, section 2).


def choose_in_float64(config, x, weight, bias):
    """The chosen experts (T, k), best first, and by how much the closest decision on the way was taken (T,)."""
    scores = 1 / (1 + np.exp(-(x.astype(np.float64) @ weight.astype(np.float64)))) + bias.astype(np.float64)
    tokens, experts = scores.shape
    gap = np.full(tokens, np.inf)
    if config.n_group > 1:
        grouped = np.sort(scores.reshape(tokens, config.n_group, -1), axis=-1)
        group_scores = grouped[..., -1] + grouped[..., -2]
        order = np.argsort(-group_scores, axis=-1, kind="stable")
        ranked = np.take_along_axis(group_scores, order, axis=-1)
        if config.topk_group < config.n_group:
            gap = ranked[:, config.topk_group - 1] - ranked[:, config.topk_group]
        kept = np.zeros((tokens, config.n_group), bool)
        np.put_along_axis(kept, order[:, : config.topk_group], True, axis=-1)
        scores = np.where(np.repeat(kept, experts // config.n_group, axis=-1), scores, 0.0)
    order = np.argsort(-scores, axis=-1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=-1)
    k = config.num_experts_per_tok
    return order[:, :k], np.minimum(gap, np.min(ranked[:, :k] - ranked[:, 1 : k + 1], axis=-1))


def near_ties(seed, config, tokens):
    """Tokens, router weights and biases: experts come in pairs, groups in pairs of groups, that differ by next to
    nothing, 1e-4 … 1e-7 of their weights, which float32 often does not resolve."""
    rng = np.random.default_rng(seed)
    width, experts = config.hidden_size, config.n_routed_experts
    half = experts // 2
    weight = rng.standard_normal((width, half)).astype(np.float32) / np.float32(width**0.5)
    distance = 10 ** rng.uniform(-7, -4, half)
    other = weight * (1 + distance * rng.standard_normal((width, half)))
    bias = rng.uniform(-0.3, 0.3, half).astype(np.float32)
    # Expert e and its twin e + E/2 lie in different groups.
    weight = np.concatenate([weight, other.astype(np.float32)], axis=1)
    x = rng.standard_normal((tokens, width)).astype(np.float32)
    return x, weight, np.concatenate([bias, bias])


@pytest.mark.whole(but=["64-16-15", "64-1-1-"])
@pytest.mark.parametrize("arithmetic", ["float64", "pairs"])
@pytest.mark.parametrize("width, groups, kept", [(64, 1, 1), (1000, 1, 1), (64, 8, 4), (64, 4, 1), (64, 16, 15)])
def test_the_router_never_flips_a_choice(small_config, width, groups, kept, arithmetic):
    config = small_config(
        "E", hidden_size=width, n_routed_experts=64, num_experts_per_tok=6, n_group=groups, topk_group=kept
    )
    x, weight, bias = near_ties(groups, config, 20_000)
    options = {"count": 6, "groups": groups, "kept_groups": kept, "arithmetic": arithmetic}
    found = np.asarray(jax.jit(functools.partial(choose_experts, **options))(x, weight, bias))
    expected, gap = choose_in_float64(config, x, weight, bias)
    clear = gap > 1e-9
    assert np.mean(clear) > 0.5
    flips = np.flatnonzero(np.any(found != expected, axis=-1) & clear)
    assert not flips.size, f"{flips.size} of {np.sum(clear)} tokens, smallest gap {gap[flips].min()}"
    # In float32 this test would fail: it is not too easy.
    logits = np.asarray(jnp.matmul(x, weight, precision="highest"))
    in_float32, _ = choose_in_float64(config, logits, np.eye(64, dtype=np.float32), bias)
    assert np.sum(np.any(in_float32 != expected, axis=-1) & clear) > 100


def test_router_weights_are_unbiased_and_scaled(small_config):
    for normalized, scale in ((True, 2.5), (False, 1.0)):
        config = small_config("E", norm_topk_prob=normalized, routed_scaling_factor=scale)
        rng = np.random.default_rng(0)
        x, weight = rng.standard_normal((50, 16)).astype(np.float32), rng.standard_normal((16, 8)).astype(np.float32)
        bias = rng.uniform(-1, 1, 8).astype(np.float32)
        module = Router(config, Scope(("",)))
        indices, gates = jax.jit(lambda x, w, b, m=module: bind(m, {"weight": w, "bias": b})(x))(x, weight, bias)
        expected, _ = choose_in_float64(config, x, weight, bias)
        np.testing.assert_array_equal(indices, expected)
        scores = 1 / (1 + np.exp(-(x.astype(np.float64) @ weight)))
        chosen = np.take_along_axis(scores, expected, axis=-1)
        if normalized:
            chosen = chosen / chosen.sum(-1, keepdims=True)
        np.testing.assert_allclose(gates, chosen * scale, rtol=2e-6)


def test_the_router_computes_in_what_its_platform_has(small_config):
    """Float64 where programs are compiled for CPUs, pairs where they are compiled for TPUs; one of the two."""
    module = Router(small_config("E"), Scope(("",)))
    weights = {"weight": np.ones((16, 8), np.float32), "bias": np.zeros(8, np.float32)}
    traced = jax.jit(lambda x: bind(module, weights).choose(x)).trace(np.ones((4, 16), np.float32))
    texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "tpu")}
    assert "f64" in texts["cpu"] and "optimization_barrier" not in texts["cpu"]
    assert "f64" not in texts["tpu"] and "optimization_barrier" in texts["tpu"]


def test_groups_left_out_count_as_zero_not_as_never(small_config):
    """With biases so negative that all kept scores are below 0, the zeros of the other groups win: as published."""
    config = small_config("E", n_group=4, topk_group=1, num_experts_per_tok=2)
    bias = np.array([-5, -5, -9, -9, -9, -9, -9, -9], np.float32)
    x = np.ones((1, 16), np.float32)
    weight = np.zeros((16, 8), np.float32)
    module = Router(config, Scope(("",)))
    found = jax.jit(lambda x: bind(module, {"weight": weight, "bias": bias}).choose(x))(x)
    np.testing.assert_array_equal(found, [[2, 3]])


def test_the_gradient_passes_through_the_weights_of_the_chosen(small_config):
    """d gates / d x and d weight as of the literal formula on the chosen; none to the correction bias."""
    config = small_config("E")
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((20, 16)).astype(np.float32), rng.standard_normal((16, 8)).astype(np.float32)
    bias = rng.uniform(-1, 1, 8).astype(np.float32)
    module = Router(config, Scope(("",)))
    expected, _ = choose_in_float64(config, x, weight, bias)
    mix = rng.standard_normal((20, 3)).astype(np.float32)

    def through_router(x, weight, bias):
        return jnp.sum(bind(module, {"weight": weight, "bias": bias})(x)[1] * mix)

    def literal(x, weight, bias):
        chosen = jnp.take_along_axis(jax.nn.sigmoid(x @ weight), jnp.asarray(expected), axis=-1)
        return jnp.sum(2.5 * chosen / jnp.sum(chosen, axis=-1, keepdims=True) * mix)

    found = jax.jit(jax.grad(through_router, argnums=(0, 1, 2)))(x, weight, bias)
    other = jax.jit(jax.grad(literal, argnums=(0, 1, 2)))(x, weight, bias)
    for one, two in zip(found, other, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5 * max(1, np.max(np.abs(two))))
    assert not np.any(found[2])
