"""A layer kind of this file's own, with a state, through everything the package does: not a line there knows of it."""

import dataclasses
import functools
import json

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower_jax.checkpoint.convert import convert
from twotower_jax.checkpoint.export import export
from twotower_jax.checkpoint.listing import infer_config
from twotower_jax.checkpoint.load import load
from twotower_jax.config import LayerFields, ModelConfig
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation import Settings, generate
from twotower_jax.generation.placement import TowerMeshes
from twotower_jax.kernels import Backends
from twotower_jax.layers import registry
from twotower_jax.layers.common import Linear
from twotower_jax.layers.mixer import Mixer, Run
from twotower_jax.mesh_check import check_fits
from twotower_jax.parameters import Scope, bind, constant, flatten, normal, parameter_table, use
from twotower_jax.sharding import MeshShape, make_mesh
from twotower_jax.train.loop import train
from twotower_jax.train.metrics import METRICS
from twotower_jax.train.setup import look
from twotower_jax.two_tower import Backbone

pytestmark = pytest.mark.usefixtures("compile_once", "average")
PROMPTS = [[5, 9, 17], [7, 30, 12, 41, 8]]


@flax.struct.dataclass
class Kept:
    """The cache: state (B, D) float32."""

    state: jax.Array


@flax.struct.dataclass
class Read:
    """A run's memory: what entered, how much of the state lasted and the state after each token, (B, L, D) each."""

    inputs: jax.Array
    rate: jax.Array
    states: jax.Array
    end: Kept


def recurrence(inputs, rate, state):
    """h_t = rate_t h_{t−1} + u_t after each token, (B, L, D), from h (B, D)."""

    def step(h, now):
        h = now[0] * h + now[1]
        return h, h

    return jnp.swapaxes(jax.lax.scan(step, state, (jnp.swapaxes(rate, 0, 1), jnp.swapaxes(inputs, 0, 1)))[1], 0, 1)


class Average(Mixer):
    """A decaying average of what `mix_in` makes of the tokens, one rate per channel, at first a field of the config."""

    cache_axes = Kept(("batch", None))

    def __init__(self, config, scope: Scope, backends: Backends, bidirectional: bool):
        shape, std = (config.hidden_size, config.hidden_size), config.hidden_size**-0.5
        self.mix_in = Linear(scope.child("mix_in"), shape, ("embed", "mlp"), normal(std), False)
        self.mix_out = Linear(scope.child("mix_out"), shape, ("mlp", "embed"), normal(std), False)
        start = constant(config.layer_fields["rate"])
        self.rate = scope.declare("rate", shape[:1], (None,), start, decay=False, float32=True)

    def _enter(self, x, run):
        """What enters the state and how much of it lasts; padding changes nothing."""
        inputs = self.mix_in(x).astype(jnp.float32)
        rate = jnp.broadcast_to(jax.nn.sigmoid(use(self.rate, jnp.float32)), inputs.shape)
        if run.document_start is not None:
            first = run.document_start == jnp.arange(x.shape[1])
            rate = jnp.where(first[..., None], 0.0, rate)
        return (inputs, rate) if run.lengths is None else self._only(inputs, rate, run.lengths)

    @staticmethod
    def _only(inputs, rate, lengths):
        real = (jnp.arange(inputs.shape[1]) < lengths[:, None])[..., None]
        return jnp.where(real, inputs, 0.0), jnp.where(real, rate, 1.0)

    def causal(self, x, cache=None, run=Run()):  # noqa: B008 (frozen)
        inputs, rate = self._enter(x, run)
        states = recurrence(inputs, rate, jnp.zeros_like(inputs[:, 0]) if cache is None else cache.state)
        return self.mix_out(states.astype(x.dtype)), Read(inputs, rate, states, Kept(states[:, -1]))

    def blockwise(self, x, memory, block_size, run=Run()):  # noqa: B008 (frozen)
        inputs, rate = self._enter(x, run)
        if isinstance(memory, Kept):
            before = memory.state[:, None]
        else:
            before = jnp.pad(memory.states[:, block_size - 1 :: block_size][:, :-1], [(0, 0), (1, 0), (0, 0)])
        blocks, rates = (v.reshape(-1, block_size, v.shape[-1]) for v in (inputs, rate))
        states = recurrence(blocks, rates, before.reshape(-1, before.shape[-1]))
        return self.mix_out(states.reshape(inputs.shape).astype(x.dtype)), None

    @classmethod
    def cache_shapes(cls, config, batch, capacity, dtype):
        return Kept(jax.ShapeDtypeStruct((batch, config.hidden_size), jnp.float32))

    def keep(self, cache, memory, before, lengths):
        return Kept(recurrence(*self._only(memory.inputs, memory.rate, lengths), cache.state)[:, -1])

    @classmethod
    def check_config(cls, config):
        if "rate" not in config.layer_fields:
            raise ValueError("layer_fields has no rate")

    @classmethod
    def check_mesh(cls, config, shape, sequence_length):
        if shape.sequence > 1:
            raise ValueError(f"mesh: sequence={shape.sequence}, but this layer reads a sequence on one device")

    @classmethod
    def flops(cls, config, keys, scans):
        return 4 * config.hidden_size**2

    @classmethod
    def infer(cls, shapes):
        return {"layer_fields": LayerFields(rate=0.5)} if "mix_in.weight" in shapes else None


@pytest.fixture(scope="module")
def average():
    registry.register("r", Average)
    yield
    registry.unregister("r")


@pytest.fixture(scope="module")
def settings(train_config):
    """Makes settings of a model whose units (the kind, an MLP) are stacked, with attention after them."""

    def make(**changes):
        short = {"batch_size": 8, "steps": 4, "checkpoint_every": 2, "log_every": 1, "validation_fraction": 0.0}
        config = train_config(**short, **changes)
        own = {"hybrid_override_pattern": "r-r-*", "layer_fields": {"rate": 0.25}}
        return dataclasses.replace(config, model=dict(config.model) | own)

    return make


@pytest.fixture(scope="module")
def trained(average, settings, compile_once, tmp_path_factory):
    """A pretrained backbone and a denoiser trained on it: settings and workdirs."""
    folder = tmp_path_factory.mktemp("runs")
    train(settings(), folder / "backbone", print)
    config = settings(objective="denoiser", init_from=str(folder / "backbone"))
    train(config, folder / "denoiser", print)
    return config, folder


def assert_same_bits(one, other):
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    for path, array in one.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(other[path]), err_msg="/".join(path))


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / METRICS).read_text().splitlines()]


@pytest.mark.whole
def test_a_run_that_was_interrupted_goes_on_bit_for_bit(trained, tmp_path):
    config, folder = trained
    asked = iter(["", "", "SIGTERM"])
    stopped = train(config, tmp_path / "run", print, stop=lambda: next(asked))
    assert 0 < stopped.step < 4
    assert train(config, tmp_path / "run", print).step == 4
    assert_same_bits(load(tmp_path / "run").params, load(folder / "denoiser").params)
    # What trained is the denoiser, the kind's own parameters among it; both units are stacked.
    before, after = (flatten(load(folder / name).params) for name in ("backbone", "denoiser"))
    path = ("denoiser_tower", "segment_0", "layer_0", "mixer", "rate")
    assert after[path].shape == (2, 24) and not np.array_equal(before[path], after[path])
    assert np.array_equal(before["context_tower", *path[1:]], after["context_tower", *path[1:]])


@pytest.mark.whole
def test_it_divides_over_eight_devices(trained, tmp_path):
    config, folder = trained
    mesh = MeshShape(data=2, fsdp=2, tensor=2)
    divided = dataclasses.replace(config, mesh=mesh)
    train(divided, tmp_path / "run", print)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(folder / "denoiser"), rtol=1e-5)
    model = load(folder / "denoiser").model.config
    with pytest.raises(ValueError, match="mesh: sequence=2, but this layer"):
        check_fits(MeshShape(sequence=2), model, 8, 32, 8)


def test_every_mode_says_what_whole_passes_say(trained, pytestconfig):
    all_modes = pytestconfig.getoption("whole")
    model, params, _ = load(trained[1] / "denoiser")
    size, new, capacity = 4, 8, 24

    def padded(text):
        return jnp.asarray([text + [0] * (capacity - len(text))])

    whole = jax.jit(lambda params, ids: bind(model, params).context_logits(ids))

    def context(text):
        return np.asarray(whole(params, padded(text)))[0, len(text) - 1]

    def tokens(mode, placement=TowerMeshes()):  # noqa: B008 (frozen)
        sampling = SamplingConfig(block_size=size, steps_per_block=1)
        chosen = Settings(mode=mode, max_new_tokens=new, sampling=sampling, batch_size=2, ignore_eos=True)
        return [result.tokens for result in generate(model, params, PROMPTS, chosen, placement=placement)]

    expected = []
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(new):
            text.append(int(np.argmax(context(text))))
        expected.append(text[len(prompt) :])
    assert tokens("ar") == expected
    if all_modes:
        assert tokens("speculative") == expected

    @functools.partial(jax.jit, static_argnames="causal")
    def after(params, ids, length, block, causal):
        bound = bind(model, params)
        _, cache = bound.prefill(ids, length, capacity)
        return bound.mock_ar_logits(block, cache) if causal else bound.denoise(block, jnp.ones(1), cache)

    def denoiser(text, block, causal):
        """The denoiser's logits for `block` after a text, from a cache made in one pass."""
        return np.array(after(params, padded(text), jnp.asarray([len(text)]), jnp.asarray([block]), causal))[0]

    mask, diffusion, mock = model.config.mask_token_id, [], []
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(new // size):
            logits = denoiser(text, [mask] * size, False)
            logits[:, mask] = -np.inf
            text += np.argmax(logits, axis=-1).tolist()
        diffusion.append(text[len(prompt) :])
    assert tokens("diffusion") == diffusion
    if all_modes:
        for prompt in PROMPTS:
            text = list(prompt)
            for _ in range(new):
                text.append(int(np.argmax(denoiser(text[:-1], text[-1:], True)[0])))
            mock.append(text[len(prompt) :])
        assert tokens("mock_ar") == mock
        # A denoiser on a device of its own is told what changed in the state.
        devices = [make_mesh(MeshShape(), [device]) for device in jax.devices()[:2]]
        assert tokens("diffusion", TowerMeshes(*devices)) == diffusion


def test_blocks_in_training_are_blocks_after_a_cache(trained):
    model, params, _ = load(trained[1] / "denoiser")
    rng = np.random.default_rng(0)
    clean, noisy = (rng.integers(0, model.config.vocab_size, (2, 12)).astype(np.int32) for _ in range(2))
    t = jnp.float32([0.3, 0.8])
    together = jax.jit(lambda params: bind(model, params).training_logits(clean, noisy, t, 4)[0])(params)

    @jax.jit
    def after(params, length, block):
        bound = bind(model, params)
        _, cache = bound.prefill(clean, length, 12)
        return bound.denoise(block, t, cache)

    for start in (4, 8):
        alone = after(params, jnp.full(2, start), noisy[:, start : start + 4])
        np.testing.assert_allclose(together[:, start : start + 4], alone, atol=1e-5)


def test_export_and_conversion_give_every_bit_back(trained, tmp_path):
    workdir = trained[1] / "denoiser"
    export(workdir, tmp_path / "folder", "both", 1 << 30)
    convert(tmp_path / "folder", tmp_path / "converted")
    assert_same_bits(load(tmp_path / "converted").params, load(workdir).params)
    export(tmp_path / "converted", tmp_path / "again", "both", 1 << 30)
    for file in (tmp_path / "folder").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_its_field_of_the_config_goes_along(trained, settings, tmp_path):
    workdir = trained[1] / "denoiser"
    config = load(workdir).model.config
    saved = json.loads((workdir / "config.json").read_text())["model"]
    assert config.layer_fields == saved["layer_fields"] == {"rate": 0.25}
    assert ModelConfig.from_hf(config.to_hf()) == config and hash(ModelConfig.from_hf(config.to_hf())) == hash(config)
    export(workdir, tmp_path / "folder", "both", 1 << 30)
    convert(tmp_path / "folder", tmp_path / "converted")
    assert load(tmp_path / "folder").model.config == load(tmp_path / "converted").model.config == config
    other = dataclasses.replace(settings(), model=dict(settings().model) | {"layer_fields": {"rate": 0.5}})
    with pytest.raises(ValueError, match=r"model.layer_fields.rate 0.25 -> 0.5"):
        look(other, trained[1] / "backbone")
    for fields, message in ({}, "layer_fields has no rate"), ({"rate": [1]}, "layer_fields must name numbers"):
        with pytest.raises(ValueError, match=message):
            ModelConfig.from_hf(config.to_hf() | {"layer_fields": fields})


def test_its_tensors_tell_its_kind(trained):
    config = load(trained[1] / "denoiser").model.config
    table = parameter_table(Backbone(config)).values()
    tensors = {str(name): list(p.tensor_shape) for p in table for name in p.tensors.flat}
    prefix = "backbone."
    found = infer_config({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    assert found.hybrid_override_pattern == "r-r-*"


def test_a_letter_is_taken_once(average):
    registry.register("r", Average)  # The same again changes nothing, as where a config is imported twice.
    with pytest.raises(ValueError, match="layer_kind 'M' is registered already, by"):
        registry.register("M", Average)
    with pytest.raises(ValueError, match="one letter, not 'rr'"):
        registry.register("rr", Average)
