"""A story as one HTML file that needs nothing else: a slider over the steps, and the charts. It opens on the finished
text and plays once.

Text of the model and of prompts is data to it: it stands in a JSON block whose `<` are escaped, and reaches the page as
text nodes. A policy in its head forbids anything to be loaded.
"""

import html
import json
from typing import Any

from twotower_jax.visualize.charts import color, expert_map, heat_map, ink_on, steps_chart
from twotower_jax.visualize.story import Cell, Story

_COLORS = 32
_SETTINGS = ("mode", "strategy", "block_size", "steps_per_block", "confidence_threshold", "temperature", "seed")

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>%(title)s</title>
<style>
:root{color-scheme:light;--paper:#fff;--ink:#222;--faint:#6b7280;--line:#bbb;--mask:#d1d5db}
@media (prefers-color-scheme:dark){:root:not([data-theme=light]){color-scheme:dark;
--paper:#16181d;--ink:#ddd;--faint:#9ca3af;--line:#555;--mask:#3f4550}}
:root[data-theme=dark]{color-scheme:dark;--paper:#16181d;--ink:#ddd;--faint:#9ca3af;--line:#555;--mask:#3f4550}
body{background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:1.5rem auto;
padding:0 1rem}
h1{font-size:1.2rem;margin:0 0 .3rem}.faint{color:var(--faint)}
#bar{display:flex;flex-wrap:wrap;gap:.6rem;align-items:center;margin:1rem 0 .4rem}#at{flex:1;min-width:12rem}
#prompt,#text{font:14px/2 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere;
border:1px solid var(--line);border-radius:6px;padding:.6rem .8rem}#text{min-height:8rem}
#prompt{color:var(--faint);border-style:dashed}.name{margin:.6rem 0 .2rem}
#text span{border-radius:3px}#text .cut{color:var(--faint)}
#text .cut{text-decoration:line-through}#text .mask{background:var(--mask);color:transparent}
#scale{display:inline-block;width:10rem;height:.8rem;border-radius:3px;background:linear-gradient(to right,%(scale)s)}
.chart{overflow:auto;margin:1.2rem 0}
</style></head><body>
<h1>%(title)s</h1><div class="faint">%(settings)s</div>
<div id="bar"><button id="play">Play</button><button id="back" aria-label="one step back">&#8592;</button>
<button id="next" aria-label="one step on">&#8594;</button>
<input id="at" type="range" min="0" value="0" aria-label="moment"><select id="by" aria-label="color by">
<option value="step">color: step</option><option value="confidence">color: confidence</option></select>
<button id="theme">Light / dark</button></div>
<div class="faint"><span id="state"></span> &nbsp; <span id="low"></span> <span id="scale"></span>
<span id="high"></span></div>
<div class="faint name">Prompt</div><div id="prompt"></div>
<div class="faint name">Answer</div><div id="text"></div>
<div class="chart">%(steps)s</div><div class="chart">%(heat)s</div>%(experts)s
<script type="application/json" id="data">%(data)s</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id), last = data.frames.length - 1;
const show = id => id in data.texts ? data.texts[id] : id + " ";
let timer = null;
function piece(text, kind, title) {
  const span = document.createElement("span");
  span.textContent = text;
  if (kind) span.className = kind;
  if (title) span.title = title;
  return span;
}
function token(cell, place) {
  const [id, step, confidence] = cell;
  if (id === null) {
    const final = place < data.cells.length ? show(data.cells[place][0]) : "  ";
    return piece(final.trim() ? final : "░", "mask", "undecided");
  }
  if (place >= data.length) return piece(show(id), "cut", "after the end of the row");
  if (step === null) return piece(show(id), "", "token " + id + ", chosen by the context tower");
  const span = piece(show(id), "",
    "token " + id + ", step " + (step + 1) + ", confidence " + confidence.toFixed(3));
  const part = $("by").value === "step" ? step / Math.max(1, data.steps - 1) : confidence;
  const [fill, ink] = data.colors[
    Math.max(0, Math.min(data.colors.length - 1, Math.floor(part * data.colors.length)))];
  span.style.background = fill;
  span.style.color = ink;
  return span;
}
function load(frame) {
  const one = $("moment").value === "step";
  const counts = (one ? frame.load || data.load.map(layer => layer.map(() => 0)) : data.load).flat();
  const share = Math.max(counts.reduce((a, b) => a + b) / counts.length, 1e-9);
  document.querySelectorAll(".tt-load").forEach((square, i) => {
    const part = counts[i] / (counts[i] + share);
    square.style.fill = data.colors[Math.min(data.colors.length - 1, Math.floor(part * data.colors.length))][0];
  });
}
function draw() {
  const at = Number($("at").value), frame = data.frames[at];
  const cells = data.cells.slice(0, frame.settled).concat(frame.cells);
  $("text").replaceChildren(...cells.map(token));
  $("state").textContent = "block " + frame.block + (frame.step === null ? ", read by the context tower"
    : ", after " + frame.step + " steps, masked " + Math.round(frame.t * 100) + " %%")
    + "  (" + at + " of " + last + ")";
  if (data.load) load(frame);
  const byStep = $("by").value === "step";
  $("low").textContent = byStep ? "step 1" : "confidence 0";
  $("high").textContent = byStep ? "step " + data.steps : "1";
}
function move(by) {
  $("at").value = Math.min(last, Math.max(0, Number($("at").value) + by));
  draw();
}
function stop() { clearInterval(timer); timer = null; $("play").textContent = "Play"; }
function play() {
  if (Number($("at").value) === last) $("at").value = 0;
  $("play").textContent = "Pause";
  timer = setInterval(() => { move(1); if (Number($("at").value) === last) stop(); }, 220);
  draw();
}
// Whoever touches something before it has begun to play by itself does not want that.
let first = null;
function touched(what) { return () => { clearTimeout(first); what(); }; }
$("play").onclick = touched(() => timer === null ? play() : stop());
$("back").onclick = touched(() => { stop(); move(-1); });
$("next").onclick = touched(() => { stop(); move(1); });
$("at").oninput = touched(() => { stop(); draw(); });
$("by").onchange = draw;
if (data.load) $("moment").onchange = draw;
$("theme").onclick = () => {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
  document.documentElement.dataset.theme = dark ? "light" : "dark";
};
$("at").max = $("at").value = last;
$("prompt").textContent = data.prompt;
draw();
if (last && !matchMedia("(prefers-reduced-motion: reduce)").matches) first = setTimeout(play, 1200);
</script></body></html>
"""


_EXPERTS = """<div class="faint">Experts used in <select id="moment" aria-label="experts used in">
<option value="step">the step shown</option><option value="all">all steps</option></select></div>
<div class="chart">%s</div>"""


def page(story: Story) -> str:
    """The HTML."""
    load = story.load
    colors = [color((i + 0.5) / _COLORS) for i in range(_COLORS)]
    header, count = story.header, max(1, len(story.blocks))
    settings = [f"{name} {header[name]}" for name in _SETTINGS if header.get(name) is not None]
    mean = sum(block.steps for block in story.blocks) / count
    settings.append(f"{story.length} tokens, ended by {story.reason}, {mean:.2f} steps per block")
    data = {
        "prompt": story.prompt_text,
        "texts": story.texts,
        "cells": [_cell(cell) for cell in story.cells],
        "frames": [
            {"block": f.block, "step": f.step, "t": f.t, "settled": f.settled, "cells": [_cell(c) for c in f.cells]}
            | ({"load": f.load} if f.load else {})
            for f in story.frames
        ],
        "length": story.length,
        "load": load,
        "steps": story.most_steps,
        "colors": [[f"rgb{fill}", ink_on(fill)] for fill in colors],
    }
    return _PAGE % {
        "title": f"Generation of row {story.row}",
        "settings": html.escape(" · ".join(setting.replace(" ", "\u00a0") for setting in settings)),
        "scale": ",".join(f"rgb{fill}" for fill in colors),
        "steps": steps_chart(story),
        "heat": heat_map(story),
        "experts": _EXPERTS % expert_map(story) if load else "",
        # Neither </script> nor <!-- can stand in it.
        "data": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    }


def _cell(cell: Cell) -> list[Any]:
    return [cell.token, cell.step, None if cell.confidence is None else round(cell.confidence, 4)]
