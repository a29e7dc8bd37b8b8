"""What prepare.py --report tells of a set, against counting by hand and against the windows of training."""

import json
import re
import xml.etree.ElementTree

import numpy as np
import pytest

from helpers import run_command
from twotower_jax.data import encode, train_tokenizer
from twotower_jax.data.opening import Data, Packing
from twotower_jax.data.prepare import Settings, prepare
from twotower_jax.data.prepared import PreparedDocuments
from twotower_jax.data.report import charts, report, text

TEXTS = [f"document {i} " + "word " * (3 * i) for i in range(40)]
TEXTS += [TEXTS[3]] * 4 + [TEXTS[20]] * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    (root / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare([str(root / "a.jsonl")], root / "set", train_tokenizer(TEXTS, 280), Settings(shard_size=500), quiet=True)
    return root / "set"


def test_a_report_counts_what_is_there(folder):
    found = report(folder, sequence_length=64, aligns=[1, 8, 32], top=3)
    tokenizer = train_tokenizer(TEXTS, 280)
    ids = [np.append(one, 2) for one in encode(tokenizer, TEXTS)]
    lengths, line = [len(one) for one in ids], np.concatenate(ids)
    assert found["documents"] == {"train": 46, "validation": 0} and found["tokens"]["train"] == len(line)
    assert found["lengths"]["mean"] == np.mean(lengths)
    assert found["lengths"]["percentiles"]["100"] == max(lengths) and found["lengths"]["percentiles"]["0"] == min(
        lengths
    )
    for one in found["lengths"]["histogram"]:
        own = [n for n in lengths if one["up_to"] // 2 < n <= one["up_to"]]
        assert (one["documents"], one["tokens"]) == (len(own), sum(own))
    assert sum(one["documents"] for one in found["lengths"]["histogram"]) == 46
    counts = np.bincount(line, minlength=280)
    assert found["vocabulary"]["used"] == (counts > 0).sum()
    assert [one["count"] for one in found["vocabulary"]["most_frequent"]] == sorted(counts, reverse=True)[:3]
    copies = found["copies"]
    assert copies["documents"] == 6 and copies["tokens"] == 4 * lengths[3] + 2 * lengths[20]
    assert [(one["times"], one["tokens"]) for one in copies["most_frequent"]] == [(5, lengths[3]), (3, lengths[20])]
    assert copies["most_frequent"][0]["text"] == TEXTS[3].strip()[:60]
    assert json.loads(json.dumps(found)) == found


def test_padding_is_that_of_training(folder):
    found = report(folder, sequence_length=64, aligns=[8, 32], top=1)["packing"]
    documents = PreparedDocuments(folder, "train")
    borders = np.cumsum(np.append(0, documents.lengths(0, documents.count)))
    crossing = sum(a // 64 != (b - 1) // 64 for a, b in zip(borders, borders[1:], strict=False))
    assert found["together"]["documents_in_several_windows"] == crossing
    tokenizer = train_tokenizer(TEXTS, 280)
    for one, align in zip([found["together"], *found["apart"]], [None, 8, 32], strict=True):
        windows = Data(str(folder)).windows(tokenizer, Packing(64, 280, 0.0, 0, align))[0]
        assert one["windows"] == len(windows)
        if align:
            counted = sum(windows[i]["counted"].sum() for i in range(len(windows)))
            # Beyond the last whole window there may be less than a window more.
            assert abs((1 - one["padding"]) * windows.tokens - counted) <= 64


def test_conversations_are_packed_whole(tmp_path):
    rows = [{"prompt": f"say {i}", "response": "word " * (2 + i)} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer(["say word 0123456789 " * 9], 280)
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "set", tokenizer, quiet=True)
    found = report(tmp_path / "set", sequence_length=128, aligns=[16], top=1)["packing"]
    windows = Data(str(tmp_path / "set")).windows(tokenizer, Packing(128, 280, 0.0, 0, 16, turn_align=16))[0]
    ids = [windows[i]["ids"] for i in range(len(windows))]
    fill = [windows[i] for i in range(len(windows))]
    learned = sum(int((one["token_weight"] == 1).sum()) for one in fill)
    (one,) = found["apart"]
    assert one["windows"] == len(ids) and one["cut"] == one["left_out"] == 0
    assert windows.learned == learned and (1 - one["padding"]) * windows.tokens == pytest.approx(windows.filled)
    documents = PreparedDocuments(tmp_path / "set", "train")
    assert windows.filled == documents.tokens


@pytest.mark.whole
def test_the_command_writes_text_json_and_plots(folder, tmp_path):
    done = run_command("prepare", f"--report={folder}", f"--output={tmp_path / 'out'}", "--sequence_length=64")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert found == report(folder, sequence_length=64, aligns=[1, 16, 32, 64], top=10)
    assert done.stdout == text(found) + "\n" == (tmp_path / "out/report.txt").read_text()
    assert "  5 times, " in done.stdout and re.search(r"apart, at multiples of 32: \d+, \d+\.\d% padding", done.stdout)
    assert {file.stem for file in (tmp_path / "out").glob("*.svg")} == set(charts(found))
    for file in (tmp_path / "out").glob("*.svg"):
        root = xml.etree.ElementTree.parse(file).getroot()
        assert len(root.findall("{*}rect")) > 1, file
    for flags, message in (
        ([f"--report={tmp_path / 'no'}"], f"{tmp_path}/no: no such folder; give a folder that launch/prepare.py made"),
        ([f"--report={folder}", "--align=48", "--sequence_length=64"], "align 48 does not divide sequence_length 64"),
        ([f"--report={folder}", "--input=x"], "--input changes nothing with --report"),
        (["--input=x", "--top=3"], "--top changes nothing without --report"),
        ([f"--report={folder}", f"--output={tmp_path / 'out'}"], f"{tmp_path}/out: exists already"),
    ):
        done = run_command("prepare", *flags)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {message}"), done.stderr
        assert done.stderr.count("\n") == 1
