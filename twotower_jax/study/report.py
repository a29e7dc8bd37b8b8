"""A study's report in Markdown, with curves beside it: means over seeds and their standard errors."""

import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from twotower_jax.outputs import write_file
from twotower_jax.study.cells import AR, Cell, Curve, Part
from twotower_jax.study.results import Mean, Results
from twotower_jax.visualize.curves import draw_curves

# The value for one seed of a cell and a way, or None where there is none.
Find = Callable[[Results, Part, Cell, int, str], float | None]


class Metric(NamedTuple):
    """A column; its numbers are told times `scale`."""

    head: str
    find: Find
    scale: float = 1.0
    places: int = 2


def _answer(name: str) -> Find:
    return lambda results, part, cell, seed, way: (results.answers(part, cell, seed, way) or {}).get(name)


def _training(name: str) -> Find:
    return lambda results, part, cell, seed, way: (results.trained(cell, seed) or {}).get(name)


def _over_ar(name: str) -> Find:
    """What a way has over what the backbone has a token at a time, the same seed's."""

    def find(results: Results, part: Part, cell: Cell, seed: int, way: str) -> float | None:
        own = (results.answers(part, cell, seed, way) or {}).get(name)
        ar = (results.ar(part, cell, seed) or {}).get(name)
        return own / ar if own is not None and ar else None

    return find


def _tokens(results: Results, part: Part, cell: Cell, seed: int, way: str) -> float:
    return results.study.tokens_of(cell)


METRICS = {
    "tokens": Metric("tokens, % of the backbone's", _tokens, 100, 0),
    "validation_loss": Metric("validation loss", _training("validation_loss"), places=3),
    "accuracy": Metric("answers right, %", _answer("accuracy"), 100, 1),
    "words": Metric("words in place, %", _answer("words"), 100, 1),
    "retained": Metric("retained of AR's right answers, %", _over_ar("accuracy"), 100, 1),
    "tokens_per_evaluation": Metric("tokens per evaluation", _answer("tokens_per_evaluation")),
    "accepted": Metric("drafts kept per block", _answer("accepted")),
    "speed": Metric("tokens/s over AR's", _over_ar("tokens_per_second")),
}


def write_report(results: Results, parts: Iterable[Part], seeds: int, path: pathlib.Path, command: str) -> None:
    """The report, and a picture for each curve of a part that has two values, as PATH_PART_ACROSS.svg.

    Raises:
      ValueError, OSError: if they cannot be written.
    """
    lines = [*_head(results, seeds, command)]
    for part in parts:
        paper = f"The paper: {part.published}" if part.published else "The paper tells nothing of it."
        lines += ["", f"## {part.title}", "", paper, "", *_table(results, part, seeds)]
        if missing := _missing(results, part, seeds):
            lines += ["", f"Missing: {missing}."]
        for curve in part.curves:
            if picture := draw(results, part, curve, seeds):
                name = f"{path.stem}_{part.name}_{curve.across}.svg"
                write_file(path.with_name(name), picture)
                lines += ["", f"![{METRICS[curve.up].head} over {METRICS[curve.across].head}]({name})"]
    write_file(path, "\n".join(lines) + "\n")


def _head(results: Results, seeds: int, command: str) -> list[str]:
    about, config = results.about, results.study.config
    if not about:
        return ["# Ablations in miniature", "", "Nothing was measured yet."]
    tokens = config.steps * config.batch_size * config.sequence_length
    days = about["date"] if about["date"] == about["began"] else f"{about['began']} to {about['date']}"
    return [
        "# Ablations in miniature",
        "",
        f"`{command}` wrote this page: {days}, {about['machine']}, jax {about['jax']}. Up to {seeds} seeds of each "
        "cell, each seed with a backbone of its own; a number is the mean over the seeds that there are, and after ± "
        "its standard error. The seeds have their questions in common: the error is that of training, not of the "
        "choice of questions.",
        "",
        f"Width {config.model.hidden_size}, pattern `{config.model.hybrid_override_pattern}`; "
        f"{tokens:,} tokens for a backbone, and {results.study.tokens:.0%} of them for a denoiser where nothing else "
        f"is said; blocks of "
        f"{config.block_size}, threshold 0.8. {results.study.questions} questions of each of the tasks "
        f"{', '.join(results.study.tasks)}; an answer is right if all of it is. Cells of a part share the backbone of "
        "their seed, and differ in nothing else than what is said; `base` is the published recipe. Under “− first” "
        "stands by how much the validation loss differs from that of the part's first cell, taken seed by seed.",
    ]


def _table(results: Results, part: Part, seeds: int) -> list[str]:
    metrics = [METRICS[name] for name in part.metrics]
    compares = "validation_loss" in part.metrics and len(part.cells) > 1
    head = ["cell", "asked by", *(metric.head for metric in metrics), *(["− first"] if compares else []), "seeds"]
    lines = [_row(head), _row(["---", "---", *["--:"] * (len(head) - 2)])]
    for cell in part.cells:
        for way in cell.ways:
            found = [mean(results, part, cell, way, name, seeds) for name in part.metrics]
            cells = [_said(value, metric) for value, metric in zip(found, metrics, strict=True)]
            if compares:
                cells.append(_said(_difference(results, part, cell, way, seeds), METRICS["validation_loss"]))
            asked = sum(results.answers(part, cell, seed, way) is not None for seed in range(seeds))
            lines.append(_row([cell.name, f"`{way}`", *cells, str(asked)]))
    return lines


def mean(results: Results, part: Part, cell: Cell, way: str, metric: str, seeds: int) -> Mean | None:
    """The mean of a metric over the seeds that were measured; None for none."""
    found = (METRICS[metric].find(results, part, cell, seed, way) for seed in range(seeds))
    return Mean.of(value for value in found if value is not None)


def _difference(results: Results, part: Part, cell: Cell, way: str, seeds: int) -> Mean | None:
    """The mean difference of the validation loss from that of the part's first cell; None for that one."""
    if cell is part.cells[0]:
        return None
    find, pairs = METRICS["validation_loss"].find, []
    for seed in range(seeds):
        own, first = (find(results, part, each, seed, way) for each in (cell, part.cells[0]))
        if None not in (own, first):
            pairs.append(own - first)
    return Mean.of(pairs)


def _missing(results: Results, part: Part, seeds: int) -> str:
    """The cells without all seeds."""
    found = []
    for cell in part.cells:
        if left := [str(seed) for seed in range(seeds) if not results.is_finished(part, cell, seed)]:
            found.append(f"{cell.name}, seed{'s' if len(left) > 1 else ''} {' '.join(left)}")
    return "; ".join(found)


def draw(results: Results, part: Part, curve: Curve, seeds: int) -> str | None:
    """Each seed's curve, and that of the means, of all ways but AR; None where no curve has two points."""
    places = [(cell, way) for cell in part.cells for way in cell.ways if way != AR]

    across, up = METRICS[curve.across], METRICS[curve.up]

    def line(value: Callable[[Cell, str, str], float | None]) -> list[tuple[float, float]]:
        pairs = [(value(*place, curve.across), value(*place, curve.up)) for place in places]
        return sorted((across.scale * x, up.scale * y) for x, y in pairs if None not in (x, y))

    def of_seed(seed: int) -> list[tuple[float, float]]:
        return line(lambda cell, way, name: METRICS[name].find(results, part, cell, seed, way))

    def mean_of(cell: Cell, way: str, name: str) -> float | None:
        found = mean(results, part, cell, way, name, seeds)
        return None if found is None else found.value

    lines = {f"seed {seed}": points for seed in range(seeds) if (points := of_seed(seed))}
    if len(lines) > 1:
        lines["mean"] = line(mean_of)
    if not any(len(points) > 1 for points in lines.values()):
        return None
    return draw_curves(up.head, lines, across=across.head, log=curve.log)


def _said(value: Mean | None, metric: Metric) -> str:
    if value is None:
        return "–"
    error = "" if value.error is None else f" ± {metric.scale * value.error:.{metric.places}f}"
    return f"{metric.scale * value.value:.{metric.places}f}{error}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
