"""Whole passes, train steps and generation at full width, random weights, as many layers as fit or as time allows.

Routing is even, as _roofline.py says. Bytes that a pass must move are counted there; here they stand beside the rate of
a copy in the same process, and FLOPs beside that of a large product.
"""

import dataclasses
import functools
import math
import statistics
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twotower_jax import randomness
from twotower_jax.benchmarks._roofline import Pass, even_routing, pass_bytes
from twotower_jax.benchmarks.accelerator.speeds import measured_ceilings
from twotower_jax.benchmarks.accelerator.units import Scale, Unit
from twotower_jax.config import ModelConfig
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.execution import Execution
from twotower_jax.generation import Settings, generate
from twotower_jax.parameters import Parameter, Params, Path, bind, count, parameter_table, unflatten
from twotower_jax.train.config import freeze, shipped
from twotower_jax.train.flops import peak_flops, step_flops
from twotower_jax.train.objectives import make_objective
from twotower_jax.train.step import apart, initial_state, make_optimizer, make_step, tables
from twotower_jax.two_tower import TwoTower

BLOCK = 16
# What a pass, a step and a generated text are decided by: everything.
_SOURCES = ("twotower_jax", "kernels")
_PASS_SECONDS, _TRAIN_SECONDS, _GENERATE_SECONDS = 150.0, 210.0, 150.0
_PASSES, _TRAIN, _GENERATE, _DEEP = 2, 3, 4, 5
# The part of a device's memory that weights may take.
_SHARE = 0.8
# Bytes that a trained parameter takes: master weights, two moments, gradient, and its copy in the compute dtype; and
# the frozen one of the other tower.
_BYTES_TRAINED = 4 + 8 + 4 + 2 + 2
_SPAN = 0.2  # Seconds of passes, one after the other, that are timed together on an accelerator.


# Passes.


def passes(scale: Scale) -> Iterator[tuple[int, Unit]]:
    """An evaluation and a step of AR at every batch, for the first layers; then for as many as fit."""
    ways: dict[str, Callable] = {"evaluation": _evaluation, "AR step": _ar_step}
    depths = [(_PASSES, scale.beginning)]
    deep = _deepest(scale)
    if len(deep) > len(scale.beginning):
        depths.append((_DEEP, deep))
    for rank, pattern in depths:
        for batch in scale.batches:
            for name, way in ways.items():
                parameters = {"pass": name, "model": scale.name, "layers": pattern, "batch": batch}
                parameters |= {"context": scale.context, "dtype": scale.dtype}
                run = functools.partial(_pass, scale, way, pattern, batch)
                seconds = _PASS_SECONDS * scale.patience * (1 if rank == _PASSES else 2)
                unit = Unit(
                    "passes", f"{name}, batch {batch}, {len(pattern)} layers", parameters, seconds, _SOURCES, run
                )
                yield rank, unit


def _deepest(scale: Scale) -> str:
    """The first layers of which both towers' weights fit."""
    pattern = scale.model.hybrid_override_pattern
    sizes = {letter: _parameters(scale, 2 * letter) - _parameters(scale, letter) for letter in set(pattern)}
    room = _SHARE * scale.memory / jnp.dtype(scale.dtype).itemsize - _parameters(scale, pattern[0]) + sizes[pattern[0]]
    layers = 0
    while layers < len(pattern) and room >= sizes[pattern[layers]]:
        room -= sizes[pattern[layers]]
        layers += 1
    return pattern[:layers]


def _parameters(scale: Scale, pattern: str) -> int:
    """How many parameters both towers have with these layers."""
    return count(parameter_table(TwoTower(_cut(scale.model, pattern))))


def _cut(model: ModelConfig, pattern: str) -> ModelConfig:
    return dataclasses.replace(model, hybrid_override_pattern=pattern)


def _pass(scale: Scale, way: Callable, pattern: str, batch: int) -> dict[str, Any]:
    model, params = _model(scale, pattern)
    call, one = way(model, params, scale, batch)
    seconds = _seconds(call, scale.turns)
    _, bandwidth = measured_ceilings(scale.dtype, scale.turns)
    moved = pass_bytes(model, jnp.dtype(scale.dtype), one)
    return {"seconds": seconds, "must_move": moved, "bandwidth": bandwidth}


def _evaluation(model: TwoTower, params: Params, scale: Scale, batch: int) -> tuple[Callable, Pass]:
    """A function without arguments: logits of a block of masks after the context."""
    cache = _filled(model, scale, batch)
    block = jnp.full((batch, BLOCK), model.config.mask_token_id, jnp.int32)
    evaluate = jax.jit(lambda p, c: bind(model, p).denoise(block, jnp.ones(batch), c))
    one = Pass("denoiser_tower", batch, BLOCK, BLOCK, scale.context, extends=False)
    with even_routing():
        compiled = evaluate.lower(params, cache).compile()
    return lambda: compiled(params, cache), one


def _ar_step(model: TwoTower, params: Params, scale: Scale, batch: int) -> tuple[Callable, Pass]:
    """A function without arguments: each row's most probable token, read into the cache in its place."""

    def step(params, token, cache):
        logits, read = bind(model, params).extend(token, jnp.ones(batch, jnp.int32), cache)
        # The same length again, so that it may be called any number of times.
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)[:, None], read.replace(lengths=cache.lengths)

    state = [jnp.full((batch, 1), 5, jnp.int32), _filled(model, scale, batch)]
    with even_routing():
        compiled = jax.jit(step, donate_argnums=(1, 2)).lower(params, *state).compile()

    def again():
        state[:] = compiled(params, *state)
        return state[0]

    return again, Pass("context_tower", batch, 1, 1, scale.context, extends=True)


def _filled(model: TwoTower, scale: Scale, batch: int):
    """A cache of zeros that says it is full of them up to a block."""
    cache = model.context_tower.empty_cache(batch, scale.context + BLOCK)
    return cache.replace(lengths=jnp.full(batch, scale.context, jnp.int32))


def _seconds(call: Callable, turns: int) -> float:
    """The median of some turns, each of calls one after the other, which are not waited for one by one."""
    on_cpu = jax.default_backend() == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter

    def timed(calls: int) -> float:
        start = clock()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        return (clock() - start) / calls

    timed(1)
    calls = 1 if on_cpu else max(1, int(_SPAN / timed(2)))
    return statistics.median(timed(calls) for _ in range(turns))


# Models.


def _model(scale: Scale, pattern: str) -> tuple[TwoTower, Params]:
    """With layers one by one, as generate.py lays out models of this size, and the same weights again if they are those
    of the last call."""
    if (scale.name, pattern) not in _models:
        _models.clear()
        execution = Execution(dtype=jnp.dtype(scale.dtype), scan_layers=False)
        model = TwoTower(_cut(scale.model, pattern), execution=execution)
        table = parameter_table(model)
        _models[scale.name, pattern] = model, unflatten(random_arrays(table, jnp.dtype(scale.dtype)))
    return _models[scale.name, pattern]


_models: dict[tuple[str, str], tuple[TwoTower, Params]] = {}


def random_arrays(table: Mapping[Path, Parameter], dtype: jnp.dtype) -> dict[Path, jax.Array]:
    """Parameters of plausible sizes by path, large ones drawn in their final dtype by few programs.

    How they are drawn otherwise, each by its own initializer, takes a program for each array.
    """
    flat = {}
    for path, parameter in table.items():
        to = jnp.dtype(jnp.float32) if parameter.float32 else dtype
        key = jax.random.fold_in(randomness.key(0), zlib.crc32("/".join(path).encode()))
        if math.prod(parameter.shape) > 2**20:
            flat[path] = _normal(key, parameter.shape, to)
        else:
            flat[path] = parameter.init(key, parameter.shape).astype(to)
    return flat


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape, dtype)


# The train step.


def training(scale: Scale) -> Iterator[tuple[int, Unit]]:
    """The denoiser's step, of the first layers if they fit, else of one layer of each kind."""
    pattern = next((p for p in (scale.beginning, scale.one_of_each) if _trains_in(scale, p) < scale.memory), None)
    pattern = pattern or scale.one_of_each
    parameters = {"model": scale.name, "layers": pattern, "rows": scale.rows, "sequence": scale.sequence}
    run = functools.partial(_train_step, scale, pattern)
    name = f"denoiser, {len(pattern)} layers, {scale.rows} × {scale.sequence} tokens"
    yield _TRAIN, Unit("train", name, parameters, _TRAIN_SECONDS * scale.patience, _SOURCES, run)


def _trains_in(scale: Scale, pattern: str) -> float:
    """Bytes, with a fifth for activations."""
    return _parameters(scale, pattern) / 2 * _BYTES_TRAINED / _SHARE


def _train_step(scale: Scale, pattern: str) -> dict[str, Any]:
    _models.clear()
    needed = _trains_in(scale, pattern)
    if needed > scale.memory:
        raise ValueError(f"needs {needed / 2**30:.0f} GiB, and the device has {scale.memory / 2**30:.0f}")
    config = shipped(scale.name)
    config.model.hybrid_override_pattern = pattern
    config.update({"objective": "denoiser", "block_size": BLOCK, "accumulate": 1, "dtype": scale.dtype})
    config.update({"batch_size": scale.rows, "sequence_length": scale.sequence, "steps": 100})
    config.mesh.update({"data": 1, "fsdp": 1, "expert": 1})
    config = freeze(config)
    model = config.model_config(config.vocab_size)
    task = make_objective(config, model)
    trained, frozen = tables(task)
    optimizer = make_optimizer(config, trained)
    balanced, rest = apart(task, unflatten(random_arrays(frozen, jnp.dtype(scale.dtype))))
    state = [initial_state(optimizer, unflatten(random_arrays(trained, jnp.dtype(jnp.float32))), balanced)]
    ids = jax.random.randint(randomness.key(1), (scale.rows, scale.sequence), 4, model.vocab_size)
    with even_routing():
        step = jax.jit(make_step(config, task, optimizer, BLOCK), donate_argnums=0)
        compiled = step.lower(state[0], rest, ids).compile()

    def once():
        state[0], metrics = compiled(state[0], rest, ids)
        return metrics.loss

    if not math.isfinite(float(once())):
        raise FloatingPointError("the loss of the first step is not finite")
    seconds = _seconds(once, max(2, scale.turns // 2))
    rate, _ = measured_ceilings(scale.dtype, scale.turns)
    flops = step_flops(config, model, BLOCK)
    found = {"seconds": seconds, "flops": flops, "rate": rate, "peak": peak_flops(config, jax.devices()[:1])}
    return found | {"tokens": scale.rows * scale.sequence, "temporaries": compiled.memory_analysis().temp_size_in_bytes}


# Generation.


def generation(scale: Scale) -> Iterator[tuple[int, Unit]]:
    """Diffusion with four evaluations a block, AR, and drafts of which all are kept, at the larger batch and alone."""
    for batch in scale.batches[::-1]:
        for mode in "diffusion", "ar", "speculative":
            parameters = {"mode": mode, "model": scale.name, "layers": scale.beginning, "batch": batch}
            parameters |= {"new_tokens": scale.new_tokens, "dtype": scale.dtype}
            run = functools.partial(_generate, scale, mode, batch)
            name = f"{mode}, batch {batch}, {len(scale.beginning)} layers"
            yield _GENERATE, Unit("generate", name, parameters, _GENERATE_SECONDS * scale.patience, _SOURCES, run)


def _generate(scale: Scale, mode: str, batch: int) -> dict[str, Any]:
    model, params = _model(scale, scale.beginning)
    sampling = SamplingConfig(block_size=BLOCK, steps_per_block=4, confidence_threshold=1.0)
    settings = Settings(
        mode=mode,
        max_new_tokens=scale.new_tokens,
        sampling=sampling,
        ignore_eos=True,
        batch_size=batch,
        tolerance=1.0 if mode == "speculative" else 0.0,
    )
    prompts = np.random.default_rng(0).integers(4, model.config.vocab_size, (batch, 48)).tolist()
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    best, results = math.inf, []
    with even_routing():
        for turn in range(3):
            start = clock()
            results = list(generate(model, params, prompts, settings))
            if turn:  # The first one compiles.
                best = min(best, clock() - start)
    tokens = sum(len(result.tokens) for result in results)
    denoiser = sum(result.denoiser_evaluations for result in results) / tokens
    context = sum(result.context_evaluations for result in results) / tokens
    return {"tokens_per_second": tokens / best, "denoiser_evaluations": denoiser, "context_evaluations": context}
