"""Each layer against its formula in spec/model.md, written out in float64 NumPy, one row and one position at a time."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower_jax.execution import Execution
from twotower_jax.layer import Layer
from twotower_jax.layers.attention import Attention, AttentionCache, AttentionMemory
from twotower_jax.layers.common import ACTIVATIONS, matmul, precision_of, rms_norm
from twotower_jax.layers.experts import Experts
from twotower_jax.layers.mamba import Mamba, MambaCache
from twotower_jax.layers.mixer import Run
from twotower_jax.layers.mlp import MLP
from twotower_jax.layers.time_conditioning import Modulation, TimeConditioning, modulation, sinusoids
from twotower_jax.parameters import Scope, bind, initialize, normal, parameter_table
from twotower_jax.sharding import MeshShape, make_mesh

pytestmark = pytest.mark.usefixtures("strict_dtypes")

SCOPE = Scope(("",))
B, D = 2, 16


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def to_float64(params):
    return jax.tree.map(lambda v: np.asarray(v, np.float64), params)


def assert_close(found, expected, tolerance=1e-5):
    expected = np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance * np.max(np.abs(expected)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def linear(p, x):
    return x @ p["weight"] + p.get("bias", 0.0)


def norm(x, weight, epsilon=1e-5, groups=1):
    parts = x.reshape(*x.shape[:-1], groups, -1)
    return (parts / np.sqrt(np.mean(parts**2, axis=-1, keepdims=True) + epsilon)).reshape(x.shape) * weight


# Norms and activations


@pytest.mark.parametrize("groups", [1, 3])
def test_rms_norm(groups):
    x, weight = draw(0, B, 5, 12), draw(1, 12)
    assert_close(rms_norm(x, weight, 1e-2, groups), norm(x.astype(np.float64), weight, 1e-2, groups), 1e-6)


def test_rms_norm_multiplies_by_the_weight_before_it_rounds():
    x, weight = jnp.bfloat16(draw(0, 50, 64)), jnp.bfloat16(1 + 0.1 * draw(1, 64))
    exact = norm(np.asarray(x, np.float64), np.asarray(weight, np.float64))
    found = rms_norm(x, weight, 1e-5)
    assert found.dtype == jnp.bfloat16
    # Up to ties: one rounding of the exact value is off by at most half a unit, two by more.
    relative = np.abs(np.asarray(found, np.float64) / exact - 1)
    assert np.max(relative) < 2.0**-8 * 1.001
    twice = np.asarray(jnp.bfloat16(norm(np.asarray(x, np.float64), 1.0)) * weight, np.float64)
    assert np.max(np.abs(twice / exact - 1)) > 1.3 * 2.0**-8


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(40,), (3, 50, 40), (2, 3, 1, 40), (0, 5, 40)])
def test_products_and_their_gradients_are_those_of_whole_arrays(shape, dtype):
    rng = np.random.default_rng(0)
    x, w, g = (jnp.asarray(rng.standard_normal(s), dtype) for s in (shape, (40, 24), (*shape[:-1], 24)))
    (y, pullback), (expected, other) = (
        jax.vjp(product, x, w) for product in (matmul, lambda x, w: jnp.matmul(x, w, precision=precision_of(dtype)))
    )
    assert y.shape == g.shape
    assert y.dtype == dtype
    for found, wanted in zip((y, *pullback(g)), (expected, *other(g)), strict=True):
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(wanted, np.float32))


def test_activations():
    x = np.linspace(-4, 4, 101)
    expected = {
        "relu": np.maximum(x, 0),
        "relu2": np.maximum(x, 0) ** 2,
        "silu": silu(x),
        "gelu": np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x]),
    }
    assert set(expected) == set(ACTIVATIONS)
    for name, y in expected.items():
        np.testing.assert_allclose(ACTIVATIONS[name](jnp.float32(x)), y, atol=2e-6)


# Mamba-2


class LiteralMamba:
    """One row at a time."""

    def __init__(self, config, params, limit=None):
        self.c, self.p, self.limit = config, to_float64(params), limit

    def project(self, x):
        c = self.c
        inner, channels = c.mamba_num_heads * c.mamba_head_dim, c.conv_channels
        zxbcdt = linear(self.p["in_proj"], x)
        dt = np.log1p(np.exp(zxbcdt[:, inner + channels :] + self.p["dt_bias"]))
        if self.limit:
            dt = np.clip(dt, *self.limit)
        return zxbcdt[:, :inner], zxbcdt[:, inner : inner + channels], dt

    def scan(self, xbc, dt, tail, state):
        """Raw xBC (L, C), dt (L, H), the K inputs before, the state → y (L, H, P) with D·x, tail and state after."""
        c, rows = self.c, []
        heads, head_dim, groups, size = c.mamba_num_heads, c.mamba_head_dim, c.n_groups, c.ssm_state_size
        rate = -np.exp(self.p["A_log"])
        for inputs, step in zip(xbc, dt, strict=True):
            tail = np.concatenate([tail[1:], inputs[None]])
            convolved = silu(np.sum(tail * self.p["conv_weight"], axis=0) + self.p.get("conv_bias", 0.0))
            x = convolved[: heads * head_dim].reshape(heads, head_dim)
            b, c_ = convolved[heads * head_dim :].reshape(2, groups, size)
            y = np.empty((heads, head_dim))
            state = state.copy()
            for h in range(heads):
                g = h * groups // heads
                state[h] = np.exp(step[h] * rate[h]) * state[h] + step[h] * np.outer(x[h], b[g])
                y[h] = state[h] @ c_[g] + self.p["D"][h] * x[h]
            rows.append(y)
        return np.stack(rows), tail, state

    def output(self, y, z):
        gated = y.reshape(z.shape) * silu(z)
        return linear(self.p["out_proj"], norm(gated, self.p["norm_weight"], groups=self.c.n_groups))

    def zeros(self):
        c = self.c
        return np.zeros((c.conv_kernel, c.conv_channels)), np.zeros(
            (c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size)
        )

    def causal(self, x, tail, state):
        z, xbc, dt = self.project(x.astype(np.float64))
        y, tail, state = self.scan(xbc, dt, tail, state)
        return self.output(y, z), tail, state

    def block(self, x, tail, state, bidirectional):
        z, xbc, dt = self.project(x.astype(np.float64))
        y, _, _ = self.scan(xbc, dt, tail, state)
        if bidirectional:
            back, _, _ = self.scan(xbc[::-1], dt[::-1], *self.zeros())
            y = (y + back[::-1]) / 2
        return self.output(y, z)


MAMBA_CONFIGS = {
    "six heads in three groups": {},
    "seven heads in one group": {"mamba_num_heads": 7, "n_groups": 1},
    "a group a head": {"mamba_num_heads": 5, "n_groups": 5, "chunk_size": 4},
    "biases": {"use_bias": True},
    "no bias at the convolution": {"use_conv_bias": False, "conv_kernel": 3},
    "limited steps": {"time_step_limit": (0.1, 0.2)},
    # Another port clamps at these; the published code does not.
    "unlimited steps": {"time_step_min": 5.0, "time_step_max": 9.0},
}


@pytest.mark.whole(but=["six heads", "seven heads", "biases", "limited steps"])
@pytest.mark.parametrize("changes", MAMBA_CONFIGS.values(), ids=MAMBA_CONFIGS.keys())
def test_mamba_after_a_cache(small_config, random_params, changes):
    """Rows with 9 and with 21 real tokens of 21: outputs and the cache after them."""
    config = small_config("M", **changes)
    mixer = Mamba(config, SCOPE)
    params = random_params(mixer)
    literal = LiteralMamba(config, params, changes.get("time_step_limit"))
    tail, state = literal.zeros()
    x, tail, state = draw(1, B, 21, D), draw(2, B, *tail.shape), draw(3, B, *state.shape)
    lengths = np.array([9, 21], np.int32)
    run = jax.jit(lambda p, x, cache, lengths: bind(mixer, p).causal(x, cache, Run(lengths=lengths)))
    y, memory = run(params, x, MambaCache(conv=tail, state=state), lengths)
    for row, length in enumerate(lengths):
        y_expected, tail_expected, state_expected = literal.causal(x[row, :length], tail[row], state[row])
        assert_close(y[row, :length], y_expected)
        assert_close(memory.end.conv[row], tail_expected)
        assert_close(memory.end.state[row], state_expected)


def test_mamba_without_a_cache_starts_from_zeros(small_config, random_params):
    config = small_config("M")
    mixer = Mamba(config, SCOPE)
    params = random_params(mixer)
    literal = LiteralMamba(config, params)
    x = draw(1, B, 2, D)  # Shorter than the convolution.
    y, memory = jax.jit(lambda p, x: bind(mixer, p).causal(x))(params, x)
    for row in range(B):
        y_expected, tail_expected, state_expected = literal.causal(x[row], *literal.zeros())
        assert_close(y[row], y_expected)
        assert_close(memory.end.conv[row], tail_expected)
        assert_close(memory.end.state[row], state_expected)


@pytest.mark.whole(but=["20-2-True", "1-5-False"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("block, blocks", [(1, 5), (2, 5), (6, 3), (20, 2)])
def test_mamba_blocks_read_the_context(small_config, random_params, block, blocks, bidirectional):
    """Each block by itself, after the context up to its left edge; the context has weights of its own."""
    config = small_config("M")
    context, denoiser = Mamba(config, SCOPE), Mamba(config, SCOPE, bidirectional=bidirectional)
    context_params, params = random_params(context, 1), random_params(denoiser, 2)
    clean, noisy = draw(1, B, block * blocks, D), draw(2, B, block * blocks, D)

    @jax.jit
    def run(context_params, params, clean, noisy):
        _, memory = bind(context, context_params).causal(clean)
        return bind(denoiser, params).blockwise(noisy, memory, block)[0]

    y = run(context_params, params, clean, noisy)
    literal_context, literal = LiteralMamba(config, context_params), LiteralMamba(config, params)
    for row in range(B):
        tail, state = literal.zeros()
        for edge in range(0, block * blocks, block):
            here = slice(edge, edge + block)
            assert_close(y[row, here], literal.block(noisy[row, here], tail, state, bidirectional), 2e-5)
            _, tail, state = literal_context.causal(clean[row, here], tail, state)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_mamba_block_after_a_cache(small_config, random_params, bidirectional):
    config = small_config("M")
    mixer = Mamba(config, SCOPE, bidirectional=bidirectional)
    params = random_params(mixer)
    literal = LiteralMamba(config, params)
    tail, state = literal.zeros()
    x, tail, state = draw(1, B, 7, D), draw(2, B, *tail.shape), draw(3, B, *state.shape)
    run = jax.jit(lambda p, x, cache: bind(mixer, p).blockwise(x, cache, x.shape[1])[0])
    y = run(params, x, MambaCache(conv=tail, state=state))
    for row in range(B):
        assert_close(y[row], literal.block(x[row], tail[row], state[row], bidirectional))


def test_fresh_mamba_parameters(small_config):
    """A = −1 … −H; step sizes log-uniform in their range, no smaller than the floor."""
    config = small_config("M", mamba_num_heads=600, n_groups=1, time_step_min=1e-3, time_step_max=0.1)
    params = initialize(parameter_table(Mamba(config, SCOPE)), jax.random.key(0))
    np.testing.assert_allclose(np.exp(params["A_log"]), np.arange(1, 601), rtol=1e-5)
    dt = np.log1p(np.exp(np.asarray(params["dt_bias"], np.float64)))
    assert np.all((dt > 0.999e-3) & (dt < 0.1001))
    assert abs(np.mean(np.log(dt)) - np.log(1e-2)) < 0.2
    floor = small_config("M", mamba_num_heads=600, n_groups=1, time_step_floor=0.05)
    params = initialize(parameter_table(Mamba(floor, SCOPE)), jax.random.key(0))
    assert np.min(np.log1p(np.exp(np.asarray(params["dt_bias"], np.float64)))) > 0.0499


# Attention


def literal_attention(config, p, x, keys, values, visible):
    """x (L, D) over keys and values (T, K, P), of which position i sees those with visible[i] (T,)."""
    heads, head_dim = config.num_attention_heads, config.head_dim
    ratio = heads // config.num_key_value_heads
    q = linear(p["q_proj"], x).reshape(len(x), heads, head_dim)
    out = np.zeros((len(x), heads, head_dim))
    for i in range(len(x)):
        for h in range(heads):
            scores = keys[:, h // ratio] @ q[i, h] / math.sqrt(head_dim)
            weights = np.where(visible[i], np.exp(scores - np.max(scores[visible[i]])), 0)
            out[i, h] = weights / weights.sum() @ values[:, h // ratio]
    return linear(p["o_proj"], out.reshape(len(x), -1))


def heads_first(v):
    return v.swapaxes(1, 2)


def literal_keys(config, p, x):
    shape = len(x), config.num_key_value_heads, config.head_dim
    return linear(p["k_proj"], x).reshape(shape), linear(p["v_proj"], x).reshape(shape)


@pytest.mark.parametrize("bias", [False, True])
def test_causal_attention_after_a_cache(small_config, random_params, bias):
    """The width of all heads, 24, is not that of the model; positions do not matter."""
    config = small_config("*", attention_bias=bias)
    mixer = Attention(config, SCOPE)
    params = random_params(mixer)
    p = to_float64(params)
    x, keys, values = draw(1, B, 5, D), draw(2, B, 7, 2, 4), draw(3, B, 7, 2, 4)
    lengths = np.array([0, 4], np.int32)
    run = jax.jit(lambda p, x, cache, lengths: bind(mixer, p).causal(x, cache, Run(cache_lengths=lengths)))
    y, memory = run(params, x, AttentionCache(key=heads_first(keys), value=heads_first(values)), lengths)
    for row, length in enumerate(lengths):
        own_keys, own_values = literal_keys(config, p, x[row])
        assert_close(memory.key[row].swapaxes(0, 1), own_keys)
        assert_close(memory.value[row].swapaxes(0, 1), own_values)
        all_keys = np.concatenate([keys[row, :length], own_keys])
        all_values = np.concatenate([values[row, :length], own_values])
        visible = np.arange(length + 5) <= length + np.arange(5)[:, None]
        assert_close(y[row], literal_attention(config, p, x[row], all_keys, all_values, visible))


def test_attention_blocks_read_the_context(small_config, random_params):
    config = small_config("*")
    mixer = Attention(config, SCOPE)
    params = random_params(mixer)
    p = to_float64(params)
    x, keys, values = draw(1, B, 6, D), draw(2, B, 6, 2, 4), draw(3, B, 6, 2, 4)
    run = jax.jit(lambda p, x, memory: bind(mixer, p).blockwise(x, memory, 3)[0])
    y = run(params, x, AttentionMemory(key=heads_first(keys), value=heads_first(values)))
    for row in range(B):
        for edge in (0, 3):
            block = x[row, edge : edge + 3]
            own_keys, own_values = literal_keys(config, p, block)
            all_keys = np.concatenate([keys[row, :edge], own_keys])
            all_values = np.concatenate([values[row, :edge], own_values])
            everything = np.ones((3, edge + 3), bool)
            expected = literal_attention(config, p, block, all_keys, all_values, everything)
            assert_close(y[row, edge : edge + 3], expected)


def test_attention_reaches_devices_with_heads_side_by_side(small_config, random_params):
    """What crosses the border of devices with heads apart makes XLA turn the projections' matrices around."""
    mixer = Attention(small_config("*"), SCOPE)

    def run(params, x):
        _, memory = bind(mixer, params).causal(x)
        return bind(mixer, params).blockwise(x, memory, 3)[0]

    with jax.set_mesh(make_mesh(MeshShape(data=2), jax.devices()[:2])):
        jaxpr = jax.make_jaxpr(run)(random_params(mixer), draw(1, 2, 6, D))
    borders = [equation for equation in jaxpr.eqns if equation.primitive.name == "shard_map"]
    assert len(borders) == 2
    for v in [v.aval for border in borders for v in (*border.invars, *border.outvars)]:
        assert v.ndim == (3 if jnp.issubdtype(v.dtype, jnp.floating) else 2)


def test_append_writes_after_each_row():
    old = AttentionCache(key=draw(0, B, 1, 6, 2), value=draw(1, B, 1, 6, 2))
    new = AttentionMemory(key=draw(2, B, 1, 3, 2), value=draw(3, B, 1, 3, 2))
    out = old.append(new, jnp.array([0, 3]))
    for found, before, added in ((out.key, old.key, new.key), (out.value, old.value, new.value)):
        np.testing.assert_array_equal(found[0, 0], np.concatenate([added[0, 0], before[0, 0, 3:]]))
        np.testing.assert_array_equal(found[1, 0], np.concatenate([before[1, 0, :3], added[1, 0]]))


# Experts and MLP


def literal_mlp(p, x, activation):
    return linear(p["down_proj"], activation(linear(p["up_proj"], x)))


@pytest.mark.parametrize("bias", [False, True])
def test_mlp(small_config, random_params, bias):
    config = small_config("-", mlp_bias=bias, mlp_hidden_act="silu")
    mixer = MLP(config, config.intermediate_size, SCOPE)
    params, x = random_params(mixer), draw(1, B, 3, D)
    assert_close(bind(mixer, params)(x), literal_mlp(to_float64(params), x, silu))


@pytest.mark.parametrize("changes", [{}, {"mlp_bias": True, "n_group": 2}, {"n_shared_experts": 0}], ids=str)
def test_experts(small_config, random_params, changes):
    config = small_config("E", **changes)
    mixer = Experts(config, SCOPE)
    params, x = random_params(mixer), draw(1, B, 9, D)
    p = to_float64(params)
    y, (load, experts, *_) = jax.jit(lambda p, x: bind(mixer, p).with_routing(x))(params, x)
    tokens = np.zeros(8)
    for row in range(B):
        for i in range(9):
            token = x[row, i].astype(np.float64)
            scores = sigmoid(token @ p["router"]["weight"])
            biased = scores + p["router"]["bias"]
            if config.n_group == 2:
                first, second = (np.sort(half)[-2:].sum() for half in np.split(biased, 2))
                biased[4:] *= first < second
                biased[:4] *= first >= second
            chosen = np.argsort(-biased)[:3]
            assert experts[row, i].tolist() == chosen.tolist()
            tokens[chosen] += 1
            expected = np.zeros(D)
            for e in chosen:
                hidden = np.maximum(token @ p["up"][e] + (p["up_bias"][e] if "up_bias" in p else 0), 0) ** 2
                out = hidden @ p["down"][e] + (p["down_bias"][e] if "down_bias" in p else 0)
                expected += 2.5 * scores[e] / scores[chosen].sum() * out
            if config.n_shared_experts:
                expected += literal_mlp(p["shared_experts"], token, lambda v: np.maximum(v, 0) ** 2)
            assert_close(y[row, i], expected)
    np.testing.assert_allclose(load, tokens / (B * 9 * 3 / 8), rtol=1e-6)


def test_a_token_of_nan_stays_alone(small_config, random_params):
    """No other token may change, and the bad one must not come out looking good."""
    mixer = Experts(small_config("E"), SCOPE)
    params, x = random_params(mixer), draw(1, 1, 9, D)
    run = jax.jit(lambda p, x: bind(mixer, p)(x))
    y = run(params, x)
    poisoned = run(params, jnp.asarray(x).at[0, 4, 3].set(jnp.nan))
    assert np.all(np.isnan(poisoned[0, 4]))
    np.testing.assert_array_equal(np.delete(poisoned, 4, axis=1), np.delete(y, 4, axis=1))


# Time conditioning


def literal_sinusoids(scaled):
    """cos and sin of an argument 1000·t that is already rounded."""
    angles = scaled * np.exp(-np.log(10_000) * np.arange(128) / 128)
    return np.concatenate([np.cos(angles), np.sin(angles)])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "dtype, t, scaled",
    [
        (jnp.float32, 0.9375, 937.5),
        (jnp.float32, 0.0, 0.0),
        (jnp.float32, 1.0, 1000.0),
        # bfloat16 has steps of 4 from 512 on, of 2 from 256 on.
        (jnp.bfloat16, 0.9375, 936.0),
        (jnp.bfloat16, 1.0, 1000.0),
        # t itself is rounded first: 0.95 becomes 0.94921875, 949.2 becomes 948, where 950 would become 952.
        (jnp.bfloat16, 0.95, 948.0),
        (jnp.bfloat16, 0.487, 486.0),
        (jnp.bfloat16, 0.001, 1.0),
    ],
)
def test_sinusoids(dtype, t, scaled, compiled):
    function = jax.jit(sinusoids, static_argnums=1) if compiled else sinusoids
    found = function(jnp.float32([t]), dtype)
    assert found.dtype == dtype
    # The angles are float32, up to 1000.
    tolerance = 1e-4 if dtype == jnp.float32 else 2.0**-8
    np.testing.assert_allclose(np.asarray(found[0], np.float64), literal_sinusoids(scaled), atol=tolerance)


def test_time_conditioning(small_config, random_params):
    config = small_config("M*E-")
    module = TimeConditioning(config, SCOPE, jnp.float32)
    params, t = random_params(module), np.float32([0.25, 0.875])
    p = to_float64(params)
    features = np.stack([literal_sinusoids(1000.0 * float(v)) for v in t])
    embedded = linear(p["mlp_2"], silu(linear(p["mlp_0"], features)))
    block = linear(p["block"], silu(embedded))
    bound = bind(module, params)
    assert_close(bound.embed(t), embedded, 1e-4)
    assert_close(bound(t), block, 1e-4)
    shift, scale, gate = modulation(params["tables"][2], bound(t))
    for found, i in ((shift, 0), (scale, 1), (gate, 2)):
        assert found.shape == (2, 1, D)
        assert_close(found[:, 0], p["tables"][2, i] + block.reshape(2, 3, D)[:, i], 1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fresh_time_conditioning_changes_nothing(small_config, dtype):
    module = TimeConditioning(small_config("M*E-"), SCOPE, dtype)
    bound = bind(module, initialize(parameter_table(module), jax.random.key(0)))
    x = jnp.asarray(draw(0, 2, 3, D), dtype)
    assert np.any(bound.embed(jnp.float32([0.1, 0.7])))  # There is something to be ignored.
    for layer in range(4):
        m = modulation(bound.tables[layer], bound(jnp.float32([0.1, 0.7])))
        np.testing.assert_array_equal(m.modulate(x), x)
        np.testing.assert_array_equal(m.gate * x, x)


def test_published_start_of_the_tables(small_config):
    module = TimeConditioning(small_config("M" * 300), SCOPE, jnp.float32, normal(D**-0.5))
    tables = initialize(parameter_table(module), jax.random.key(0))["tables"]
    assert tables.shape == (300, 3, D)
    assert np.std(tables) == pytest.approx(D**-0.5, rel=0.05)


# A layer: residual, norm, modulation


def make_layer(config, kind, random_params, dtype=jnp.float32):
    layer = Layer(config, kind, Scope(("",)), Execution(dtype=dtype), False)
    return layer, random_params(layer)


def memory_of(config, kind, random_params):
    if kind == "M":
        literal = LiteralMamba(config, {})
        tail, state = literal.zeros()
        return MambaCache(conv=draw(5, B, *tail.shape), state=draw(6, B, *state.shape))
    if kind == "*":
        return AttentionCache(key=draw(5, B, 2, 4, 4), value=draw(6, B, 2, 4, 4))
    return None


@pytest.mark.parametrize("kind", "M*E-")
def test_norm_and_modulation_come_in_the_order_of_the_kind(small_config, random_params, kind):
    config = small_config(kind)
    layer, params = make_layer(config, kind, random_params)
    memory = memory_of(config, kind, random_params)
    h, lengths = draw(1, B, 5, D), np.array([4, 2], np.int32)
    shift, scale, gate = (draw(i, B, 1, D) for i in (2, 3, 4))

    @jax.jit
    def run(params, h, memory, shift, scale, gate):
        bound = bind(layer, params)
        run = Run(cache_lengths=lengths)
        y, _ = bound.blockwise(h, memory, 5, run, Modulation(shift, scale, gate))

        def mixer(x):
            return bound.mixer.blockwise(x, memory, 5, run)[0]

        def normed(x):
            return rms_norm(x, params["norm"]["weight"], 1e-5)

        before = h + gate * mixer(normed(h * (1 + scale) + shift))
        after = h + gate * mixer(normed(h) * (1 + scale) + shift)
        return y, before, after

    y, before, after = run(params, h, memory, shift, scale, gate)
    right, wrong = (before, after) if kind in "M*" else (after, before)
    assert_close(y, right, 1e-6)
    assert np.max(np.abs(right - wrong)) > 0.1


@pytest.mark.parametrize("residual", [jnp.float32, jnp.bfloat16])
def test_the_residual_keeps_its_dtype(small_config, random_params, residual):
    """In bfloat16 the mixer works on rounded values either way; with residual_in_fp32 the sum is not rounded."""
    config = small_config("-")
    layer, params = make_layer(config, "-", random_params, jnp.bfloat16)
    bound = bind(layer, params)
    h = jnp.asarray(draw(1, B, 5, D), residual)
    y, _ = bound.causal(h)
    assert y.dtype == residual
    x = rms_norm(h.astype(jnp.bfloat16), params["norm"]["weight"], 1e-5)
    assert x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, h + bound.mixer(x).astype(residual))
