"""Numbers of a run over its steps, as an SVG."""

import html
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from twotower_jax.files import check_folder
from twotower_jax.jsonl import read_rows
from twotower_jax.paths import as_path
from twotower_jax.train.metrics import METRICS
from twotower_jax.visualize.charts import color, svg

_WIDTH, _HEIGHT, _LEFT, _TOP = 460, 220, 62, 40


def read_curves(workdir: str | pathlib.Path, fields: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """The steps and values of some numbers of a run's metrics.jsonl, where a row has them; a step that was made twice
    counts as it was made last.

    Raises:
      ValueError: if there are no metrics, or no row has a number of that name, with those that there are.
    """
    workdir = as_path(workdir)
    check_folder(workdir, "give the workdir of a run")
    rows = {row.get("step"): row for row in read_rows(workdir / METRICS)}
    curves = {}
    for field in fields:
        found = [(step, row[field]) for step, row in rows.items() if _is_number(step) and _is_number(row.get(field))]
        if not found:
            names = sorted(
                {name for row in rows.values() for name, value in row.items() if _is_number(value)} - {"step"}
            )
            raise ValueError(f"{workdir / METRICS}: no row has a number {field!r}; there are {', '.join(names)}")
        curves[field] = sorted(found)
    return curves


def draw_curves(
    title: str, curves: dict[str, list[tuple[float, float]]], *, across: str = "step", log: bool = False
) -> str:
    """A line for each name through its values, (step, value), all on one axis.

    Args:
      across: what the first numbers are. log: whether theirs is a logarithmic axis; they are then positive.
    """
    scaled = math.log10 if log else float
    points = [(scaled(x), y) for curve in curves.values() for x, y in curve]
    (x_low, x_high), (y_low, y_high) = (_range([point[i] for point in points]) for i in range(2))
    bottom = _TOP + _HEIGHT

    def place(step: float, value: float) -> tuple[float, float]:
        x = _LEFT + _WIDTH * (scaled(step) - x_low) / (x_high - x_low)
        return round(x, 1), round(bottom - _HEIGHT * (value - y_low) / (y_high - y_low), 1)

    parts = [f'<rect class="tt-empty" x="{_LEFT}" y="{_TOP}" width="{_WIDTH}" height="{_HEIGHT}"/>']
    for i in range(5):
        x, y = x_low + (x_high - x_low) * i / 4, y_low + (y_high - y_low) * i / 4
        parts.append(_text(_LEFT + _WIDTH * i / 4, bottom + 16, f"{10**x if log else x:.4g}", "middle"))
        parts.append(_text(_LEFT - 6, bottom - _HEIGHT * i / 4 + 4, f"{y:.3g}", "end"))
    parts.append(_text(_LEFT + _WIDTH / 2, bottom + 34, across, "middle"))
    for number, (name, curve) in enumerate(curves.items()):
        paint = f"rgb{color(0.1 + 0.65 * number / max(1, len(curves) - 1))}"
        corners = " ".join(f"{x},{y}" for x, y in (place(*point) for point in curve))
        parts.append(f'<polyline points="{corners}" fill="none" stroke="{paint}" stroke-width="2"/>')
        for step, value in curve:
            x, y = place(step, value)
            about = html.escape(f"{across} {round(step, 4)}: {name} {value:.4g}")
            parts.append(f'<circle cx="{x}" cy="{y}" r="2.5" fill="{paint}"><title>{about}</title></circle>')
        y = bottom + 58 + 20 * number
        parts.append(f'<rect x="{_LEFT}" y="{y - 11}" width="13" height="13" fill="{paint}"/>')
        parts.append(_text(_LEFT + 20, y, name, "start"))
    return svg(_LEFT + _WIDTH + 24, bottom + 52 + 20 * len(curves), title, parts)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="tt-ink" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
