"""Charts as SVG, for a page or as own files: of a story the order of commits, steps per block, experts used; and bars
of any numbers."""

import html
from collections.abc import Sequence

from twotower_jax.visualize.story import Story

# Viridis at six even places; text on the dark half is white, on the light half black.
_STOPS = ((68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37))
_LEFT, _TOP = 64, 44
# Custom properties, so that a page that sets them colors its charts too.
_STYLE = """<style>
.tt-ink{fill:var(--ink,#222)}.tt-paper{fill:var(--paper,#fff)}.tt-empty{fill:none;stroke:var(--line,#bbb)}
.tt-chart text{font:12px system-ui,sans-serif}
@media (prefers-color-scheme:dark){.tt-ink{fill:var(--ink,#ddd)}.tt-paper{fill:var(--paper,#16181d)}}
</style>"""


def color(part: float) -> tuple[int, int, int]:
    """RGB of a number in 0 … 1."""
    place = min(max(part, 0.0), 1.0) * (len(_STOPS) - 1)
    low = min(int(place), len(_STOPS) - 2)
    return tuple(round(a + (b - a) * (place - low)) for a, b in zip(_STOPS[low], _STOPS[low + 1], strict=True))


def ink_on(background: tuple[int, int, int]) -> str:
    """Black or white, whichever can be read on it."""
    red, green, blue = background
    return "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else "#fff"


def step_part(step: int, most_steps: int) -> float:
    """Where a step stands on the scale of colors."""
    return step / max(1, most_steps - 1)


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="tt-chart" role="img" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}"><title>{html.escape(title)}</title>{_STYLE}'
        f'<rect class="tt-paper" width="{width}" height="{height}"/>'
        f'<text class="tt-ink" x="8" y="18">{html.escape(title)}</text>' + "".join(parts) + "</svg>"
    )


def bar_chart(title: str, bars: Sequence[tuple[str, float, str]]) -> str:
    """A bar a line: its label, how long it is, 0 or more, and what to say of it."""
    left, side, longest = 90, 20, 320
    most = max((value for _, value, _ in bars), default=0) or 1
    parts = []
    for number, (label, value, about) in enumerate(bars):
        y, wide = _TOP + number * side, longest * value / most
        parts.append(f'<text class="tt-ink" x="{left - 6}" y="{y + 13}" text-anchor="end">{html.escape(label)}</text>')
        box = f'x="{left}" y="{y}" width="{wide:.1f}" height="{side - 4}"'
        parts.append(f'<rect {box} fill="rgb{color(0.4)}"><title>{html.escape(about)}</title></rect>')
        said = f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
        parts.append(f'<text class="tt-ink" x="{left + wide + 6:.1f}" y="{y + 13}">{said}</text>')
    width = max(left + longest + 110, 16 + 7 * len(title))
    return svg(width, _TOP + len(bars) * side + 10, title, parts)


def heat_map(story: Story) -> str:
    """A line per block, a column per position: the step (from 1) that decided it. Drafts not kept are paler."""
    size, most = story.header["block_size"], story.most_steps
    large = len(story.blocks) <= 64
    side = 22 if large else 8
    parts = [
        f'<text class="tt-ink" x="{_LEFT + i * side + side / 2}" y="{_TOP - 6}" text-anchor="middle">{i}</text>'
        for i in range(0, size, 1 if large and size <= 32 else 8)
    ]
    for block in story.blocks:
        y = _TOP + block.number * side
        if large or block.number % 8 == 0:
            label = f'y="{y + side / 2 + 4}" text-anchor="end">block {block.number}</text>'
            parts.append(f'<text class="tt-ink" x="{_LEFT - 6}" {label}')
        for i, cell in enumerate(block.draft):
            x, box = _LEFT + i * side, f'width="{side - 1}" height="{side - 1}"'
            if cell.step is None:
                parts.append(f'<rect class="tt-empty" x="{x + 0.5}" y="{y + 0.5}" {box}/>')
                continue
            fill = color(step_part(cell.step, most))
            pale = "" if i < block.offset + block.kept else ' opacity="0.3"'
            about = f"block {block.number}, position {i}: {story.text(cell.token)!r}, step {cell.step + 1}, "
            about = html.escape(f"{about}confidence {cell.confidence:.3f}{', not kept' if pale else ''}")
            square = f'<rect x="{x}" y="{y}" {box} fill="rgb{fill}"><title>{about}</title></rect>'
            number = f'<text x="{x + side / 2 - 0.5}" y="{y + 15}" text-anchor="middle" fill="{ink_on(fill)}"'
            number = f'{number} pointer-events="none">{cell.step + 1}</text>' if large else ""
            parts.append(f"<g{pale}>{square}{number}</g>")
    width = max(300, _LEFT + size * side + 12)
    return svg(width, _TOP + len(story.blocks) * side + 10, "Step that decided each position", parts)


def steps_chart(story: Story) -> str:
    """A bar a block: how many evaluations of the denoiser it took."""
    most, height = max(1, story.most_steps), 120
    step = 28 if len(story.blocks) <= 40 else 6
    parts, bottom = [], _TOP + height
    for block in story.blocks:
        x, tall = _LEFT + block.number * step, height * block.steps / most
        about = f"<title>block {block.number}: {block.steps} steps</title>"
        bar = f'x="{x}" y="{bottom - tall:.1f}" width="{step - 2}" height="{tall:.1f}"'
        parts.append(f'<rect {bar} fill="rgb{color(0.4)}">{about}</rect>')
        if step == 28:
            place = f'x="{x + step / 2 - 1}" text-anchor="middle"'
            parts.append(f'<text class="tt-ink" {place} y="{bottom - tall - 4:.1f}">{block.steps}</text>')
            parts.append(f'<text class="tt-ink" {place} y="{bottom + 15}">{block.number}</text>')
    parts.append(f'<text class="tt-ink" x="8" y="{bottom + 15}">block</text>')
    mean = sum(block.steps for block in story.blocks) / max(1, len(story.blocks))
    title = f"Denoiser evaluations per block (mean {mean:.2f})"
    return svg(max(300, _LEFT + len(story.blocks) * step + 12), bottom + 26, title, parts)


def load_part(load: float) -> float:
    """Where an expert's load, a multiple of the even share, stands on the scale of colors: the even share in its
    middle."""
    return load / (1 + load)


def expert_map(story: Story) -> str:
    """A line per layer with experts, a column per expert: the denoiser's tokens that it got in all steps of the row.

    The squares are in the order of `Story.load`, with the class tt-load, so that a page can color them by a step.
    """
    load = story.load
    experts = len(load[0])
    side = 22 if experts <= 32 else 8
    most_labels = 1 if side == 22 else 16
    parts = [
        f'<text class="tt-ink" x="{_LEFT + e * side + side / 2}" y="{_TOP - 6}" text-anchor="middle">{e}</text>'
        for e in range(0, experts, most_labels)
    ]
    for number, counts in enumerate(load):
        y, share = _TOP + number * side, sum(counts) / experts
        if side == 22 or number % 4 == 0:
            label = f'y="{y + side / 2 + 4}" text-anchor="end">layer {number}</text>'
            parts.append(f'<text class="tt-ink" x="{_LEFT - 6}" {label}')
        for e, count in enumerate(counts):
            about = f"layer {number}, expert {e}: {count} tokens, {count / share:.2f} times the even share"
            box = f'x="{_LEFT + e * side}" y="{y}" width="{side - 1}" height="{side - 1}"'
            fill = f'fill="rgb{color(load_part(count / share))}"'
            parts.append(f'<rect class="tt-load" {box} {fill}><title>{about}</title></rect>')
    bottom = _TOP + len(load) * side + 22
    for i, (load, text) in enumerate(((0.0, "unused"), (1.0, "even share"), (4.0, "4 times"))):
        x = _LEFT + i * 100
        parts.append(f'<rect x="{x}" y="{bottom - 11}" width="13" height="13" fill="rgb{color(load_part(load))}"/>')
        parts.append(f'<text class="tt-ink" x="{x + 18}" y="{bottom}">{text}</text>')
    width = max(380, _LEFT + experts * side + 12)
    return svg(width, bottom + 12, "Experts that the denoiser used", parts)
