"""What the tests share: small models with random weights that all matter, the recorded data, and how to compile."""

# ruff: noqa: E402
import atexit
import contextlib
import gc
import json
import os
import pathlib
import random
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

# All processes of a session, pytest's workers and the commands that tests start, share what they compile. Set before
# JAX is imported; a bound, though never reached, makes JAX lock the folder. A folder given from outside is kept.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-by-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**33))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Nearly all of the time goes into compiling programs that run once or twice, half of that into optimizing them; so it
# does in the commands that tests start. JAX_DISABLE_MOST_OPTIMIZATIONS=0 runs every test as users compile.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import interpreters
import shapes
import slices

shapes.install()
interpreters.install()

import hypothesis
import jax
import numpy as np
import pytest

from helpers import DATA
from twotower_jax import parameters
from twotower_jax.checkpoint.export import model_tensors
from twotower_jax.checkpoint.folder_writing import write_folder
from twotower_jax.config import ModelConfig
from twotower_jax.train.config import TrainConfig, base_config, freeze
from twotower_jax.two_tower import TwoTower

# The same examples on every run, and no time limit on one (the first of a shape compiles).
hypothesis.settings.register_profile("slice", derandomize=True, deadline=None, max_examples=10, database=None)
hypothesis.settings.register_profile("whole", hypothesis.settings.get_profile("slice"), max_examples=25)

# Tracing makes many objects and little garbage, which Python would look through every few hundred.
gc.set_threshold(50_000, 20, 20)

# Virtual devices for the tests of meshes; everything else uses the first.
jax.config.update("jax_num_cpu_devices", 8)

SMALL = {
    "hidden_size": 24,
    "hybrid_override_pattern": "MEME*",
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
}


# The files that take longest, which start first, so that no worker is left alone with one of them at the end.
_LONG = (
    "kernels/ssd/test_ssd",
    "train/test_processes",
    "test_sharding",
    "test_reference",
    "test_quantization",
    "test_tower",
    "generation/test_mesh",
    "train/test_durability",
    "generation/test_requests",
    "generation/test_engine",
    "train/test_adapting",
    "kernels/attention/test_hardware",
    "checkpoint/test_family",
    "launch/test_verify",
    "kernels/experts/test_hardware",
    "train/test_loop",
    "checkpoint/test_adapter",
    "train/test_conversations",
    "evaluation/test_lm",
    "train/test_balance",
    "docs/test_changing",
    "layers/test_layers",
    "generation/test_speculative",
    "layers/test_own_kind",
    "train/test_step",
    "train/test_optimizers",
    "serving/test_adapters",
    "reinforce/test_reinforce",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="run every case; without, a slice of each matrix of cases")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", slices.MARKER)
    hypothesis.settings.load_profile("whole" if config.getoption("whole") else "slice")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what only `--whole` runs; orders files, and leaves the order of tests in a file."""
    if not config.getoption("whole"):
        left = slices.further_cases(config, items)
        config.hook.pytest_deselected(items=list(left))
        items[:] = [item for item in items if item not in left]
    places = {f"tests/{name}.py": place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: places.get(item.nodeid.split("::")[0], len(places)))


def pytest_collection_finish() -> None:
    """Takes what is imported, which stays, out of what the garbage collector goes through."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def released_programs():
    """Lets go of what a file's tests compiled, so that no file finds what another one left. A compiled program takes
    dozens of memory mappings, too, of which Linux gives a process 65,530; one that runs half of the tests comes near,
    and the compiler then crashes."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def data() -> pathlib.Path:
    """The folder of recorded data, `tests/recorded`."""
    return DATA


@pytest.fixture
def strict_dtypes():
    """No silent change of dtype: float32 and bfloat16 meet only where the code says so."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def strict_arithmetic(strict_dtypes):
    """Nor of rank."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="session")
def small_config():
    """Makes a tiny `ModelConfig`: odd head counts, several groups, all kinds of layers."""

    def make(pattern: str = "M*E-", **changes) -> ModelConfig:
        values = {
            "vocab_size": 40,
            "hidden_size": 16,
            "hybrid_override_pattern": pattern,
            "mamba_num_heads": 6,
            "mamba_head_dim": 4,
            "ssm_state_size": 5,
            "n_groups": 3,
            "chunk_size": 16,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "intermediate_size": 12,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 12,
            "moe_shared_expert_intermediate_size": 20,
            "routed_scaling_factor": 2.5,
        }
        return ModelConfig(**values | changes)

    return make


@pytest.fixture(scope="session")
def step_config():
    """Makes a tiny `TrainConfig` of a denoiser that any mesh of eight devices divides: 8 rows of 32, blocks of 4."""

    def make(**changes) -> TrainConfig:
        config = base_config(
            model={
                "hidden_size": 16,
                "hybrid_override_pattern": "ME*ME",
                "mamba_num_heads": 8,
                "mamba_head_dim": 4,
                "ssm_state_size": 8,
                "n_groups": 4,
                "chunk_size": 8,
                "num_attention_heads": 8,
                "num_key_value_heads": 2,
                "head_dim": 4,
                "n_routed_experts": 8,
                "num_experts_per_tok": 3,
                "moe_intermediate_size": 24,
                "moe_shared_expert_intermediate_size": 16,
            }
        )
        config.update(objective="denoiser", sequence_length=32, batch_size=8, block_size=4, steps=4, learning_rate=1e-2)
        config.update_from_flattened_dict(changes)
        return freeze(config)

    return make


@pytest.fixture(scope="module")
def compile_once():
    """Runs of the same step, in the tests of a file, share one compilation, however short."""
    with _settings(jax_persistent_cache_min_compile_time_secs=0.0):
        yield


@contextlib.contextmanager
def _settings(**values: Any) -> Iterator[None]:
    before = {name: jax.config.values[name] for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def train_text(tmp_path_factory) -> str:
    """Sentences that a small model learns fast."""
    draw = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [" ".join(draw.choice(words) for _ in range(60)) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def train_config(train_text):
    """Makes the `TrainConfig` of a short run on that text: a small model, 12 steps.

    With `pattern`, of these layers: "-" compiles in a moment, for tests of what surrounds the step.
    """

    def make(*, pattern: str = SMALL["hybrid_override_pattern"], **changes) -> TrainConfig:
        config = base_config(SMALL | {"hybrid_override_pattern": pattern})
        config.update(
            {
                "data": train_text,
                "vocab_size": 270,
                "sequence_length": 32,
                "batch_size": 5,
                "block_size": 8,
                "steps": 12,
                "learning_rate": 2e-2,
                "validation_fraction": 0.1,
                "log_every": 5,
                "checkpoint_every": 4,
            }
        )
        config.update(changes)
        return freeze(config)

    return make


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory, small_config, random_params) -> pathlib.Path:
    """A two-tower folder as published, with the tokenizer of the recorded one and a layer of each kind."""
    model = TwoTower(small_config("M*E-", vocab_size=512, eos_token_id=2))
    out, names = tmp_path_factory.mktemp("small") / "checkpoint", ("tokenizer.json", "tokenizer_config.json")
    small = {name: (DATA / "tiny" / "checkpoint" / name).read_bytes() for name in names}
    config = model.config.to_hf() | {"architectures": ["NemotronHTwoTowerForCausalLM"]}
    write_folder(
        out, model_tensors(model, random_params(model)), small | {"config.json": json.dumps(config).encode()}, 2**30
    )
    return out


@pytest.fixture(scope="session")
def random_params():
    """Draws parameters of a module such that every one of them matters: none is at 0 or 1, and states last."""

    def draw(module, seed: int = 0) -> parameters.Params:
        rng = np.random.default_rng(seed)
        flat = {}
        for path, parameter in parameters.parameter_table(module).items():
            name, shape = path[-1], parameter.shape
            value = rng.standard_normal(shape)
            if name in ("D", "norm_weight") or path[-2:-1] in (("norm",), ("norm_f",)):
                value = 1 + 0.3 * value
            elif name == "A_log":
                value = 0.7 * value
            elif name == "dt_bias":
                value = -2 + value
            elif name.endswith("bias"):
                value = 0.3 * value
            elif name == "tables":
                value = 0.3 * value + np.array([0.0, 0.0, 1.0])[:, None]
            elif name != "embeddings":
                value = value * (1.5 if "router" in path else 1.0) / np.sqrt(shape[-2])
            flat[path] = np.asarray(value, np.float32)
        # In one program: `asarray` would compile one for each shape.
        return jax.jit(lambda flat: jax.tree.map(jax.numpy.copy, flat))(parameters.unflatten(flat))

    return draw


def _read_safetensors(path: pathlib.Path) -> dict[str, tuple[dict, bytes]]:
    """Each tensor's header entry and bytes."""
    blob = path.read_bytes()
    start = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:start])
    header.pop("__metadata__", None)
    return {name: (entry, blob[slice(*(start + o for o in entry["data_offsets"]))]) for name, entry in header.items()}


def _write_safetensors(path: pathlib.Path, tensors: dict[str, tuple[dict, bytes]]) -> None:
    header, offset = {}, 0
    for name, (entry, content) in tensors.items():
        header[name] = entry | {"data_offsets": [offset, offset + len(content)]}
        offset += len(content)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(content for _, content in tensors.values()))


def write_backbone_folder(two_tower: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """The context tower of a two-tower folder as a single-tower folder, in one file without an index."""
    out.mkdir()
    for file in two_tower.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copy(file, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"architectures": ["NemotronHForCausalLM"]}))
    tensors = {}
    for file in sorted(two_tower.glob("*.safetensors")):
        for name, tensor in _read_safetensors(file).items():
            if name == "context_lm_head.weight":
                tensors["lm_head.weight"] = tensor
            elif name.startswith("context_tower."):
                tensors["backbone." + name.removeprefix("context_tower.")] = tensor
    _write_safetensors(out / "model.safetensors", tensors)
    return out


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory) -> pathlib.Path:
    """The context tower of `tests/recorded/tiny/checkpoint` as a single-tower folder."""
    return write_backbone_folder(DATA / "tiny" / "checkpoint", tmp_path_factory.mktemp("tiny") / "backbone")


@pytest.fixture(scope="session")
def backbone_folder_bf16(tmp_path_factory) -> pathlib.Path:
    """The context tower of `tests/recorded/tiny_bf16/checkpoint` as a single-tower folder."""
    return write_backbone_folder(DATA / "tiny_bf16" / "checkpoint", tmp_path_factory.mktemp("tiny_bf16") / "backbone")
