"""Draws docs/pictures/towers.svg, the two towers side by side: python docs/pictures/towers.py"""

import pathlib

PATTERN = "MEM*E"  # configs/tiny.py; the published model has 52 layers of the same kinds
KINDS = {"M": "Mamba-2", "E": "experts", "*": "attention"}
HANDED = {"M": "state at the block's start", "*": "keys and values of all before"}
CLEAN = ["The", "towers", "walk", "down"]
MASKED = ["together", "[mask]", "[mask]", "layer"]
WIDTH, HEIGHT, LAYER, GAP, TOP = 880, 470, 40, 14, 92
CONTEXT, DENOISER, TOWER = 70, 570, 240


def text(x, y, said, size=14, weight="normal", anchor="middle", fill="#1f2933"):
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{fill}">'
        f"{said}</text>"
    )


def box(x, y, width, height, fill, stroke):
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{stroke}"/>'


def arrow(x1, y1, x2, y2, color="#52606d"):
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{color}" stroke-width="1.6" marker-end="url(#head)"/>'
    )


def tower(x, title, subtitle, fill, stroke):
    """A tower from its input at the top to its head at the bottom."""
    middle = x + TOWER / 2
    parts = [text(middle, 28, title, 18, "bold"), text(middle, 48, subtitle, 13, fill="#52606d")]
    for i, letter in enumerate(PATTERN):
        y = TOP + 34 + i * (LAYER + GAP)
        parts += [box(x, y, TOWER, LAYER, fill, stroke), text(middle, y + 25, KINDS[letter], 15)]
        parts.append(arrow(middle, y - GAP if i else TOP, middle, y - 1))
    return parts


def tokens(x, shown):
    size, parts = TOWER / len(shown), []
    for i, token in enumerate(shown):
        masked = token == "[mask]"
        parts.append(box(x + i * size + 2, TOP - 26, size - 4, 26, "#d9e2ec" if masked else "#ffffff", "#9fb3c8"))
        parts.append(text(x + (i + 0.5) * size, TOP - 8, token, 11, fill="#829ab1" if masked else "#1f2933"))
    return parts


def draw() -> str:
    parts = tower(CONTEXT, "context tower", "frozen · reads clean text, causally", "#e0f2fe", "#0284c7")
    parts += tower(DENOISER, "denoiser tower", "trained · both ways in a block, told the noise", "#ffedd5", "#ea580c")
    parts += tokens(CONTEXT, CLEAN) + tokens(DENOISER, MASKED)
    for i, letter in enumerate(PATTERN):
        if letter in HANDED:
            y = TOP + 34 + i * (LAYER + GAP) + LAYER / 2
            parts.append(arrow(CONTEXT + TOWER + 4, y, DENOISER - 4, y, "#0284c7"))
            parts.append(text((CONTEXT + TOWER + DENOISER) / 2, y - 7, HANDED[letter], 12.5, fill="#0369a1"))
    bottom = TOP + 34 + len(PATTERN) * (LAYER + GAP)
    for x, said in ((CONTEXT, "next token (AR)"), (DENOISER, "every masked token of the block")):
        parts += [
            arrow(x + TOWER / 2, bottom - GAP, x + TOWER / 2, bottom + 8),
            text(x + TOWER / 2, bottom + 26, said, 14),
        ]
    y = bottom + 40
    parts.append(
        f'<path d="M {DENOISER + TOWER / 2} {y} V {y + 18} H {CONTEXT - 40} V {TOP - 13} H {CONTEXT - 6}" fill="none" '
        'stroke="#52606d" stroke-width="1.6" stroke-dasharray="5 4" marker-end="url(#head)"/>'
    )
    parts.append(text(WIDTH / 2, y + 10, "a finished block is read by the context tower", 12.5, fill="#52606d"))
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M 0 0 L 8 4 L 0 8 z" fill="#52606d"/></marker></defs>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>{head}{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    pathlib.Path(__file__).with_name("towers.svg").write_text(draw(), encoding="utf-8")
