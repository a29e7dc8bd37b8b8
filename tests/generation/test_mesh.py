"""Generation on eight virtual devices: the tokens of one device, wherever rows, experts, heads and towers lie."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from calls import call_of, results_of
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from twotower_jax.checkpoint.load import load
from twotower_jax.config import Variant
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation import MODES, Engine, Request, Settings, TowerMeshes, generate, score_ar, tower_meshes
from twotower_jax.generation import placement as placement_module
from twotower_jax.generation.blocks import Table, block
from twotower_jax.generation.placement import in_force, parse_mesh, row_format
from twotower_jax.generation.slots import allocate, cache_bytes
from twotower_jax.parameters import flatten, parameter_table
from twotower_jax.sharding import MeshShape, make_mesh
from twotower_jax.two_tower import TwoTower

SAMPLING = SamplingConfig(block_size=4, steps_per_block=3, confidence_threshold=0.3, temperature=1.0)
SETTINGS = Settings(max_new_tokens=9, sampling=SAMPLING, batch_size=4, prefill_chunk=16)
# More rows than slots, of lengths that are read in one piece and in three; the last ones wait.
PROMPTS = [[5 + i] * (1 + 8 * i) for i in range(6)]


@pytest.fixture(scope="module")
def model(small_config, random_params):
    model = TwoTower(
        small_config(
            "M*E",
            mamba_num_heads=8,
            n_groups=4,
            num_attention_heads=8,
            moe_intermediate_size=8,
            moe_shared_expert_intermediate_size=16,
        )
    )
    return model, random_params(model)


@pytest.fixture(scope="module")
def one_device(model):
    @functools.cache
    def run(mode):
        return list(generate(*model, PROMPTS, dataclasses.replace(SETTINGS, mode=mode)))

    return run


MIXED = "data=2,fsdp=2,tensor=2"
CASES = [(MIXED, False, mode) for mode in MODES]
CASES += [("", True, mode) for mode in ("diffusion", "mock_ar", "speculative")]  # Each tower on a device of its own.
CASES += [("expert=2,tensor=2", True, "speculative")]  # Each on a mesh of its own.
# Four devices of an axis: two experts each, and fewer KV heads than devices. Four of the axes that divide rows, with a
# row each, are those of MIXED.
CASES += [(shape, False, "diffusion") for shape in ("data=2,expert=4", "fsdp=2,tensor=4")]


@pytest.mark.whole(but=["tensor=2-False-diffusion"])
@pytest.mark.parametrize(("shape", "apart", "mode"), CASES)
def test_tokens_and_evaluations_are_those_of_one_device(model, one_device, shape, apart, mode):
    """With rows that wait for a slot, prompts read in pieces, sampling, and rows that end inside a block."""
    placement = tower_meshes(parse_mesh(shape.split(",") if shape else []), apart=apart)
    results = list(generate(*model, PROMPTS, dataclasses.replace(SETTINGS, mode=mode), placement=placement))
    assert results == one_device(mode)


def test_the_table_is_divided_and_written_in_place(model):
    """Rows over data and fsdp, states by heads over tensor; each device writes its part into the one it was given."""
    mesh = tower_meshes(parse_mesh(MIXED.split(","))).context
    whole, part = (cache_bytes(model[0], 8, 1024, m) for m in (None, mesh))
    with in_force(mesh):
        slots = allocate(model=model[0], batch=8, capacity=1024)
        blocks, call, recipe = call_of(model[0], Request(prompt=[5], max_new_tokens=4, mode="ar"), 8)
        params = TowerMeshes(mesh).context_params(*model)
        compiled = block.lower(params, slots, blocks, call, model=model[0], recipe=recipe).compile()
    mamba, attention, _ = slots.cache.layers.by_layer()
    assert mamba.state.sharding.shard_shape(mamba.state.shape) == (2, 4, *mamba.state.shape[2:])
    assert attention.key.sharding.shard_shape(attention.key.shape) == (2, *attention.key.shape[1:])
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(slots))
    assert held == part
    assert part < 0.3 * whole
    assert compiled.memory_analysis().alias_size_in_bytes >= part
    # No device ever has another's keys.
    gathered = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather", compiled.as_text())
    keys = int(np.prod(attention.key.shape)) // 4
    assert all(np.prod([int(n) for n in shape.split(",")]) < keys for _, shape in gathered)


def test_parameters_load_where_they_are_used(data):
    """Each tower on its mesh, matrices whole but for experts and widths, the bytes those of one device."""
    placement = TowerMeshes(*(make_mesh(MeshShape(expert=2, tensor=2), jax.devices()[i : i + 4]) for i in (0, 4)))
    loaded = load(data / "tiny" / "checkpoint", sharding=placement.parameter_sharding)
    whole = flatten(load(data / "tiny" / "checkpoint").params)
    for path, parameter in parameter_table(loaded.model).items():
        array = flatten(loaded.params)[path]
        assert np.asarray(array).tobytes() == np.asarray(whole[path]).tobytes(), path
        mesh = placement.context if path[0].startswith("context") else placement.denoiser
        assert array.sharding.device_set == set(mesh.devices.flat), path
        over = array.size // int(np.prod(array.sharding.shard_shape(array.shape)))
        tensor = any(axis in ("heads", "mlp", "vocab", "expert_mlp", "mamba_inner") for axis in parameter.axes)
        matrix = parameter.tensors.size == 1 and len(parameter.tensor_shape) > 1 or len(parameter.tensor_shape) > 1
        assert over == (2 if "experts" in parameter.axes else 1) * (2 if tensor and matrix else 1), path
    moved = placement.context_params(loaded.model, loaded.params)
    assert flatten(moved)[("context_tower", "embeddings")] is flatten(loaded.params)[("context_tower", "embeddings")]


def test_tables_of_rows_that_do_not_fill_tiles_lie_by_rows(small_config):
    """On a TPU, and nothing else that a model has."""
    place = SingleDeviceSharding(jax.devices()[0])
    by_rows = Format(Layout((0, 1)), place)
    for width, platform, expected in ((3136, "tpu", by_rows), (3136, "gpu", place), (2688, "tpu", place)):
        table = parameter_table(TwoTower(small_config("-", hidden_size=width)))
        for path, parameter in table.items():
            found = row_format(parameter, parameter.shape, place, platform)
            assert found == (expected if path[-1] == "embeddings" else place), path
    # The scales of a quantized one are a column.
    embeddings = table["context_tower", "embeddings"]
    assert row_format(embeddings, (300, 1), place, "tpu") == place


@pytest.mark.whole
def test_however_a_table_lies_tokens_are_the_same(model, one_device, monkeypatch):
    """Here by columns, which is not how a CPU has it; what towers share they share."""
    bare, params = model
    shared = params | {"denoiser_tower": params["denoiser_tower"] | {}}
    shared["denoiser_tower"]["embeddings"] = params["context_tower"]["embeddings"]
    by_columns = Format(Layout((1, 0)), SingleDeviceSharding(jax.devices()[0]))
    monkeypatch.setattr(
        placement_module,
        "row_format",
        lambda p, shape, place, platform: by_columns if p.path[-1] == "embeddings" else place,
    )
    laid = placement_module.by_rows(bare, shared)
    tables = [laid[tower]["embeddings"] for tower in ("context_tower", "denoiser_tower")]
    assert tables[0] is tables[1] and tables[0].format.layout.major_to_minor == (1, 0)
    results = list(generate(bare, laid, PROMPTS, dataclasses.replace(SETTINGS, mode="ar")))
    assert results == one_device("ar")


@pytest.mark.whole
def test_tied_towers_may_be_apart(small_config, random_params):
    model = TwoTower(small_config("ME"), Variant(context="tied"))
    settings = dataclasses.replace(SETTINGS, max_new_tokens=5)
    params = random_params(model)
    expected = list(generate(model, params, PROMPTS[:2], settings))
    placement = tower_meshes(MeshShape(), apart=True)
    assert list(generate(model, params, PROMPTS[:2], settings, placement=placement)) == expected


def test_memory_is_counted_by_device(model):
    placement = tower_meshes(MeshShape(data=4))
    row = cache_bytes(model[0], 1, 128)
    settings = dataclasses.replace(SETTINGS, batch_size=8, max_cache_gb=1.5 * row / 1e9)
    message = r"8 rows of 128 positions need .* GB on each device, and max_cache_gb .* lower batch_size to 4,"
    with pytest.raises(ValueError, match=message):
        Engine(*model, settings, capacity=128, placement=placement)
    # Two rows per device of four are six too many; a table is a multiple of the devices.
    assert Engine(*model, settings, capacity=128, slots=3, placement=placement).cache_bytes == row


@pytest.mark.whole
def test_scores_on_a_mesh_are_those_of_one_device(model):
    rows = [[4, 5], list(range(4, 36)), [7], list(range(10, 27))]
    placement = tower_meshes(MeshShape(data=2, tensor=2))
    expected = score_ar(*model, rows[:3])
    with in_force(placement.context):
        found = score_ar(model[0], placement.context_params(*model), rows[:3])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("words", "apart", "message"),
    [
        (["expert"], False, "'expert' is not of the form AXIS=DEVICES"),
        (["row=2"], False, "there is no axis 'row'"),
        (["sequence=2"], False, "only training divides sequences"),
        (["tensor=3"], False, "tensor=3 does not divide"),
        (["data=9"], False, "9 devices are more than the 8 here"),
        (["data=5"], True, "two times 5 devices are more than the 8 here"),
    ],
)
def test_meshes_that_cannot_be(model, words, apart, message):
    with pytest.raises(ValueError, match=message):
        tower_meshes(parse_mesh(words), apart=apart).check(model[0].config)


@pytest.mark.whole
def test_both_towers_work_at_once(model, one_device, monkeypatch):
    """Whenever the host waits for what the context made of some rows, the denoiser has been given blocks of others that
    do not depend on it: by the order in which calls are made, and waited for."""
    log, begin, finish, wait = [], Table.begin, Table.finish, jax.device_get

    def begun(self, call, *args):
        log.append(("begin", frozenset(np.flatnonzero(call.alive).tolist())))
        return begin(self, call, *args)

    def finished(self, call, *args):
        log.append(("finish", frozenset(np.flatnonzero(call.alive).tolist())))
        return finish(self, call, *args)

    def waited(value):
        log.append(("wait", frozenset()))
        return wait(value)

    monkeypatch.setattr(Table, "begin", begun)
    monkeypatch.setattr(Table, "finish", finished)
    monkeypatch.setattr(jax, "device_get", waited)
    results = list(generate(*model, PROMPTS, SETTINGS, placement=tower_meshes(MeshShape(), apart=True)))
    assert results == one_device("diffusion")
    open_, together = [], 0
    for what, rows in log:
        if what == "begin":
            assert not any(rows & others for others in open_)
            open_.append(rows)
        elif what == "finish":
            assert open_.pop(0) == rows  # In the order in which they were begun.
            together += bool(open_)
        assert len(open_) <= 2
    finishes = sum(what == "finish" for what, _ in log)
    assert together > finishes / 2  # All but the first, and the last rows, which are alone.
    # What was begun beside it does not wait for the commit either: the denoiser's copy of the table, which both
    # the begun blocks and the news of the commit go to, is written after it was read.
    order = [what for what, _ in log if what != "wait"]
    assert "begin finish begin finish" in " ".join(order)


@pytest.mark.whole
def test_a_row_canceled_between_the_towers_leaves_its_slot_to_another(model):
    """What the denoiser had made of it is not committed to the row that has its slot now."""
    asked = [Request(prompt=[7 + i], max_new_tokens=9, sampling=SAMPLING, sample=i) for i in range(8)]

    def run(engine, rows, canceled=()):
        for one in canceled:
            engine.submit(one)
        if canceled:
            engine.step()
            engine.step()
        for number in range(len(canceled)):
            engine.cancel(number)
        return results_of(engine, rows)

    apart = Engine(*model, SETTINGS, capacity=64, placement=tower_meshes(MeshShape(), apart=True))
    assert run(apart, asked[4:], asked[:4]) == run(Engine(*model, SETTINGS, capacity=64), asked[4:])
