"""Temporary memory of the compiled denoiser step against the block size, from 64 down to 4.

With a state stored for each block it would grow sixteenfold. Sequences of 1024 tokens in chunks of 128, the width of
the recorded tiny model, rematerialization on as in the 30B recipe.
"""

import dataclasses

import jax
import jax.numpy as jnp

from twotower_jax.benchmarks._shapes import abstract_params, tiny_config
from twotower_jax.execution import Execution
from twotower_jax.parameters import bind
from twotower_jax.two_tower import TwoTower

_LENGTH, _CHUNK = 1024, 128


def define_flags() -> None:
    """There is nothing to set."""


def main() -> None:
    model = TwoTower(dataclasses.replace(tiny_config(), chunk_size=_CHUNK), execution=Execution(remat="unit"))
    config = model.config
    mamba_layers = config.hybrid_override_pattern.count("M")
    state = config.mamba_inner * config.ssm_state_size * 4
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {_LENGTH} tokens, {mamba_layers} Mamba layers\n")
    print("| block | temporaries of the train step | for comparison: one state per block and Mamba layer |")
    print("|---|---|---|")
    for block_size in (64, 32, 16, 8, 4):
        temporaries = _temporaries(model, block_size)
        states = mamba_layers * _LENGTH // block_size * state
        print(f"| {block_size} | {temporaries / 2**20:.1f} MiB | {states / 2**20:.1f} MiB |", flush=True)


def _temporaries(model: TwoTower, block_size: int) -> int:
    """Bytes that the compiled gradient needs beyond its arguments and results."""

    def loss(params, clean, noisy, t):
        logits, _ = bind(model, params).training_logits(clean, noisy, t, block_size)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

    ids, t = jax.ShapeDtypeStruct((1, _LENGTH), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.float32)
    compiled = jax.jit(jax.grad(loss)).lower(abstract_params(model), ids, ids, t).compile()
    return compiled.memory_analysis().temp_size_in_bytes
