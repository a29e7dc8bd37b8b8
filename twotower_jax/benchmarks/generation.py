"""Tokens a second and evaluations of every mode, against the same model decoded by plain loops, and against batches.

    python launch/benchmark.py generation                     # the demonstration's model
    python launch/benchmark.py generation --model=recorded    # the tests' model: 16 narrow layers
    python launch/benchmark.py generation --model=small100m --batches=1,64 --modes=ar,diffusion     # weights in memory
    python launch/benchmark.py generation --roofline --model=nano30b --dtype=bfloat16 --batches=1,64     # on an H200

Speed is counted by the clock, and in processor seconds, which other work on the machine changes less; they are those of
all threads. Weights are random: the time of an evaluation does not depend on what they are, and how many evaluations a
block takes is forced, so that all loops do the same work. Diffusion takes `--steps` evaluations per block (a threshold
of 1 commits by count alone), and `--tolerance=1` keeps every draft. --roofline is described in _roofline.py.

Four plain loops do the evaluations of diffusion at batch 1, look at the block on the host after each step, and sample
a step with the library's own `sample_step`:

    jitted, cache          `denoise`, `sample_step` and `extend` are compiled, and called one after another from Python
    jitted, read per block   the same, but for each block the context reads the whole text again
    jitted, read per step    the same, but for each step, as a loop of nothing but forward passes does; texts are padded
                           to one length, so that each function is compiled once
    eager, cache           nothing is compiled: every operation is dispatched by itself, as a first port of the
                           published code would
"""

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from twotower_jax import randomness
from twotower_jax.benchmarks import _roofline
from twotower_jax.benchmarks._shapes import demo_config, nano_config, small_config, tiny_config
from twotower_jax.diffusion import SamplingConfig, noise_level, sample_step
from twotower_jax.execution import Execution
from twotower_jax.generation import Settings, generate
from twotower_jax.parameters import bind
from twotower_jax.two_tower import TwoTower

_PROMPT_LENGTH, _CAPACITY = 48, 256
_MODELS = {"demo": demo_config, "recorded": tiny_config, "small100m": small_config, "nano30b": nano_config}
# Modes, and what speculative mode tolerates.
_RUNS = (("diffusion", 0), ("ar", 0), ("mock_ar", 0), ("speculative", 0), ("speculative", 1))


def define_flags() -> None:
    flags.DEFINE_enum("model", "demo", list(_MODELS), "Whose shape.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and activations.")
    flags.DEFINE_bool("roofline", False, "Diffusion against AR with even routing, as parts of the roofline.")
    flags.DEFINE_list("modes", [], "Only these modes, and no plain loops; default: all, and the loops.")
    flags.DEFINE_list("batches", ["1", "8", "64"], "Rows together.")
    flags.DEFINE_integer("new_tokens", 128, "New tokens of each row.", lower_bound=16)
    flags.DEFINE_integer("steps", 4, "Denoiser evaluations per block of 16.", lower_bound=1, upper_bound=16)
    flags.DEFINE_integer("eager_tokens", 16, "New tokens of the eager loop, which is slow.", lower_bound=16)
    flags.DEFINE_integer("repeats", 3, "Runs of each, of which the fastest counts.", lower_bound=1)


def main() -> None:
    values = flags.FLAGS
    config, dtype, batches = _MODELS[values.model](), jnp.dtype(values.dtype), [int(b) for b in values.batches]
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, model {values.model}")
    if unknown := sorted(set(values.modes) - {mode for mode, _ in _RUNS}):
        raise ValueError(f"--modes: there is no mode {unknown[0]!r}")
    if values.roofline:
        # As generate.py has it: a scan copies the experts out of the stack, but compiles sooner.
        execution = Execution(dtype=dtype, scan_layers=jax.default_backend() == "cpu")
        model = TwoTower(config, execution=execution)
        print(*_roofline.run(model, dtype, batches, _PROMPT_LENGTH, values.new_tokens, values.repeats), sep="\n")
        return
    # As generate.py has it: small models scanned, since they compile sooner so.
    execution = Execution(dtype=dtype, scan_layers=values.model in ("demo", "recorded"))
    model = TwoTower(config, execution=execution)
    params = _roofline.random_params(model, dtype)
    sampling = SamplingConfig(block_size=16, steps_per_block=values.steps, confidence_threshold=1.0)
    settings = Settings(max_new_tokens=values.new_tokens, sampling=sampling, ignore_eos=True)
    print(f"{values.steps} evaluations per block of 16\n")
    columns = "tokens/s | times batch 1 | tokens a processor second | times batch 1"
    print(f"| mode | batch | evaluations per token, denoiser + context | {columns} |")
    print("|---|--:|---|--:|--:|--:|--:|")
    alone = {}
    for mode, tolerance in _RUNS:
        if values.modes and mode not in values.modes:
            continue
        name = f"{mode}, every draft kept" if tolerance else mode
        for batch in batches:
            of_mode = dataclasses.replace(settings, mode=mode, tolerance=float(tolerance), batch_size=batch)
            rates, evaluations = _engine(model, params, of_mode, batch, values.repeats)
            first = alone.setdefault(name, rates)
            speeds = (f"{own:,.0f} | {own / one:.1f}" for own, one in zip(rates, first, strict=True))
            print(f"| {name} | {batch} | {evaluations} | {' | '.join(speeds)} |", flush=True)
    if not values.modes:
        _against_loops(model, params, settings, values.eager_tokens, values.repeats)


def _against_loops(model, params, settings: Settings, eager_tokens: int, repeats: int) -> None:
    """The engine and the plain loops by turns, so that a machine that slows down slows all of them."""
    execution = model.context_tower.execution
    # Without scanned segments: a scan is compiled even when nothing else is.
    flat = TwoTower(model.config, execution=dataclasses.replace(execution, scan_layers=False))
    flat_params = _roofline.random_params(flat, execution.dtype)
    alone = dataclasses.replace(settings, batch_size=1)
    short = dataclasses.replace(settings, max_new_tokens=eager_tokens)
    rates = _best(
        {
            "engine": lambda: _tokens(generate(model, params, _prompts(model, 1), alone)),
            "plain loop, jitted, cache": lambda: _plain(model, params, settings, jax.jit),
            "plain loop, jitted, read per block": lambda: _plain(model, params, settings, jax.jit, read_every="block"),
            "plain loop, jitted, read per step": lambda: _plain(model, params, settings, jax.jit, read_every="step"),
        },
        repeats,
    ) | _best({"plain loop, eager, cache": lambda: _plain(flat, flat_params, short, lambda function: function)}, 1)
    print("\n| diffusion, batch 1 | tokens/s | the engine's, times | tokens a processor second | the engine's, times |")
    print("|---|--:|--:|--:|--:|")
    for name, rate in rates.items():
        speeds = (f"{own:,.1f} | {of_engine / own:,.1f}" for own, of_engine in zip(rate, rates["engine"], strict=True))
        print(f"| {name} | {' | '.join(speeds)} |")


class Rates(NamedTuple):
    """Tokens a second of the clock, and of the processor."""

    clock: float
    processor: float


def _prompts(model: TwoTower, batch: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(4, model.config.vocab_size, (batch, _PROMPT_LENGTH)).tolist()


def _engine(model, params, settings: Settings, batch: int, repeats: int) -> tuple[Rates, str]:
    """Speed and evaluations per token."""
    results = []

    def run() -> int:
        results[:] = generate(model, params, _prompts(model, batch), settings)
        return _tokens(results)

    rates = _best({"": run}, repeats)[""]
    tokens = sum(len(r.tokens) for r in results)
    denoiser = sum(r.denoiser_evaluations for r in results) / tokens
    context = sum(r.context_evaluations for r in results) / tokens
    return rates, f"{denoiser:.2f} + {context:.2f}"


def _tokens(results) -> int:
    return sum(len(r.tokens) for r in results)


def _best(runs: dict[str, Callable[[], int]], repeats: int) -> dict[str, Rates]:
    """Rates of the fastest of some rounds through all runs after a first one, each measure by itself.

    A run returns its number of tokens.
    """
    for run in runs.values():
        run()
    rates = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            clock, processor = time.perf_counter(), time.process_time()
            tokens = run()
            rates[name].append(
                Rates(tokens / (time.perf_counter() - clock), tokens / (time.process_time() - processor))
            )
    return {name: Rates(*map(max, zip(*of_run, strict=True))) for name, of_run in rates.items()}


_compiled = {}


def _plain(model, params, settings: Settings, jit, read_every: str | None = None) -> int:
    """Diffusion of one row as a plain loop, with a cache or reading the text every "block" or "step"; returns the
    number of tokens."""
    sampling, mask = settings.sampling, model.config.mask_token_id
    if jit not in _compiled:
        _compiled[jit] = (
            jit(lambda p, ids, n: bind(model, p).prefill(ids, n, _CAPACITY)),
            jit(lambda p, block, t, cache: bind(model, p).denoise(block, t, cache)),
            jit(
                lambda keys, block, logits, n, step: sample_step(
                    sampling, keys, block, logits, block=n, step=step, mask_token_id=mask
                )
            ),
            jit(lambda p, block, n, cache: bind(model, p).extend(block, n, cache)),
        )
    prefill, denoise, sample, extend = _compiled[jit]
    keys = jax.random.split(randomness.key(settings.seed), 1)
    text = _prompts(model, 1)[0]

    def read():
        length = len(text) if read_every is None else _PROMPT_LENGTH + settings.max_new_tokens
        padded = np.full((1, length), model.config.pad_token_id, np.int32)
        padded[0, : len(text)] = text
        return prefill(params, padded, jnp.full(1, len(text)))[1]

    cache = read()
    for n in range(settings.max_new_tokens // sampling.block_size):
        if read_every == "block":
            cache = read()
        block, step = jnp.full((1, sampling.block_size), mask, jnp.int32), 0
        while bool(jnp.any(block == mask)):
            if read_every == "step":
                cache = read()
            logits = denoise(params, block, noise_level(block, mask), cache)
            block = sample(keys, block, logits, n, step).xt
            step += 1
        text += np.asarray(block)[0].tolist()
        if read_every is None:
            _, cache = extend(params, block, jnp.full(1, sampling.block_size), cache)
    return len(text) - _PROMPT_LENGTH
