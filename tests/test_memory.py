"""memory.py, and the commands that ask it: what does not fit is refused in one line before anything is allocated."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from absl.testing import flagsaver

from helpers import ROOT, run_command
from twotower_jax import memory, model_from_flags
from twotower_jax.checkpoint.load import contents
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation import Settings, rehearsal
from twotower_jax.generation.engine import start
from twotower_jax.generation.placement import TowerMeshes, tower_meshes
from twotower_jax.memory import GIB, Room
from twotower_jax.model_from_flags import weight_bytes
from twotower_jax.parameters import parameter_table
from twotower_jax.quantization import METHODS
from twotower_jax.sharding import MeshShape, make_mesh
from twotower_jax.train import setup
from twotower_jax.train.loop import train
from twotower_jax.train.objectives import make_objective
from twotower_jax.train.start import check_memory, check_room
from twotower_jax.train.step import abstract_state, make_optimizer, tables
from twotower_jax.two_tower import TwoTower

MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    4000 kB\n"}
VERSION_2 = {"proc/self/cgroup": "0::/a/b\n"}
VERSION_1 = {"proc/self/cgroup": "5:cpu:/\n4:memory,other:/a\n0::/\n"}


def host(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (MEMINFO, 4000 * 1024),
        (MEMINFO | VERSION_2 | {"sys/fs/cgroup/a/b/memory.max": "max\n"}, 4000 * 1024),
        # A limit of the group, of its parent, of a container's own root; what was read from files does not count.
        ({**VERSION_2, "sys/fs/cgroup/a/b/memory.max": "900", "sys/fs/cgroup/a/b/memory.current": "100\n"}, 800),
        ({**VERSION_2, "sys/fs/cgroup/a/memory.max": "900", "sys/fs/cgroup/a/memory.current": "1000"}, 0),
        (
            {
                **MEMINFO,
                **VERSION_2,
                "sys/fs/cgroup/memory.max": "900",
                "sys/fs/cgroup/memory.current": "700",
                "sys/fs/cgroup/memory.stat": "anon 100\ninactive_file 500\n",
            },
            700,
        ),
        (
            {
                **VERSION_1,
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "900",
                "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "300",
                "sys/fs/cgroup/memory/a/memory.stat": "inactive_file 1\ntotal_inactive_file 100\n",
            },
            700,
        ),
    ],
)
def test_what_the_host_has_free(tmp_path, files, expected):
    assert memory.host_free(host(tmp_path, files)) == expected


def device(free=None, platform="gpu"):
    stats = {"bytes_limit": 100 + free, "bytes_in_use": 100} if free is not None else None
    return SimpleNamespace(platform=platform, process_index=0, memory_stats=lambda: stats, device_kind="card")


def test_the_fullest_device_counts(tmp_path):
    assert memory.room([device(50), device(30), device()]) == Room(30, "card has free")
    assert memory.room([device()]) is None
    root = host(tmp_path, MEMINFO)
    assert memory.room([device(platform="cpu")], root) == Room(4000 * 1024, "this machine has free", shared=True)


def test_the_border_and_the_message():
    """Two devices of 3 GiB hold 3 GiB each; a host of 6 GiB holds both parts, and not a byte more."""
    cards, room = [device(), device()], Room(3 * GIB, "card has free")
    memory.check_holds({"weights": 3 * GIB}, cards, "fsdp", available=room)
    with pytest.raises(ValueError, match="at least 4.0 GiB on each device .weights 3.0, more 1.0.*3.0 GiB") as error:
        memory.check_holds({"weights": 3 * GIB, "more": GIB, "no": 0}, cards, "fsdp", "use less", available=room)
    assert "at least 3 such devices would, with fsdp to divide it over them; or use less" in str(error.value)
    assert "\n" not in str(error.value)
    here = Room(6 * GIB, "this machine has free", shared=True)
    memory.check_holds({"weights": 3 * GIB}, cards, "fsdp", available=here)
    with pytest.raises(ValueError, match="on each of 2 devices .*this machine has free 6.0 GiB; a machine with more"):
        memory.check_holds({"weights": 3 * GIB + 1}, cards, "fsdp", available=here)
    memory.check_holds({"weights": 9 * GIB}, [device()], "fsdp")  # Nothing is known.


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("fsdp", [1, 8])
def test_a_runs_state_and_gradients_are_counted(step_config, fsdp, moments):
    """One device holds weights, gradients and two moments of what trains, and the frozen tower; counts apart."""
    config = step_config(**{"mesh.fsdp": fsdp, "moments_dtype": moments})
    mesh = make_mesh(config.mesh, jax.devices()[:fsdp]) if fsdp > 1 else None
    objective = make_objective(config, config.model_config(40))
    state, frozen = abstract_state(objective, make_optimizer(config, tables(objective)[0]), mesh)
    trained, rest = (sum(map(memory.sharded_bytes, jax.tree.leaves(tree))) for tree in (state.params, frozen))
    needed = 2 * trained + (2 if moments == "float32" else 1) * trained + rest + 2 * 4
    check_memory(config, objective, mesh, Room(needed, "x"))
    with pytest.raises(ValueError, match="optimizer"):
        check_memory(config, objective, mesh, Room(needed - 1, "x"))


def test_a_run_whose_compiled_step_does_not_fit(train_config, tmp_path, monkeypatch):
    """Its temporaries count; nothing is read of a checkpoint, allocated or written before that is known."""
    config = train_config(pattern="-", accumulate=5)
    objective = make_objective(config, config.model_config(270))
    state, frozen = abstract_state(objective, make_optimizer(config, tables(objective)[0]))
    held = sum(map(memory.sharded_bytes, jax.tree.leaves((state, frozen))))
    gradients = sum(map(memory.sharded_bytes, jax.tree.leaves(state.params)))
    monkeypatch.setattr(setup, "with_params", lambda *_: pytest.fail("parameters were read"))
    monkeypatch.setattr(memory, "room", lambda devices: Room(held + gradients, "card has free"))
    message = r"temporaries of the compiled step 0.0\), and card has free .* or accumulate=10 takes half as many rows"
    with pytest.raises(ValueError, match=message) as error:
        train(config, tmp_path / "run", lambda line: None)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_step_that_its_compiler_refuses(train_config, tmp_path, monkeypatch):
    """TPUs' compiler makes no program of what does not fit; anything else that it says is no matter of memory."""
    config, said = train_config(pattern="-"), []

    def compile_or_fail(self):
        raise jax.errors.JaxRuntimeError(said[-1])

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_or_fail)
    said.append("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.1G of 15.7G hbm.\nTotal: much")
    with pytest.raises(ValueError, match="does not fit: the compiler says RESOURCE_.* Used 21.1G of 15.7G hbm.$"):
        train(config, tmp_path / "run", lambda line: None)
    said.append("INTERNAL: something")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something"):
        train(config, tmp_path / "run", lambda line: None)
    assert not (tmp_path / "run").exists()


def test_the_border_of_a_compiled_step(train_config):
    config = train_config(pattern="-")
    objective = make_objective(config, config.model_config(270))
    weights = abstract_state(objective, make_optimizer(config, tables(objective)[0]))
    held = sum(map(memory.sharded_bytes, jax.tree.leaves(weights)))
    counted = held - sum(map(memory.sharded_bytes, jax.tree.leaves(weights[0].step)))
    check_room(config, *weights, 100, None, Room(counted + 100, "x"))
    with pytest.raises(ValueError, match="temporaries of the compiled step"):
        check_room(config, *weights, 101, None, Room(counted + 100, "x"))


@pytest.mark.whole
def test_what_generation_takes_beside_weights(small_config, random_params):
    """The caches and the programs of what then runs; in shapes, as the parameters are loaded."""
    model, prompts = TwoTower(small_config("M*-")), [[5] * 9, [6, 7]]
    settings = Settings(max_new_tokens=6, batch_size=2, sampling=SamplingConfig(block_size=4))
    params = random_params(model)
    shapes = rehearsal.abstract_params(model, None, jnp.dtype(jnp.float32), lambda parameter: None, "cpu")
    assert jax.tree.map(lambda v: (v.shape, v.dtype), shapes) == jax.tree.map(lambda v: (v.shape, v.dtype), params)
    needed = rehearsal.needed(model, shapes, prompts, settings, TowerMeshes())
    engine = start(model, params, prompts, settings)
    assert needed["caches"] == engine.cache_bytes
    # The logits of two blocks at once, in float32, at the least; a fraction of what all weights take at the most.
    assert 4 * 2 * 4 * model.config.vocab_size <= needed["temporaries as compiled"] < 2**24


@pytest.mark.parametrize(("method", "dtype"), [(None, "float32"), (None, "bfloat16"), ("int8", "bfloat16")])
def test_a_models_weights_are_counted(small_config, method, dtype):
    """Whole on one device; on a mesh what each of its devices holds, of the two towers' meshes the fuller one."""
    model = TwoTower(small_config())
    table, dtype = parameter_table(model), jnp.dtype(dtype)
    method = METHODS.get(method)
    whole = weight_bytes(model, method, dtype, TowerMeshes())
    if method is None:
        assert whole == sum(p.tensors.size * 0 + jnp.dtype("float32" if p.float32 else dtype).itemsize *
                            jax.numpy.zeros(p.shape, bool).size for p in table.values())  # fmt: skip
    else:
        assert whole < weight_bytes(model, None, dtype, TowerMeshes())
    towers = weight_bytes(model, method, dtype, tower_meshes(MeshShape(data=2), apart=True))
    assert whole / 2 <= towers < whole
    assert weight_bytes(model, method, dtype, tower_meshes(MeshShape(tensor=2))) < whole
    shared = weight_bytes(model, method, dtype, TowerMeshes(), shared=True)
    assert whole / 2 <= shared < 0.7 * whole


def test_a_folder_says_what_it_holds(data, backbone_folder):
    both, one = contents(data / "tiny" / "checkpoint"), contents(backbone_folder)
    assert (both.shared, one.shared) == (False, True)
    assert both.config == one.config
    assert one.dtype == both.dtype == jnp.float32


def command(*words, **settings):
    """A command on a machine whose address space hides nothing: only what it says counts."""
    run = run_command(*words, **settings)
    (line,) = [line for line in run.stderr.splitlines() if line]
    return run.returncode, line


def test_the_published_model_on_one_small_machine(tmp_path, data, train_text):
    """Exits with 2, and writes nothing."""
    status, line = command(
        "train",
        f"--config={ROOT / 'configs/nano30b.py'}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data={train_text}",
        *(f"--config.mesh.{axis}=1" for axis in ("data", "fsdp", "expert")),
    )
    assert status == 2
    assert line.startswith("error: the model does not fit: it needs at least ") and "GiB" in line
    assert not (tmp_path / "run").exists()


@pytest.fixture
def checkpoint_flag(small_folder):
    """The flags of a command with a checkpoint of 2 × 0.1 MB."""
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(checkpoint=str(small_folder)):
        yield small_folder
    flags.FLAGS.unparse_flags()


def test_generation_that_does_not_fit_beside_its_weights(checkpoint_flag, monkeypatch):
    """Asked of the compiler before weights are read, where these are a tenth of what is free or more."""
    found = contents(checkpoint_flag)
    weights = weight_bytes(TwoTower(found.config, found.variant), None, jnp.dtype("float32"), TowerMeshes())
    settings, asked = Settings(max_new_tokens=4, mode="ar"), []

    def needs(model, params, placement):
        asked.append(asked[0] if asked else rehearsal.needed(model, params, [[7, 8]], settings, placement))
        return asked[-1]

    def load(free: int) -> None:
        monkeypatch.setattr(memory, "room", lambda devices: Room(free, "card has free"))
        model_from_flags.load_model(needs=needs)

    monkeypatch.setattr(model_from_flags, "load", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(ValueError, match="caches 0.0, temporaries as compiled 0.0.*or a smaller --batch_size") as error:
        load(weights + 1000)
    assert "\n" not in str(error.value)
    whole = weights + sum(asked[0].values())
    with pytest.raises(ValueError, match="temporaries"):
        load(whole - 1)
    with pytest.raises(pytest.fail.Exception, match="weights are read"):
        load(whole)
    assert len(asked) == 3
    with pytest.raises(pytest.fail.Exception, match="weights are read"):
        load(11 * weights)
    assert len(asked) == 3


def test_a_checkpoint_that_is_larger_than_the_machine(tmp_path, small_config):
    """A file with a hole for its weights: two towers of an MLP of 2 × 2^35 numbers, of which bfloat16 makes 256 GiB."""
    config = small_config("-", hidden_size=1 << 14, intermediate_size=1 << 21)
    header, size = {}, 0
    for parameter in parameter_table(TwoTower(config)).values():
        for name in parameter.tensors.flat:
            length = 2 * math.prod(parameter.tensor_shape)
            place = [size, size + length]
            header[str(name)] = {"dtype": "BF16", "shape": list(parameter.tensor_shape), "data_offsets": place}
            size += length
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    flags = [f"--checkpoint={tmp_path}", "--dtype=bfloat16"]
    (tmp_path / "rows.jsonl").write_text('{"ids": [7, 8]}\n')
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    for words in (["generate", f"--prompts={rows}"], ["score", f"--input={rows}"]):
        status, line = command(*words, *flags, f"--output={out}")
        assert status == 2
        assert "weights of 138,519,707,648 parameters in bfloat16 258.0" in line and "take --quantize=int8" in line
        assert not out.exists()
