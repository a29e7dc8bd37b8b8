"""The real train step of a config, compiled for hardware that is not there, and what it would take of it."""

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from twotower_jax.mesh_check import check_fits
from twotower_jax.parameters import count
from twotower_jax.planning import checks
from twotower_jax.planning.checks import Check
from twotower_jax.planning.hardware import Hardware
from twotower_jax.planning.predict import Prediction, predict
from twotower_jax.planning.rates import RATES
from twotower_jax.sharding import batch_sharding, make_mesh
from twotower_jax.train.config import TrainConfig
from twotower_jax.train.flops import step_flops
from twotower_jax.train.objectives import make_objective
from twotower_jax.train.schedule import block_stages
from twotower_jax.train.step import abstract_state, make_optimizer, make_step, tables

# What is to stay free of a device's memory.
HEADROOM = 0.1
# For projections: the share of the peak rate that a run is taken to reach.
UTILIZATION = 0.5


class StepPlan(NamedTuple):
    """What a step takes. Bytes are of one device, times in seconds.

    Attributes:
      parameters, trained: counts. weights: trained in float32 and frozen ones. optimizer: moments.
      activations: everything else that lives during a step (XLA's temporaries, gathered layers and gradients in it).
      retiled: of the weights, what the step copies into other tiles at its beginning (`checks.retiled_bytes`).
      flops: analytic, of one step over all devices.
      predicted: how long a step takes by the compiled program; None where the rates of the hardware are not known.
      lower_seconds, compile_seconds: by the clock. processor_seconds: of both, on all cores.
      gates: the checks of the compiled program; the name is that of the printed JSON.
      kernel_flops: of `flops`, one device's share that kernels compute.
      refused: why the compiler made no program, in its words: the step does not fit; then there are no checks, and
        activations are what it says that the step would take, without what is there anyway.
    """

    hardware: str
    chips: int
    devices: int
    mesh: dict[str, int]
    parameters: int
    trained: int
    weights: int
    optimizer: int
    activations: int
    retiled: int
    memory: int
    tokens: int
    flops: float
    peak_flops: float
    lower_seconds: float
    compile_seconds: float
    processor_seconds: float
    gates: list[Check]
    predicted: Prediction | None = None
    kernel_flops: float = 0.0
    refused: str | None = None

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.activations

    @property
    def fits(self) -> bool:
        return self.total <= (1 - HEADROOM) * self.memory

    @property
    def tokens_per_second(self) -> float:
        """Projected: at UTILIZATION of the peak rate of all devices."""
        return self.tokens * UTILIZATION * self.peak_flops * self.devices / self.flops

    @property
    def predicted_utilization(self) -> float | None:
        """The share of the peak rate that the model's own FLOPs have of the predicted time."""
        if self.predicted is None:
            return None
        return self.flops / (self.peak_flops * self.devices * self.predicted.seconds)


def plan_step(config: TrainConfig, hardware: Hardware, keep: Callable[[str], None] = lambda text: None) -> StepPlan:
    """Compiles the last stage of a run for `hardware`.

    Args:
      keep: called with the compiled program.

    Raises:
      ValueError: if the config's mesh does not fit the hardware, or the model the mesh.
    """
    model = config.model_config(config.vocab_size)
    mesh = make_mesh(config.mesh, hardware.devices)
    block_size = block_stages(config)[-1].block_size
    check_fits(
        config.mesh.resolve(len(hardware.devices)),
        model,
        config.batch_size // config.accumulate,
        config.sequence_length,
        block_size,
    )
    objective = make_objective(config, model)
    trained, frozen_table = tables(objective)
    optimizer = make_optimizer(config, trained)
    state, frozen = abstract_state(objective, optimizer, mesh)
    ids = jax.ShapeDtypeStruct((config.batch_size, config.sequence_length), jnp.int32, sharding=batch_sharding(mesh))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(
        make_step(config, objective, optimizer, block_size), donate_argnums=0, out_shardings=(shardings, None)
    )
    with jax.set_mesh(mesh):
        started, used = time.monotonic(), time.process_time()
        lowered = step.lower(state, frozen, ids)
        lower_seconds, started = time.monotonic() - started, time.monotonic()
        compiled, peak, refused = compile_or_refuse(lowered)
        compile_seconds, processor_seconds = time.monotonic() - started, time.process_time() - used
    weights = _bytes_on_a_device((state.params, frozen))
    optimizer_bytes = _bytes_on_a_device(state.optimizer)
    sizes, program = config.mesh.resolve(len(hardware.devices)), compiled.as_text() if compiled else ""
    keep(program)
    table = [*trained.values(), *frozen_table.values()]
    rates = RATES.get(hardware.name.partition(":")[0])
    kernel_flops = step_flops(config, model, block_size, in_kernels=True) / len(hardware.devices)
    return StepPlan(
        hardware=hardware.name,
        chips=hardware.chips,
        devices=len(hardware.devices),
        mesh={axis: size for axis, size in dataclasses.asdict(sizes).items() if size > 1},
        parameters=count(trained) + count(frozen_table),
        trained=count(trained),
        weights=weights,
        optimizer=optimizer_bytes,
        activations=peak - weights - optimizer_bytes,
        retiled=checks.retiled_bytes(program, table, mesh.shape),
        memory=hardware.memory,
        tokens=config.batch_size * config.sequence_length,
        flops=step_flops(config, model, block_size),
        peak_flops=hardware.peak_flops,
        lower_seconds=lower_seconds,
        compile_seconds=compile_seconds,
        processor_seconds=processor_seconds,
        gates=[
            checks.per_block_states(program, config, model, block_size, sizes),
            checks.dense_experts(program, config, model, sizes),
            checks.weight_copies(program, table, mesh.shape),
        ]
        if program
        else [],
        predicted=predict(program, rates, hardware.peak_flops, kernel_flops) if program and rates else None,
        kernel_flops=kernel_flops,
        refused=refused,
    )


def compile_or_refuse(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled | None, int, str | None]:
    """The program and the most bytes that it takes, or None, these bytes and what the compiler says."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", str(error))
        if used is None:
            raise
        return None, int(float(used[1]) * 2 ** (10 * (1 + "KMGT".index(used[2])))), used[0]
    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes - memory.alias_size_in_bytes
    return compiled, memory.output_size_in_bytes + memory.temp_size_in_bytes + arguments, None


def _bytes_on_a_device(tree) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
