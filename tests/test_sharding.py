"""twotower_jax/sharding.py: losses and gradients on eight virtual devices against one, and what moves between them."""

import dataclasses
import functools
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower_jax.checkpoint.load import load
from twotower_jax.config import Variant
from twotower_jax.execution import Execution
from twotower_jax.kernels import expert_mlp
from twotower_jax.kernels.experts import Weights, relu2
from twotower_jax.layers import expert_parallel
from twotower_jax.parameters import flatten, parameter_table, unflatten
from twotower_jax.sharding import (
    BATCH,
    MESH_AXES,
    AtRest,
    MeshShape,
    batch_sharding,
    local,
    make_mesh,
    spec,
    stored_sharding,
)
from twotower_jax.train.objectives import Denoiser, NoiseKey, make_objective
from twotower_jax.train.step import abstract_state, make_optimizer, make_step, start_state, tables
from twotower_jax.two_tower import TwoTower

# Difference of a gradient, by norm: sums are taken in another order, nothing else.
TOLERANCE = 3e-6
ROWS, LENGTH, BLOCK = 8, 32, 4

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"sequence": 8},
    {"expert": 8},
    {"tensor": 4, "data": 2},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"sequence": 2, "fsdp": 2, "expert": 2},
    {"sequence": 2, "tensor": 2, "data": 2},
]


@pytest.fixture(scope="module")
def objective(small_config):
    """Everything in it: both towers train, every kind of layer, a bidirectional denoiser, both losses."""
    config = small_config(
        "M*E-",
        mamba_num_heads=8,
        n_groups=4,
        num_attention_heads=8,
        moe_intermediate_size=8,
        moe_shared_expert_intermediate_size=16,
    )
    variant = Variant(context="trained", context_loss=True, bidirectional_mamba=True)
    return Denoiser(TwoTower(config, variant, Execution(remat="layer")))


@pytest.fixture(scope="module")
def ids():
    return np.random.default_rng(0).integers(4, 40, (ROWS, LENGTH)).astype(np.int32)


class Gradients(NamedTuple):
    """A loss, its gradients by path, and the program that gave them."""

    loss: float
    by_path: dict
    program: str


@pytest.fixture(scope="module")
def gradients(objective, ids, random_params):
    """A mesh's shape as pairs, () for one device → `Gradients`; once for each."""
    params = random_params(objective.model)
    table = parameter_table(objective.model)

    def loss(params, ids):
        losses = objective.losses(params, ids, jnp.ones(ROWS, bool), NoiseKey(0, 3, jnp.arange(ROWS)), BLOCK)
        return sum(losses[term].mean for term in objective.terms)

    def run(params, ids, places=None):
        function = jax.jit(jax.value_and_grad(loss), out_shardings=(None, places))
        compiled = function.lower(params, ids).compile()
        value, found = compiled(params, ids)
        by_path = {path: np.asarray(g, np.float64) for path, g in flatten(found).items()}
        return Gradients(float(value), by_path, compiled.as_text())

    @functools.cache
    def compute(shape):
        if not shape:
            return run(params, ids)
        mesh = make_mesh(MeshShape(**dict(shape)))
        places = unflatten({path: stored_sharding(mesh, p.axes, p.shape) for path, p in table.items()})
        with jax.set_mesh(mesh):
            return run(jax.device_put(params, places), jax.device_put(ids, batch_sharding(mesh)), places)

    return compute


each_mesh = pytest.mark.parametrize("shape", MESHES, ids=lambda shape: "-".join(f"{k}{v}" for k, v in shape.items()))


@pytest.mark.whole(but=["sequence2-fsdp2-expert2"])
@each_mesh
def test_loss_and_every_gradient_are_those_of_one_device(objective, gradients, shape):
    found, expected = gradients(tuple(shape.items())), gradients(())
    assert abs(found.loss - expected.loss) < 2e-6 * expected.loss
    for path, gradient in found.by_path.items():
        one = expected.by_path[path]
        assert np.any(one) == parameter_table(objective.model)[path].trainable, path
        assert np.linalg.norm(gradient - one) <= TOLERANCE * np.linalg.norm(one), path


# What moves between devices.

# The kinds that an axis may cause, beside sums.
KINDS = {
    "data": set(),
    "fsdp": {"all-gather", "reduce-scatter"},
    "sequence": {"all-gather", "reduce-scatter", "all-to-all", "collective-permute"},
    "expert": {"all-gather", "reduce-scatter", "all-to-all"},
    "tensor": {"all-gather", "all-to-all", "collective-permute"},
}


def collectives(program: str) -> list[tuple[str, tuple[int, ...]]]:
    """Kind and shape of everything that a collective between several devices gives."""
    found = []
    for line in program.splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
        if match and together(line) > 1:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found += [(match[2], tuple(int(n) for n in shape.split(",") if n)) for shape in shapes]
    return found


def together(line: str) -> int:
    """How many devices a collective is between; with 1, as for the sum over an axis of one device, nothing moves."""
    if "source_target_pairs" in line:
        return 2
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match[1].split(","))
    sizes, axes = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line).groups()
    return math.prod(int(size) for axis, size in re.findall(r"('\w+')=(\d+)", sizes) if axis in axes)


@pytest.mark.whole(but=["sequence2-fsdp2-expert2"])
@each_mesh
def test_no_collective_that_the_design_does_not_expect(objective, gradients, shape):
    """Weights are gathered a layer at a time and gradients summed; rows of tokens move for the sake of three axes only.

    Of "expert" as rows to experts, at most `capacity` to a device. Of "tensor" as sums after a mixer. Of "sequence" as
    keys and values, the inputs of a convolution, and states.
    """
    sizes = {axis: shape.get(axis, 1) for axis in MESH_AXES}

    def on_a_device(parameter, stored):
        parts = spec(parameter.axes, parameter.shape, sizes, stored=stored)
        axes = [(part,) if isinstance(part, str) else part or () for part in parts]
        return tuple(n // math.prod(sizes[a] for a in by) for n, by in zip(parameter.shape, axes, strict=True))

    table = parameter_table(objective.model)
    largest = max(math.prod(on_a_device(parameter, stored=False)) for parameter in table.values())
    rows, positions = ROWS // math.prod(sizes[axis] for axis in BATCH), LENGTH // sizes["sequence"]
    # One of each part of a sequence, with 8 heads.
    states = sizes["sequence"] * rows * math.prod((8, 4, 5))
    expected = set().union({"all-reduce"}, *(KINDS[axis] for axis in shape))
    moved = collectives(gradients(tuple(shape.items())).program)
    for kind, dims in moved:
        assert kind in expected, (kind, dims)
        assert math.prod(dims) <= max(largest, rows * LENGTH * 16, states), (kind, dims)
        if not {"sequence", "tensor"} & shape.keys():
            assert dims[:2] != (rows, positions), (kind, dims)
            assert kind != "all-gather" or math.prod(dims) <= largest, (kind, dims)
    if {"fsdp", "sequence"} & shape.keys():
        # The largest gradients are summed into where they lie, not everywhere.
        for path, parameter in table.items():
            if path[-1] in ("up", "down") or path == ("denoiser_head", "weight"):
                assert ("reduce-scatter", on_a_device(parameter, stored=True)) in moved, path


# The train step as a whole.


@pytest.fixture(scope="module")
def run_steps(ids):
    """Two steps of a config from the same start: state, metrics of the second, and the compiled program."""

    def run(config, random_params):
        objective = make_objective(config, config.model_config(40))
        optimizer = make_optimizer(config, tables(objective)[0])
        mesh = make_mesh(config.mesh) if config.mesh != MeshShape() else None
        params = random_params(objective.model)

        def steps():
            state, frozen = start_state(objective, optimizer, params, mesh)
            step = jax.jit(make_step(config, objective, optimizer, BLOCK), donate_argnums=0)
            batch = ids if mesh is None else jax.device_put(ids, batch_sharding(mesh))
            compiled = step.lower(state, frozen, batch).compile()
            for _ in range(2):
                state, metrics = compiled(state, frozen, batch)
            return state, metrics, compiled

        if mesh is None:
            return steps()
        with jax.set_mesh(mesh):
            return steps()

    return run


@pytest.fixture(scope="module")
def one_device_steps(run_steps, step_config, random_params):
    return run_steps(step_config(), random_params)


def close(found, expected, tolerance):
    for path, array in flatten(found).items():
        other = np.asarray(flatten(expected)[path], np.float64)
        assert np.linalg.norm(np.asarray(array, np.float64) - other) <= tolerance * np.linalg.norm(other), path


@pytest.mark.whole
@pytest.mark.parametrize("changes", [{"mesh.fsdp": 2, "mesh.expert": 4}, {"accumulate": 4}], ids=str)
def test_two_steps_are_those_of_one_device(run_steps, step_config, random_params, one_device_steps, changes):
    """Parameters, losses and norms, on a mesh, and with the batch taken in parts."""
    expected, expected_metrics, _ = one_device_steps
    config = step_config(**changes)
    state, metrics, _ = run_steps(config, random_params)
    close(state.params, expected.params, 2e-5)  # AdamW's first steps divide small gradients by their own size
    np.testing.assert_allclose(metrics.loss, expected_metrics.loss, rtol=3e-6)
    np.testing.assert_allclose(metrics.grad_norm, expected_metrics.grad_norm, rtol=1e-5)
    for name in metrics.losses.keys() - {"expert_load", "expert_entropy"}:  # those of a part are not the whole's
        np.testing.assert_array_equal(metrics.losses[name].count, expected_metrics.losses[name].count)
    if config.accumulate == 1:
        load, expected_load = (m.losses["expert_load"].mean for m in (metrics, expected_metrics))
        np.testing.assert_allclose(load, expected_load, rtol=1e-6)


# The rules.


def test_a_mesh_axis_divides_an_array_once():
    sizes = {"fsdp": 2, "expert": 2, "tensor": 2}
    assert spec(("experts", "embed", "expert_mlp"), (2, 16, 8), sizes, stored=True) == jax.P("expert", "fsdp", "tensor")
    assert spec(("embed", "mlp"), (32, 8), sizes, stored=True) == jax.P(("fsdp", "expert"), "tensor")
    assert spec(("embed", "mlp"), (16, 8), sizes) == jax.P(None, "tensor")


def test_what_does_not_divide_stays_whole():
    assert spec(("embed", "mlp"), (6, 9), {"fsdp": 2, "expert": 2, "tensor": 2}, stored=True) == jax.P("fsdp", None)


def test_matrices_lie_in_whole_tiles_of_rows_where_they_can():
    """The rows, 8 at least a device; "embed" however it divides where that cannot be."""
    sizes = {"fsdp": 4, "expert": 2}
    assert spec(("mlp", "embed"), (64, 48), sizes, stored=True) == jax.P(("fsdp", "expert"), None)
    assert spec(("mlp", "embed"), (32, 48), sizes, stored=True) == jax.P("fsdp", None)
    assert spec(("mlp", "embed"), (16, 48), sizes, stored=True) == jax.P(None, ("fsdp", "expert"))
    assert spec(("layers", "experts", "expert_mlp", "embed"), (3, 2, 64, 48), sizes, stored=True) == jax.P(
        None, "expert", "fsdp", None
    )
    # With their biases, (E, D), experts have no rows to divide.
    assert spec(("experts", "embed"), (2, 48), {"fsdp": 4}, stored=True) == jax.P(None, "fsdp")


def test_whole_experts_lie_on_a_device_where_there_are_enough():
    """As many as there are of the published model, on the meshes of nano30b.py; and what is in use."""
    axes, shape = ("layers", "experts", "expert_mlp", "embed"), (5, 128, 1856, 2688)
    pod = {"data": 2, "fsdp": 8, "expert": 16}
    assert spec(axes, shape, pod, stored=True) == jax.P(None, ("expert", "fsdp"), None, None)
    assert spec(axes, shape, pod) == jax.P(None, "expert", None, None)
    assert spec(axes, shape, {"fsdp": 4, "sequence": 2, "expert": 16}, stored=True) == jax.P(
        None, ("expert", "fsdp", "sequence"), None, None
    )
    # Sixteen times sixteen devices are too many for whole experts; what is left divides the rows.
    assert spec(axes, shape, {"fsdp": 8, "sequence": 2, "expert": 16}, stored=True) == jax.P(
        None, ("expert", "fsdp"), "sequence", None
    )


@pytest.mark.whole(but=["[4-stored1"])
@pytest.mark.parametrize(
    "experts, stored",
    [
        (8, (("expert", "fsdp", "sequence"), None)),
        (4, (("expert", "fsdp"), "sequence")),
        (2, ("expert", ("fsdp", "sequence"))),
    ],
)
def test_experts_are_gathered_in_order_and_gradients_summed(experts, stored):
    """Whole experts, experts and rows, or rows alone at rest: each device gets its own of them, and what all devices
    say of one is added up where it lies."""
    mesh = make_mesh(MeshShape(expert=2, fsdp=2, sequence=2))
    rng = np.random.default_rng(0)
    weights, x = np.float32(rng.standard_normal((experts, 32, 6))), np.float32(rng.standard_normal((4, 4, 32)))
    axes, tokens = ("experts", "expert_mlp", "embed"), ("batch", "length", None)
    place = stored_sharding(mesh, axes, weights.shape)
    assert place.spec == jax.P(*stored, None)

    def multiplied(x, weights, number):
        return jnp.einsum("blf,efd,e->bled", x, weights, number)

    def loss(weights, function):
        y = function(x, weights, jnp.arange(1.0, experts + 1))
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y

    def on_a_device(x, weights, number):
        """The expert's own rows are multiplied here, those of other devices there."""
        everybody = jax.lax.all_gather(x, "expert", tiled=True)
        y = multiplied(everybody, weights, number)
        return jax.lax.all_to_all(y, "expert", 0, 2, tiled=True)

    expected, expected_y = jax.grad(loss, has_aux=True)(weights, multiplied)
    with jax.set_mesh(mesh):
        divided = local(on_a_device, (tokens, AtRest(axes), ("experts",)), (*tokens, None))
        found, y = jax.jit(lambda w: jax.grad(loss, has_aux=True)(w, divided))(jax.device_put(weights, place))
    np.testing.assert_allclose(y, expected_y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_state_is_divided_evenly(step_config):
    """Every matrix with a side of D = 16 over all devices of fsdp, its moments like itself."""
    config = step_config(**{"mesh.fsdp": 8})
    objective = make_objective(config, config.model_config(40))
    optimizer = make_optimizer(config, tables(objective)[0])
    mesh = make_mesh(config.mesh)
    state, frozen = abstract_state(objective, optimizer, mesh)
    adam = state.optimizer[1][0]
    for tree in (state.params, adam.mu, adam.nu, frozen):
        for path, leaf in flatten(tree).items():
            divided = leaf.sharding.num_devices // (leaf.sharding.shard_shape(leaf.shape) == leaf.shape and 8 or 1)
            shape = parameter_table(objective.model)[path].tensor_shape
            matrix = len(shape) > 1 and 16 in shape
            assert divided == (8 if matrix else 1), path


@pytest.mark.parametrize(
    "shape, message",
    [
        ({"fsdp": 0}, "fsdp=0"),
        ({"fsdp": -1, "data": -1}, "only one axis"),
        ({"fsdp": 3}, "fsdp=3 does not fit 8 devices"),
        ({"fsdp": -1, "expert": 3}, "does not fit 8 devices"),
    ],
    ids=str,
)
def test_a_mesh_that_cannot_be(shape, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshShape(**shape))


def test_the_rest_of_the_devices():
    assert make_mesh(MeshShape(fsdp=-1, expert=2)).shape == dict.fromkeys(MESH_AXES, 1) | {"fsdp": 4, "expert": 2}
    assert dataclasses.asdict(MeshShape(data=-1).resolve(8))["data"] == 8


def test_a_checkpoint_loads_onto_a_mesh(data):
    """Every array where it is stored, with the bytes that one device gets."""
    mesh = make_mesh(MeshShape(fsdp=4, expert=2))
    loaded, whole = (load(data / "tiny" / "checkpoint", mesh=m) for m in (mesh, None))
    for path, parameter in parameter_table(loaded.model).items():
        array, expected = flatten(loaded.params)[path], flatten(whole.params)[path]
        assert array.sharding == stored_sharding(mesh, parameter.axes, parameter.shape), path
        assert np.asarray(array).tobytes() == np.asarray(expected).tobytes(), path


@pytest.mark.whole(but=["expert"])
@pytest.mark.parametrize("shape", [{"expert": 4}, {"expert": 2, "tensor": 2}], ids=["expert", "tensor"])
def test_no_row_is_dropped_when_all_go_to_one_device(shape):
    """All rows of every device to experts 0 and 1: several rounds, and the outputs and gradients of one device."""
    rng = np.random.default_rng(0)
    x, gates = rng.standard_normal((64, 6)), rng.uniform(0.1, 1, (64, 2))
    weights = Weights(*(rng.standard_normal(s) for s in ((8, 6, 4), (8, 4, 6), (8, 4), (8, 6))))
    x, gates, weights = jax.tree.map(np.float32, (x, gates, weights))
    indices = np.tile(np.int32([0, 1]), (64, 1))
    devices = jax.devices()[: int(np.prod(list(shape.values())))]
    rows = ("batch", None)
    axes = Weights(
        ("experts", None, "expert_mlp"), ("experts", "expert_mlp", None), ("experts", "expert_mlp"), ("experts", None)
    )

    def results(function):
        def loss(x, gates, weights):
            y = function(x, indices, gates, weights)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(x, gates, weights)

    def on_a_mesh(*args):
        mlp = functools.partial(expert_parallel.expert_mlp, activation=relu2, implementation=None)
        return local(mlp, (rows, rows, rows, axes), rows)(*args)

    expected = results(expert_mlp)
    with jax.set_mesh(make_mesh(MeshShape(**shape), devices)):
        found = results(on_a_mesh)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.max(np.abs(other)))
