"""Pictures of a trace: what they hold, that text cannot break out of them, and what becomes of broken traces."""

import html.parser
import io
import json
import os
import pathlib
import re
import xml.etree.ElementTree

import browser
import pytest
from PIL import Image

from helpers import run_command
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation import Progress, Result, Settings, Step
from twotower_jax.generation.trace import TraceWriter
from twotower_jax.visualize.animation import animation
from twotower_jax.visualize.charts import expert_map, heat_map, steps_chart
from twotower_jax.visualize.curves import draw_curves, read_curves
from twotower_jax.visualize.page import page
from twotower_jax.visualize.story import Cell, TraceError, read_story

HOSTILE = "</script><script>alert('&amp;')</script><!--"


def decode(ids):
    return "".join(HOSTILE if i == 7 else chr(ord("@") + i) for i in ids)


def _lines(config, mode: str) -> list[dict]:
    """A trace of two rows. Row 1 has two blocks in diffusion and ends in the second; in speculative, a rejection."""
    lines = []
    settings = Settings(mode=mode, sampling=SamplingConfig(block_size=4, steps_per_block=2))
    trace = TraceWriter(lines.append, config, settings, [[5], [7, 6]], decode)
    first = [
        Step(0, 0, 1.0, [3, 3, 3, 3], [8, 3, 9, 3], [0.9, 0.1, 0.8, 0.2]),
        Step(0, 1, 0.5, [8, 3, 9, 3], [8, 7, 9, 6], [0.9, 0.5, 0.8, 0.6], [[[0, 1]] * 4, [[7, 0]] * 3 + [[7, 2]]]),
    ]
    if mode == "diffusion":
        second = [Step(1, 0, 1.0, [3] * 4, [4, 2, 5, 5], [0.7] * 4)]
        trace.add(Progress(0, 0, 0, [8, 7, 9, 6], first, None, Result([5], [8, 7, 9], 2, 1, "length")))
        trace.add(Progress(1, 0, 0, [8, 7, 9, 6], first, None, None))
        end = Result([7, 6], [8, 7, 9, 6, 4, 2], 3, 2, "eos")
        trace.add(Progress(1, 1, 4, [4, 2, 5, 5], second, None, end))
    else:
        draft = [Step(0, 0, 0.75, [8, 3, 3, 3], [8, 7, 9, 6], [0.0, 0.5, 0.8, 0.6])]
        trace.add(Progress(0, None, 0, [8], None, None, Result([5], [8], 0, 1, "length")))
        trace.add(Progress(1, None, 0, [8], None, None, None))
        trace.add(Progress(1, 0, 1, [7, 5], draft, 1, Result([7, 6], [8, 7, 5], 1, 2, "length")))
    trace.finish()
    return lines


def _write(path: pathlib.Path, lines: list) -> pathlib.Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def trace(tmp_path, small_config):
    return _write(tmp_path / "trace.jsonl", _lines(small_config("-"), "diffusion"))


def test_a_story_is_the_row_step_by_step(trace):
    story = read_story(trace, 1)
    assert (story.prompt_ids, story.prompt, story.reason, story.length) == ([7, 6], HOSTILE + "F", "eos", 6)
    assert [(f.block, f.step, f.settled, f.t) for f in story.frames] == [
        (0, 0, 0, 1.0),
        (0, 1, 0, 0.5),
        (0, 2, 0, 0.0),
        (0, None, 4, None),
        (1, 0, 4, 1.0),
        (1, 1, 4, 0.0),
        (1, None, 8, None),
    ]
    assert story.frames[0].cells == [Cell(None)] * 4
    assert story.frames[1].cells == [Cell(8, 0, 0.9), Cell(None), Cell(9, 0, 0.8), Cell(None)]
    assert story.cells[:4] == [Cell(8, 0, 0.9), Cell(7, 1, 0.5), Cell(9, 0, 0.8), Cell(6, 1, 0.6)]
    assert [block.steps for block in story.blocks] == [2, 1]
    assert read_story(trace).prompt_ids == [5]


def test_drafts_that_the_context_rejected_are_not_in_the_text(tmp_path, small_config):
    story = read_story(_write(tmp_path / "trace.jsonl", _lines(small_config("-"), "speculative")), 1)
    assert story.cells == [Cell(8), Cell(7, 0, 0.5), Cell(5)]
    assert story.frames[1].settled == 0  # The given token is the draft's first.
    assert [cell.token for cell in story.frames[1].cells] == [8, 7, 9, 6]
    assert (story.blocks[0].offset, story.blocks[0].kept) == (1, 1)
    assert heat_map(story).count('opacity="0.3"') == 2
    assert page(story) and animation(story)


class _Scripts(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.scripts, self.loads, self._inside = [], [], False

    def handle_starttag(self, tag, attrs):
        self._inside = tag == "script"
        self.scripts += [""] if self._inside else []
        self.loads += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1] += data

    def handle_endtag(self, tag):
        self._inside = False


def test_a_page_holds_everything_and_text_cannot_leave_it(trace):
    story = read_story(trace, 1)
    text = page(story)
    parser = _Scripts()
    parser.feed(text)
    assert len(parser.scripts) == 2
    assert not parser.loads
    assert set(re.findall(r"https?://[^\"' ]*", text)) == {"http://www.w3.org/2000/svg"}
    assert "alert('" not in text.replace(parser.scripts[0], "").replace("\\u003c", "")
    data = json.loads(parser.scripts[0])
    assert data["prompt"] == HOSTILE + "F"
    assert data["texts"]["7"] == HOSTILE
    assert len(data["frames"]) == len(story.frames)
    assert data["cells"][1] == [7, 1, 0.5]
    assert (data["length"], data["steps"]) == (6, 2)


@pytest.mark.skipif(browser.PROGRAM is None, reason="there is no Chromium here")
def test_a_page_opens_on_the_finished_text_and_plays_once(trace, tmp_path):
    story = read_story(trace, 1)
    (tmp_path / "page.html").write_text(page(story), encoding="utf-8")
    with browser.Page((tmp_path / "page.html").as_uri()) as one:
        # Prompt and answer have a place each.
        assert one.run("document.getElementById('prompt').textContent") == story.prompt_text
        assert one.run("at.value === at.max && document.querySelectorAll('#text .mask').length === 0")
        finished = one.run("document.getElementById('text').textContent")
        one.run("window.seen = []; new MutationObserver(() => seen.push(Number(at.value)))"
                ".observe(document.getElementById('text'), {childList: true})")  # fmt: skip
        one.until("seen.length && at.value === at.max && document.getElementById('play').textContent === 'Play'")
        assert one.run("seen") == list(range(len(story.frames)))
        assert one.run("document.getElementById('text').textContent") == finished
        # Not again, unless it is asked for; and not by itself where a reader has begun to look.
        one.click("#back")
        assert one.run("Number(at.value)") == len(story.frames) - 2
        assert one.errors == []


def test_charts_are_well_formed_and_say_what_happened(trace):
    story = read_story(trace, 1)
    names = [title.text for title in xml.etree.ElementTree.fromstring(heat_map(story)).iter() if "title" in title.tag]
    assert len(names) == 1 + 8
    assert any(HOSTILE.replace("'", "\\'") in n or HOSTILE in n for n in names if "position 1" in n)
    assert sum("step 2, confidence 0.600" in name for name in names) == 1
    bars = [t.text for t in xml.etree.ElementTree.fromstring(steps_chart(story)).iter() if "title" in t.tag]
    assert bars == ["Denoiser evaluations per block (mean 1.50)", "block 0: 2 steps", "block 1: 1 steps"]


def test_experts_of_a_step_and_of_a_row(trace):
    story = read_story(trace, 1)
    first = [[4, 4, 0, 0, 0, 0, 0, 0], [3, 0, 1, 0, 0, 0, 0, 4]]
    assert [frame.load for frame in story.frames] == [None, None, first, None, None, None, None]
    assert story.load == first
    squares = re.findall(r'<rect class="tt-load"[^>]*fill="(rgb[^"]*)"><title>([^<]*)<', expert_map(story))
    assert [title for _, title in squares][8:11] == [
        "layer 1, expert 0: 3 tokens, 3.00 times the even share",
        "layer 1, expert 1: 0 tokens, 0.00 times the even share",
        "layer 1, expert 2: 1 tokens, 1.00 times the even share",
    ]
    assert squares[0][0] == squares[1][0] != squares[2][0]
    data = json.loads(re.search(r'id="data">(.*?)</script>', page(story))[1])
    assert (data["load"], data["frames"][2]["load"]) == (first, first)
    assert page(story).count('class="tt-load"') == 16


def test_an_animation_shows_every_step_and_stays_small(trace):
    story = read_story(trace, 1)
    whole = animation(story)
    image = Image.open(io.BytesIO(whole))
    assert image.n_frames == len(story.frames)
    shorter = animation(story, largest=len(whole) - 1)
    assert len(shorter) < len(whole)
    thinned = Image.open(io.BytesIO(shorter))
    image.seek(image.n_frames - 1)
    thinned.seek(thinned.n_frames - 1)
    assert thinned.convert("RGB").tobytes() == image.convert("RGB").tobytes()


def test_a_long_row_is_drawn_with_fewer_frames_and_its_end(trace):
    story = read_story(trace, 1)
    story.frames = story.frames[:3] * 150 + story.frames[-1:]
    image = Image.open(io.BytesIO(animation(story)))
    assert image.n_frames <= 400
    assert image.height < 500


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (1, "{}\n", "expected the header"),
        (1, {"block_size": 0}, "block_size must be at least 1"),
        (2, "[]\n", "expected a JSON object"),
        (2, "{\n", "Expecting"),
        (2, '{"row": 0}\n', "'kind' is missing"),
        (3, {"kind": "dance"}, "unknown kind 'dance'"),
        (8, {"xt": [3]}, "xt must hold 4 tokens"),
        (8, {"confidence": [0.1, "x", 0.1, 0.1]}, "confidence must hold 4 numbers"),
        (8, {"committed": [9]}, "positions below 4"),
        (8, {"step": 5}, "step 5 of block 0"),
        (9, {"experts": [[8]]}, "numbers below 8"),
        (9, {"experts": 3}, "experts must hold a list"),
        (8, {"row": -1}, "row must be a whole number"),
        (10, {"start": 2}, "start 2 where the row has 0 tokens"),
        (10, {"accepted": 9}, "do not fit"),
        (13, {"tokens": [1]}, "not those of its blocks"),
    ],
)
def test_a_broken_trace_names_its_line(tmp_path, small_config, number, change, message):
    lines = _lines(small_config("-"), "diffusion")
    lines[number - 1] = change if isinstance(change, str) else lines[number - 1] | change
    path = _write(tmp_path / "trace.jsonl", lines)
    with pytest.raises(TraceError, match=re.escape(f"{path}, line {number}: ")) as error:
        read_story(path, 1)
    assert message in str(error.value)


def test_traces_that_cannot_be_drawn_say_why(tmp_path, small_config):
    lines = _lines(small_config("-"), "diffusion")
    path = tmp_path / "trace.jsonl"
    with pytest.raises(TraceError, match="line 11: the trace ends before the result of row 1"):
        read_story(_write(path, lines[:11]), 1)
    with pytest.raises(TraceError, match="line 1: the file is empty"):
        read_story(_write(path, []))
    for header, message in (
        ({"version": 3}, "version 3 of the format"),
        ({"mode": "ar"}, "mode 'ar' has no denoiser steps"),
    ):
        with pytest.raises(ValueError, match=message):
            read_story(_write(path, [lines[0] | header, *lines[1:]]))
    with pytest.raises(ValueError, match="row 0 ended with its first token"):
        read_story(_write(tmp_path / "short.jsonl", _lines(small_config("-"), "speculative")))
    with pytest.raises(ValueError, match="there is no row 2; the trace has 2"):
        read_story(_write(path, lines), 2)


def test_the_command_writes_all_or_nothing(trace, tmp_path):
    out = tmp_path / "pictures"
    run = run_command("visualize", f"--trace={trace}", f"--output={out}", "--row=1")
    assert run.returncode == 0, run.stderr
    assert sorted(os.listdir(out)) == ["animation.gif", "experts.svg", "heatmap.svg", "page.html", "steps.svg"]

    broken = tmp_path / "broken.jsonl"
    broken.write_text(trace.read_text()[:-20])
    run = run_command("visualize", f"--trace={broken}", f"--output={tmp_path / 'none'}", "--row=1")
    assert (run.returncode, run.stderr.count("\n")) == (3, 1)
    assert run.stderr.startswith(f"error: {broken}, line 14: ")
    assert not (tmp_path / "none").exists()

    (tmp_path / "without" / "PIL").mkdir(parents=True)
    (tmp_path / "without" / "PIL" / "__init__.py").write_text("raise ImportError('gone')")
    run = run_command(
        "visualize", f"--trace={trace}", f"--output={tmp_path / 'none'}", PYTHONPATH=str(tmp_path / "without")
    )
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "pip install 'twotower_jax[visual]'" in run.stderr


# Curves of a run.


def test_curves_are_a_run_s_numbers_where_they_stand(tmp_path):
    """The step that was made again counts as it was made last; the lowest value is at the bottom, the last at right."""
    rows = [{"step": 0, "exact": 0.25}, {"step": 1, "reward": 0.5, "kl": None, "load": [1.0]}, {"step": 2, "reward": 9}]
    rows += [{"step": 2, "reward": 1.5, "exact": 0.75}, {"step": 4, "reward": 1.0}]
    _write(tmp_path / "metrics.jsonl", rows)
    curves = read_curves(tmp_path, ["reward", "exact"])
    assert curves == {"reward": [(1, 0.5), (2, 1.5), (4, 1.0)], "exact": [(0, 0.25), (2, 0.75)]}
    root = xml.etree.ElementTree.fromstring(draw_curves("<&", curves))
    lines = [line.get("points").split() for line in root.iter("{http://www.w3.org/2000/svg}polyline")]
    places = [[tuple(map(float, corner.split(","))) for corner in line] for line in lines]
    box = next(r for r in root.iter("{http://www.w3.org/2000/svg}rect") if r.get("class") == "tt-empty")
    left, top, width, height = (float(box.get(name)) for name in ("x", "y", "width", "height"))
    for line, curve in zip(places, curves.values(), strict=True):
        expected = [(left + width * step / 4, top + height * (1 - (value - 0.25) / 1.25)) for step, value in curve]
        assert line == [pytest.approx(corner, abs=0.06) for corner in expected]
    with pytest.raises(ValueError, match="no row has a number 'load'; there are exact, reward"):
        read_curves(tmp_path, ["load"])


@pytest.mark.whole
def test_the_command_draws_curves(tmp_path):
    _write(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    out = tmp_path / "pictures"
    run = run_command("visualize", f"--workdir={tmp_path}", "--fields=loss", f"--output={out}")
    assert run.returncode == 0 and os.listdir(out) == ["curves.svg"], run.stderr
    for given, said in (
        ((), "give either --trace=FILE or --workdir=DIR"),
        ((f"--workdir={tmp_path}",), "--workdir needs --fields"),
        ((f"--workdir={tmp_path / 'gone'}", "--fields=loss"), "no such folder"),
        ((f"--workdir={tmp_path}", "--fields=gain"), "no row has a number 'gain'; there are loss"),
    ):
        run = run_command("visualize", *given, f"--output={tmp_path / 'none'}")
        assert run.returncode == 2 and said in run.stderr and run.stderr.count("\n") == 1, run.stderr
        assert not (tmp_path / "none").exists()
