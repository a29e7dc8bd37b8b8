"""Time to trace and compile the denoiser's train step and a denoising step, for towers of 8, 16 and 52 layers.

The width is that of the recorded tiny model; the patterns are the beginning of the 30B model's and the whole of it.
Compilation is counted in processor seconds, which a busy machine does not change.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp

from twotower_jax.benchmarks._shapes import NANO_PATTERN, abstract_params, tiny_config
from twotower_jax.parameters import bind
from twotower_jax.stack import segments
from twotower_jax.two_tower import TwoTower

_LAYERS = (8, 16, 52)


def define_flags() -> None:
    """There is nothing to set."""


def main() -> None:
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}\n")
    print("| layers | distinct layers | train step: trace | compile | denoiser evaluation: trace | compile |")
    print("|---|---|---|---|---|---|")
    for layers in _LAYERS:
        pattern = NANO_PATTERN[:layers]
        model = TwoTower(dataclasses.replace(tiny_config(), hybrid_override_pattern=pattern))
        distinct = sum(len(stretch.unit) for stretch in segments(pattern))
        times = [f"{seconds:.1f} s" for case in (_train_step, _evaluation) for seconds in _times(*case(model))]
        print(f"| {layers} | {distinct} | {' | '.join(times)} |", flush=True)


def _times(function, *arguments) -> tuple[float, float]:
    """Processor seconds to trace and lower, and to compile."""
    start = time.process_time()
    lowered = jax.jit(function).lower(*arguments)
    middle = time.process_time()
    lowered.compile()
    return middle - start, time.process_time() - middle


def _train_step(model: TwoTower):
    def loss(params, clean, noisy, t):
        logits, _ = bind(model, params).training_logits(clean, noisy, t, 16)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

    ids = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    return jax.grad(loss), abstract_params(model), ids, ids, jax.ShapeDtypeStruct((2,), jnp.float32)


def _evaluation(model: TwoTower):
    params = abstract_params(model)
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    prompt = jax.ShapeDtypeStruct((2, 32), jnp.int32)
    _, cache = jax.eval_shape(lambda p, ids, n: bind(model, p).prefill(ids, n, 64), params, prompt, lengths)
    block, t = jax.ShapeDtypeStruct((2, 16), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.float32)
    return lambda p, b, t, c: bind(model, p).denoise(b, t, c), params, block, t, cache
