"""A story as an animated GIF: text that resolves block by block. Needs Pillow."""

import functools
import io
import textwrap
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image, ImageColor, ImageDraw, ImageFont

from twotower_jax.visualize.charts import color, ink_on, step_part
from twotower_jax.visualize.story import Cell, Frame, Story

LARGEST_BYTES = 3_000_000
_MOST_FRAMES, _WIDTH, _LINES, _LINE, _MARGIN, _HEADER = 400, 760, 14, 26, 14, 34
_PROMPT_CHARACTERS = 240
_STEP_MS, _BLOCK_MS, _END_MS = 220, 500, 3000
_PAPER, _INK, _FAINT, _MASK = "#ffffff", "#222222", "#6b7280", "#d1d5db"


class _Piece(NamedTuple):
    """Text of one token, its background (None: paper), its ink, and the least width of its cell."""

    text: str
    background: str | tuple[int, int, int] | None
    ink: str
    width: float = 0.0


Measure = Callable[[str], float]  # The width of a text in pixels.
Placed = tuple[float, float, _Piece]  # x, width and the piece.


def animation(story: Story, largest: int = LARGEST_BYTES) -> bytes:
    """The GIF. Frames are left out evenly, the last one never, until it has at most `largest` bytes."""
    frames = story.frames
    while len(frames) > _MOST_FRAMES:
        frames = _thinned(frames)
    while True:
        content = _encode(story, frames)
        if len(content) <= largest or len(frames) <= 2:
            return content
        frames = _thinned(frames)


def _thinned(frames: list[Frame]) -> list[Frame]:
    return frames[len(frames) % 2 == 0 :: 2]


def _encode(story: Story, frames: list[Frame]) -> bytes:
    font = _font()
    measure = functools.cache(font.getlength)
    # The end of a text that is longer than the picture.
    drawn = [_lines(_pieces(story, frame, measure), measure)[-_LINES:] for frame in frames]
    size = (_WIDTH, _HEADER + max(map(len, drawn)) * _LINE + _MARGIN)
    images = [_draw(frame, lines, font, size) for frame, lines in zip(frames, drawn, strict=True)]
    palette = _palette(story)
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    durations = [_BLOCK_MS if frame.step is None else _STEP_MS for frame in frames]
    durations[-1] = _END_MS
    out = io.BytesIO()
    images[0].save(out, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=False)
    return out.getvalue()


def _palette(story: Story) -> Image.Image:
    """One for all frames, or colors would flicker: the grays, and each step's color on its way to that of its text."""
    colors = [(gray, gray, gray) for gray in range(0, 256, 15)]
    colors += [ImageColor.getrgb(name) for name in (_PAPER, _INK, _FAINT, _MASK)]
    shades = min(40, max(1, story.most_steps))
    for number in range(shades):
        fill = color(step_part(number, shades))
        ink = ImageColor.getrgb(ink_on(fill))
        for part in (0.0, 0.25, 0.5, 0.75):
            colors.append(tuple(round(a + (b - a) * part) for a, b in zip(fill, ink, strict=True)))
    image = Image.new("P", (1, 1))
    image.putpalette([value for rgb in colors for value in rgb])
    return image


def _font() -> ImageFont.FreeTypeFont:
    """A common font with many scripts if the system has it, or Pillow's own."""
    try:
        return ImageFont.truetype("DejaVuSansMono.ttf", 15)
    except OSError:
        return ImageFont.load_default(16)


def _pieces(story: Story, frame: Frame, measure: Measure) -> list[_Piece]:
    prompt = " ".join(story.prompt_text.split())
    if len(prompt) > _PROMPT_CHARACTERS:
        prompt = "…" + prompt[-_PROMPT_CHARACTERS:]
    # Words of the prompt are broken where they are longer than a line.
    pieces = [_Piece(part + " ", None, _FAINT) for word in prompt.split(" ") for part in textwrap.wrap(word, 60)]
    shown = [*story.cells[: frame.settled], *frame.cells]
    for place, cell in enumerate(shown):
        final = story.cells[place].token if place < len(story.cells) else None
        pieces.append(_token(story, cell, measure, final, ended=place >= story.length))
    return pieces


def _visible(text: str) -> str:
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else "�" for c in text)[:40] or " "


def _token(story: Story, cell: Cell, measure: Measure, final: int | None, ended: bool) -> _Piece:
    if cell.token is None:
        # As wide as what will stand there, so that the text does not move.
        width = measure(_visible(story.text(final)) if final is not None else "mm")
        return _Piece("", _MASK, _INK, width)
    text = _visible(story.text(cell.token))
    if ended:
        return _Piece(text, None, _MASK)
    if cell.step is None:
        return _Piece(text, None, _INK)
    background = color(step_part(cell.step, story.most_steps))
    return _Piece(text, background, ink_on(background))


def _lines(pieces: list[_Piece], measure: Measure) -> list[list[Placed]]:
    lines, x = [[]], float(_MARGIN)
    for piece in pieces:
        width = max(piece.width, measure(piece.text))
        if x + width > _WIDTH - _MARGIN and lines[-1]:
            lines.append([])
            x = float(_MARGIN)
        lines[-1].append((x, width, piece))
        x += width + 1
    return lines


def _draw(frame: Frame, lines: list[list[Placed]], font, size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(image)
    state = "read by the context tower" if frame.step is None else f"step {frame.step}"
    draw.text((_MARGIN, 8), f"block {frame.block}, {state}", fill=_FAINT, font=font)
    for number, line in enumerate(lines):
        y = _HEADER + number * _LINE
        for x, width, piece in line:
            if piece.background is not None:
                draw.rectangle((x, y, x + width - 1, y + _LINE - 5), fill=piece.background)
            draw.text((x, y + 1), piece.text, fill=piece.ink, font=font)
    return image
