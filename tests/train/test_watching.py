"""What the person watching a run is told: arithmetic, memory, utilization, profiles, samples, TensorBoard."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tensorboardX.proto.event_pb2 import Event

from twotower_jax.config import Variant
from twotower_jax.diffusion import LossSum
from twotower_jax.execution import Execution
from twotower_jax.parameters import bind, initialize, parameter_table
from twotower_jax.train import flops, metrics, samples, watch
from twotower_jax.train.config import TrainConfig, base_config, freeze
from twotower_jax.train.metrics import METRICS, LossWindow, MetricsWriter, duration, last_row, progress_line
from twotower_jax.two_tower import Backbone, TwoTower

MODEL = {
    "hidden_size": 24,
    "hybrid_override_pattern": "ME*-",
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 40,
}


def config_of(**changes) -> TrainConfig:
    config = base_config(MODEL)
    config.update({"sequence_length": 32, "block_size": 8, "batch_size": 3} | changes)
    return freeze(config)


# Arithmetic.


@pytest.mark.parametrize("kind", ["M", "E", "*", "-"])
def test_the_products_of_a_layer_are_those_of_its_parameters(kind, small_config):
    config = small_config(kind)
    layer = [p for path, p in parameter_table(Backbone(config)).items() if path[0] == "tower" and "layer_0" in path]
    # Every weight that multiplies does so once per token; of the experts' only the share that a token uses.
    used = 0.0
    for parameter in layer:
        if parameter.decay:  # the matrices, and the convolution
            share = config.num_experts_per_tok / config.n_routed_experts if "experts" in parameter.axes else 1
            used += np.prod(parameter.shape) * share
    more = {
        # The recurrence: a product for every entry of the state, once into it and once out of it.
        "M": 4 * config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size,
        "*": 4 * config.num_attention_heads * config.head_dim * 10,
    }
    assert flops.tower_flops(config, keys=10) == 2 * used + more.get(kind, 0)


def products(jaxpr) -> int:
    """Two for every multiply-add of the matrix products of a program, those inside its parts included."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * int(np.prod(equation.outvars[0].aval.shape)) * int(np.prod([left[i] for i in contracted]))
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else [value]:
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    assert equation.primitive.name != "scan" or equation.params["length"] == 1
                    total += products(part)
    return total


def test_a_dense_model_multiplies_as_often_as_counted(small_config):
    config = small_config("--")
    model = Backbone(config, Execution(scan_layers=False))
    params = jax.eval_shape(lambda: initialize(parameter_table(model), jax.random.key(0)))
    ids = jax.ShapeDtypeStruct((3, 32), jnp.int32)
    traced = jax.make_jaxpr(lambda params, ids: bind(model, params).logits(ids))(params, ids)
    head = 2 * config.hidden_size * config.vocab_size
    assert products(traced.jaxpr) == 3 * 32 * (flops.tower_flops(config, keys=0) + head)


def test_a_step_counts_what_trains_three_times():
    def step(objective="denoiser", **variant):
        config = config_of(objective=objective, variant=variant)
        return flops.step_flops(config, config.model_config(50), 8) / config.batch_size

    model = config_of().model_config(50)
    causal, blockwise, head = flops.tower_flops(model, 33 / 2), flops.tower_flops(model, 20), 2 * 24 * 50
    time = 3 * 2 * (256 * 24 + 24 * 24 + 24 * 72)
    assert step("autoregressive") == 32 * 3 * (causal + head)
    assert step() == pytest.approx(32 * (causal + 3 * (blockwise + head)) + time)
    assert step(time_conditioning=False) == pytest.approx(step() - time)
    assert step(context="trained") == pytest.approx(step() + 32 * 2 * causal)
    assert step(context="trained", context_loss=True) == pytest.approx(step() + 32 * (2 * causal + 3 * head))
    scan = 2 * 4 * (32 + 2 * 2 * 8) + 4 * 32 * 8  # a convolution and a recurrence more
    assert step(bidirectional_mamba=True) == pytest.approx(step() + 32 * 3 * scan)


def test_keys_are_counted_on_average():
    length, size = 32, 8
    causal = sum(i + 1 for i in range(length)) / length
    blockwise = sum((i // size) * size + size for i in range(length)) / length
    assert (causal, blockwise) == ((length + 1) / 2, (length + size) / 2)


def test_the_peak_is_known_given_or_left_out():
    here = jax.devices()[:2]
    assert flops.peak_flops(config_of(), here) is None
    assert flops.peak_flops(config_of(peak_flops=2e9), here) == 4e9

    class Device:
        device_kind = "NVIDIA H200"

    assert flops.peak_flops(config_of(), [Device()] * 4) == 4 * 989e12


# Memory and profiles.


def test_memory_is_counted_by_what_lies_on_a_device():
    mesh = jax.sharding.AbstractMesh((4,), ("x",))
    whole, parts = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((), ("x",)))
    tree = {
        "a": jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=parts),
        "b": jax.ShapeDtypeStruct((3,), jnp.bfloat16, sharding=whole),
    }
    assert watch.bytes_per_device(tree) == 16 + 6
    assert watch.bytes_per_device(jnp.ones((2, 3))) == 24
    assert watch.memory_line(tree, tree, {}) == "memory of each device: 44 bytes: 22 bytes trained weights, " \
        "22 bytes optimizer"  # fmt: skip
    assert [watch.readable_bytes(n) for n in (12, 1536, 3 << 30)] == ["12 bytes", "1.5 KiB", "3.0 GiB"]


def test_a_profile_holds_the_steps_asked_for(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(("start", folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with watch.Profiler(watch.Profile.parse("2:3", tmp_path)) as profiler:
        for step in range(1, 6):
            profiler.before(step)
            calls.append(step)
            said = profiler.after(step, jnp.ones(1))
            assert bool(said) == (step == 3)
    assert calls == [1, ("start", tmp_path), 2, 3, "stop", 4, 5]
    for wrong in ("3", "3:2", "0:1", "a:b", ":"):
        with pytest.raises(ValueError, match="is not FIRST:LAST"):
            watch.Profile.parse(wrong, tmp_path)


# Rows.


def test_a_row_goes_to_tensorboard_and_says_nothing_that_is_not_json(tmp_path):
    with MetricsWriter(tmp_path, first_step=3) as writer:
        writer.write({"step": 3, "loss": None, "grad_norm": 2.5, "bins": [0.5, None]})
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None
    (file,) = (tmp_path / "tensorboard").iterdir()
    events, content = [], file.read_bytes()
    while content:  # length, its checksum, the event, its checksum
        length = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    assert events[1].step == 3 and events[1].session_log.status == 1
    assert {v.tag: v.simple_value for v in events[2].summary.value} == {"grad_norm": 2.5, "bins/00": 0.5}


def test_the_progress_line_says_what_there_is():
    row = {"step": 7, "loss": None, "learning_rate": 1e-3, "grad_norm": None, "tokens_per_second": 1234.5,
           "skipped_steps": 2, "model_flops_utilization": 0.412}  # fmt: skip
    assert progress_line(row, 100, 75) == (
        "step   7/100  loss not finite  lr 1.00e-03  grad norm not finite  1,234 tokens/s  MFU 41.2%  2 skipped  "
        "1:15 left"
    )


def test_weights_and_biases_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb_project='mine' needs the package wandb"):
        metrics.import_wandb("mine")

    class Recorder:
        def __init__(self):
            self.calls = []

        def init(self, **settings):
            self.calls.append(settings)
            return self

        def log(self, scalars, step):
            self.calls.append((step, scalars))

        def finish(self, exit_code):
            self.calls.append(exit_code)

    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    for step in (1, 2):
        with MetricsWriter(tmp_path, step, "mine", {"seed": 0}) as writer:
            writer.write({"step": step, "loss": 0.5})
    first, second = recorder.calls[0], recorder.calls[3]
    assert first["project"] == "mine" and first["config"] == {"seed": 0} and first["resume"] == "allow"
    assert first["id"] == second["id"] and recorder.calls[1:3] == [(1, {"loss": 0.5}), 0]


def test_samples_are_written_and_survive_a_model_out_of_bounds(tmp_path, small_config, monkeypatch):
    class Tokenizer:
        def decode(self, ids):
            return "".join(chr(97 + i % 26) for i in ids)

    monkeypatch.setattr(samples, "encode", lambda tokenizer, texts: [np.arange(4, 4 + len(t)) for t in texts])
    model = TwoTower(small_config("-"), Variant(time_conditioning=False))
    params = initialize(parameter_table(model), jax.random.key(0))
    watcher = samples.Samples(pathlib.Path(tmp_path), Tokenizer(), samples.Sampler(model, 6), ("abc", "de"))
    said = []
    for step in (4, 8):
        watcher.write(step, params, 4, said.append)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in rows] == [(4, "abc"), (4, "de"), (8, "abc"), (8, "de")]
    assert [row["text"] for row in rows[:2]] == [row["text"] for row in rows[2:]] and len(rows[0]["text"]) == 6
    assert said[0] == f"sample: abc|{rows[0]['text']}"
    broken = jax.tree.map(lambda a: a * jnp.nan, params)
    watcher.write(12, broken, 4, said.append)
    assert said[-1].startswith("no samples at step 12: ")


def test_losses_of_several_batches_add_up_and_survive_a_checkpoint():
    def loss(total, count):
        return LossSum(np.float32(total), np.int32(count))

    weights = {"masked_loss": 1.0, "context_loss": 0.5}
    window = LossWindow(weights)
    bins = LossSum(np.array([1.0, 0.0], np.float32), np.array([2, 0], np.int32))
    window.add({"masked_loss": loss(6.0, 2), "context_loss": loss(1.0, 1), "by_noise_level": bins})
    window = LossWindow(weights, json.loads(json.dumps(window.get_state())))
    window.add({"masked_loss": loss(2.0, 2), "context_loss": loss(2.0, 1), "by_noise_level": bins})
    assert window.means() == {
        "loss": 2.75,
        "masked_loss": 2.0,
        "context_loss": 1.5,
        "loss_by_noise_level": [0.5, None],
    }
    window.add({"by_noise_level": LossSum(np.ones(3), np.ones(3))})
    assert window.means()["loss_by_noise_level"] == [1.0, 1.0, 1.0]


def test_half_a_line_of_a_killed_run_is_cut_off(tmp_path):
    assert last_row(tmp_path) is None
    (tmp_path / METRICS).write_text('{"step": 1}\n{"st')
    with MetricsWriter(tmp_path, first_step=2) as writer:
        writer.write({"step": 2, "loss": 1.0, "bins": [0.5, None]})
    rows = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert rows == [{"step": 1}, {"step": 2, "loss": 1.0, "bins": [0.5, None]}]
    assert last_row(tmp_path)["step"] == 2


def test_durations_are_readable():
    assert [duration(s) for s in (0.4, 75, 8000)] == ["0:00", "1:15", "2:13:20"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "denoiser", "sample_every": 5}, "sample_every=5 needs sample_prompts"),
        ({"sample_every": 5, "sample_prompts": ("a",)}, "sample_every=5 needs objective='denoiser'"),
        ({"sample_prompts": ("a", "")}, "must be texts that are not empty"),
        ({"sample_tokens": 0}, "sample_tokens=0"),
        ({"max_skipped_steps": -1}, "max_skipped_steps=-1"),
        ({"peak_flops": -1.0}, "peak_flops=-1.0"),
    ],
)
def test_settings_for_watching_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError) as error:
        config_of(**changes)
    assert message in str(error.value)
