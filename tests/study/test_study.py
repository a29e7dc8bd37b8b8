"""A study: it goes on where it was interrupted, does nothing twice, and reports what was measured."""

import dataclasses
import json
import statistics
import xml.etree.ElementTree

import pytest

from helpers import run_command
from twotower_jax.data import encode
from twotower_jax.data.tasks import questions
from twotower_jax.generation.answers import Marks, is_right
from twotower_jax.generation.settings import Result
from twotower_jax.study import parts as of_the_paper
from twotower_jax.study import run as engine
from twotower_jax.study.cells import AR, Cell, Curve, Part, Study, points_of, runs_of
from twotower_jax.study.report import METRICS, write_report
from twotower_jax.study.results import NAME, Results, answer_key, identity
from twotower_jax.train.config import base_config

SPECULATIVE = "speculative:steps_per_block=1"
# The second cell has the training of the first one, and asks otherwise.
PART = Part(
    "tiny",
    "Does it run?",
    "Nothing.",
    (Cell("one", ways=(AR, "diffusion")), Cell("two", ways=("diffusion", SPECULATIVE))),
)
TIMED = Part("timed", "How fast?", "Nothing.", (Cell("one", ways=(AR, "diffusion")),), ("speed",), timed=True)
PARTS = PART, TIMED


def tiny(**changes) -> Study:
    config = base_config(
        model={
            "hidden_size": 16,
            "hybrid_override_pattern": "*",  # Compiles soonest.
            "mamba_num_heads": 2,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
        }
    )
    config.update(data="tasks:sort", vocab_size=576, reset_at_documents=True, block_size=16, log_every=1)
    config.update(sequence_length=128, batch_size=4, steps=3)
    return dataclasses.replace(Study(config, PARTS, {"learning_rate": 1e-3}, questions=2), **changes)


def half_right(asked_of: list):
    """In place of `answered`: of two answers the second one lacks its last word. An answer takes AR a pass of the
    context for each token, diffusion three evaluations, and speculative two blocks with three drafts kept in all."""

    def answered(who, asked, ways, rounds):
        asked_of.append((list(ways), rounds, {settings.max_new_tokens for settings in ways.values()}))
        right = {question.prompt: question.answer for question in questions("sort", "test", 2)}
        texts = [right[asked[0].prompt], right[asked[1].prompt].rsplit(" ", 1)[0]]
        found = {}
        for way, settings in ways.items():
            evaluations = 0 if settings.mode == AR else 3
            rest = {"blocks": 2, "accepted_draft_tokens": 3} if settings.mode == "speculative" else {}
            results = [
                Result(question.ids, [*encode(who.tokenizer, [text])[0].tolist(), 2], evaluations, 9, "eos", **rest)
                for question, text in zip(asked, texts, strict=True)
            ]
            right_ones = [is_right(who, *pair) for pair in zip(asked, results, strict=True)]
            found[way] = Marks(asked, results, right_ones, [0.5 if settings.mode == AR else 0.25] * rounds)
        return found

    return answered


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A workdir, what was reported, what was asked, and the ends of a study that was stopped after a step, and not."""
    workdir, lines, asked = tmp_path_factory.mktemp("study"), [], []

    def stop() -> str:
        return "enough" if any(line.startswith("step 1/3") for line in lines) else ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "answered", half_right(asked))
        first = engine.run(tiny(), workdir, PARTS, 1, lines.append, stop)
        after = json.loads((workdir / NAME).read_text())
        again = engine.run(tiny(), workdir, PARTS, 1, lines.append)
    return workdir, lines, asked, (first, after, again)


def test_it_goes_on_in_the_middle_of_a_run(studied):
    workdir, lines, _, (first, after, again) = studied
    assert (first, again) == (False, True)
    backbone, denoiser = runs_of(tiny(), PART.cells[0], 0)
    assert set(after["runs"]) == {backbone.key} and "metrics" not in after["runs"][backbone.key]
    assert after["cells"] == [] and sum("resuming at step" in line for line in lines) == 1
    found = json.loads((workdir / NAME).read_text())
    assert set(found["runs"]) == {backbone.key, denoiser.key}  # of three cells
    for run in (backbone, denoiser):
        rows = [json.loads(line) for line in (workdir / run.key / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3]
        metrics = found["runs"][run.key]["metrics"]
        assert metrics["validation_loss"] == rows[-1]["validation_loss"] and metrics["tokens"] == 3 * 4 * 128
    assert found["runs"][backbone.key]["seconds"] > after["runs"][backbone.key]["seconds"] > 0


def test_every_cell_is_told_with_what_came_of_it(studied):
    workdir, _, asked, _ = studied
    longest = 1 + max(len(question.answer.replace(",", " ,").split()) for question in questions("sort", "test", 2))
    # Each way once, and those that are timed together.
    assert asked == [
        *(([way], 0, {longest}) for way in (AR, "diffusion", SPECULATIVE)),
        ([AR, "diffusion"], 3, {longest}),
    ]
    found = json.loads((workdir / NAME).read_text())
    backbone, denoiser = runs_of(tiny(), PART.cells[0], 0)
    one, two, timed = found["cells"]
    told = [(cell["part"], cell["cell"], cell["seed"]) for cell in found["cells"]]
    assert told == [("tiny", "one", 0), ("tiny", "two", 0), ("timed", "one", 0)]
    assert one["settings"]["denoiser"]["learning_rate"] == 1e-3 and one["runs"] == two["runs"]
    # AR's answers are the backbone's, which all denoisers on it have in common.
    assert set(found["runs"][backbone.key]["answers"]) == {AR}
    words = len(questions("sort", "test", 2)[1].answer.split())
    tokens = sum(len(q.answer.replace(",", " ,").split()) + 1 for q in questions("sort", "test", 2)) - 1
    for answers in (one["answers"][AR], one["answers"]["diffusion"], two["answers"][SPECULATIVE]):
        assert answers["accuracy"] == 0.5 and answers["questions"] == 2
        assert answers["words"] == pytest.approx((1 + (words - 1) / words) / 2)
    assert one["answers"][AR]["tokens_per_evaluation"] is None
    assert two["answers"]["diffusion"]["tokens_per_evaluation"] == tokens / 6
    assert two["answers"][SPECULATIVE]["accepted"] == 6 / 4 and two["answers"]["diffusion"]["accepted"] is None
    assert [timed["answers"][way]["tokens_per_second"] for way in (AR, "diffusion")] == [tokens / 0.5, tokens / 0.25]
    assert METRICS["speed"].find(Results.read(tiny(), workdir), TIMED, TIMED.cells[0], 0, "diffusion") == 2


@pytest.mark.whole
def test_a_denoiser_is_really_asked(studied):
    workdir, *_ = studied
    results = Results.read(tiny(), workdir)
    found = engine._ask(results, PART, PART.cells[1], runs_of(tiny(), PART.cells[1], 0)[1], PART.cells[1].ways)
    for way, answers in found.items():
        assert 0 <= answers["accuracy"] <= 1 and 0 <= answers["words"] <= 1 and answers["tokens_per_evaluation"] > 0
        assert (answers["accepted"] is not None) == (way == SPECULATIVE)


def test_nothing_is_done_twice(studied, monkeypatch):
    workdir, *_ = studied
    before = (workdir / NAME).read_text()

    def refused(*_, **__):
        raise AssertionError("ran again")

    for name in ("train", "load", "answered"):
        monkeypatch.setattr(engine, name, refused)
    assert engine.run(tiny(), workdir, PARTS, 1, print)
    assert json.loads((workdir / NAME).read_text())["runs"] == json.loads(before)["runs"]
    # A way that is new is all there is to do.
    more = dataclasses.replace(PART, cells=(Cell("one", ways=(AR, "diffusion", "diffusion:confidence_threshold=0.6")),))
    with pytest.raises(AssertionError, match="ran again"):
        engine.run(tiny(), workdir, (more,), 1, print)
    assert not engine.run(tiny(), workdir, (more,), 1, print, lambda: "stopped")


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"questions": 3}, "questions"), ({"denoiser": {"learning_rate": 2e-3}}, "denoiser"), ({}, "config.steps")],
)
def test_a_workdir_of_another_study_is_refused(studied, changes, named):
    workdir, *_ = studied
    other = tiny(**changes)
    if not changes:
        other.config.steps = 4
    before = sorted(workdir.iterdir())
    with pytest.raises(ValueError, match=rf"another study \({named} differs\)"):
        engine.run(other, workdir, (PART,), 1, print)
    assert sorted(workdir.iterdir()) == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="something else than a study"):
        engine.run(tiny(), tmp_path, (PART,), 1, print)


def test_every_cell_of_the_study_can_be_run(tmp_path):
    study, shared = of_the_paper.default_study(), set()
    for part in of_the_paper.PARTS:
        for cell in part.cells:
            keys = []
            for training in runs_of(study, cell, 1):
                config = training.config(study, tmp_path)
                assert config.seed == 1 and config.sequence_length == study.config.sequence_length
                keys.append(training.key)
            assert [point.name for point in points_of(cell, config.block_size, 64, 8)] == list(cell.ways)
            shared.add((part.name, cell.name == "base", *keys))
        assert part.cells[0].name == "base"
    # What the parts differ from is one training.
    assert len({(backbone, denoiser) for _, base, backbone, denoiser in shared if base}) == 1
    assert len({denoiser for *_, denoiser in shared}) == sum(not base for _, base, *_ in shared) + 1
    assert config.steps == round(study.tokens * study.config.steps) and study.config.init_from == ""
    with pytest.raises(ValueError, match="no part 'nope'; choose among thresholds, "):
        study.choose(["nope"])


CURVED = Part(
    "curved",
    "How many tokens?",
    "2.1 T.",
    (Cell("all", ways=(AR, "diffusion")), Cell("half", tokens=0.5, ways=("diffusion",))),
    ("validation_loss", "accuracy", "retained"),
    (Curve("tokens", "retained", log=True),),
)


def recorded(study: Study, folder, losses, right) -> Results:
    """A study.json with these validation losses and accuracies: cell → seed → value, None for what is missing."""
    runs = {}
    for cell in CURVED.cells:
        for seed, (loss, accuracy) in enumerate(zip(losses[cell.name], right[cell.name], strict=True)):
            backbone, denoiser = runs_of(study, cell, seed)
            runs[backbone.key] = {
                "seconds": 1.0,
                "metrics": {},
                "answers": {AR: {"accuracy": right[AR][seed], "seconds": 1}},
            }
            if loss is not None:
                answers = {answer_key(CURVED, cell, "diffusion"): {"accuracy": accuracy, "seconds": 1.0}}
                metrics = {"validation_loss": loss, "tokens": 1}
                runs[denoiser.key] = {"seconds": 1.0, "metrics": metrics, "answers": answers}
    about = {"began": "2026-11-28", "date": "2026-11-29", "machine": "2 CPU cores", "jax": "0.12"}
    told = {"version": 1, "study": identity(study), "about": about, "cells": [], "runs": runs}
    (folder / NAME).write_text(json.dumps(told))
    return Results.read(study, folder)


def test_a_report_tells_means_and_standard_errors(tmp_path):
    losses = {"all": [0.5, 0.625, 0.75], "half": [0.75, 0.8125, None]}
    right = {AR: [0.8, 1.0, 0.9], "all": [0.4, 0.75, 0.72], "half": [0.2, 0.25, None]}
    results = recorded(tiny(), tmp_path, losses, right)
    write_report(results, (CURVED,), 3, tmp_path / "report.md", "python launch/study.py --seeds=3")
    text = (tmp_path / "report.md").read_text()

    def said(values, scale, places):
        error = statistics.stdev(values) / len(values) ** 0.5
        return f"{scale * sum(values) / len(values):.{places}f} ± {scale * error:.{places}f}"

    retained = [0.4 / 0.8, 0.75 / 1.0, 0.72 / 0.9]
    whole = [said(losses["all"], 1, 3), said(right["all"], 100, 1), said(retained, 100, 1)]
    assert f"| all | `diffusion` | {' | '.join(whole)} | – | 3 |" in text
    half = [said([0.75, 0.8125], 1, 3), said([0.2, 0.25], 100, 1), said([0.2 / 0.8, 0.25 / 1.0], 100, 1)]
    # Seed by seed: the errors of both cells' means would be larger.
    difference = said([0.75 - 0.5, 0.8125 - 0.625], 1, 3)
    assert f"| half | `diffusion` | {' | '.join(half)} | {difference} | 2 |" in text
    assert "Missing: half, seed 2." in text and "2026-11-28 to 2026-11-29" in text and "The paper: 2.1 T." in text
    picture = xml.etree.ElementTree.parse(tmp_path / "report_curved_tokens.svg").getroot()
    lines = [element for element in picture.iter() if element.tag.endswith("polyline")]
    assert len(lines) == 4  # Three seeds and their means.
    assert [len(line.get("points").split()) for line in lines] == [2, 2, 1, 2]  # AR is no point of a curve.

    write_report(results, (CURVED,), 1, tmp_path / "report.md", "python launch/study.py --seeds=1")
    text = (tmp_path / "report.md").read_text()
    assert "| all | `diffusion` | 0.500 | 40.0 | 50.0 | – | 1 |" in text and "Missing" not in text


def test_the_command(tmp_path):
    done = run_command("study", "--workdir=study", "--minutes=0", "--report=report.md", cwd=tmp_path)
    assert done.returncode == 0 and "Missing: base, seeds 0 1 2." in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "study").exists()
    refused = {"--parts=towers,nope": "no part 'nope'", "--report=no/x.md": "folder does not exist"}
    for flag, said in (refused | {"--minutes=0": "--minutes=0 runs nothing"}).items():
        done = run_command("study", "--workdir=study", flag, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
