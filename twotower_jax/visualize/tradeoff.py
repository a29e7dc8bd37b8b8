"""A sweep as an SVG: agreement with AR (or quality) and likelihood, over tokens per evaluation and per second."""

import html

from twotower_jax.generation.tune import Point, Sweep
from twotower_jax.visualize.charts import color, svg

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP_X, _GAP_Y = 300, 220, 62, 40, 78, 62
_ACROSS = (("tokens_per_evaluation", "tokens per evaluation"), ("tokens_per_second", "tokens per second"))
_UP = (("judged_by", "agreement with AR"), ("log_likelihood", "log-likelihood, nats a token"))


def plot(sweep: Sweep, chosen: Point) -> str:
    """Circles are settings, colored by block size. Those with a gray ring are on the Pareto front of agreement (or
    quality, where it is known) and tokens per second, the one with a red ring is `chosen`. The diamond is AR, the
    dashed line its speed: diffusion breaks even to the right of it."""
    sizes = list(sweep.needed)
    fills = {size: f"rgb{color(0.15 + 0.7 * i / max(1, len(sizes) - 1))}" for i, size in enumerate(sizes)}
    parts = []
    for column, (x_name, x_label) in enumerate(_ACROSS):
        for line, (y_name, y_label) in enumerate(_UP):
            y_label = "quality" if y_name == "judged_by" and sweep.ar.quality is not None else y_label
            left, top = _LEFT + column * (_WIDTH + _GAP_X), _TOP + line * (_HEIGHT + _GAP_Y)
            parts.append(_panel(sweep, chosen, fills, (x_name, x_label), (y_name, y_label), left, top))
    bottom = _TOP + 2 * (_HEIGHT + _GAP_Y) + 4
    legend = [(f"block {size}", fills[size], "none") for size in sizes]
    legend += [("Pareto front", "none", "#888"), ("chosen", "none", "#e11d48")]
    for i, (label, fill, stroke) in enumerate(legend):
        x = _LEFT + i * 110
        parts.append(f'<circle cx="{x}" cy="{bottom}" r="6" fill="{fill}" stroke="{stroke}" stroke-width="2"/>')
        parts.append(f'<text class="tt-ink" x="{x + 12}" y="{bottom + 4}">{label}</text>')
    x = _LEFT + len(legend) * 110
    parts.append(_diamond(x, bottom) + f'<text class="tt-ink" x="{x + 12}" y="{bottom + 4}">AR</text>')
    width = max(_LEFT + 2 * _WIDTH + _GAP_X + 20, x + 60)
    return svg(width, bottom + 18, "Diffusion against AR", parts)


def _panel(sweep: Sweep, chosen: Point, fills: dict[int, str], x_axis, y_axis, left: int, top: int) -> str:
    (x_name, x_label), (y_name, y_label) = x_axis, y_axis
    everything = [sweep.ar, *sweep.points]
    x_low, x_high = _range([getattr(point, x_name) for point in everything])
    y_low, y_high = _range([getattr(point, y_name) for point in everything])

    def place(point: Point) -> tuple[float, float]:
        x = left + _WIDTH * (getattr(point, x_name) - x_low) / (x_high - x_low)
        return round(x, 1), round(top + _HEIGHT * (1 - (getattr(point, y_name) - y_low) / (y_high - y_low)), 1)

    parts = [f'<rect class="tt-empty" x="{left}" y="{top}" width="{_WIDTH}" height="{_HEIGHT}"/>']
    for i in range(5):
        x, y = left + _WIDTH * i / 4, top + _HEIGHT * (1 - i / 4)
        x_value, y_value = x_low + (x_high - x_low) * i / 4, y_low + (y_high - y_low) * i / 4
        parts.append(_text(x, top + _HEIGHT + 16, f"{x_value:,.3g}" if x_value < 1000 else f"{x_value:,.0f}", "middle"))
        parts.append(_text(left - 6, y + 4, f"{y_value:.3g}", "end"))
    parts.append(_text(left + _WIDTH / 2, top + _HEIGHT + 34, x_label, "middle"))
    parts.append(_text(left, top - 7, y_label, "start"))
    ar_x, ar_y = place(sweep.ar)
    if x_name == "tokens_per_second":
        line = f'x1="{ar_x}" x2="{ar_x}" y1="{top}" y2="{top + _HEIGHT}"'
        parts.append(f'<line {line} stroke="#e11d48" stroke-dasharray="4 4"/>')
    parts.append(_diamond(ar_x, ar_y))
    for point in sweep.points:
        x, y = place(point)
        block, steps, threshold = point.setting()
        about = (
            f"block {block}, steps {steps}{threshold and f', threshold {threshold}'}: "
            f"{point.tokens_per_evaluation:.2f} tokens per evaluation, {point.tokens_per_second:,.0f} tokens/s, "
            f"agreement {point.agreement:.3f}, log-likelihood {point.log_likelihood:.3f}"
        )
        ring = "#e11d48" if point is chosen else "#888" if point.pareto else "none"
        circle = f'cx="{x}" cy="{y}" r="6" fill="{fills[point.sampling.block_size]}" stroke="{ring}" stroke-width="2"'
        parts.append(f"<circle {circle}><title>{html.escape(about)}</title></circle>")
    return "".join(parts)


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="tt-ink" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _diamond(x: float, y: float) -> str:
    corners = f"{x},{y - 8} {x + 8},{y} {x},{y + 8} {x - 8},{y}"
    return f'<polygon points="{corners}" fill="#e11d48"><title>AR</title></polygon>'
