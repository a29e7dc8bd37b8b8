"""Watching and tracing: what is drawn and written of a generation, and what the command makes of it."""

import io
import json
import shutil

import pytest

from helpers import run_command
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation import Progress, Result, Settings, Step
from twotower_jax.generation.trace import FORMAT, VERSION, TraceWriter
from twotower_jax.generation.trained import trained_block_size
from twotower_jax.generation.watch import Watch

MASK = 3
STEPS = [
    Step(0, 0, 1.0, [3, 3, 3, 3], [8, 3, 9, 3], [0.9, 0.1, 0.8, 0.2]),
    Step(0, 1, 0.5, [8, 3, 9, 3], [8, 7, 9, 6], [0.9, 0.5, 0.8, 0.6], [[[0, 1], [1, 2], [0, 2], [7, 0]]]),
]
RESULT = Result([5], [8, 7, 9], 2, 1, "length", text="HGI", blocks=1)


def decode(ids):
    return "".join("\n" if i == 10 else chr(ord("@") + i) for i in ids)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_undecided_positions_are_drawn_as_blocks_until_they_are_decided(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    watch = Watch([[5], [10]], decode, MASK, stream, delay=0)
    watch.show(
        [Progress(0, 0, 0, [8, 7, 9, 6], STEPS, None, RESULT), Progress(1, 0, 0, [8, 8, 9, 6], STEPS[:1], None, None)]
    )
    frames = stream.getvalue().split("\x1b[J")
    assert "0: EH░I░\n" in frames[0]
    assert "0: EHGIF\n" in frames[1]
    assert "1: ⏎H░I░\n" in frames[1]  # Done before its neighbor: its last step stays.
    assert "1: ⏎HHIF\n" in frames[2]
    assert frames[1].startswith("\x1b[2A")  # Over the two lines before.
    watch.show([Progress(1, 1, 4, [8] * 50, None, None, None)])
    last = stream.getvalue().split("\x1b[J")[-2]
    assert last.startswith("\x1b[1A")  # Row 0 is done and stays above.
    assert last.endswith("1: …" + "H" * 35 + "\n")  # The end of a line that is too long.


def test_without_a_terminal_a_line_a_block():
    stream = io.StringIO()
    watch = Watch([[5]], None, MASK, stream, given=1)
    watch.show([Progress(0, None, 0, [8], None, None, None), Progress(0, 0, 1, [7, 9], STEPS, 1, RESULT)])
    assert stream.getvalue() == "row 0, block 0, 2 steps, 1 drafted tokens kept, ended by length:  7 9\n"


def test_a_trace_holds_everything_in_order(small_config):
    lines = []
    settings = Settings(mode="speculative", sampling=SamplingConfig(block_size=4, steps_per_block=2), seed=7)
    trace = TraceWriter(lines.append, small_config("-"), settings, [[5]], decode)
    trace.add(Progress(0, None, 0, [8], None, None, None))
    trace.add(Progress(0, 0, 1, [7, 9], STEPS, 1, RESULT))
    trace.finish()
    lines = [json.loads(json.dumps(line)) for line in lines]
    header = lines[0]
    assert (header["format"], header["version"], header["prompts"], header["seed"]) == (FORMAT, VERSION, 1, 7)
    assert (header["block_size"], header["mask_token_id"], header["mode"]) == (4, MASK, "speculative")
    assert [line["kind"] for line in lines[1:]] == ["prompt", "block", "step", "step", "block", "result", "texts"]
    assert lines[1] == {"kind": "prompt", "row": 0, "ids": [5], "text": "E"}
    assert lines[2] == {"kind": "block", "row": 0, "block": None, "start": 0, "tokens": [8], "accepted": None}
    # The first position of a draft is the token that was there before it.
    assert lines[4] | {"kind": "step", "start": 0, "t": 0.5, "xt": [8, 3, 9, 3], "tokens": [8, 7, 9, 6]} == lines[4]
    assert lines[4]["committed"] == [1, 3]
    assert (lines[3]["experts"], lines[4]["experts"]) == (None, [[0, 1, 1, 2, 0, 2, 7, 0]])
    assert header["n_routed_experts"] == 8
    assert lines[5] == {"kind": "block", "row": 0, "block": 0, "start": 1, "tokens": [7, 9], "accepted": 1}
    assert lines[6]["finish_reason"] == "length"
    assert lines[7]["texts"] == {"2": "B", "3": "C", "5": "E", "6": "F", "7": "G", "8": "H", "9": "I"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"config.json": {"hidden_size": 64}}, None),
        ({"config.json": {"hidden_size": 64}, "generation_config.json": {"block_size": 32}}, 32),
        ({"config.json": {"objective": "denoiser", "block_size": 8, "block_curriculum": [[0, 32]]}}, 8),
        ({"config.json": {"objective": "denoiser", "block_size": None, "block_curriculum": [[0, 32], [0.5, 16]]}}, 16),
        ({"config.json": {"objective": "autoregressive", "block_size": None, "block_curriculum": [[0, 32]]}}, None),
        ({"config.json": ["block_size"], "generation_config.json": {"block_size": "16"}}, None),
    ],
)
def test_where_the_trained_block_size_stands(tmp_path, files, expected):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert trained_block_size(tmp_path) == expected


@pytest.mark.whole
def test_the_command_follows_its_flags(tmp_path, small_folder):
    """One run for the warning, the trace, a stop text and the fields of a row."""
    checkpoint = shutil.copytree(small_folder, tmp_path / "checkpoint")
    (checkpoint / "generation_config.json").write_text('{"block_size": 2}')
    prompts, out, trace = (tmp_path / name for name in ("prompts.jsonl", "out.jsonl", "trace.jsonl"))
    prompts.write_text('{"text": "The list"}\n{"ids": [7, 8, 9]}\n')
    flags = {"prompts": prompts, "output": out, "trace": trace, "checkpoint": checkpoint, "mode": "speculative"}
    flags |= {"block_size": 4, "steps_per_block": 1, "max_new_tokens": 6, "tolerance": 1.0, "stop": "q"}
    arguments = [f"--{k}={v}" for k, v in flags.items()]
    run = run_command("generate", *arguments, "--watch", "--ignore_eos")
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        assert row["finish_reason"] in ("length", "stop")
        assert "q" not in row["text"]
        assert len(row["tokens"]) == 6 or row["finish_reason"] == "stop"
        assert row["acceptance_length"] == row["accepted_draft_tokens"] / row["blocks"]
        assert row["evaluations_per_token"] > 0
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    assert lines[0]["format"] == FORMAT
    for line in lines:
        if line.get("kind") == "step":  # One layer with experts, 4 positions, 3 of 8 experts each.
            assert [len(layer) for layer in line["experts"]] == [12]
            assert {e for layer in line["experts"] for e in layer} <= set(range(8))
    assert sum(line.get("kind") == "result" for line in lines) == 2
    assert "row 0, block 0, 1 steps, 3 drafted tokens kept" in run.stderr
    assert "warning: --block_size=4 is more than the 2 that the denoiser was trained with" in run.stderr
