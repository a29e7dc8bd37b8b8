"""Members of the Nemotron-H family as `transformers` 5.24 saves them: with experts, dense, with latent experts.

`recorded/family` holds what it computed in float32: logits within 2e-4, greedy tokens equal.
"""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers import DATA, run_command
from twotower_jax.checkpoint import config_file, huggingface, listing
from twotower_jax.checkpoint.convert import convert
from twotower_jax.checkpoint.export import export
from twotower_jax.checkpoint.load import load
from twotower_jax.data import load_tokenizer
from twotower_jax.data.end_tokens import end_tokens
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.files import CheckpointError
from twotower_jax.generation import Settings, generate
from twotower_jax.kernels.numerics.quantized import Quantized, as_array
from twotower_jax.layers import registry
from twotower_jax.layers.experts import Experts
from twotower_jax.parameters import Scope, bind, count, flatten, parameter_table, unflatten
from twotower_jax.quantization import METHODS
from twotower_jax.sharding import MeshShape, batch_sharding, make_mesh, stored_sharding
from twotower_jax.train.config import base_config, freeze
from twotower_jax.train.loop import train
from twotower_jax.two_tower import Backbone

FAMILY = DATA / "family"
KINDS = ("moe", "dense", "latent")
LOGITS = 2e-4
BLOCK, THRESHOLD = 8, 0.3  # So that some steps commit more than one token.
CONFIGS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


class Member:
    """One of the three, loaded."""

    def __init__(self, kind: str):
        self.kind, self.folder = kind, FAMILY / kind
        self.model, self.params = huggingface.load(self.folder)
        self.cases = json.loads((FAMILY / f"{kind}.generation.json").read_text())

    def logits(self, params, ids):
        return np.asarray(self._logits(params, ids))

    @functools.cached_property
    def _logits(self):
        return jax.jit(lambda p, ids: bind(self.model, p).context_logits(ids))

    def denoise(self, clean, noisy, t):
        return self._denoise(self.params, clean[None], noisy[None], t)[0]

    @functools.cached_property
    def _denoise(self):
        return jax.jit(lambda p, *a: bind(self.model, p).training_logits(*a, BLOCK)[0])

    def generate(self, prompts=None, **settings):
        sampling = SamplingConfig(block_size=BLOCK, steps_per_block=BLOCK, confidence_threshold=THRESHOLD)
        settings = Settings(**{"max_new_tokens": 16, "batch_size": 2, "sampling": sampling} | settings)
        return list(generate(self.model, self.params, prompts or [case["prompt"] for case in self.cases], settings))


@pytest.fixture(scope="module", params=KINDS)
def member(request) -> Member:
    return Member(request.param)


def test_logits(member):
    expected = load_file(FAMILY / f"{member.kind}.expected.safetensors")
    np.testing.assert_allclose(member.logits(member.params, expected["ids"]), expected["logits"], rtol=0, atol=LOGITS)


@pytest.mark.whole
def test_tokens_in_four_modes(member):
    """Both towers compute what the one computed, so that mock_ar and speculative give the tokens of ar as well;
    diffusion gives what a literal loop over the forward pass of training does."""
    expected = [case["ar"] for case in member.cases]
    for mode in ("ar", "mock_ar", "speculative"):
        assert [result.tokens for result in member.generate(mode=mode, ignore_eos=True)] == expected, mode
    prompts = [case["prompt"][: len(case["prompt"]) // BLOCK * BLOCK] for case in member.cases]
    found = member.generate(prompts, ignore_eos=True)
    for result, prompt in zip(found, prompts, strict=True):
        tokens, evaluations = denoised(member, prompt, 16)
        assert (result.tokens, result.denoiser_evaluations) == (tokens, evaluations)


def denoised(member, prompt: list[int], new: int) -> tuple[list[int], int]:
    """Tokens and evaluations of diffusion as the maths has it, by the forward pass of training, without a cache.

    Needs a prompt of whole blocks; as many steps as a block has tokens, so that one commit a step is the least.
    """
    mask, evaluations = member.model.config.mask_token_id, 0
    tokens, length = list(prompt), 32  # What comes later in it is not seen.
    while len(tokens) < len(prompt) + new:
        block = np.full(BLOCK, mask)
        while (masked := block == mask).any():
            clean = np.array([*tokens, *[0] * (length - len(tokens))])
            noisy = np.array([*tokens, *block, *[0] * (length - len(tokens) - BLOCK)])
            t = np.float32([masked.mean()])
            logits = np.array(member.denoise(clean, noisy, t)[len(tokens) :][:BLOCK], np.float64)
            logits[:, mask] = -np.inf
            probabilities = np.exp(logits - logits.max(-1, keepdims=True))
            probabilities /= probabilities.sum(-1, keepdims=True)
            confidence = np.where(masked, probabilities.max(-1), -1)
            commit = (confidence > THRESHOLD) | (np.arange(BLOCK) == confidence.argmax())
            block = np.where(commit & masked, logits.argmax(-1), block)
            evaluations += 1
        tokens += block.tolist()
    return tokens[len(prompt) :], evaluations


@pytest.mark.whole
def test_rows_end_at_any_of_the_end_tokens(member):
    assert member.model.config.eos_token_ids == (2, 11)
    first, second = (case["ar"] for case in member.cases)
    ends = member.generate(mode="ar", eos=(first[5], second[3]))
    for result, tokens in zip(ends, (first, second), strict=True):
        end = min(i for i, token in enumerate(tokens) if token in (first[5], second[3]))
        assert (result.tokens, result.finish_reason) == (tokens[: end + 1], "eos")


def test_there_and_back_bit_for_bit(member, tmp_path, capsys):
    """Folder, converted checkpoint, folder: tensors, dtypes and every other file's bytes."""
    convert(member.folder, tmp_path / "converted", verify=True)
    said = capsys.readouterr().err
    left_out = "left out 2 tensors of multi-token prediction (mtp.*)"
    assert (left_out in said) == (member.kind == "latent") and said.count("mtp") <= 1
    for source in (member.folder, tmp_path / "converted"):
        for tower in ("context", "denoiser"):
            output = tmp_path / f"{source.name}-{tower}"
            export(source, output, tower, 1 << 18)
            for name in CONFIGS:
                assert (output / name).read_bytes() == (member.folder / name).read_bytes(), name
            wanted = load_file(member.folder / "model.safetensors")
            found = {k: v for file in output.glob("*.safetensors") for k, v in load_file(file).items()}
            assert found.keys() == {name for name in wanted if not name.startswith("mtp.")}
            for name, tensor in found.items():
                assert tensor.dtype == wanted[name].dtype and tensor.tobytes() == wanted[name].tobytes(), name


def test_both_towers_of_a_single_one(member, tmp_path):
    """config.json is the one that came, but for the architecture."""
    export(member.folder, tmp_path / "both", "both", 1 << 30)
    came, wrote = (json.loads((folder / "config.json").read_text()) for folder in (member.folder, tmp_path / "both"))
    assert wrote == came | {"architectures": ["NemotronHTwoTowerForCausalLM"]}
    model, params = huggingface.load(tmp_path / "both")
    assert model.config == member.model.config
    for path, array in flatten(member.params).items():
        np.testing.assert_array_equal(array, flatten(params)[path])


@pytest.mark.whole
def test_training_starts_from_it(tmp_path):
    """Two steps; text is closed with the first end token, and the workdir keeps them all."""
    text, folder = tmp_path / "text.jsonl", FAMILY / "latent"
    text.write_text("".join(json.dumps({"text": f"document {i} " * 9}) + "\n" for i in range(12)))
    config = base_config(model={"hidden_size": 8, "hybrid_override_pattern": "-", "intermediate_size": 8} | UNUSED)
    config.update(init_from=str(folder), data=str(text), objective="denoiser", steps=2, sequence_length=32)
    config.update(batch_size=4, block_size=8, validation_fraction=0.0, checkpoint_every=2, log_every=1)
    train(freeze(config), tmp_path / "run")
    loaded = load(tmp_path / "run")
    assert loaded.model.config == config_file.read_config(folder)
    assert end_tokens(tmp_path / "run", load_tokenizer(tmp_path / "run")) == (2, 11)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [np.isfinite(row["loss"]) for row in rows] == [True, True]
    export(tmp_path / "run", tmp_path / "out", "denoiser", 1 << 30)
    assert huggingface.open_folder(tmp_path / "out").config == loaded.model.config


UNUSED = dict.fromkeys(("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups"), 1)


@pytest.mark.whole
def test_the_command_s_end_tokens(tmp_path):
    """--eos in place of the checkpoint's."""
    case, *_ = json.loads((FAMILY / "moe.generation.json").read_text())
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"ids": case["prompt"]}))
    command = ["generate", f"--checkpoint={FAMILY / 'moe'}", "--mode=ar"]
    command += [f"--prompts={tmp_path / 'prompts.jsonl'}", f"--output={tmp_path / 'out.jsonl'}", "--max_new_tokens=6"]
    done = run_command(*command, f"--eos=7,{case['ar'][2]}")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert (row["tokens"], row["finish_reason"]) == (case["ar"][:3], "eos")
    done = run_command(*command, "--eos=300")
    assert (done.returncode, done.stderr) == (2, "error: eos=300 lies outside vocab_size=300\n")
    # Scored, a row counts as far as the end token, which a row that was cut there is scored as.
    rows = [case["ar"], case["ar"][:3], case["ar"][:2]]
    rows = "".join(json.dumps({"prompt_ids": case["prompt"], "tokens": tokens}) + "\n" for tokens in rows)
    (tmp_path / "rows.jsonl").write_text(rows)
    command = ["score", f"--checkpoint={FAMILY / 'moe'}", "--objective=generations"]
    command += [f"--input={tmp_path / 'rows.jsonl'}", f"--output={tmp_path / 'scores.jsonl'}"]
    done = run_command(*command, f"--eos=7,{case['ar'][2]}")
    assert done.returncode == 0 and "under the context tower, 8 tokens" in done.stderr, done.stderr
    whole, cut, shorter = map(json.loads, (tmp_path / "scores.jsonl").read_text().splitlines())
    assert whole == cut != shorter


# End tokens of a folder.


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """The latent model, but for the weights."""
    for name in CONFIGS:
        shutil.copyfile(FAMILY / "latent" / name, tmp_path / name)
    return tmp_path


def _change(path: pathlib.Path, **changes) -> None:
    values = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not ...}
    path.write_text(json.dumps(values))


def test_whose_end_tokens_count(folder):
    tokenizer = load_tokenizer(folder)

    def found() -> tuple[int, ...]:
        return config_file.read_config(folder).eos_token_ids

    _change(folder / "generation_config.json", eos_token_id=[2, 38])
    assert found() == end_tokens(folder, tokenizer) == (2, 38)
    for nothing in (None, ...):
        _change(folder / "generation_config.json", eos_token_id=nothing)
        assert found() == end_tokens(folder, tokenizer) == (2, 11)
    (folder / "generation_config.json").unlink()
    _change(folder / "config.json", eos_token_id=11)
    assert found() == end_tokens(folder, tokenizer) == (11,)
    # For a tokenizer alone, its own; without one the published model's.
    (folder / "config.json").unlink()
    assert end_tokens(folder, tokenizer) == (tokenizer.token_to_id("<|im_end|>"),)
    _change(folder / "tokenizer_config.json", eos_token={"content": "<s>"})
    assert end_tokens(folder, tokenizer) == (1,)
    (folder / "tokenizer_config.json").unlink()
    assert end_tokens(folder, tokenizer) == (2,)


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"eos_token_id": [2, 300]}', "eos_token_id=300 lies outside vocab_size=300"),
        ('{"eos_token_id": "2"}', "eos_token_id must be int or a list of them, found '2'"),
        ("[]", "expected a JSON object, found list"),
        ("{", "not valid JSON"),
    ],
)
def test_end_tokens_that_are_none(folder, content, message):
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        config_file.read_config(folder)
    assert str(caught.value).startswith(f"{folder / 'generation_config.json'}: ") and message in str(caught.value)


# Tensors.


def test_names_of_other_versions(tmp_path):
    """`model.` for `backbone.`, and `embedding.` for `embeddings.`."""
    shutil.copytree(FAMILY / "moe", tmp_path / "moe")
    tensors = load_file(FAMILY / "moe/model.safetensors")
    renamed = {name.replace("backbone.embeddings.", "model.embedding."): v for name, v in tensors.items()}
    renamed = {name.replace("backbone.", "model."): v for name, v in renamed.items()}
    save_file(renamed, tmp_path / "moe/model.safetensors")
    model, params = huggingface.load(tmp_path / "moe")
    _, expected = huggingface.load(FAMILY / "moe")
    for path, array in flatten(expected).items():
        np.testing.assert_array_equal(array, flatten(params)[path])


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_of_tensors_is_enough(kind, tmp_path):
    """The layers and widths, latent ones among them, follow from names and shapes."""
    shapes = {name: list(v.shape) for name, v in load_file(FAMILY / kind / "model.safetensors").items()}
    path = tmp_path / "tensors.json"
    path.write_text(json.dumps({"tensors": shapes}))
    found, config = listing.read_list(path).config, config_file.read_config(FAMILY / kind)
    for name in ("hybrid_override_pattern", "mamba_inner", "conv_channels", "expert_input_size"):
        assert getattr(found, name) == getattr(config, name), name
    assert found.moe_latent_size == (24 if kind == "latent" else 0)
    text = listing.dry_run(path, "identity")
    assert "nothing missing, nothing left over" in text


def test_nano_4b():
    path = DATA / "nano4b/backbone_tensors.json.gz"
    config = listing.read_list(path).config
    assert config.hybrid_override_pattern == "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"
    assert count(parameter_table(Backbone(config))) == 3_973_556_832
    text = listing.dry_run(path, "identity")
    assert "263 tensors, 3,973,556,832 parameters; nothing missing, nothing left over" in text


# Latent experts.


def test_operations_of_latent_experts():
    """By hand: router, fc1, fc2, two products of each chosen expert, two of the shared one."""
    config = config_file.read_config(FAMILY / "latent")
    d, z, e, k, f, shared = 48, 24, 12, 4, 40, 56
    flops = registry.kind("E").flops
    assert flops(config, 0.0, 1) == 2 * d * e + 2 * (d * z + z * d) + k * 2 * (z * f + f * z) + 4 * d * shared
    plain = dataclasses.replace(config, moe_latent_size=0)
    assert flops(plain, 0.0, 1) == 2 * d * e + k * 4 * d * f + 4 * d * shared


@pytest.mark.whole
@pytest.mark.parametrize("shape", [{"expert": 2, "tensor": 2}, {"fsdp": 4}], ids=["expert-tensor", "fsdp"])
def test_latent_experts_on_a_mesh(small_config, random_params, shape):
    """Outputs and every gradient are those of one device."""
    config = small_config("E", hidden_size=16, moe_latent_size=8, mlp_bias=True, moe_shared_expert_intermediate_size=16)
    experts = Experts(config, Scope(("",)))
    params, table = random_params(experts), parameter_table(experts)
    x = np.float32(np.random.default_rng(0).standard_normal((4, 4, 16)))

    def loss(params, x):
        y = bind(experts, params)(x)
        return jax.numpy.sum(y * jax.numpy.cos(jax.numpy.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y

    gradients = jax.jit(jax.grad(loss, has_aux=True, argnums=(0, 1)))
    expected = gradients(params, x)
    mesh = make_mesh(MeshShape(**shape), jax.devices()[:4])
    places = unflatten({path: stored_sharding(mesh, p.axes, p.shape) for path, p in table.items()})
    with jax.set_mesh(mesh):
        found = gradients(jax.device_put(params, places), jax.device_put(x, batch_sharding(mesh)))
    named = flatten(expected[0][0])
    assert np.any(named["fc1_latent_proj", "weight"]) and np.any(named["fc2_latent_proj", "weight"])
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1e-6, np.max(np.abs(other))))


@pytest.mark.whole
def test_latent_experts_in_fewer_bits():
    """Projections and experts in 8 bits compute what their values and scales say."""
    latent = Member("latent")
    _, params = huggingface.load(latent.folder, quantize=METHODS["int8"])
    values = flatten(params)
    fewer = [v for path, v in values.items() if "latent" in path[-2] or path[-1] in ("up", "down")]
    # In each tower two stretches of layers with experts, four matrices each.
    assert len(fewer) == 16 and all(isinstance(v, Quantized) for v in fewer)
    whole = {path: as_array(v, np.float32) if isinstance(v, Quantized) else v for path, v in values.items()}
    ids = load_file(FAMILY / "latent.expected.safetensors")["ids"]
    expected = latent.logits(unflatten(whole), ids)
    np.testing.assert_allclose(latent.logits(params, ids), expected, rtol=0, atol=LOGITS)
    assert np.abs(latent.logits(latent.params, ids) - expected).max() > 100 * LOGITS
