"""The real train step of a config, compiled for hardware that is not there, and what it would take of it."""

import dataclasses
import math
import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from twotower_jax.config import ModelConfig
from twotower_jax.parameters import count
from twotower_jax.planning.hardware import Hardware
from twotower_jax.sharding import batch_sharding, check_fits, make_mesh
from twotower_jax.train.config import TrainConfig
from twotower_jax.train.flops import step_flops
from twotower_jax.train.objectives import make_objective
from twotower_jax.train.schedule import block_stages
from twotower_jax.train.step import abstract_state, make_optimizer, make_step, tables

# What is to stay free of a device's memory.
HEADROOM = 0.1
# For projections: the share of the peak rate that a run is taken to reach.
UTILIZATION = 0.5


class Gate(NamedTuple):
    """A buffer that must not exist: its name, and the shapes found that would be it."""

    name: str
    found: list[str]


class Plan(NamedTuple):
    """What a step takes. Bytes are of one device, times in seconds.

    Attributes:
      parameters, trained: counts. weights: trained in float32 and frozen ones. optimizer: moments.
      activations: everything else that lives during a step (XLA's temporaries, gathered layers and gradients in it).
      flops: analytic, of one step over all devices.
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
    memory: int
    tokens: int
    flops: float
    peak_flops: float
    lower_seconds: float
    compile_seconds: float
    gates: list[Gate]

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


def plan_step(config: TrainConfig, hardware: Hardware) -> Plan:
    """Compiles the last stage of a run for `hardware`.

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
        started = time.monotonic()
        lowered = step.lower(state, frozen, ids)
        lower_seconds, started = time.monotonic() - started, time.monotonic()
        compiled = lowered.compile()
        compile_seconds = time.monotonic() - started
    weights = _bytes_on_a_device((state.params, frozen))
    optimizer_bytes = _bytes_on_a_device(state.optimizer)
    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.output_size_in_bytes + memory.temp_size_in_bytes + arguments
    sizes = config.mesh.resolve(len(hardware.devices))
    return Plan(
        hardware=hardware.name,
        chips=hardware.chips,
        devices=len(hardware.devices),
        mesh={axis: size for axis, size in dataclasses.asdict(sizes).items() if size > 1},
        parameters=count(trained) + count(frozen_table),
        trained=count(trained),
        weights=weights,
        optimizer=optimizer_bytes,
        activations=peak - weights - optimizer_bytes,
        memory=hardware.memory,
        tokens=config.batch_size * config.sequence_length,
        flops=step_flops(config, model, block_size),
        peak_flops=hardware.peak_flops,
        lower_seconds=lower_seconds,
        compile_seconds=compile_seconds,
        gates=find_forbidden(compiled.as_text(), config, model, block_size, sizes),
    )


def find_forbidden(program: str, config: TrainConfig, model: ModelConfig, block_size: int, sizes) -> list[Gate]:
    """Buffers of a compiled program that the design rules out.

    Args:
      program: HLO as text, the part of one device.
      sizes: the mesh's `MeshShape`.
    """
    rows = config.batch_size // config.accumulate // sizes.batch_shards
    tokens = rows * config.sequence_length // sizes.sequence
    head_dim, states = model.mamba_head_dim, model.ssm_state_size
    per_block = tokens // block_size * (model.mamba_num_heads // sizes.tensor) * head_dim * states
    experts, width = model.n_routed_experts // sizes.expert, model.moe_intermediate_size // sizes.tensor
    gates = [Gate("a state for every block", []), Gate("a dense expansion over the experts", [])]
    for shape in sorted(set(re.findall(r"(?:f32|bf16)\[[\d,]+\]", program))):
        dims = [int(n) for n in shape[shape.index("[") + 1 : -1].split(",")]
        elements = math.prod(dims)
        # Chunks may have a state each, if they are longer than blocks.
        if model.chunk_size > block_size and elements >= per_block and sorted(dims[-2:]) == sorted((head_dim, states)):
            gates[0].found.append(shape)
        expanded = dims[-1] == experts * width or sorted(dims[-2:]) == sorted((experts, width))
        if experts > 1 and expanded and elements >= tokens * experts * width:
            gates[1].found.append(shape)
    return gates


def _bytes_on_a_device(tree) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
