"""twotower_jax/parameters.py: the table agrees with the published checkpoints, and drives initialization and casts."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from twotower_jax.config import Variant
from twotower_jax.execution import Execution
from twotower_jax.parameters import (
    AS_IS,
    CONV,
    LINEAR,
    Scope,
    bind,
    cast,
    constant,
    count,
    flatten,
    initialize,
    normal,
    parameter_table,
    unflatten,
)
from twotower_jax.two_tower import Backbone, TwoTower

NANO = {
    "vocab_size": 131072,
    "hidden_size": 2688,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "chunk_size": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
}


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("kind, total", [("two_tower", 63_185_902_848), ("backbone", 31_577_940_288)])
def test_names_and_shapes_of_the_full_size_checkpoints(data, small_config, kind, total, scan_layers):
    published = json.loads(gzip.decompress((data / f"nano30b/{kind}_tensors.json.gz").read_bytes()))
    config, execution = small_config(**NANO), Execution(scan_layers=scan_layers)
    table = parameter_table(
        TwoTower(config, execution=execution) if kind == "two_tower" else Backbone(config, execution)
    )
    ours = [(str(name), list(p.tensor_shape)) for p in table.values() for name in p.tensors.flat]
    assert len(ours) == len(published["tensors"])  # None stands twice.
    assert dict(ours) == published["tensors"]
    assert count(table) == published["parameters"] == total


def test_tied_towers_and_no_time_have_fewer(small_config):
    config = small_config()
    names = {
        variant: {str(n) for p in parameter_table(TwoTower(config, variant)).values() for n in p.tensors.flat}
        for variant in (Variant(), Variant(context="tied"), Variant(time_conditioning=False))
    }
    full, tied, untimed = names.values()
    assert full - tied == {name for name in full if name.startswith("denoiser_tower.")}
    assert full - untimed == {name for name in full if name.startswith(("t_embedder.", "t_block.", "scale_shift_"))}
    assert tied < full and untimed < full


def test_every_declaration_fits_its_array(small_config):
    """Stacks first, then experts, then the tensor itself; an axis name for each dimension."""
    for path, p in parameter_table(TwoTower(small_config("M*EM*E-"))).items():
        assert len(p.axes) == len(p.shape), path
        assert p.tensors.shape == p.shape[: p.tensors.ndim], path
        assert p.path == path
        stacked = "segment_0" in path or path[-1] == "tables"
        assert (p.axes[0] == "layers") == stacked, path
        assert ("experts" in p.axes) == (path[-1] in ("up", "down")), path
        array = np.arange(np.prod(p.shape[p.tensors.ndim :])).reshape(p.shape[p.tensors.ndim :])
        stored = p.to_tensor(array)
        assert stored.shape == p.tensor_shape, path
        np.testing.assert_array_equal(p.from_tensor(stored), array)


def test_layouts():
    """(out, in) → (in, out); (channels, 1, width) → (width, channels)."""
    module = Scope(("a.",))

    def table(shape, layout):
        declared = module.declare("w", shape, (None,) * len(shape), constant(0.0), layout=layout)
        return declared.get_metadata()["declaration"]

    linear, conv, as_is = table((3, 2), LINEAR), table((4, 5), CONV), table((3, 2), AS_IS)
    assert (linear.tensor_shape, conv.tensor_shape, as_is.tensor_shape) == ((2, 3), (5, 1, 4), (3, 2))
    stored = np.arange(6).reshape(2, 3)
    assert linear.from_tensor(stored)[2, 1] == stored[1, 2]
    stored = np.arange(20).reshape(5, 1, 4)
    assert conv.from_tensor(stored)[3, 2] == stored[2, 0, 3]


def test_axes_must_match_the_shape():
    with pytest.raises(ValueError, match="w: 1 logical axes for a shape of 2 dimensions"):
        Scope(("",)).declare("w", (2, 3), ("embed",), constant(0.0))


def test_what_decays_and_what_stays_float32(small_config):
    """No decay of norms, biases, A_log, D, dt_bias; the correction bias is no parameter of the optimizer at all."""
    table = parameter_table(TwoTower(small_config("M*E-", use_bias=True, attention_bias=True, mlp_bias=True)))
    for path, p in table.items():
        name = path[-1]
        norm = name == "norm_weight" or path[-2] in ("norm", "norm_f")
        assert p.decay != (norm or name.endswith("bias") or name in ("A_log", "D", "tables")), path
        assert p.float32 == (name in ("A_log", "D", "dt_bias") or path[-2:] == ("router", "bias")), path
        assert p.trainable != (path[-2:] == ("router", "bias")), path


def test_cast_keeps_what_is_marked(small_config, random_params):
    model = TwoTower(small_config("ME"))
    table, params = parameter_table(model), random_params(model)
    for path, array in flatten(cast(table, params, jnp.bfloat16)).items():
        assert array.dtype == (jnp.float32 if table[path].float32 else jnp.bfloat16), path
        np.testing.assert_array_equal(array, flatten(params)[path].astype(array.dtype))


@pytest.mark.whole
def test_a_draw_does_not_depend_on_the_other_parameters(small_config):
    """The same array whether the model has a second tower or not, and another one for every path and key."""
    both, tied = (parameter_table(TwoTower(small_config("E"), Variant(context=c))) for c in ("frozen", "tied"))
    drawn, fewer = flatten(initialize(both, jax.random.key(0))), flatten(initialize(tied, jax.random.key(0)))
    for path, array in fewer.items():
        np.testing.assert_array_equal(array, drawn[path])
    other = flatten(initialize(tied, jax.random.key(1)))
    random = [path for path, array in fewer.items() if np.std(array) > 0 and path[-1] != "tables"]
    assert len(random) >= 8
    for path in random:
        assert np.any(other[path] != fewer[path]), path
    embeddings = drawn["context_tower", "embeddings"], drawn["denoiser_tower", "embeddings"]
    assert np.any(embeddings[0] != embeddings[1])
    sub = {path: p for path, p in both.items() if path[0] == "denoiser_head"}
    np.testing.assert_array_equal(
        initialize(sub, jax.random.key(0))["denoiser_head"]["weight"], drawn["denoiser_head", "weight"]
    )


@pytest.mark.whole
def test_scales_of_fresh_parameters(small_config):
    """initializer_range; what feeds the residual stream is divided by √layers; norms at 1, biases at 0."""
    config = small_config("M*E-", hidden_size=64, intermediate_size=64, moe_intermediate_size=64, mlp_bias=True)
    table = parameter_table(TwoTower(config))
    for path, array in flatten(initialize(table, jax.random.key(0))).items():
        if path[-2] in ("norm", "norm_f"):
            np.testing.assert_array_equal(array, 1)
        elif path[-1] in ("bias", "up_bias", "down_bias") or path[-2:] == ("block", "weight"):
            np.testing.assert_array_equal(array, 0)
        elif path[-1] == "down" or path[-2] in ("out_proj", "o_proj", "down_proj"):
            assert np.std(array) == pytest.approx(0.02 / 2, rel=0.1), path
        elif path[-1] in ("weight", "up", "embeddings"):
            assert np.std(array) == pytest.approx(0.02, rel=0.1), path


def test_bind_leaves_the_module_as_it_is(small_config):
    model = TwoTower(small_config("-"))
    params = initialize(parameter_table(model), jax.random.key(0))
    bound = bind(model, params)
    assert bound.denoiser_head.weight[...] is params["denoiser_head"]["weight"]
    leaves = jax.tree.leaves(nnx.state(model))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_flatten_and_unflatten_are_inverse():
    nested = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(nested) == {("a", "b"): 1, ("a", "c", "d"): 2, ("e",): 3}
    assert unflatten(flatten(nested)) == nested


def test_normal_is_float32_of_its_deviation():
    drawn = normal(0.5)(jax.random.key(0), (200, 100))
    assert drawn.dtype == jnp.float32
    assert np.std(drawn) == pytest.approx(0.5, rel=0.02)
    assert abs(np.mean(drawn)) < 0.02
