"""What a model needs at the least of hardware that is not there, from shapes alone: no compiler, in seconds.

Of a train step: weights, moments and gradients; activations come on top, and plan.py compiles to learn how many. The
same of an adapter's step on one device, by how its base is stored. Of serving: the weights of both towers and the
caches of some rows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from twotower_jax.execution import Execution
from twotower_jax.lora import BASES
from twotower_jax.memory import sharded_bytes
from twotower_jax.mesh_check import check_fits
from twotower_jax.parameters import parameter_table
from twotower_jax.planning.hardware import GIB, device_figures
from twotower_jax.planning.plan import HEADROOM, UTILIZATION
from twotower_jax.planning.table import RUNS
from twotower_jax.quantization import Method, abstract
from twotower_jax.sharding import MESH_AXES, MeshShape
from twotower_jax.train.config import TrainConfig
from twotower_jax.train.flops import step_flops
from twotower_jax.train.objectives import make_objective
from twotower_jax.train.schedule import block_stages
from twotower_jax.train.step import abstract_state, make_optimizer, tables
from twotower_jax.two_tower import TwoTower


class Card(NamedTuple):
    """A device by its vendor's data sheet: bytes, and dense bfloat16 FLOP/s."""

    name: str
    memory: int
    peak_flops: float


def _card(name: str, generation: str) -> Card:
    return Card(name, *device_figures(generation))


# The names that nano4b.py has for hardware: the device, and how many.
TRAINING = {
    "h200": (_card("H200", "h200"), 1),
    "h100": (_card("H100", "h100"), 1),
    "v5e-8": (_card("v5e", "v5e"), 8),
    "v6e-8": (_card("v6e", "v6e"), 8),
    "v5p-64": (_card("v5p", "v5p"), 64),
}
# One device each.
SERVING = (_card("24 GB GPU", "l4"), _card("80 GB GPU", "h100"), _card("v6e", "v6e"), _card("v5e", "v5e"))


# One device each, for an adapter.
ADAPTING = (_card("24 GB GPU", "l4"), _card("80 GB GPU", "h100"), _card("H200", "h200"))


class LeastTraining(NamedTuple):
    """A train step. Bytes of one device.

    Attributes:
      weights: trained in float32 and frozen ones. optimizer: moments. gradients: whole before any is used, as the norm
        of all of them decides how far each goes.
      flops: analytic, of one step over all devices.
    """

    card: Card
    devices: int
    mesh: dict[str, int]
    weights: int
    optimizer: int
    gradients: int
    tokens: int
    flops: float

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.gradients

    @property
    def frozen(self) -> int:
        """Those of the weights that do not train."""
        return self.weights - self.gradients

    @property
    def left(self) -> int:
        """For activations, with HEADROOM free; negative where not even the state fits."""
        return int((1 - HEADROOM) * self.card.memory) - self.total

    @property
    def tokens_per_second(self) -> float:
        """Projected: at UTILIZATION of the peak rate of all devices."""
        return self.tokens * UTILIZATION * self.card.peak_flops * self.devices / self.flops


class LeastServing(NamedTuple):
    """Both towers on one device, `rows` of `capacity` positions. Bytes; caches grow with the rows."""

    card: Card
    rows: int
    capacity: int
    weights: int
    cache: int

    @property
    def total(self) -> int:
        return self.weights + self.cache

    @property
    def fits(self) -> bool:
        return self.total <= (1 - HEADROOM) * self.card.memory


def least_training(config: TrainConfig, card: Card, devices: int) -> LeastTraining:
    """Raises ValueError if the config's mesh does not fit the devices, or the model the mesh."""
    model, block_size = config.model_config(config.vocab_size), block_stages(config)[-1].block_size
    shape = config.mesh.resolve(devices)
    check_fits(shape, model, config.batch_size // config.accumulate, config.sequence_length, block_size)
    sizes = tuple(getattr(shape, axis) for axis in MESH_AXES)
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    objective = make_objective(config, model)
    state, frozen = abstract_state(objective, make_optimizer(config, tables(objective)[0]), mesh)
    trained = _bytes(state.params)
    return LeastTraining(
        card=card,
        devices=devices,
        mesh={axis: size for axis, size in zip(MESH_AXES, sizes, strict=True) if size > 1},
        weights=trained + _bytes(frozen),
        optimizer=_bytes(state.optimizer),
        gradients=trained,
        tokens=config.batch_size * config.sequence_length,
        flops=step_flops(config, model, block_size),
    )


def least_serving(
    config: TrainConfig, card: Card, *, rows: int, capacity: int, quantize: Method | None = None
) -> LeastServing:
    """Both towers in bfloat16, or quantized, on one device."""
    model = TwoTower(config.model_config(config.vocab_size), execution=Execution(dtype=jnp.bfloat16))
    weights = [abstract(parameter, quantize) for parameter in parameter_table(model).values()]
    cache = jax.eval_shape(lambda: model.context_tower.empty_cache(rows, capacity))
    return LeastServing(card, rows, capacity, _bytes(weights), _bytes(cache))


def markdown(get_config: Callable[[str], TrainConfig], *, rows: int, capacity: int) -> str:
    """Two tables: a train step on each hardware of TRAINING, and serving on each card of SERVING.

    Args:
      get_config: of a name of TRAINING.
    """
    trained = [least_training(get_config(name), *hardware) for name, hardware in TRAINING.items()]
    served = [least_serving(get_config(""), card, rows=rows, capacity=capacity) for card in SERVING]
    return "\n\n".join([_table(_TRAINING, trained), _table(_SERVING, served)])


def adapter_markdown(config: TrainConfig) -> str:
    """A table: the step of the config's adapter on one device, by how the base is stored."""
    config = dataclasses.replace(config, mesh=MeshShape())
    bases = [dataclasses.replace(config, lora=dataclasses.replace(config.lora, base=base)) for base in BASES[1:]]
    columns = [(one.lora.base, least_training(one, ADAPTING[0], 1)) for one in bases]

    def gib(size: Callable[[LeastTraining], int]):
        return lambda column: f"{size(column[1]) / GIB:.2f}"

    def left(card: Card):
        return gib(lambda plan: plan._replace(card=card).left)

    lines = [
        ("one step of an adapter, its base in", lambda column: column[0]),
        ("base, GiB", gib(lambda plan: plan.frozen)),
        ("adapter", gib(lambda plan: plan.gradients)),
        ("optimizer", gib(lambda plan: plan.optimizer)),
        ("gradients", gib(lambda plan: plan.gradients)),
        ("in all, without activations", gib(lambda plan: plan.total)),
        *((f"left for activations on a {card.name}, {HEADROOM:.0%} of it free", left(card)) for card in ADAPTING),
    ]
    return _table(lines, columns)


def _bytes(tree: Any) -> int:
    return sum(map(sharded_bytes, jax.tree.leaves(tree)))


def _table(lines, columns: list[Any]) -> str:
    rows = [[name, *(show(column) for column in columns)] for name, show in lines]
    rows.insert(1, ["---", *["--:"] * len(columns)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _gib(name: str):
    return lambda plan: f"{getattr(plan, name) / GIB:.2f}"


def _days(tokens: float):
    return lambda plan: f"{tokens / plan.tokens_per_second / 86400:.1f}"


def _in_all(plan) -> str:
    return f"{plan.total / GIB:.2f} of {plan.card.memory / GIB:.0f}"


_TRAINING = [
    ("one train step", lambda plan: f"{plan.devices} × {plan.card.name}"),
    ("mesh", lambda plan: " × ".join(f"{axis} {size}" for axis, size in plan.mesh.items()) or "one device"),
    ("weights, GiB a device", _gib("weights")),
    ("optimizer", _gib("optimizer")),
    ("gradients", _gib("gradients")),
    ("in all, without activations", _in_all),
    (f"left for activations with {HEADROOM:.0%} free", _gib("left")),
    ("tokens a step", lambda plan: f"{plan.tokens:,}"),
    ("FLOPs a step, analytic", lambda plan: f"{plan.flops / 1e12:,.0f} T"),
    (f"tokens/s at {UTILIZATION:.0%} of the peak", lambda plan: f"{plan.tokens_per_second:,.0f}"),
    *((f"days for {name} tokens", _days(tokens)) for name, tokens in RUNS.items()),
]
_SERVING = [
    ("serving both towers in bfloat16", lambda plan: plan.card.name),
    ("rows, positions", lambda plan: f"{plan.rows}, {plan.capacity}"),
    ("weights, GiB", _gib("weights")),
    ("caches", _gib("cache")),
    ("in all, without temporaries", _in_all),
    (f"fits with {HEADROOM:.0%} free", lambda plan: "yes" if plan.fits else "no"),
]
