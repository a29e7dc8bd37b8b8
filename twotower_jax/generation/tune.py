"""A sweep of diffusion's settings on given prompts and this hardware, against AR: speed, and how near to AR it stays.

Everything is greedy. A point is (block size, steps, threshold); thresholds share a compiled function, so each (block
size, steps) is compiled once. A first pass of every point gives its tokens, compiles, and is not timed; then rounds go
through AR and all points in turn, so that a machine that slows down slows all of them, and the median counts.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from twotower_jax.diffusion import SamplingConfig
from twotower_jax.diffusion.strategies import knobs
from twotower_jax.generation.engine import generate
from twotower_jax.generation.placement import TowerMeshes, in_force
from twotower_jax.generation.quality import generated_likelihoods
from twotower_jax.generation.settings import Result, Settings
from twotower_jax.generation.timing import in_turns
from twotower_jax.parameters import Params
from twotower_jax.two_tower import TwoTower


@dataclasses.dataclass
class Point:
    """What was measured of AR (`sampling` None) or of a setting of diffusion, over all prompts.

    Attributes:
      tokens_per_evaluation: new tokens over passes of either tower, reading the prompt being one.
      tokens_per_second: by the clock, the median of the rounds.
      evaluations_per_second: of rows, both towers' together.
      agreement: of the positions of AR's row or this one, the part where both have the same token.
      agreement_prefix: the part of them that comes before a row's first difference.
      log_likelihood: of the new tokens under the context tower given what precedes them, nats per token.
      pareto: no other setting has both more agreement and more tokens per second, or one more and the other equal.
      quality: by the caller's measure, the higher the better; None without one. It then takes the place of agreement
        where settings are compared.
    """

    sampling: SamplingConfig | None
    tokens_per_evaluation: float
    tokens_per_second: float
    evaluations_per_second: float
    agreement: float
    agreement_prefix: float
    log_likelihood: float
    pareto: bool = False
    quality: float | None = None

    @property
    def judged_by(self) -> float:
        """What is to be high beside the speed: quality, or agreement where it is not known."""
        return self.agreement if self.quality is None else self.quality

    def row(self) -> dict[str, Any]:
        """For results.json."""
        values = dataclasses.asdict(self)
        if self.quality is None:
            del values["quality"]
        sampling = values.pop("sampling")
        names = ("block_size", "steps_per_block", "confidence_threshold") if sampling else ()
        if sampling and "confidence_threshold" not in knobs(sampling["strategy"]):
            names = names[:-1]
        return {name: sampling[name] for name in names} | values

    def setting(self) -> tuple[str, str, str]:
        """Block, steps and threshold as text; empty where there is none."""
        s = self.sampling
        if s is None:
            return "AR", "", ""
        threshold = f"{s.confidence_threshold:g}" if "confidence_threshold" in knobs(s.strategy) else ""
        return str(s.block_size), str(s.steps_per_block), threshold


@dataclasses.dataclass
class Sweep:
    """AR, the settings in the order of `grid`, and the rule that picks one.

    Attributes:
      needed: for each block size the tokens per evaluation at which diffusion is as fast as AR here: AR's tokens
        per second over the median of its own evaluations per second.
    """

    ar: Point
    points: list[Point]
    needed: dict[int, float]

    def best(self, least: float) -> Point:
        """The fastest of at least this agreement, or this part of AR's quality where it is known; where there is none,
        the one of most, and of equals the fastest."""
        enough = [point for point in self.points if point.judged_by >= least * self.ar.judged_by]
        if enough:
            return max(enough, key=lambda point: point.tokens_per_second)
        return max(self.points, key=lambda point: (point.judged_by, point.tokens_per_second))


def grid(
    thresholds: Sequence[float],
    steps: Sequence[int],
    blocks: Sequence[int],
    strategy: str = "confidence",
    options: Mapping[str, Any] = {},  # noqa: B006 (never written)
) -> list[SamplingConfig]:
    """All combinations, those of one compiled function together. More steps than a block has tokens are the same as
    that many, and stand for them.

    Args:
      thresholds: left out of account for a strategy that has none, or whose options name it.
      strategy, options: of every combination.

    Raises:
      ValueError: for a value out of range, or an empty list.
    """
    if not (thresholds and steps and blocks):
        raise ValueError("thresholds, steps and blocks must each hold at least one value")
    swept = "confidence_threshold" in knobs(strategy) and "confidence_threshold" not in options
    points = {
        (block, min(step, block), threshold): None
        for block in sorted(set(blocks))
        for step in sorted(set(steps))
        for threshold in (sorted(set(thresholds)) if swept else (None,))
    }
    return [
        SamplingConfig(
            block_size=block,
            steps_per_block=step,
            strategy=strategy,
            strategy_options=dict(options) | ({"confidence_threshold": threshold} if swept else {}),
        )
        for block, step, threshold in points
    ]


def sweep(
    model: TwoTower,
    params: Params,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    samplings: Sequence[SamplingConfig],
    rounds: int = 3,
    report: Callable[[str], None] = lambda message: None,
    placement: TowerMeshes = TowerMeshes(),  # noqa: B008 (frozen)
    quality: Callable[[Settings], float] | None = None,
) -> Sweep:
    """Measures AR and every sampling.

    Args:
      settings: of every run, but for mode and sampling.
      rounds: timed ones.
      report: gets a line after each run.
      placement: the devices, the same for both towers.
      quality: of settings, the higher the better, such as the part of a task's questions that they answer rightly.

    Raises:
      ValueError, FloatingPointError: as of `generate`.
    """
    params = placement.context_params(model, params)
    runs = [dataclasses.replace(settings, mode="ar", sampling=SamplingConfig())]
    runs += [dataclasses.replace(settings, mode="diffusion", sampling=sampling) for sampling in samplings]

    def results_of(run: Settings) -> list[Result]:
        return list(generate(model, params, prompts, run, placement=placement))

    timed = in_turns([functools.partial(results_of, run) for run in runs], rounds, report)
    points = []
    for run, (rows, times) in zip(runs, timed, strict=True):
        pairs = [(row.prompt_ids, row.tokens) for row in rows]
        with in_force(placement.context):
            likelihoods = generated_likelihoods(model, params, pairs, settings.batch_size)
        sampling = run.sampling if run.mode == "diffusion" else None
        total = sum(x.log_likelihood for x in likelihoods) / sum(x.tokens for x in likelihoods)
        points.append(_point(sampling, rows, timed[0][0], statistics.median(times), total))
        if quality is not None:
            points[-1].quality = quality(run)
            report(f"quality {len(points)}/{len(runs)}: {points[-1].quality:.4f}")
    ar, points = points[0], points[1:]
    for point in points:
        point.pareto = not any(_dominates(other, point) for other in points)
    needed = {}
    for size in sorted({sampling.block_size for sampling in samplings}):
        rates = [p.evaluations_per_second for p in points if p.sampling.block_size == size]
        needed[size] = ar.tokens_per_second / statistics.median(rates)
    return Sweep(ar, points, needed)


def agreement(tokens: Sequence[int], reference: Sequence[int]) -> tuple[int, int, int]:
    """Equal tokens at equal places; those before the first difference; and the places that either row has."""
    equal = [a == b for a, b in zip(tokens, reference, strict=False)]
    return sum(equal), [*equal, False].index(False), max(len(tokens), len(reference))


def _point(
    sampling: SamplingConfig | None,
    rows: Sequence[Result],
    reference: Sequence[Result],
    seconds: float,
    log_likelihood: float,
) -> Point:
    tokens = sum(len(row.tokens) for row in rows)
    evaluations = sum(row.denoiser_evaluations + row.context_evaluations for row in rows)
    counts = [agreement(row.tokens, ar.tokens) for row, ar in zip(rows, reference, strict=True)]
    equal, prefix, places = (sum(column) for column in zip(*counts, strict=True))
    return Point(
        sampling=sampling,
        tokens_per_evaluation=tokens / evaluations,
        tokens_per_second=tokens / seconds,
        evaluations_per_second=evaluations / seconds,
        agreement=equal / places,
        agreement_prefix=prefix / places,
        log_likelihood=log_likelihood,
    )


def _dominates(a: Point, b: Point) -> bool:
    ours, theirs = (a.judged_by, a.tokens_per_second), (b.judged_by, b.tokens_per_second)
    return ours != theirs and all(x >= y for x, y in zip(ours, theirs, strict=True))
