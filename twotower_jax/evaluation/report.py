"""What an evaluation writes: results.json, a Markdown table, and plots of quality over speed and over length."""

import dataclasses
import html
from collections.abc import Sequence
from typing import Any

from twotower_jax.evaluation import paper
from twotower_jax.evaluation.compare import Retained, Scores, paired, retained
from twotower_jax.evaluation.speed import Speed
from twotower_jax.evaluation.suite import TaskScores
from twotower_jax.visualize.charts import color, svg

_WIDTH, _HEIGHT, _LEFT, _TOP = 420, 240, 70, 44


@dataclasses.dataclass
class Evaluation:
    """All that was found.

    Attributes:
      tasks: each task's scores, by point.
      points: their names, in the order given. ar: that of AR, if one is.
      likelihood: the kind of likelihood, by point.
      speed: by point; empty if it was not measured.
      generated: tokens per evaluation over all answers to the tasks, by point; none where no task asks for text.
      about: whatever else is to be told: the checkpoint, settings, versions.
    """

    tasks: dict[str, dict[str, TaskScores]]
    points: list[str]
    ar: str | None
    likelihood: dict[str, str]
    speed: dict[str, Speed] = dataclasses.field(default_factory=dict)
    generated: dict[str, float] = dataclasses.field(default_factory=dict)
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    def first(self, task: str, point: str) -> Scores:
        """What stands for a task."""
        scores = self.tasks[task][point]
        return scores.metrics[scores.first]

    def counted(self) -> list[str]:
        """The tasks that retained quality is over: those whose score is better the higher it is."""
        return [task for task, found in self.tasks.items() if self.first(task, next(iter(found))).higher_is_better]

    def retained(self, point: str) -> Retained | None:
        """What a point keeps of AR's quality over all tasks."""
        if self.ar is None:
            return None
        return retained([(self.first(task, self.ar), self.first(task, point)) for task in self.counted()])

    def quality(self, point: str) -> float | None:
        """The mean of what stands for each task."""
        values = [self.first(task, point).value for task in self.counted()]
        return sum(values) / len(values) if values else None

    def results(self) -> dict[str, Any]:
        """For results.json."""
        kept = {point: self.retained(point) for point in self.points}
        known = {point: found for point, found in kept.items() if found is not None}
        return {
            "version": 1,
            "tasks": {
                task: {point: _values(scores) for point, scores in found.items()} for task, found in self.tasks.items()
            },
            "retained": {point: found.fraction for point, found in known.items()},
            "retained_interval": {point: [found.low, found.high] for point, found in known.items()},
            "speed": {point: self._speed(point) for point in self.points if point in self.speed},
            "differences": self._differences(),
            "likelihood": self.likelihood,
            "first_metric": {task: next(iter(found.values())).first for task, found in self.tasks.items()},
            "questions": {task: next(iter(found.values())).questions for task, found in self.tasks.items()},
            "shots": {task: next(iter(found.values())).shots for task, found in self.tasks.items()},
            "published": {
                task: {"ar": line.ar / 100, "diffusion": line.two_tower / 100, "differs": line.differs}
                for task in self.tasks
                if (line := paper.BY_NAME.get(task)) is not None
            },
            "about": self.about,
        }

    def _speed(self, point: str) -> dict[str, float]:
        measured = self.speed[point]
        found = measured._asdict()
        if point in self.generated:
            found["tokens_per_evaluation"] = self.generated[point]
        if self.ar in self.speed:
            found["over_ar"] = measured.tokens_per_second / self.speed[self.ar].tokens_per_second
        return found

    def _differences(self) -> dict[str, Any]:
        """What each point has more than AR in each task, metric by metric."""
        found: dict[str, Any] = {}
        for task, of_task in self.tasks.items():
            for point, scores in of_task.items():
                if self.ar is None or point == self.ar:
                    continue
                for metric, value in scores.metrics.items():
                    difference = paired(of_task[self.ar].metrics[metric], value)
                    if difference is not None:
                        found.setdefault(task, {}).setdefault(point, {})[metric] = difference._asdict()
        return found

    def markdown(self) -> str:
        """A table of scores, one of speeds, and what they are."""
        lines = ["# Evaluation", "", *self._head(), "", *self._scores(), ""]
        if self.speed:
            lines += [*self._speeds(), ""]
        notes = [f"* {task}: {line.differs}." for task in self.tasks if (line := paper.BY_NAME.get(task)) is not None]
        if notes:
            lines += ["Where these differ from the published table, or it does not say:", "", *notes, ""]
        return "\n".join(lines)

    def _head(self) -> list[str]:
        told = [f"`{self.about['source']}`"] if "source" in self.about else []
        if self.about.get("limit"):
            told.append(f"at most {self.about['limit']} questions of each task or part of one")
        kinds = sorted(set(self.likelihood.values()))
        named = {kind: [point for point in self.points if self.likelihood[point] == kind] for kind in kinds}
        told.append("likelihood " + ", ".join(f"{kind} ({', '.join(points)})" for kind, points in named.items()))
        if self.about.get("programs"):
            told.append(self.about["programs"])
        return [f"{'; '.join(told)}. Differences from AR are paired, with 95 % intervals."]

    def _scores(self) -> list[str]:
        others = [point for point in self.points if self.ar is not None and point != self.ar]
        head = ["task", "metric", "shots", "questions", *self.points]
        head += [f"{point} − {self.ar}" for point in others] + [f"{point} retained" for point in others]
        lines = [_row(head), _row(["---", "---", *["--:"] * (len(head) - 2)])]
        for task, found in self.tasks.items():
            about = next(iter(found.values()))
            for metric in about.metrics:
                counts = task in self.counted() and metric == about.first
                cells = [task, f"**{metric}**" if counts else metric, str(about.shots), str(about.questions)]
                cells += [_score(found[point].metrics[metric]) for point in self.points]
                cells += [_difference(found[self.ar].metrics[metric], found[point].metrics[metric]) for point in others]
                cells += [_part(found[self.ar].metrics[metric], found[point].metrics[metric]) for point in others]
                lines.append(_row(cells))
        if others:
            kept = []
            for point in others:
                found = self.retained(point)
                between = "" if found is None or found.low is None else _between(found)
                kept.append("" if found is None else f"**{100 * found.fraction:.1f} %**{between}")
            means = [_percent(self.quality(point)) for point in self.points]
            lines.append(_row(["**mean**", "bold ones", "", "", *means, *[""] * len(others), *kept]))
        return lines

    def _speeds(self) -> list[str]:
        lines = [_row(["point", "tokens/s", "over AR", "tokens per evaluation"]), _row(["---", "--:", "--:", "--:"])]
        for point in self.points:
            found = self._speed(point)
            over = f"{found['over_ar']:.2f}" if "over_ar" in found else ""
            cells = [f"{found['tokens_per_second']:,.1f}", over, f"{found['tokens_per_evaluation']:.2f}"]
            lines.append(_row([point, *cells]))
        return lines

    def plot(self) -> str:
        """An SVG of quality over speed: the mean of what stands for each task, over tokens per second; without speeds,
        over the points' numbers."""
        places = {point: self.speed[point].tokens_per_second if self.speed else float(i)
                  for i, point in enumerate(self.points)}  # fmt: skip
        values = {point: (places[point], 100 * (self.quality(point) or 0.0)) for point in self.points}
        x_label = "tokens per second" if self.speed else "operating point"
        parts, x_of, y_of = _frame(list(values.values()), x_label, "mean score, %")
        for i, (point, (x, y)) in enumerate(values.items()):
            fill = "#e11d48" if point == self.ar else f"rgb{color(0.15 + 0.7 * i / max(1, len(values) - 1))}"
            about = html.escape(f"{point}: {y:.2f} %, {x_label} {x:,.1f}")
            parts.append(f'<circle cx="{x_of(x)}" cy="{y_of(y)}" r="6" fill="{fill}"><title>{about}</title></circle>')
            parts.append(_legend(i, point, fill))
        height = _TOP + _HEIGHT + 50 + 18 * len(values)
        return svg(_LEFT + _WIDTH + 20, height, "Quality over speed", parts)

    def length_plot(self, kind: str) -> str | None:
        """An SVG of accuracy over the length of the context, for a kind of long_context.py; None without such tasks."""
        lengths = {int(task.removeprefix(f"{kind}_")): task for task in self.tasks
                   if task.startswith(f"{kind}_") and task.removeprefix(f"{kind}_").isdecimal()}  # fmt: skip
        if not lengths:
            return None
        values = {point: [(float(n), 100 * self.first(lengths[n], point).value) for n in sorted(lengths)]
                  for point in self.points}  # fmt: skip
        everything = [place for line in values.values() for place in line] + [(float(min(lengths)), 0.0)]
        parts, x_of, y_of = _frame(everything, "tokens of the context", "right, %")
        for i, (point, line) in enumerate(values.items()):
            stroke = "#e11d48" if point == self.ar else f"rgb{color(0.15 + 0.7 * i / max(1, len(values) - 1))}"
            path = " ".join(f"{x_of(x)},{y_of(y)}" for x, y in line)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="2"/>')
            for x, y in line:
                about = html.escape(f"{point}: {y:.1f} % at {x:,.0f} tokens")
                place = f'cx="{x_of(x)}" cy="{y_of(y)}" r="4"'
                parts.append(f'<circle {place} fill="{stroke}"><title>{about}</title></circle>')
            parts.append(_legend(i, point, stroke))
        height = _TOP + _HEIGHT + 50 + 18 * len(values)
        return svg(_LEFT + _WIDTH + 20, height, f"{kind}: accuracy over length", parts)


def _values(scores: TaskScores) -> dict[str, float]:
    found = {}
    for metric, value in scores.metrics.items():
        found[metric] = value.value
        if value.standard_error is not None:
            found[f"{metric}_stderr"] = value.standard_error
    return found


def _between(found: Retained) -> str:
    return f" [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _is_part(scores: Scores) -> bool:
    """Whether it lies between 0 and 1 and is told in percent."""
    return scores.questions is not None and scores.higher_is_better and all(0 <= x <= 1 for x in scores.questions)


def _score(scores: Scores) -> str:
    scale = 100 if _is_part(scores) else 1
    error = "" if scores.standard_error is None else f" ± {scale * scores.standard_error:.2f}"
    return f"{scale * scores.value:.2f}{error}"


def _difference(first: Scores, second: Scores) -> str:
    found, scale = paired(first, second), 100 if _is_part(first) else 1
    if found is None:
        return f"{second.value - first.value:+.2f}"
    between = "" if found.low is None else f" [{scale * found.low:+.2f}, {scale * found.high:+.2f}]"
    return f"{scale * found.difference:+.2f}{between}"


def _part(first: Scores, second: Scores) -> str:
    return f"{100 * second.value / first.value:.1f} %" if first.higher_is_better and first.value > 0 else ""


def _frame(places: Sequence[tuple[float, float]], x_label: str, y_label: str) -> tuple[list[str], Any, Any]:
    """Axes with labels, and functions from values to places."""
    (x_low, x_high), (y_low, y_high) = (_range([place[i] for place in places]) for i in (0, 1))
    parts = [f'<rect class="tt-empty" x="{_LEFT}" y="{_TOP}" width="{_WIDTH}" height="{_HEIGHT}"/>']

    def x_of(x: float) -> float:
        return round(_LEFT + _WIDTH * (x - x_low) / (x_high - x_low), 1)

    def y_of(y: float) -> float:
        return round(_TOP + _HEIGHT * (1 - (y - y_low) / (y_high - y_low)), 1)

    for i in range(5):
        x, y = x_low + (x_high - x_low) * i / 4, y_low + (y_high - y_low) * i / 4
        parts.append(_text(x_of(x), _TOP + _HEIGHT + 16, f"{x:,.3g}" if abs(x) < 1000 else f"{x:,.0f}", "middle"))
        parts.append(_text(_LEFT - 6, y_of(y) + 4, f"{y:.3g}", "end"))
    parts.append(_text(_LEFT + _WIDTH / 2, _TOP + _HEIGHT + 34, x_label, "middle"))
    parts.append(_text(_LEFT, _TOP - 8, y_label, "start"))
    return parts, x_of, y_of


def _legend(number: int, name: str, fill: str) -> str:
    y = _TOP + _HEIGHT + 54 + 18 * number
    return f'<circle cx="{_LEFT}" cy="{y}" r="5" fill="{fill}"/>' + _text(_LEFT + 12, y + 4, name, "start")


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="tt-ink" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
