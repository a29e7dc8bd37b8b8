"""twotower_jax/config.py: what a published config.json means, and what is refused."""

import dataclasses
import json
import math

import pytest

from twotower_jax.config import ModelConfig, Variant, read_model_config


@pytest.fixture
def raw(data):
    """A published config.json."""
    return json.loads((data / "tiny/checkpoint/config.json").read_text())


def test_a_published_config(raw):
    config = ModelConfig.from_hf(raw)
    for field in dataclasses.fields(ModelConfig):
        if field.name in raw:
            assert getattr(config, field.name) == raw[field.name], field.name
    # What the file does not say.
    assert config.mask_token_id == 3
    assert config.time_step_limit is None
    assert (config.num_hidden_layers, config.mamba_inner, config.conv_channels) == (16, 128, 128 + 2 * 2 * 16)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"time_step_limit": (0.0, math.inf)},
        {"time_step_limit": (0.001, 0.1), "mlp_hidden_act": "silu", "use_bias": True, "layer_norm_epsilon": 1e-6},
        {"hybrid_override_pattern": "-*", "n_routed_experts": 0, "mamba_num_heads": 0},
    ],
    ids=str,
)
def test_round_trip_through_json(raw, changes):
    config = dataclasses.replace(ModelConfig.from_hf(raw), **changes)
    written = json.loads(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(written) == config
    assert written["num_hidden_layers"] == len(config.hybrid_override_pattern)


def test_fields_without_a_meaning_here_are_ignored(raw):
    expected = ModelConfig.from_hf(raw)
    assert ModelConfig.from_hf(raw | {"rope_theta": "no such thing", "torch_dtype": 5, "head_dim": 32}) == expected
    # null stands for the default.
    assert ModelConfig.from_hf(raw | {"chunk_size": None}).chunk_size == 128


def test_numbers_as_some_writers_have_them(raw):
    assert ModelConfig.from_hf(raw | {"time_step_limit": [0.0, "inf"]}).time_step_limit == (0.0, math.inf)
    assert ModelConfig.from_hf(raw | {"layer_norm_epsilon": 1}).layer_norm_epsilon == 1.0
    assert ModelConfig.from_hf(raw | {"layer_norm_epsilon": "1e-5"}).layer_norm_epsilon == 1e-5


WORDS = {"M": ("linear_attention", "mamba"), "E": ("moe",), "*": ("full_attention", "attention"), "-": ("mlp",)}


@pytest.mark.parametrize("name", ["layers_block_type", "layer_types"])
@pytest.mark.parametrize("age", [0, -1], ids=["new", "old"])
def test_layers_as_a_list_of_words(raw, name, age):
    expected = ModelConfig.from_hf(raw)
    words = [WORDS[kind][age] for kind in raw["hybrid_override_pattern"]]
    without = {key: value for key, value in raw.items() if key not in ("hybrid_override_pattern", "num_hidden_layers")}
    assert ModelConfig.from_hf(without | {name: words}) == expected
    assert ModelConfig.from_hf(without | {name: words, "num_hidden_layers": None}) == expected
    assert ModelConfig.from_hf(raw | {name: words}) == expected
    with pytest.raises(ValueError, match=f"hybrid_override_pattern says .*, {name} says 'M'; leave out the wrong one"):
        ModelConfig.from_hf(raw | {name: words[:1]})
    with pytest.raises(ValueError, match=f"num_hidden_layers=3 but {name}='ME' has 2 layers"):
        ModelConfig.from_hf(without | {name: ["mamba", "moe"], "num_hidden_layers": 3})
    with pytest.raises(ValueError, match=rf"{name} holds \['recurrent'\]; known layers are 'linear_attention'"):
        ModelConfig.from_hf(without | {name: ["moe", "recurrent"]})


INFINITIES = [math.inf, "inf", "Infinity", "+inf", {"__float__": "Infinity"}, {"__float__": "inf"}]


@pytest.mark.parametrize("infinity", INFINITIES, ids=str)
def test_infinity_in_all_spellings(raw, infinity):
    limited = json.loads(json.dumps(raw | {"time_step_limit": [0.0, infinity]}))
    assert ModelConfig.from_hf(limited).time_step_limit == (0.0, math.inf)
    renamed = json.loads(json.dumps(raw | {"mamba_dt_limit": ["0", infinity], "time_step_limit": None}))
    assert ModelConfig.from_hf(renamed).time_step_limit == (0.0, math.inf)


@pytest.mark.parametrize("infinity", ["-Infinity", {"__float__": "-Infinity"}, -math.inf], ids=str)
def test_a_limit_below_everything_is_none(raw, infinity):
    with pytest.raises(ValueError, match="must be 0 <= low <= high"):
        ModelConfig.from_hf(raw | {"time_step_limit": [infinity, 0.1]})


# Another name, the name here, another value.
NAMES = [
    ("rms_norm_eps", "layer_norm_epsilon", 1e-6),
    ("norm_eps", "layer_norm_epsilon", "1e-6"),
    ("mamba_n_groups", "n_groups", 4),
    ("mamba_d_conv", "conv_kernel", 3),
    ("mamba_dt_min", "time_step_min", 0.002),
    ("mamba_dt_max", "time_step_max", 0.2),
    ("mamba_dt_limit", "time_step_limit", [0.0, 1.0]),
    ("mamba_dt_init_floor", "time_step_floor", 1e-5),
    ("mamba_conv_bias", "use_conv_bias", False),
    ("mamba_proj_bias", "use_bias", True),
    ("mamba_chunk_size", "chunk_size", 64),
    ("mamba_d_state", "ssm_state_size", 8),
    ("num_local_experts", "n_routed_experts", 32),
]


# By what this program calls a field, what else files call it.
NAMES_OF_TODAY = {
    "layer_norm_epsilon": ["rms_norm_eps", "norm_eps"],
    "n_groups": ["mamba_n_groups", "mamba_num_groups"],
    "conv_kernel": ["mamba_d_conv"],
    "chunk_size": ["mamba_chunk_size"],
    "ssm_state_size": ["mamba_d_state", "mamba_state_dim"],
    "mamba_num_heads": ["mamba_n_heads"],
    "mamba_head_dim": ["mamba_d_head"],
    "use_conv_bias": ["mamba_conv_bias"],
    "use_bias": ["mamba_proj_bias"],
    "time_step_min": ["mamba_dt_min"],
    "time_step_max": ["mamba_dt_max"],
    "time_step_floor": ["mamba_dt_init_floor"],
    "time_step_limit": ["mamba_dt_limit"],
    "expand": ["mamba_expand"],
    "head_dim": ["attention_head_dim"],
    "n_routed_experts": ["num_local_experts", "num_experts"],
    "mamba_hidden_act": ["mamba_act"],
}


@pytest.mark.parametrize("other, name, value", NAMES, ids=lambda v: v if isinstance(v, str) else "")
def test_other_names(raw, other, name, value):
    expected = ModelConfig.from_hf(raw | {name: value})
    assert expected != ModelConfig.from_hf(raw)
    without = {key: kept for key, kept in raw.items() if key != name}
    assert ModelConfig.from_hf(without | {other: value}) == expected
    assert ModelConfig.from_hf(raw | {name: value, other: value}) == expected
    assert ModelConfig.from_hf(raw | {other: None}) == ModelConfig.from_hf(raw)
    # A wrong spelling of either is named with the right one.
    with pytest.raises(ValueError, match=f"{name}=.* contradicts {other}=.*, which is the same under another name"):
        ModelConfig.from_hf(raw | {name: [5.0, 5.0] if isinstance(value, list) else 5, other: value})


def test_widths_that_the_family_does_not_follow(raw):
    """Heads times their width count: of the published members, only some have expand times the hidden size."""
    assert ModelConfig.from_hf(raw | {"expand": 7}) == ModelConfig.from_hf(raw)
    assert ModelConfig.from_hf(raw | {"mamba_expand": 7}) == ModelConfig.from_hf(raw)
    with pytest.raises(ValueError, match="expand=2 contradicts mamba_expand=7"):
        ModelConfig.from_hf(raw | {"expand": 2, "mamba_expand": 7})


@pytest.mark.parametrize(
    "value, ids", [(2, (2,)), ([2], (2,)), ([2, 11], (2, 11)), ([11, 2, 11], (11, 2)), (None, (2,))]
)
def test_end_tokens(raw, value, ids):
    config = ModelConfig.from_hf(raw | {"eos_token_id": value})
    assert config.eos_token_ids == ids
    assert config.eos_token_id == (ids if len(ids) > 1 else ids[0])
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_latent_experts_are_an_option(raw):
    plain = ModelConfig.from_hf(raw)
    assert ModelConfig.from_hf(raw | {"moe_latent_size": None}) == plain
    assert "moe_latent_size" not in plain.to_hf()
    latent = ModelConfig.from_hf(raw | {"moe_latent_size": 24})
    assert (plain.expert_input_size, latent.expert_input_size) == (64, 24)
    assert ModelConfig.from_hf(latent.to_hf()) == latent


# The family as `transformers` saves it, in every other way that a file may say the same.
KINDS = ("moe", "dense", "latent")
PATTERNS = {"moe": "MEM*EME", "dense": "M-M-M-MM-M*-M-", "latent": "MEME*ME"}


@pytest.fixture(params=KINDS)
def family(request, data):
    """The content of a recorded config.json, and what it says, every field."""
    raw = json.loads((data / f"family/{request.param}/config.json").read_text())
    config = ModelConfig.from_hf(raw)
    assert "hybrid_override_pattern" not in raw and "num_hidden_layers" not in raw
    assert config.hybrid_override_pattern == PATTERNS[request.param]
    assert (config.time_step_limit, config.eos_token_ids) == ((0.0, math.inf), (2, 11))
    assert config.moe_latent_size == (24 if request.param == "latent" else 0)
    for field in dataclasses.fields(ModelConfig):
        given = raw.get(field.name)
        if given is not None and field.name not in ("time_step_limit", "eos_token_id"):
            assert getattr(config, field.name) == given, field.name
    return raw, config


def test_a_members_layers_in_every_spelling(family):
    raw, config = family
    pattern = config.hybrid_override_pattern
    bare = {name: value for name, value in raw.items() if name != "layers_block_type"}
    spelled = {"hybrid_override_pattern": [pattern], "layers_block_type": [], "layer_types": []}
    for name in ("layers_block_type", "layer_types"):
        spelled[name] += [[WORDS[kind][age] for kind in pattern] for age in (0, -1)] + [list(pattern)]
    for name, ways in spelled.items():
        for way in ways:
            for more in ({}, {"num_hidden_layers": len(pattern)}, {"num_hidden_layers": None}):
                assert ModelConfig.from_hf(bare | {name: way} | more) == config, (name, way, more)
            # One way beside another, and beside those that say nothing.
            assert ModelConfig.from_hf(raw | {name: way}) == config
            assert ModelConfig.from_hf(dict.fromkeys(spelled) | bare | {name: way}) == config
    with pytest.raises(ValueError, match="field 'hybrid_override_pattern' is missing"):
        ModelConfig.from_hf(bare)


def test_a_members_numbers_in_every_spelling(family):
    raw, config = family
    for infinity in INFINITIES:
        text = json.dumps(raw | {"time_step_limit": [0.0, infinity]})
        assert ModelConfig.from_hf(json.loads(text)) == config, infinity
    for ids in ([2, 11], [2, 11, 2]):
        assert ModelConfig.from_hf(raw | {"eos_token_id": ids}) == config
    assert ModelConfig.from_hf(raw | {"eos_token_id": 2}) == dataclasses.replace(config, eos_token_id=2)
    assert ModelConfig.from_hf(raw | {"layer_norm_epsilon": "1e-5", "routed_scaling_factor": 2.5}) == config


def test_a_members_fields_under_their_other_names(family):
    """One after the other, and all at once."""
    raw, config = family
    renamed = dict(raw)
    for name, others in NAMES_OF_TODAY.items():
        if name not in raw:
            continue
        without = {key: value for key, value in raw.items() if key != name}
        for other in others:
            assert ModelConfig.from_hf(without | {other: raw[name]}) == config, other
            assert ModelConfig.from_hf(raw | {other: raw[name]}) == config, other
            assert ModelConfig.from_hf(raw | {other: None}) == config, other
        renamed[others[0]] = renamed.pop(name)
    assert ModelConfig.from_hf(renamed) == config
    assert not set(NAMES_OF_TODAY) & set(renamed)


def test_a_members_nulls_and_what_it_leaves_out(family):
    """null, and nothing, are the defaults, which the recorded files have wherever it is the same."""
    raw, config = family
    needed = {"hidden_size", "vocab_size", "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups"}
    for field in dataclasses.fields(ModelConfig):
        if field.name not in raw or field.name in needed or raw[field.name] is None:
            continue
        if getattr(config, field.name) != field.default:
            continue
        without = {key: value for key, value in raw.items() if key != field.name}
        assert ModelConfig.from_hf(without) == ModelConfig.from_hf(raw | {field.name: None}) == config, field.name
    assert raw["sliding_window"] is None and ModelConfig.from_hf(raw | {"tie_word_embeddings": None}) == config
    if "E" not in config.hybrid_override_pattern:
        # Sizes of experts that there are none of.
        sizes = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts")
        found = ModelConfig.from_hf(raw | dict.fromkeys(sizes))
        assert dataclasses.replace(found, **{name: raw[name] for name in sizes}) == config


IGNORED = {
    "rope_theta": 10000,
    "rope_scaling": {"type": "yarn", "factor": 4.0},
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "partial_rotary_factor": 1.0,
    "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": "*E",
    "mtp_layers_block_type": ["attention", "moe"],
    "expand": 3,
    "mamba_expand": 3,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "torch_dtype": "bfloat16",
    "dtype": "bfloat16",
    "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},
    "transformers_version": "4.55.4",
    "mamba_ssm_cache_dtype": "float16",
    "use_mamba_kernels": False,
    "num_logits_to_keep": 0,
}


def test_what_a_member_says_beyond_the_model(family):
    """Ignored where nothing is computed by it, named where the model would compute something else."""
    raw, config = family
    for name, value in IGNORED.items():
        without = {key: kept for key, kept in raw.items() if key not in ("expand", name)}
        assert ModelConfig.from_hf(without | {name: value}) == config, name
    assert ModelConfig.from_hf(raw | IGNORED) == config
    for name, value in (("sliding_window", 4096), ("mamba_hidden_act", "gelu"), ("tie_word_embeddings", True)):
        with pytest.raises(ValueError, match=f"{name}="):
            ModelConfig.from_hf(raw | {name: value})
    assert ModelConfig.from_hf(raw | {"mamba_hidden_act": "swish"}) == config


# A change of the published config, and the message it gets.
REFUSED = [
    ({"hidden_size": None}, "field 'hidden_size' is missing"),
    ({"hidden_size": "64"}, "hidden_size must be int, found '64'"),
    ({"hidden_size": 64.0}, "hidden_size must be int, found 64.0"),
    ({"hidden_size": True}, "hidden_size must be int, found True"),
    ({"hidden_size": 0}, "hidden_size=0 must be positive with layers 'MEMEM*EMEMEM*EME'"),
    ({"use_bias": 1}, "use_bias must be bool, found 1"),
    ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon must be float, found 'small'"),
    ({"layer_norm_epsilon": math.nan}, "layer_norm_epsilon must be float, found nan"),
    ({"layer_norm_epsilon": math.inf}, "layer_norm_epsilon must be float, found inf"),
    ({"routed_scaling_factor": 10**400}, "routed_scaling_factor must be float, found 1000"),
    ({"mlp_hidden_act": ["relu2"]}, "mlp_hidden_act must be str, found ['relu2']"),
    ({"mlp_hidden_act": "tanh"}, "mlp_hidden_act='tanh' is not one of relu2, relu, silu, gelu"),
    ({"hybrid_override_pattern": ""}, "hybrid_override_pattern is empty; it names each layer's kind"),
    ({"hybrid_override_pattern": "MAM"}, "hybrid_override_pattern='MAM' holds ['A']; known layer kinds are M * E -"),
    ({"num_hidden_layers": 52}, "num_hidden_layers=52 but hybrid_override_pattern='MEMEM*EMEMEM*EME' has 16 layers"),
    ({"chunk_size": -1}, "chunk_size=-1 must be positive"),
    ({"n_groups": 3}, "n_groups=3 does not divide mamba_num_heads=8"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
    ({"n_group": 3}, "n_group=3 does not divide n_routed_experts=16"),
    ({"n_group": 16}, "n_group=16 leaves fewer than two of n_routed_experts=16 in a group"),
    ({"topk_group": 2}, "topk_group=2 exceeds n_group=1"),
    ({"num_experts_per_tok": 17}, "num_experts_per_tok=17 exceeds n_routed_experts=16"),
    ({"n_shared_experts": 2}, "n_shared_experts=2 must be 0 or 1"),
    ({"moe_shared_expert_intermediate_size": 0}, "n_shared_experts=1 needs a positive moe_shared_expert_interm"),
    ({"time_step_limit": [0.2, 0.1]}, "time_step_limit=(0.2, 0.1) must be 0 <= low <= high"),
    ({"time_step_limit": [0.0]}, "time_step_limit must be two numbers, found [0.0]"),
    ({"time_step_limit": [0.0, "high"]}, "time_step_limit must be two numbers, found [0.0, 'high']"),
    ({"mask_token_id": 512}, "mask_token_id=512 lies outside vocab_size=512"),
    ({"eos_token_id": -1}, "eos_token_id=-1 lies outside vocab_size=512"),
    ({"eos_token_id": [2, 512]}, "eos_token_id=512 lies outside vocab_size=512"),
    ({"eos_token_id": []}, "eos_token_id must be int or a list of them, found []"),
    ({"eos_token_id": [2, "11"]}, "eos_token_id must be int or a list of them, found [2, '11']"),
    ({"eos_token_id": True}, "eos_token_id must be int or a list of them, found True"),
    ({"moe_latent_size": -1}, "moe_latent_size=-1 must not be negative"),
    ({"sliding_window": 4096}, "sliding_window=4096; the model has no such thing"),
    ({"quantization_config": {"bits": 8}}, "quantization_config={'bits': 8}; the model has no such thing"),
    ({"time_step_limit": {"__float__": "Infinity"}}, "time_step_limit must be two numbers, found inf"),
    ({"layers_block_type": "M"}, "layers_block_type must be a list of words, one per layer, found 'M'"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings=true, but Nemotron-TwoTower has separate heads"),
    ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act='gelu'; only 'silu' exists"),
]


@pytest.mark.parametrize("change, message", REFUSED, ids=lambda v: None if isinstance(v, str) else next(iter(v)))
def test_refusals(raw, change, message):
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_hf(raw | change)
    assert str(caught.value).startswith("model config: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sizes_of_absent_layers_do_not_matter(raw):
    sizes = {"n_groups": 3, "n_group": 3, "ssm_state_size": 0}
    changes = {"hybrid_override_pattern": "*-", "num_hidden_layers": 2}
    assert ModelConfig.from_hf(raw | changes | sizes).hybrid_override_pattern == "*-"


@pytest.mark.parametrize("value", [[], None, "text", 5])
def test_not_an_object(value):
    with pytest.raises(ValueError, match="expected a JSON object, found"):
        ModelConfig.from_hf(value)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file; a checkpoint folder holds a config.json"),
        (b"{", "not a readable JSON file"),
        (b"\xff\xfe", "not a readable JSON file"),
        (b"[" * 100_000, "not a readable JSON file"),
        (b"[]", "expected a JSON object, found list"),
        (b'{"vocab_size": 7}', "field 'hidden_size' is missing"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_model_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_folder_in_place_of_the_file(tmp_path):
    with pytest.raises(ValueError, match="not a readable JSON file"):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"context": "detached"}, "context='detached' is not one of 'frozen', 'trained', 'tied'"),
        ({"context_loss": True}, "context_loss=True with context='frozen'"),
    ],
)
def test_variants_that_make_no_sense(values, message):
    with pytest.raises(ValueError) as caught:
        Variant(**values)
    assert message in str(caught.value)


@pytest.mark.parametrize("context", ["trained", "tied"])
def test_variants_that_do(context):
    assert Variant(context=context, context_loss=True, bidirectional_mamba=True, time_conditioning=False)
