"""Times whole passes of small models with the forms that run by default against simpler forms of each op, on a CPU.

    python launch/benchmark.py forms

The train step of configs/tiny.py (forward, backward, optimizer), and an evaluation of the denoiser of 16 layers that
the recorded numbers are of. In each row one op is named otherwise and everything else is left as it is. All run in one
process, in turns; the median of the turns' ratios to the default of the same turn counts, in processor seconds, with
XLA on one thread, so that waiting threads are not counted as work.
"""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
from absl import flags

from twotower_jax import kernels, randomness
from twotower_jax.benchmarks._one_thread import use_one_thread
from twotower_jax.benchmarks._shapes import tiny_config
from twotower_jax.execution import Execution
from twotower_jax.kernels import Backends
from twotower_jax.parameters import bind, initialize, parameter_table
from twotower_jax.train.config import freeze, shipped
from twotower_jax.train.objectives import make_objective
from twotower_jax.train.step import make_optimizer, make_step, start_state, tables
from twotower_jax.two_tower import TwoTower

_BLOCK = 16


def define_flags() -> None:
    flags.DEFINE_integer("turns", 15, "How often each form runs.", lower_bound=1)
    flags.DEFINE_list("op", [], "Only these ops; default: all.")


def main() -> None:
    use_one_thread()
    trains, evaluates = ("causal_conv", "attention", "expert_mlp"), ("block_scan", "attention", "expert_mlp")
    # The ops that each pass makes use of.
    cases = {
        "train step, a denoiser of configs/tiny.py": (_train_step, ("ssd", "two_tower_ssd", *trains)),
        "train step, a backbone of configs/tiny.py": (
            lambda backends: _train_step(backends, "autoregressive"),
            ("ssd", *trains),
        ),
        "evaluation of 16 layers, batch 1": (lambda backends: _evaluation(backends, 1), evaluates),
        "evaluation of 16 layers, batch 8": (lambda backends: _evaluation(backends, 8), evaluates),
    }
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, median of {flags.FLAGS.turns} turns\n")
    print("| pass | op | form | processor time | against the default |")
    print("|---|---|---|--:|--:|")
    for case, (make, ops) in cases.items():
        forms = {("", "default"): make(Backends())}
        for op in [op for op in ops if op in flags.FLAGS.op] if flags.FLAGS.op else ops:
            for name in _simple(op):
                forms[op, name] = make(Backends(**{op: name}))
        for (op, name), (seconds, ratio) in zip(forms, _ratios(list(forms.values())), strict=True):
            print(f"| {case} | {op} | {name} | {seconds * 1e3:.1f} ms | {ratio:.2f} |", flush=True)


def _simple(op: str) -> list[str]:
    """The other forms that run here: no other platform's kernels, and no interpreters."""
    made_for = {name: kernels.platform_of(op, name) for name in kernels.implementations(op)}
    return [
        name
        for name, platform in made_for.items()
        if platform is None and name != "xla" and not name.endswith("_interpret")
    ]


def _train_step(backends: Backends, objective: str = "denoiser"):
    """A function without arguments that makes one more step."""
    config = shipped("tiny")
    config.objective, config.block_size = objective, _BLOCK
    config.kernels.update(dataclasses.asdict(backends))
    config = freeze(config)
    model = config.model_config(config.vocab_size)
    task = make_objective(config, model)
    optimizer = make_optimizer(config, tables(task)[0])
    state, frozen = start_state(task, optimizer, task.start(None, randomness.key(0)))
    step = jax.jit(make_step(config, task, optimizer, _BLOCK), donate_argnums=0)
    ids = jax.random.randint(randomness.key(1), (config.batch_size, config.sequence_length), 4, model.vocab_size)

    def once():
        nonlocal state
        state, metrics = step(state, frozen, ids)
        jax.block_until_ready((state, metrics))

    return once


def _evaluation(backends: Backends, batch: int):
    """A function without arguments: one pass of the denoiser over a block after 64 tokens."""
    model = TwoTower(tiny_config(), execution=Execution(backends=backends))
    params = initialize(parameter_table(model), randomness.key(0))
    prompt, block = jnp.full((batch, 64), 5, jnp.int32), jnp.full((batch, _BLOCK), 3, jnp.int32)
    lengths = jnp.full(batch, 64, jnp.int32)
    _, cache = jax.jit(lambda p: bind(model, p).prefill(prompt, lengths, 128))(params)
    evaluate = jax.jit(lambda p, c: bind(model, p).denoise(block, jnp.ones(batch), c))
    return lambda: jax.block_until_ready(evaluate(params, cache))


def _ratios(functions) -> list[tuple[float, float]]:
    """Median processor seconds of each, and the median of its ratio to the first in the same turn."""
    for function in functions:
        function()
    turns = []
    for _ in range(flags.FLAGS.turns):
        times = []
        for function in functions:
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
        turns.append(times)
    by_form = list(zip(*turns, strict=True))
    ratios = [statistics.median(t / first for t, first in zip(times, by_form[0], strict=True)) for times in by_form]
    return list(zip(map(statistics.median, by_form), ratios, strict=True))
