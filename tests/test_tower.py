"""The towers: whatever is computed in two ways must come out the same.

Training against generation, all blocks at once against one after the other, scanned against unrolled, padded against
unpadded, one row against a batch. Single layers have met their formulas in layers/test_layers.py.
"""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from twotower_jax.config import Variant
from twotower_jax.execution import Execution
from twotower_jax.parameters import bind, flatten, fresh, initialize, parameter_table, unflatten
from twotower_jax.stack import PerLayer
from twotower_jax.two_tower import Backbone, TwoTower, from_backbone, is_trainable

pytestmark = pytest.mark.usefixtures("strict_dtypes")

# Two repeats of three layers, scanned, and one more layer.
PATTERN = "M*EM*E-"
TOLERANCE = 2e-5


def tokens(seed, *shape, vocab=40):
    return np.random.default_rng(seed).integers(0, vocab, shape).astype(np.int32)


def assert_close(found, expected, tolerance=TOLERANCE):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=tolerance * np.max(np.abs(expected)))


def assert_trees_close(found, expected, tolerance=TOLERANCE):
    """Relative to each array's norm."""
    for path, (one, other) in zip_trees(found, expected):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other) + 1e-7, path


def zip_trees(one, other):
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    return [(path, (leaf, other[path])) for path, leaf in one.items()]


class Model:
    """A two-tower model with random parameters and its compiled functions."""

    def __init__(self, config, variant, execution, random_params):
        self.model = model = TwoTower(config, variant, execution)
        self.params = random_params(model)

        def method(name, static=()):
            function = jax.jit(
                lambda params, *args, **options: getattr(bind(model, params), name)(*args, **options),
                static_argnames=static,
            )
            return lambda *args, params=self.params, **options: function(params, *args, **options)

        self.context_logits = method("context_logits")
        self.prefill = method("prefill", ("capacity",))
        self.extend = method("extend")
        self.denoise = method("denoise")
        self.mock_ar_logits = method("mock_ar_logits")
        self.training_logits = method("training_logits", ("block_size",))


@pytest.fixture(scope="module")
def make(small_config, random_params):
    """Makes a `Model`, the same one for the same arguments."""

    @functools.cache
    def make(pattern=PATTERN, variant=Variant(), execution=Execution(), **changes):  # noqa: B008 (frozen)
        return Model(small_config(pattern, **changes), variant, execution, random_params)

    return make


def test_per_layer_and_by_layer_are_inverse(make):
    stacked = jnp.arange(7 * 2).reshape(7, 2)
    entries = PerLayer.unstack(make().model.denoiser_tower.stretches, stacked)
    np.testing.assert_array_equal(jnp.stack(entries.by_layer()), stacked)
    np.testing.assert_array_equal(entries.stack(), stacked)


@pytest.mark.whole
def test_layer_outputs_of_a_scanned_tower(make):
    model = make()
    ids = tokens(0, 2, 32)
    run = jax.jit(lambda p, ids: bind(model.model, p).context_tower.layer_outputs(ids))
    outputs = run(model.params, ids)
    assert len(outputs) == 8
    np.testing.assert_array_equal(outputs[0], model.params["context_tower"]["embeddings"][ids])
    head = np.asarray(model.params["context_head"]["weight"], np.float64)
    assert_close(np.asarray(outputs[-1], np.float64) @ head, model.context_logits(ids))
    # The last dense layer by hand, from what comes before it.
    layer = model.params["context_tower"]["segment_1"]["layer_0"]
    h = np.asarray(outputs[6], np.float64)
    x = h / np.sqrt(np.mean(h**2, axis=-1, keepdims=True) + 1e-5) * np.asarray(layer["norm"]["weight"], np.float64)
    up, down = (np.asarray(layer["mixer"][name]["weight"], np.float64) for name in ("up_proj", "down_proj"))
    h = h + np.maximum(x @ up, 0) ** 2 @ down
    h = h / np.sqrt(np.mean(h**2, axis=-1, keepdims=True) + 1e-5)
    assert_close(outputs[-1], h * np.asarray(model.params["context_tower"]["norm_f"]["weight"], np.float64))


def move(params, table, other_table):
    """Parameters of one layout in another, by the names of their tensors in a checkpoint."""
    tensors = {}
    for path, array in flatten(params).items():
        names = table[path].tensors
        flat = np.asarray(array).reshape(names.size, *array.shape[names.ndim :])
        tensors.update(zip(names.flat, flat, strict=True))
    return unflatten(
        {
            path: jnp.asarray(np.stack([tensors[name] for name in p.tensors.flat]).reshape(p.shape))
            for path, p in other_table.items()
        }
    )


def test_scanned_and_unrolled_are_the_same(make):
    scanned, unrolled = make("M-M-*"), make("M-M-*", execution=Execution(scan_layers=False))
    assert [s.repeats for s in scanned.model.context_tower.stretches] == [2, 1]
    params = move(scanned.params, parameter_table(scanned.model), parameter_table(unrolled.model))
    clean, noisy, t = tokens(0, 2, 16), tokens(1, 2, 16), np.float32([0.3, 0.9])
    expected = scanned.training_logits(clean, noisy, t, block_size=4)
    found = unrolled.training_logits(clean, noisy, t, params=params, block_size=4)
    assert_close(found[0], expected[0])
    assert_close(found[1], expected[1])


# Prefill, decoding


@pytest.mark.whole
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    first=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    pieces=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=3),
)
@hypothesis.settings(max_examples=15)
def test_reading_in_pieces_equals_reading_at_once(make, seed, first, pieces):
    """Each row in pieces of its own sizes, padded on the right with anything, from one token on, some pieces empty."""
    model, width = make(), 8
    text, junk = tokens(seed, 2, 32), np.random.default_rng(seed)
    full = np.asarray(model.context_logits(text))
    read, cache = np.zeros(2, int), None
    for sizes in [first, *pieces]:
        lengths = np.minimum(sizes, 32 - width - read).astype(np.int32)
        ids = junk.integers(0, 40, (2, width)).astype(np.int32)
        for row, length in enumerate(lengths):
            ids[row, :length] = text[row, read[row] : read[row] + length]
        if cache is None:
            logits, cache = model.prefill(ids, lengths, capacity=40)
        else:
            logits, cache = model.extend(ids, lengths, cache)
        read += lengths
        np.testing.assert_array_equal(cache.lengths, read)
        for row in np.flatnonzero(lengths):
            assert_close(logits[row], full[row, read[row] - 1])
    whole = model.prefill(text, read.astype(np.int32), capacity=40)[1]
    for row in range(2):
        for one, other in zip(real_part(cache, row), real_part(whole, row), strict=True):
            assert_close(one, other, 1e-4)


def real_part(cache, row):
    """The arrays of one row of a cache, keys and values without what lies beyond its length."""
    length = int(cache.lengths[row])
    arrays = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(cache.layers):
        name = path[-1].name
        # Stacked layers have an axis before the batch.
        leaf = np.asarray(leaf)
        leaf = leaf[:, row] if leaf.ndim == (4 if name == "conv" else 5) else leaf[row]
        if name in ("key", "value"):
            leaf = leaf[..., :length, :]
        arrays.append(leaf)
    return arrays


def test_padding_is_seen_by_nobody(make):
    """Exactly: what stands there changes no logit, no state and no key."""
    model, lengths = make(), np.array([3, 8], np.int32)
    ids, other = tokens(0, 2, 8), tokens(1, 2, 8)
    other[0, :3], other[1] = ids[0, :3], ids[1]
    logits, cache = model.prefill(ids, lengths, capacity=40)
    logits_other, cache_other = model.prefill(other, lengths, capacity=40)
    assert_close(logits_other, logits, 1e-6)
    for row in range(2):
        for one, two in zip(real_part(cache, row), real_part(cache_other, row), strict=True):
            assert_close(one, two, 1e-6)


@pytest.mark.whole
def test_a_batch_gives_what_each_row_alone_gives(make):
    model = make()
    ids, lengths, block, t = tokens(0, 2, 8), np.array([3, 8], np.int32), tokens(1, 2, 4), np.float32([0.25, 1.0])
    logits, cache = model.prefill(ids, lengths, capacity=40)
    denoised = model.denoise(block, t, cache)
    # Alone and unpadded.
    alone, its_cache = model.prefill(ids[:1, :3], lengths[:1], capacity=40)
    assert_close(alone, logits[:1], 2e-6)
    assert_close(model.denoise(block[:1], t[:1], its_cache), denoised[:1], 2e-6)
    # In other company.
    logits_other, cache = model.prefill(np.stack([ids[0], ids[1][::-1]]), np.array([3, 6], np.int32), capacity=40)
    assert_close(logits_other[0], logits[0], 2e-6)
    in_company = np.stack([block[0], block[1][::-1]])
    assert_close(model.denoise(in_company, np.float32([t[0], 0.5]), cache)[0], denoised[0], 2e-6)


def test_a_cache_that_is_too_small(make):
    with pytest.raises(ValueError, match="a cache of 5 positions cannot take 8 tokens"):
        make().prefill(tokens(0, 2, 8), np.array([3, 5], np.int32), capacity=5)


def test_denoising_reads_nothing_beyond_the_cache_lengths(make):
    """Whatever an earlier text or padding left there."""
    model = make()
    ids, lengths, block, t = tokens(0, 2, 8), np.array([3, 8], np.int32), tokens(1, 2, 4), np.float32([0.25, 1.0])
    _, cache = model.prefill(ids, lengths, capacity=40)
    expected = model.denoise(block, t, cache)

    def poison(path, leaf):
        if path[-1].name not in ("key", "value"):
            return leaf
        beyond = jnp.arange(40)[:, None] >= lengths[:, None, None, None]
        return jnp.where(beyond, jnp.nan, leaf)

    poisoned = cache.replace(layers=jax.tree_util.tree_map_with_path(poison, cache.layers))
    np.testing.assert_array_equal(model.denoise(block, t, poisoned), expected)


# Training against generation


LENGTH = 192
VARIANTS = {
    "default": ("M*E-", {}, {}),
    "no experts": ("M*-", {}, {}),
    "bidirectional": ("M*-", {"bidirectional_mamba": True}, {}),
    "tied, bidirectional, no time": (
        "M*-",
        {"context": "tied", "bidirectional_mamba": True, "time_conditioning": False},
        {},
    ),
    "another config": (
        "M*E-",
        {},
        {
            "use_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "n_group": 2,
            "n_shared_experts": 0,
            "mamba_num_heads": 5,
            "n_groups": 1,
            "residual_in_fp32": True,
        },
    ),
}


@pytest.mark.whole(but=["default-12"])
@pytest.mark.parametrize(
    "name, block",
    [
        # Around the chunk of 16: far below, dividing it, not dividing it, above it.
        ("default", 1),
        ("no experts", 4),
        ("default", 12),
        ("no experts", 64),
        ("bidirectional", 24),
        ("tied, bidirectional, no time", 4),
        ("another config", 4),
    ],
)
def test_training_computes_what_generation_does(make, name, block):
    """Three blocks, each denoised after a cache of the clean blocks before it: the first, which has none, the last,
    and one between."""
    pattern, variant, changes = VARIANTS[name]
    model = make(pattern, Variant(**variant), **changes)
    clean, noisy, t = tokens(0, 1, LENGTH), tokens(1, 1, LENGTH), np.float32([0.8])
    logits, h_context = model.training_logits(clean, noisy, t, block_size=block)
    if block == 1:
        assert_close(np.asarray(h_context) @ model.params["context_head"]["weight"], model.context_logits(clean))

    chosen = np.array([0, (LENGTH // block) // 2, LENGTH // block - 1])
    lengths = (chosen * block).astype(np.int32)
    _, cache = model.prefill(np.repeat(clean, 3, axis=0), lengths, capacity=LENGTH)
    expected = model.denoise(noisy.reshape(-1, block)[chosen], np.repeat(t, 3), cache)
    assert_close(logits.reshape(-1, block, 40)[chosen], expected)


@hypothesis.given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 7))
@hypothesis.settings(max_examples=10)
def test_a_block_sees_clean_tokens_before_it_and_its_own_noisy_ones(make, seed, n):
    model = make("M*E-")
    clean, noisy, t = tokens(0, 2, 32), tokens(1, 2, 32), np.float32([0.25, 0.8])
    expected = np.asarray(model.training_logits(clean, noisy, t, block_size=4)[0])
    rng = np.random.default_rng(seed)
    here = slice(4 * n, 4 * n + 4)

    # Clean tokens from here on, and noisy tokens anywhere else, change nothing here.
    other_clean, other_noisy = clean.copy(), rng.integers(0, 40, noisy.shape).astype(np.int32)
    other_clean[:, 4 * n :] = rng.integers(0, 40, other_clean[:, 4 * n :].shape)
    other_noisy[:, here] = noisy[:, here]
    logits = model.training_logits(other_clean, other_noisy, t, block_size=4)[0]
    assert_close(logits[:, here], expected[:, here], 2e-6)

    # Any position of the block changes all of it; any clean token before changes it too.
    other_noisy = noisy.copy()
    other_noisy[:, 4 * n + rng.integers(0, 4)] += 1
    logits = model.training_logits(clean, other_noisy % 40, t, block_size=4)[0]
    assert np.all(np.max(np.abs(logits[:, here] - expected[:, here]), axis=-1) > 1e-4)
    if n:
        other_clean = clean.copy()
        other_clean[:, rng.integers(0, 4 * n)] += 1
        logits = model.training_logits(other_clean % 40, noisy, t, block_size=4)[0]
        assert np.all(np.max(np.abs(logits[:, here] - expected[:, here]), axis=-1) > 1e-5)


def test_a_length_that_is_no_multiple_of_the_block(make):
    with pytest.raises(ValueError, match="sequence length 32 is not a multiple of the block size 12"):
        make("M*E-").training_logits(tokens(0, 2, 32), tokens(1, 2, 32), np.float32([0.2, 0.8]), block_size=12)


# Gradients


def test_an_unrolled_loop_computes_the_same(make):
    """Also gradients, of parameters that stay stacked."""
    params, found = make("M-M-*").params, []
    for unroll in (False, True):
        model = make("M-M-*", execution=Execution(unroll=unroll)).model

        def loss(params, model=model):
            return weighted(bind(model, params).training_logits(*batch(), 4)[0])

        assert ("unroll=2" in str(jax.make_jaxpr(loss)(params))) is unroll
        found.append(jax.jit(jax.value_and_grad(loss))(params))
    assert_close(found[1][0], found[0][0])
    assert_trees_close(found[1][1], found[0][1])


def weighted(logits):
    return jnp.sum(logits * jnp.cos(jnp.arange(logits.size, dtype=jnp.float32)).reshape(logits.shape)) / logits.size


def batch():
    return tokens(0, 2, 16), tokens(1, 2, 16), np.float32([0.25, 0.8])


@pytest.fixture(scope="module")
def training_gradients(make):
    """(variant's context, …) → (loss, gradients), functions of the parameters, of training in blocks of 4."""

    @functools.cache
    def functions(context, remat="none"):
        model = make("M*-", Variant(context=context), Execution(remat=remat)).model

        def loss(params):
            return weighted(bind(model, params).training_logits(*batch(), 4)[0])

        return jax.jit(loss), jax.jit(jax.grad(loss))

    return functions


# In a context tower M*- the denoiser reads the inputs of each mixer's scan and keys, not what comes out of the last.
UNREAD = {
    ("context_head", "weight"),
    ("context_tower", "norm_f", "weight"),
    ("context_tower", "segment_0", "layer_1", "mixer", "q_proj", "weight"),
    ("context_tower", "segment_0", "layer_1", "mixer", "o_proj", "weight"),
}


@pytest.mark.whole
def test_a_gradient_through_the_context_is_that_of_generation(make, training_gradients):
    """In both towers: the same blocks after caches, differentiated through their keys, values and states."""
    model = make("M*-", Variant(context="trained"))

    def loss(params):
        clean, noisy, t = batch()
        bound = bind(model.model, params)
        _, cache = bound.prefill(jnp.repeat(clean, 4, axis=0), jnp.tile(jnp.arange(4) * 4, 2), 16)
        return weighted(bound.denoise(noisy.reshape(-1, 4), jnp.repeat(t, 4), cache).reshape(2, 16, -1))

    found = training_gradients("trained")[1](model.params)
    assert_trees_close(found, jax.jit(jax.grad(loss))(model.params), 1e-4)
    for path, gradient in flatten(found).items():
        unread = path in UNREAD or path[:3] == ("context_tower", "segment_0", "layer_2")
        assert np.any(gradient) != unread, path


@pytest.mark.whole
def test_tied_towers_add_up_their_gradients(make, training_gradients):
    """One tower in both roles: its gradient is the sum of what two equal towers get."""
    tied = make("M*-", Variant(context="tied")).params
    assert "denoiser_tower" not in tied
    two = tied | {"denoiser_tower": tied["context_tower"]}
    both = training_gradients("trained")[1](two)
    total = jax.tree.map(jnp.add, both["context_tower"], both.pop("denoiser_tower"))
    assert_trees_close(training_gradients("tied")[1](tied), both | {"context_tower": total}, 1e-5)


@pytest.mark.whole
def test_a_frozen_context_gets_no_gradient(make, training_gradients):
    params = make("M*-", Variant(context="trained")).params
    frozen = training_gradients("frozen")[1](params)
    trained = training_gradients("trained")[1](params)
    for path, gradient in flatten(frozen).items():
        assert np.any(gradient) == is_trainable(Variant(), path), path
    assert_trees_close(frozen | {"context_tower": trained["context_tower"]}, trained, 1e-6)


@pytest.mark.whole
def test_expert_load_comes_in_the_order_of_the_layers(make):
    """For a pattern with repeats: the same as laid out layer by layer, and on average 1."""
    clean, noisy, t = batch()
    scanned, flat = make("MEE" * 2 + "E"), make("MEE" * 2 + "E", execution=Execution(scan_layers=False))
    params = move(scanned.params, parameter_table(scanned.model), parameter_table(flat.model))
    found, expected = (
        jax.jit(lambda p, m=m: bind(m.model, p).training_states(clean, noisy, t, 4).expert_load)(p)
        for m, p in ((scanned, scanned.params), (flat, params))
    )
    assert found.shape == (5, 8)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(np.mean(found, axis=1), 1, rtol=1e-6)


@pytest.mark.whole
@pytest.mark.parametrize("bidirectional", [False, True])
def test_documents_side_by_side_know_nothing_of_each_other(make, bidirectional):
    """Three in one row, of 4, 8 and 4 tokens, give what each gives alone, in both towers."""
    model = make("M*E", Variant(bidirectional_mamba=bidirectional), chunk_size=8)
    clean, noisy, t = batch()
    starts = np.repeat([0, 4, 12], [4, 8, 4]).astype(np.int32)[None].repeat(2, axis=0)

    def states(clean, noisy, start=None):
        return bind(model.model, model.params).training_states(clean, noisy, t, 4, start)

    together = jax.jit(states)(clean, noisy, starts)
    for begin, end in ((0, 4), (4, 12), (12, 16)):
        alone = jax.jit(states)(clean[:, begin:end], noisy[:, begin:end])
        for found, expected in zip(together[:2], alone[:2], strict=True):
            np.testing.assert_allclose(found[:, begin:end], expected, atol=2e-5)


@pytest.mark.whole
@pytest.mark.parametrize("remat", ["layer", "unit"])
def test_rematerialization_changes_no_gradient(make, training_gradients, remat):
    params = make("M*-", Variant(context="trained")).params
    expected = training_gradients("frozen")[1](params)
    assert_trees_close(training_gradients("frozen", remat=remat)[1](params), expected, 1e-6)


@pytest.mark.whole
def test_the_gradient_is_the_slope(make, training_gradients):
    """Along a random direction of each tower's parameters, against a difference quotient."""
    params = make("M*-", Variant(context="trained")).params
    loss, gradients = training_gradients("trained")
    found = gradients(params)
    rng, step = np.random.default_rng(0), 5e-4
    for part in ("context_tower", "denoiser_tower", "time"):
        direction = jax.tree.map(lambda v: jnp.asarray(rng.standard_normal(v.shape), jnp.float32), params[part])
        slope = sum(map(jnp.vdot, *map(jax.tree.leaves, (found[part], direction))))

        def along(distance, part=part, direction=direction):
            return float(loss(params | {part: jax.tree.map(lambda p, d: p + distance * d, params[part], direction)}))

        assert float(slope) == pytest.approx((along(step) - along(-step)) / (2 * step), rel=5e-3)
        assert abs(slope) > 1e-3


def test_what_is_trainable():
    def paths(variant):
        every = [("context_tower", "x"), ("denoiser_tower", "x"), ("context_head", "x"), ("denoiser_head", "x")]
        return [path[0] for path in (*every, ("time", "x")) if is_trainable(variant, path)]

    assert paths(Variant()) == ["denoiser_tower", "denoiser_head", "time"]
    assert paths(Variant(context="trained")) == ["context_tower", "denoiser_tower", "denoiser_head", "time"]
    assert "context_head" in paths(Variant(context="tied", context_loss=True))


# From a backbone


@pytest.mark.whole
def test_a_fresh_denoiser_is_the_backbone(make, small_config, random_params):
    """Fresh time conditioning changes nothing at any t; used causally, the denoiser says what the context says."""
    backbone = Backbone(small_config("M*-"))
    params_of_one = random_params(backbone)
    model = make("M*-")
    params = from_backbone(model.model, params_of_one, jax.random.key(1))
    assert jax.tree.structure(params) == jax.tree.structure(model.params)
    jax.tree.map(
        np.testing.assert_array_equal,
        params["time"],
        initialize(fresh(parameter_table(model.model)), jax.random.key(1))["time"],
    )

    ids = tokens(0, 2, 32)
    expected = jax.jit(lambda p, ids: bind(backbone, p).logits(ids))(params_of_one, ids)
    np.testing.assert_array_equal(model.context_logits(ids, params=params), expected)
    _, cache = model.prefill(ids[:, :8], np.array([8, 8], np.int32), capacity=40, params=params)
    assert_close(model.mock_ar_logits(ids[:, 8:11], cache, params=params), expected[:, 8:11])

    block = tokens(1, 2, 4)
    untimed = model.denoise(block, None, cache, params=params)
    for t in (np.float32([0.0, 1.0]), np.float32([0.13, 0.5])):
        np.testing.assert_array_equal(model.denoise(block, t, cache, params=params), untimed)
    # With other parameters it does change something, and the denoiser is not the context.
    assert np.max(np.abs(model.denoise(block, t, cache) - model.denoise(block, None, cache))) > 0.1
    assert np.max(np.abs(model.mock_ar_logits(ids[:, 8:11], cache) - model.context_logits(ids)[:, 8:11])) > 0.1
