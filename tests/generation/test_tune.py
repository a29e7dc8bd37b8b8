"""Choosing an operating point: the sweep, the rule, and the file that generation follows."""

import dataclasses
import json
import os
import shutil
import xml.etree.ElementTree

import numpy as np
import pytest

from helpers import run_command
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.files import CheckpointError
from twotower_jax.generation import Settings, generate
from twotower_jax.generation.blocks import block
from twotower_jax.generation.operating_point import FILE, merged, read_operating_point
from twotower_jax.generation.trained import trained_block_size
from twotower_jax.generation.tune import Point, Sweep, agreement, grid, sweep
from twotower_jax.two_tower import TwoTower
from twotower_jax.visualize.tradeoff import plot


def test_a_grid_has_every_combination_once():
    points = grid([0.9, 0.5], [8, 2, 16], [4, 8])
    assert [(p.block_size, p.steps_per_block, p.confidence_threshold) for p in points] == [
        (b, s, t) for b, s in ((4, 2), (4, 4), (8, 2), (8, 8)) for t in (0.5, 0.9)
    ]
    with pytest.raises(ValueError, match="must each hold at least one"):
        grid([], [4], [4])
    with pytest.raises(ValueError, match="confidence_threshold=2"):
        grid([2.0], [4], [4])


def test_a_grid_of_any_strategy():
    """Thresholds are swept where the strategy has one and the options leave it open."""
    points = grid([0.5, 0.9], [2], [4, 8], "factor", {"factor": "1.5"})
    assert [(p.block_size, p.strategy, p.strategy_options) for p in points] == [
        (size, "factor", (("factor", 1.5),)) for size in (4, 8)
    ]
    points = grid([0.5, 0.9], [2], [4], "remasking", {"doubt_threshold": 0.1})
    assert [(p.confidence_threshold, p.strategy_options) for p in points] == [
        (threshold, (("doubt_threshold", 0.1),)) for threshold in (0.5, 0.9)
    ]
    assert [p.confidence_threshold for p in grid([0.5], [2], [4], options={"confidence_threshold": "0.7"})] == [0.7]
    rows = [Point(p, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0) for p in (points[0], grid([0.5], [2], [4], "factor")[0])]
    assert [point.setting() for point in rows] == [("4", "2", "0.5"), ("4", "2", "")]
    assert [("confidence_threshold" in point.row()) for point in rows] == [True, False]
    with pytest.raises(ValueError, match="strategy='none' is unknown"):
        grid([0.5], [2], [4], "none")


@pytest.mark.parametrize(
    ("tokens", "reference", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], (3, 3, 3)),
        ([1, 9, 3], [1, 2, 3], (2, 1, 3)),
        ([1, 2], [1, 2, 3, 4], (2, 2, 4)),
        ([5, 2, 3, 4], [1], (0, 0, 4)),
    ],
)
def test_agreement_counts_places_of_either_row(tokens, reference, expected):
    assert agreement(tokens, reference) == expected


def _point(agree: float, speed: float, block: int = 8) -> Point:
    return Point(SamplingConfig(block_size=block), 2.0, speed, speed / 2.0, agree, agree, -1.0)


def test_the_fastest_of_enough_agreement_is_chosen():
    points = [_point(0.5, 900.0), _point(0.92, 300.0), _point(0.95, 200.0), _point(0.95, 250.0)]
    measured = Sweep(_point(1.0, 100.0), points, {8: 1.0})
    assert measured.best(0.9) is points[1]
    assert measured.best(0.0) is points[0]
    assert measured.best(0.99) is points[3]


@pytest.mark.whole
def test_a_sweep_compiles_thresholds_together_and_measures_what_generate_gives(small_config, random_params):
    model = TwoTower(small_config("M"))
    params = random_params(model)
    prompts = np.random.default_rng(0).integers(4, 40, (2, 5)).tolist()
    settings = Settings(max_new_tokens=7, batch_size=2, ignore_eos=True)
    samplings = grid([0.0, 1.0], [4], [4])
    compiled = block._cache_size()
    measured = sweep(model, params, prompts, settings, samplings, rounds=1)
    assert block._cache_size() == compiled + 2  # AR's, and one for both thresholds.
    # At threshold 0 every position is sure in the first step, at 1 none is, and each step commits one.
    assert measured.points[0].tokens_per_evaluation == pytest.approx(14 / (2 * (2 * 1 + 1 + 1)))
    assert measured.points[1].tokens_per_evaluation == pytest.approx(14 / (2 * (2 * 4 + 1 + 1)))
    assert (measured.ar.agreement, measured.ar.sampling) == (1.0, None)
    assert measured.ar.tokens_per_evaluation == pytest.approx(1.0, abs=0.15)
    expected = [r.tokens for r in generate(model, params, prompts, dataclasses.replace(settings, mode="ar"))]
    for point, sampling in zip(measured.points, samplings, strict=True):
        assert point.sampling == sampling
        assert point.log_likelihood < 0
        assert point.tokens_per_second > 0
    same = [r.tokens for r in generate(model, params, prompts, dataclasses.replace(settings, sampling=samplings[1]))]
    equal = sum(a == b for x, y in zip(same, expected, strict=True) for a, b in zip(x, y, strict=True))
    assert measured.points[1].agreement == pytest.approx(equal / 14)
    assert any(point.pareto for point in measured.points)
    speeds = [point.evaluations_per_second for point in measured.points]
    assert measured.needed[4] == pytest.approx(measured.ar.tokens_per_second / np.median(speeds))

    picture = plot(measured, measured.points[0])
    titles = [e.text for e in xml.etree.ElementTree.fromstring(picture).iter() if e.tag.endswith("title")]
    assert sum("threshold 1:" in title for title in titles) == 4


def test_a_chosen_point_is_read_back_and_other_fields_stay(tmp_path):
    (tmp_path / FILE).write_text('{"temperature": 0.3, "do_sample": true, "eos_token_id": 2, "block_size": 32}')
    assert read_operating_point(tmp_path) == {"block_size": 32}
    chosen = SamplingConfig(block_size=8, steps_per_block=4, confidence_threshold=0.7)
    (tmp_path / FILE).write_text(merged(tmp_path, chosen, trained_block_size(tmp_path)))
    values = json.loads((tmp_path / FILE).read_text())
    assert (values["temperature"], values["do_sample"], values["eos_token_id"]) == (0.3, True, 2)
    assert read_operating_point(tmp_path) == {
        "block_size": 8,
        "steps_per_block": 4,
        "confidence_threshold": 0.7,
        "strategy": "confidence",
    }
    assert trained_block_size(tmp_path) == 32
    assert read_operating_point(tmp_path / "elsewhere") == {}
    # Tuning again does not take the chosen block for the trained one, nor an unknown one.
    (tmp_path / FILE).write_text(merged(tmp_path, chosen, None))
    assert trained_block_size(tmp_path) is None


def test_a_chosen_strategy_is_read_back_with_its_knobs(tmp_path):
    (tmp_path / FILE).write_text('{"confidence_threshold": 0.4, "strategy_options": {"x": 1}}')
    chosen = SamplingConfig(block_size=8, steps_per_block=4, strategy="factor", strategy_options={"factor": 1.5})
    (tmp_path / FILE).write_text(merged(tmp_path, chosen, None))
    found = read_operating_point(tmp_path)
    assert found == {"block_size": 8, "steps_per_block": 4, "strategy": "factor", "strategy_options": {"factor": 1.5}}
    assert SamplingConfig(**found) == chosen
    (tmp_path / FILE).write_text(merged(tmp_path, SamplingConfig(), None))
    assert "strategy_options" not in json.loads((tmp_path / FILE).read_text())


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"block_size": "16"}',
        '{"block_size": 0}',
        '{"steps_per_block": true}',
        '{"confidence_threshold": 1.5}',
        '{"strategy": "guess"}',
        '{"strategy": "factor", "strategy_options": {"doubt": 1}}',
        '{"strategy": "factor", "strategy_options": {"factor": [1]}}',
        '{"strategy": "factor", "strategy_options": "factor=1"}',
    ],
)
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(CheckpointError, match=FILE):
        read_operating_point(tmp_path)


def _run(script: str, **flags):
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    return run_command(script, *arguments)


@pytest.mark.whole
def test_the_command_tunes_and_generation_follows(tmp_path, small_folder):
    checkpoint = shutil.copytree(small_folder, tmp_path / "checkpoint")
    (checkpoint / FILE).write_text('{"temperature": 0.5, "block_size": 4}')
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "tuning"
    prompts.write_text('{"ids": [7, 8, 9]}\n')
    where = {"checkpoint": checkpoint, "prompts": prompts}
    run = _run("tune", **where, output=out, thresholds=0.8, steps=1, blocks="4,8", max_new_tokens=8, rounds=1, write=1)
    assert run.returncode == 0, run.stderr
    assert "warning: blocks larger than the trained one of 4 are left out" in run.stderr
    assert "blocks of 4: as fast as AR from " in run.stdout
    assert sorted(os.listdir(out)) == [FILE, "plot.svg", "results.json"]
    results = json.loads((out / "results.json").read_text())
    assert len(results["points"]) == 1
    assert results["chosen"]["block_size"] == 4
    assert (out / FILE).read_text() == (checkpoint / FILE).read_text()
    assert json.loads((checkpoint / FILE).read_text())["temperature"] == 0.5

    trace = tmp_path / "trace.jsonl"
    run = _run("generate", **where, max_new_tokens=4, trace=trace, steps_per_block=2)
    assert run.returncode == 0, run.stderr
    assert f"{FILE} of the checkpoint: block_size=4, confidence_threshold=0.8, strategy=confidence" in run.stderr
    header = json.loads(trace.read_text().splitlines()[0])
    assert (header["block_size"], header["steps_per_block"], header["temperature"]) == (4, 2, 0.0)


def test_bad_flags_are_one_line(tmp_path, data):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"ids": [7]}\n')
    run = _run("tune", checkpoint=data / "tiny/checkpoint", prompts=prompts, output=tmp_path / "o", steps="4,x")
    assert (run.returncode, run.stderr) == (2, "error: --steps=4,x: not a list of whole numbers\n")
    assert not (tmp_path / "o").exists()
