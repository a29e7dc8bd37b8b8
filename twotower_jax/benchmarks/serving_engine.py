"""What rows cost one another: evaluations wasted on waiting, and tokens per second, as the quorum of a call is chosen.

    python launch/benchmark.py serving_engine --checkpoint=DIR        # a trained denoiser, such as quickstart's
    python launch/benchmark.py serving_engine                         # random weights of the demonstration's shape

A call ends when a quorum of its rows have finished their blocks (generation/quorum.py). Runs with the quorum of the
engine, with one of all rows, which is how the engine worked before, and with one row, go by turns in one process. An
evaluation is wasted on a row that has no use for it: it is done and waits for others, or its slot is empty.

Then a simulation from the recorded numbers of evaluations per block, for other batch sizes, other distributions and
other quorums, in which an evaluation costs 1 and a pass of the context what was measured (or --context_cost).
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags

from twotower_jax import command_line
from twotower_jax.benchmarks import _roofline
from twotower_jax.benchmarks._shapes import demo_config
from twotower_jax.checkpoint.load import load
from twotower_jax.data import encode, load_tokenizer
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.execution import Execution
from twotower_jax.generation import Engine, Settings, positions, scheduling
from twotower_jax.generation.quorum import Quorum, best_part, part_of, simulate
from twotower_jax.parameters import bind
from twotower_jax.two_tower import TwoTower

_WORDS = ("list", "str", "dict", "file", "module", "function", "class", "value", "error", "object", "method", "the")


def define_flags() -> None:
    command_line.DEFINE_path("checkpoint", None, "A trained two-tower model; default: random weights.")
    flags.DEFINE_list("batches", ["8", "64"], "Rows together.")
    flags.DEFINE_integer("new_tokens", 128, "New tokens of each row.", lower_bound=16)
    flags.DEFINE_integer("rows_per_slot", 3, "Rows that go through each slot.", lower_bound=1)
    flags.DEFINE_float("threshold", 0.8, "confidence_threshold; little training needs a lower one.")
    flags.DEFINE_integer("repeats", 3, "Timed rounds, of which the median counts.", lower_bound=1)
    flags.DEFINE_float("context_cost", None, "Of a pass of the context, in evaluations; default: as measured here.")


@dataclasses.dataclass
class Run:
    """What one run of an engine did.

    Attributes:
      made: evaluations of the whole table. used: those of rows that were undecided, of `made` times the rows.
      reads: passes of the context over the table.
      tokens: new. seconds: by the clock. processor: of all threads.
      counts: evaluations of every block, row by row.
    """

    made: int
    used: int
    reads: int
    tokens: int
    seconds: float
    processor: float
    counts: list[list[int]]


def run(model, params, prompts: Sequence[Sequence[int]], settings: Settings, capacity: int) -> Run:
    """All prompts through one table."""
    engine = Engine(model, params, settings, capacity=capacity)
    for number, prompt in enumerate(prompts):
        engine.submit(prompt, settings.max_new_tokens - settings.max_new_tokens // 4 * (number % 3))
    made = used = reads = 0
    advance = engine._advance

    def counted(kind, places):
        nonlocal made, used, reads
        emitted = advance(kind, places)
        evaluations = np.asarray(emitted.denoiser_evaluations)
        # Some row is undecided in each evaluation of a call, and was so since the call began.
        made, used = made + int(evaluations.max()), used + int(evaluations.sum())
        reads += bool(np.asarray(emitted.context_evaluations).any())
        return emitted

    engine._advance = counted
    counts, tokens = [[] for _ in prompts], 0
    start, processor = time.perf_counter(), time.process_time()
    while engine.busy:
        for progress in engine.step():
            if progress.tokens:
                # A block's evaluations are the largest of its step map: what comes last is committed last.
                counts[progress.number].append(max(progress.step_map))
            if progress.result is not None:
                tokens += len(progress.result.tokens)
                assert sum(counts[progress.number]) == progress.result.denoiser_evaluations
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    return Run(made, used, reads, tokens, seconds, processor, counts)


# Shares of the rows; 0 stands for one row.
FRACTIONS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75)


def main() -> None:
    values = flags.FLAGS
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    if values.checkpoint is None:
        model = TwoTower(demo_config(), execution=Execution(scan_layers=True))
        params = _roofline.random_params(model, np.float32)
        draw = np.random.default_rng(0)
        texts = [draw.integers(4, model.config.vocab_size, draw.integers(4, 48)).tolist() for _ in range(1024)]
    else:
        loaded = load(values.checkpoint)
        model, params = loaded.model, loaded.params
        draw = np.random.default_rng(0)
        words = [" ".join(draw.choice(_WORDS, draw.integers(2, 12))) for _ in range(1024)]
        texts = [list(ids) for ids in encode(load_tokenizer(values.checkpoint), words)]
    sampling = SamplingConfig(block_size=16, steps_per_block=16, confidence_threshold=values.threshold)
    recorded, ratios = [], []
    columns = "evaluations per block | of them wasted | context passes | tokens/s | times that of all"
    print(f"\n| rows | quorum | {columns} | by processor seconds |\n|--:|---|--:|--:|--:|--:|--:|--:|")
    for batch in map(int, values.batches):
        settings = Settings(max_new_tokens=values.new_tokens, sampling=sampling, batch_size=batch, ignore_eos=True)
        prompts = (texts * (1 + batch * values.rows_per_slot // len(texts)))[: batch * values.rows_per_slot]
        capacity = max(positions(len(p), values.new_tokens, settings) for p in prompts)
        rules = {
            "all rows": lambda self, alive: alive,
            "the engine's": Quorum.of,
            "3/8": lambda self, alive: part_of(3 / 8, alive),
            "one row": lambda self, alive: 1,
        }
        runs = {name: [] for name in rules}
        for turn in range(values.repeats + 1):  # The first compiles.
            for name, rule in rules.items():
                with _quorum(rule):
                    done = run(model, params, prompts, settings, capacity)
                if turn:
                    runs[name].append(done)
        speed = {name: statistics.median(r.tokens / r.seconds for r in of) for name, of in runs.items()}
        work = {name: statistics.median(r.tokens / r.processor for r in of) for name, of in runs.items()}
        for name, of in runs.items():
            one = of[0]
            blocks = sum(map(len, one.counts))
            wasted = 1 - one.used / (one.made * batch)
            print(
                f"| {batch} | {name} | {one.made * batch / blocks:.2f} | {wasted:.0%} | {one.reads} | "
                f"{speed[name]:,.0f} | {speed[name] / speed['all rows']:.2f} | {work[name] / work['all rows']:.2f} |",
                flush=True,
            )
        assert runs["all rows"][0].counts == runs["one row"][0].counts, "the quorum changed a block"
        recorded += [count for row in runs["all rows"][0].counts for count in row]
        ratios.append(context_cost(model, params, batch, capacity))
    context = values.context_cost if values.context_cost is not None else statistics.median(ratios)
    print(
        f"\na pass of the context costs {', '.join(f'{r:.2f}' for r in ratios)} evaluations; simulated: {context:.2f}"
    )
    report(recorded, context)


def report(recorded: Sequence[int], context: float) -> None:
    """Simulated throughput over that of a quorum of all rows."""
    mean = statistics.mean(recorded)
    print(f"{len(recorded)} blocks of {mean:.2f} evaluations, deviation {statistics.pstdev(recorded):.2f}")
    draw = np.random.default_rng(1)
    cases = {
        "recorded": list(recorded),
        f"even, {round(mean)}": [round(mean)],
        "uniform, 1 … 2 means": list(range(1, max(2, round(2 * mean)))),
        "geometric of the same mean": np.minimum(draw.geometric(1 / mean, 4096), 64).tolist(),
    }
    names = " | ".join(f"{fraction:.3g}" if fraction else "one row" for fraction in FRACTIONS)
    print(f"\n| evaluations per block | rows | engine's | {names} |\n|---|--:|{'--:|' * (len(FRACTIONS) + 1)}")
    for name, counts in cases.items():
        for batch in (2, 3, 4, 8, 16, 64, 256):
            every = simulate(counts, batch, batch, context, 400)
            quorums = [part_of(best_part(counts, batch), batch), *(max(1, part_of(f, batch)) for f in FRACTIONS)]
            gains = [simulate(counts, batch, quorum, context, 400) / every for quorum in quorums]
            print(f"| {name} | {batch} | {' | '.join(f'{gain:.2f}' for gain in gains)} |", flush=True)


def context_cost(model, params, batch: int, capacity: int, repeats: int = 9) -> float:
    """Seconds of a pass of the context over a block of all rows, per second of an evaluation of the denoiser."""
    size = 16
    ids, lengths = np.full((batch, size), 5, np.int32), np.full(batch, size, np.int32)
    capacity = scheduling.round_up(capacity, scheduling.PIECE)
    cache = jax.jit(lambda p, ids, n: bind(model, p).prefill(ids, n, capacity)[1])(params, ids, lengths)
    calls = {
        "evaluation": jax.jit(lambda p, ids, c: bind(model, p).denoise(ids, np.ones(batch, np.float32), c)),
        "pass": jax.jit(lambda p, ids, c: bind(model, p).extend_states(ids, lengths, c)),
    }
    seconds = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call(params, ids, cache))
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return statistics.median(seconds["pass"]) / statistics.median(seconds["evaluation"])


class _quorum:
    """While a rule is in force in place of the engine's."""

    def __init__(self, rule):
        self._rule = rule

    def __enter__(self):
        self._before, Quorum.of = Quorum.of, self._rule

    def __exit__(self, *_):
        Quorum.of = self._before
