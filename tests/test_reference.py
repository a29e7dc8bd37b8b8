"""Parity with the published PyTorch code, from numbers recorded by running it on tiny random weights.

`data/README.md` says what each recorded array is. The tolerances are those that an exact float32 implementation
meets: logits 2e-4 absolute, loss 1e-5, gradients 1e-3 relative per tensor, every token and count equal.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from helpers import DATA
from twotower_jax import certify, parameters
from twotower_jax.checkpoint import huggingface
from twotower_jax.config import ModelConfig
from twotower_jax.diffusion import SamplingConfig, masked_loss_sum, token_log_probabilities
from twotower_jax.execution import Execution
from twotower_jax.generation import DenoiserRow, Settings, generate, score_ar, score_denoiser
from twotower_jax.layers.common import rms_norm
from twotower_jax.layers.experts import Router
from twotower_jax.parameters import bind, parameter_table
from twotower_jax.two_tower import TwoTower

LOGITS, LOSS, GRADIENT = 2e-4, 1e-5, 1e-3


@pytest.fixture(scope="module")
def model() -> TwoTower:
    """Both recorded models have this shape, so that what is compiled for one serves the other."""
    return TwoTower(ModelConfig.from_hf(json.loads((DATA / "tiny/checkpoint/config.json").read_text())))


class Recorded:
    def __init__(self, name: str, model: TwoTower):
        loaded, params = huggingface.load(DATA / name / "checkpoint")
        assert loaded.config == model.config
        self.model = model
        self.stored = params
        self.params = parameters.cast(parameter_table(model), params, jnp.float32)
        self.expected = load_file(DATA / name / "expected.safetensors")
        self.cases = json.loads((DATA / name / "generation.json").read_text())["cases"]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.expected[name]

    @functools.cached_property
    def cache(self):
        length = int(self["cache.prompt_len"])
        lengths = jnp.full(2, length, jnp.int32)
        return _prefill(self.params, self["context.ids"][:, :length], lengths, model=self.model)


@pytest.fixture(scope="module", params=["tiny", "tiny_bf16"])
def recorded(request, model) -> Recorded:
    return Recorded(request.param, model)


@functools.partial(jax.jit, static_argnames="model")
def _context(params, ids, *, model):
    model = bind(model, params)
    return model.context_logits(ids), model.context_tower.layer_outputs(ids)


@functools.partial(jax.jit, static_argnames="model")
def _prefill(params, ids, lengths, *, model):
    return bind(model, params).prefill(ids, lengths, 48)[1]


@functools.partial(jax.jit, static_argnames="model")
def _denoise(params, block, t, cache, *, model):
    model = bind(model, params)
    return model.denoise(block, t, cache), model.denoise(block, None, cache), model.time.embed(t), model.time(t)


@functools.partial(jax.jit, static_argnames=("model", "block_size"))
def _train(params, ids, masked, t, *, model, block_size):
    noisy = jnp.where(masked, model.config.mask_token_id, ids)
    logits, _ = bind(model, params).training_logits(ids, noisy, t, block_size)
    return masked_loss_sum(token_log_probabilities(logits, ids), masked).mean, logits


def assert_close(actual, expected, tolerance):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance)


def test_context_logits_and_hidden_states(recorded):
    logits, hidden = _context(recorded.params, recorded["context.ids"], model=recorded.model)
    assert_close(logits, recorded["context.logits"], LOGITS)
    assert len(hidden) == recorded.model.config.num_hidden_layers + 1
    for i, h in enumerate(hidden):
        assert_close(h, recorded[f"context.hidden.{i:02d}"], LOGITS)


@pytest.mark.whole
def test_caches(recorded):
    length = int(recorded["cache.prompt_len"])
    np.testing.assert_array_equal(recorded.cache.lengths, [length, length])
    checked = 0
    for i, layer in enumerate(recorded.cache.layers.by_layer()):
        kind = recorded.model.config.hybrid_override_pattern[i]
        if kind == "M":
            assert_close(layer.state, recorded[f"cache.{i:02d}.ssm"], LOGITS)
            assert_close(layer.conv.swapaxes(1, 2), recorded[f"cache.{i:02d}.conv"], LOGITS)
        elif kind == "*":
            assert_close(layer.key[:, :, :length], recorded[f"cache.{i:02d}.key"], LOGITS)
            assert_close(layer.value[:, :, :length], recorded[f"cache.{i:02d}.value"], LOGITS)
        else:
            assert layer is None
            continue
        checked += 2
    assert checked == sum(name.startswith("cache.") for name in recorded.expected) - 1


@pytest.mark.whole
def test_denoiser_with_and_without_time(recorded):
    block, t = recorded["denoiser.block"], recorded["denoiser.t"]
    timed, untimed, embedding, block_out = _denoise(recorded.params, block, t, recorded.cache, model=recorded.model)
    assert_close(timed, recorded["denoiser.logits"], LOGITS)
    assert_close(untimed, recorded["denoiser.logits_no_time"], LOGITS)
    assert_close(embedding, recorded["time.embedding"], LOGITS)
    assert_close(block_out, recorded["time.block"], LOGITS)


def test_training_logits_and_loss(recorded):
    ids, masked, t = (recorded[f"train.{name}"] for name in ("ids", "masked", "t"))
    # As long for both models: blocks after the last one change nothing before them.
    length = ids.shape[1]
    ids, masked = (np.pad(v, [(0, 0), (0, 64 - length)]) for v in (ids, masked))
    loss, logits = _train(
        recorded.params, ids, masked, t, model=recorded.model, block_size=int(recorded["train.block_size"])
    )
    assert_close(logits[:, :length], recorded["train.logits"], LOGITS)
    assert_close(loss, recorded["train.loss"], LOSS)


def test_gradients(model):
    recorded = Recorded("tiny", model)  # They were not recorded for the other one.
    found = certify.gradients(model, recorded.params, recorded.expected)
    for name, gradient in found.items():
        if name.startswith("context_"):
            assert not gradient.any(), f"{name}: the context is frozen"
    for name, gradient in load_file(DATA / "tiny/expected_gradients.safetensors").items():
        error = np.linalg.norm(found.pop(name) - gradient)
        assert error <= GRADIENT * np.linalg.norm(gradient), name
    # What the published code gives no gradient, such as an expert that no token chose, must have none here.
    assert all(not gradient.any() for gradient in found.values())


def _settings(mode: str, **sampling) -> Settings:
    new = sampling.pop("max_new_tokens", 24)
    return Settings(mode=mode, max_new_tokens=new, sampling=SamplingConfig(**sampling), ignore_eos=True, batch_size=3)


def _generate(recorded: Recorded, settings: Settings, **options):
    prompts = [case["prompt"] for case in recorded.cases]
    return list(generate(recorded.model, recorded.params, filled(prompts), settings, **options))[: len(prompts)]


def filled(prompts: list[list[int]]) -> list[list[int]]:
    """Three rows of which one has 64 tokens, so that what is compiled for one model serves the other."""
    longest = [*prompts, *[[1] * 64] * (3 - len(prompts))]
    assert len(longest) == 3 and max(map(len, longest)) == 64
    return longest


@pytest.mark.whole
@pytest.mark.parametrize("mode", ["ar", "mock_ar"])
def test_one_token_at_a_time(recorded, mode):
    for result, case in zip(_generate(recorded, _settings(mode)), recorded.cases, strict=True):
        assert result.tokens == case[mode]
        assert result.prompt_ids == case["prompt"]
        assert result.denoiser_evaluations == (24 if mode == "mock_ar" else 0)
        assert result.context_evaluations == 24
        assert result.finish_reason == "length"


@pytest.mark.whole(but=["[tiny]"])
def test_mask_diffusion_token_by_token_and_step_by_step(recorded, pytestconfig):
    runs = list(zip(*(case["mask_diffusion"] for case in recorded.cases), strict=True))
    if not pytestconfig.getoption("whole"):
        # Those of one block size share what is compiled.
        runs = [run for run in runs if run[0]["block_size"] == 16]
        assert {run[0]["steps_per_block"] for run in runs} == {16, 4}
    for expected in runs:
        names = ("max_new_tokens", "block_size", "steps_per_block", "confidence_threshold")
        settings = _settings("diffusion", **{name: expected[0][name] for name in names})
        for result, case in zip(_generate(recorded, settings, record_trace=True), expected, strict=True):
            assert result.tokens == case["tokens"]
            assert result.denoiser_evaluations == case["denoiser_evaluations"]
            steps = [{"block": s.block, "step": s.step, "t": s.t, "xt": s.xt} for s in result.trace]
            assert steps == case["trace"]


@pytest.mark.whole
def test_scores_are_the_recorded_log_probabilities(recorded):
    def log_softmax(logits):
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    def picked(logits, ids):
        return np.take_along_axis(log_softmax(logits), ids[..., None], -1)[..., 0]

    ids = recorded["context.ids"]
    scores = np.stack(score_ar(recorded.model, recorded.params, ids.tolist()))
    assert_close(scores, picked(recorded["context.logits"][:, :-1], ids[:, 1:]), LOGITS)

    ids, masked = recorded["train.ids"], recorded["train.masked"]
    size = int(recorded["train.block_size"])
    rows = [
        DenoiserRow(i.tolist(), m.tolist(), float(t), size)
        for i, m, t in zip(ids, masked, recorded["train.t"], strict=True)
    ]
    scores = np.stack(score_denoiser(recorded.model, recorded.params, rows))
    assert_close(scores, picked(recorded["train.logits"], ids), LOGITS)
    assert_close(-scores[masked].mean(), recorded["train.loss"], LOSS)


def test_no_routing_choice_differs_from_float64(recorded):
    """Every decision of every context layer on the recorded hidden states, against a float64 router."""
    config = recorded.model.config
    tensors = certify.by_tensor_name(recorded.model, recorded.params)
    for layer, kind in enumerate(config.hybrid_override_pattern):
        if kind != "E":
            continue
        prefix = f"context_tower.layers.{layer}."
        hidden = recorded[f"context.hidden.{layer:02d}"].reshape(-1, config.hidden_size)
        x = rms_norm(jnp.asarray(hidden), tensors[prefix + "norm.weight"], config.layer_norm_epsilon)
        weight, bias = tensors[prefix + "mixer.gate.weight"].T, tensors[prefix + "mixer.gate.e_score_correction_bias"]
        chosen = _choose(x, weight, bias, config=config)
        scores = 1 / (1 + np.exp(-(np.float64(x) @ np.float64(weight)))) + bias
        exact = np.argsort(-scores, axis=-1, kind="stable")[:, : config.num_experts_per_tok]
        np.testing.assert_array_equal(chosen, exact)


@functools.partial(jax.jit, static_argnames="config")
def _choose(x, weight, bias, *, config):
    router = Router(config, parameters.Scope(("",)))
    return bind(router, {"weight": weight, "bias": bias}).choose(x)


@pytest.mark.whole
def test_bfloat16_stays_close_to_float32(recorded):
    """Weights, activations and caches in bfloat16.

    The measure is the relative difference of a position's logits from the float32 numbers, at the median position:
    8 bits per layer, adding up over 16 layers, give some 2 %. (At the few positions where bfloat16 activations choose
    another expert, random weights give other logits altogether; the correlation over all positions bounds them.)
    """
    model = TwoTower(recorded.model.config, execution=Execution(dtype=jnp.bfloat16))
    params = parameters.cast(parameter_table(model), recorded.params, jnp.bfloat16)
    logits, _ = _context(params, recorded["context.ids"], model=model)
    exact = recorded["context.logits"]
    assert np.isfinite(logits).all()
    error = np.linalg.norm(logits - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert np.median(error) < 0.04
    assert np.corrcoef(np.ravel(logits), np.ravel(exact))[0, 1] > 0.95


@pytest.mark.whole
def test_generation_in_bfloat16(recorded):
    model = TwoTower(recorded.model.config, execution=Execution(dtype=jnp.bfloat16))
    params = parameters.cast(parameter_table(model), recorded.params, jnp.bfloat16)
    settings = dataclasses.replace(_settings("diffusion", block_size=8, steps_per_block=4), max_new_tokens=16)
    prompts = filled([case["prompt"] for case in recorded.cases])
    assert all(len(result.tokens) == 16 for result in generate(model, params, prompts, settings))
