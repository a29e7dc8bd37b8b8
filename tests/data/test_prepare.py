"""Tests of launch/prepare.py: inputs of all kinds, parts, interruption, refusals, and training data from the result."""

import fcntl
import gzip
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import ROOT, run_command
from twotower_jax.checkpoint.workdir import Workdir
from twotower_jax.data import EOS_ID, TrainingData, encode, load_tokenizer, save_tokenizer, train_tokenizer
from twotower_jax.data.documents import DataError
from twotower_jax.data.end_tokens import end_tokens
from twotower_jax.data.inputs import File, divide, find_files, read_rows
from twotower_jax.data.prepare import Settings, prepare
from twotower_jax.data.prepared import PreparedDocuments, read_manifest
from twotower_jax.train.config import base_config, freeze
from twotower_jax.train.start import make_start

COMMAND = [sys.executable, str(ROOT / "launch" / "prepare.py")]


def make_texts(count, seed=0):
    rng = random.Random(seed)
    words = ["the", "cat", "sat", "on", "mat", "zwölf", "\u2028", "\n", "</s>", "12", "def f(x):"]
    return [f"{seed}.{i} " + " ".join(rng.choices(words, k=rng.randrange(1, 60))) for i in range(count)]


def rows(texts, field="text"):
    return "".join(json.dumps({field: text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(make_texts(50), 320)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tokenizer):
    """Texts in files of all kinds; the files' folder, the texts in order, and the tokenizer's folder."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [make_texts(count, seed) for seed, count in enumerate([400, 1, 150, 120, 1])]
    (folder / "in" / "deep").mkdir(parents=True)
    (folder / "in" / "a.jsonl").write_text(rows(texts[0]), encoding="utf-8")
    (folder / "in" / "b.txt").write_text(texts[1][0], encoding="utf-8-sig")
    (folder / "in" / "c.jsonl.gz").write_bytes(gzip.compress(rows(texts[2]).encode()))
    table = pyarrow.table({"n": list(range(120)), "text": texts[3]})
    pyarrow.parquet.write_table(table, folder / "in" / "d.parquet", row_group_size=25)
    (folder / "in" / "deep" / "e.txt.gz").write_bytes(gzip.compress(texts[4][0].encode()))
    (folder / "in" / "notes.md").write_text("not read")
    save_tokenizer(tokenizer, folder / "tokenizer")
    return folder / "in", [text for part in texts for text in part], folder / "tokenizer"


SETTINGS = Settings(validation_fraction=0.1, seed=5, shard_size=3000)


@pytest.fixture(scope="module")
def reference(corpus, tokenizer, tmp_path_factory):
    """The corpus, prepared by one process without interruption."""
    output = tmp_path_factory.mktemp("reference") / "out"
    prepare([str(corpus[0])], output, tokenizer, SETTINGS, quiet=True)
    return output


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def documents_of(folder, split):
    documents = PreparedDocuments(folder, split)
    ends = np.cumsum(documents.lengths(0, documents.count))
    return np.split(documents.read(0, documents.tokens), ends[:-1])


def run(*arguments):
    return run_command("prepare", *arguments)


def flags(corpus, output, *more):
    return [f"--input={corpus[0]}", f"--output={output}", f"--tokenizer={corpus[2]}", "--validation_fraction=0.1",
            "--seed=5", "--shard_size=3000", *more]  # fmt: skip


# What comes out


def test_every_document_comes_out_once_in_order(corpus, reference, tokenizer):
    _, texts, _ = corpus
    wanted = [np.append(ids, EOS_ID).tolist() for ids in encode(tokenizer, texts)]
    train, validation = ([ids.tolist() for ids in documents_of(reference, s)] for s in ("train", "validation"))
    place = {str(ids): i for i, ids in enumerate(wanted)}
    assert len(place) == len(texts)
    for part in (train, validation):
        places = [place[str(ids)] for ids in part]
        assert places == sorted(places)
    assert sorted(map(str, train + validation)) == sorted(place)
    # Six standard deviations of a binomial of 672 and 0.1 are 47.
    assert abs(len(validation) - 67) < 47


def test_shards_have_the_size_asked_for(corpus, reference):
    manifest = read_manifest(reference)
    assert all(shard.tokens <= 3000 for shard in manifest.shards) and len(manifest.shards) > 8
    assert len({shard.name[:-17] for shard in manifest.shards}) > 8  # of several parts
    assert manifest.dtype == "uint16" and manifest.vocab_size == 320
    assert [pathlib.Path(file["path"]).name for file in manifest.inputs] == [
        "a.jsonl", "b.txt", "c.jsonl.gz", "d.parquet", "e.txt.gz",
    ]  # fmt: skip
    assert not any("progress" in name or "partial" in name for name in contents(reference))


def test_copies_stay_on_one_side(tmp_path, tokenizer):
    texts = make_texts(60)
    (tmp_path / "a.jsonl").write_text(rows(texts * 2))
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer, Settings(validation_fraction=0.4), quiet=True)
    train, validation = ({str(ids) for ids in documents_of(tmp_path / "out", s)} for s in ("train", "validation"))
    assert train and validation and not train & validation


@pytest.mark.whole
def test_training_starts_from_a_prepared_folder(reference, tmp_path, small_config):
    model = {name: value for name, value in vars(small_config()).items() if name != "vocab_size"}
    settings = base_config(model)
    settings.update(data=str(reference), sequence_length=32, batch_size=4, block_size=16)
    start = make_start(freeze(settings), Workdir(tmp_path, {}, ()))
    assert start.model.vocab_size == 320 and start.tokenizer.to_str() == load_tokenizer(reference).to_str()
    stream = np.concatenate(documents_of(reference, "train"))
    ids = next(TrainingData(start.training, batch_size=len(start.training), seed=0))["ids"]
    wanted = stream[: len(start.training) * 32].reshape(-1, 32)
    assert sorted(map(bytes, ids.astype("<u2"))) == sorted(map(bytes, wanted))
    assert 0 < start.validation.tokens < start.training.tokens == start.training.windows.size
    settings.reset_at_documents = True
    batch = next(TrainingData(make_start(freeze(settings), Workdir(tmp_path, {}, ())).training, batch_size=4, seed=0))
    assert set(batch) == {"ids", "document_start", "counted"} and (batch["document_start"] % 16 == 0).all()


@pytest.mark.whole
def test_which_token_closes_documents(tmp_path, tokenizer):
    """The first of the checkpoint's end tokens, or of --eos; a set of another is another set."""
    (tmp_path / "a.jsonl").write_text(rows(make_texts(5)))
    save_tokenizer(tokenizer, tmp_path / "model")
    (tmp_path / "model/config.json").write_text('{"eos_token_id": [7, 2]}')
    given = [f"--input={tmp_path / 'a.jsonl'}", f"--tokenizer={tmp_path / 'model'}"]
    for name, flag, token in (("one", [], 7), ("two", ["--eos=11,2"], 11)):
        done = run(*given, *flag, f"--output={tmp_path / name}")
        assert done.returncode == 0 and f"documents closed by token {token}\n" in done.stdout, done.stderr
        assert {int(ids[-1]) for ids in documents_of(tmp_path / name, "train")} == {token}
        assert read_manifest(tmp_path / name).end_token == token
        assert end_tokens(tmp_path / name, tokenizer) == (token,)
    other = Settings(end_token=11)
    with pytest.raises(ValueError, match="end_token 7 -> 11"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "one", tokenizer, other, quiet=True)
    with pytest.raises(ValueError, match="the tokenizer has no token 5000 to close documents with"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "three", tokenizer, Settings(end_token=5000), quiet=True)
    done = run(*given, "--eos=</s>", f"--output={tmp_path / 'four'}")
    assert done.returncode == 2 and done.stderr == "error: --eos=</s>: not a list of token ids, such as 2,11\n"


def test_a_set_made_before_there_was_a_choice(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(rows(make_texts(5)))
    made = prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer, quiet=True)
    values = json.loads((tmp_path / "out/dataset.json").read_text())
    assert values["settings"].pop("end_token") == EOS_ID
    (tmp_path / "out/dataset.json").write_text(json.dumps(values))
    again = prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", tokenizer, quiet=True)
    assert again.end_token == EOS_ID and again.shards == made.shards


# Interruption


@pytest.mark.whole
def test_number_of_processes_does_not_matter(corpus, reference, tmp_path):
    done = run(*flags(corpus, tmp_path / "out", "--workers=3"))
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(reference)
    assert "tokens/s" in done.stderr and "tokens to train on" in done.stdout
    again = run(*flags(corpus, tmp_path / "out"))  # nothing left to do
    assert (again.returncode, again.stdout) == (0, done.stdout)
    verified = run(f"--verify={tmp_path / 'out'}")
    assert verified.returncode == 0 and verified.stdout.endswith("all as recorded\n")
    file = max((tmp_path / "out").glob("train-*"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    verified = run(f"--verify={tmp_path / 'out'}")
    assert verified.returncode == 3 and f"error: {file}: its content is not what was recorded" in verified.stderr


@pytest.mark.whole(but=["[1]"])
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_any_moment_goes_on_to_the_same_bytes(corpus, reference, tmp_path, tokenizer, seed):
    output, rng = tmp_path / "out", random.Random(seed)
    whole = contents(reference)
    process = subprocess.Popen([*COMMAND, *flags(corpus, output)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # After some part is done the rest takes a good while yet.
    parts = rng.randrange(1, 5)
    while len(list(output.glob("progress/0*.json"))) < parts:
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(rng.random() * 0.01)
    children = [
        int(pid) for pid in pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert children and not (output / "dataset.json").exists()
    for _ in range(500):  # nobody is left writing
        if not any(_alive(pid) for pid in children):
            break
        time.sleep(0.01)
    assert not any(_alive(pid) for pid in children)
    finished = [file for file in output.iterdir() if file.name.endswith(".array_record")]
    assert finished and all(file.read_bytes() == whole[file.name] for file in finished)
    prepare([str(corpus[0])], output, tokenizer, SETTINGS, workers=2, quiet=True)
    assert contents(output) == whole


def _alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def interrupted(corpus, reference, output):
    """What a run leaves that was killed after all parts but one."""
    shutil.copytree(reference, output)
    manifest = read_manifest(reference)
    files = find_files([str(corpus[0])])
    (output / "dataset.json").unlink()
    (output / "progress").mkdir()
    values = {"text_field": "text", "validation_fraction": 0.1, "seed": 5, "shard_size": 3000, "skip_bad": False}
    plan = {
        f"input {i}": f"{file.path}, {file.size} bytes, changed at {file.changed} ns" for i, file in enumerate(files)
    }
    (output / "progress" / "plan.json").write_text(json.dumps(values | plan))
    parts = {}
    for shard in manifest.shards:
        parts.setdefault(shard.name.split("-")[1], []).append(shard._asdict())
    for number, shards in list(parts.items())[:-1]:
        record = {"shards": shards, "skipped": 0, "problems": []}
        (output / "progress" / f"{number}.json").write_text(json.dumps(record))
    return parts


def test_only_what_is_not_done_is_done(corpus, reference, tmp_path, tokenizer):
    output = tmp_path / "out"
    parts = interrupted(corpus, reference, output)
    (output / "progress" / "train-000000-000.array_record.123").write_bytes(b"half")
    spoiled, cut = (parts[number][0]["name"] for number in ("000000", "000002"))
    content = bytearray((output / spoiled).read_bytes())
    content[-1] ^= 1  # of the same size, so that only doing the part again would mend it
    (output / spoiled).write_bytes(content)
    (output / cut).write_bytes(content[:100])  # of another size: done again
    before = {file: file.stat().st_mtime_ns for file in output.glob("*.array_record")}
    prepare([str(corpus[0])], output, tokenizer, SETTINGS, quiet=True)
    changed = {file.name.split("-")[1] for file in before if file.stat().st_mtime_ns != before[file]}
    assert changed == {"000002", max(parts)}
    (output / spoiled).write_bytes(contents(reference)[spoiled])
    assert contents(output) == contents(reference)


# Refusals


def test_other_settings_are_refused_with_the_differences(corpus, reference, tmp_path, tokenizer):
    interrupted(corpus, reference, tmp_path / "half")
    shutil.copytree(reference, tmp_path / "whole")
    other = Settings(validation_fraction=0.2, seed=6, shard_size=3000)
    one = [str(corpus[0] / "a.jsonl")]
    for output in (tmp_path / "half", tmp_path / "whole"):
        before = contents(output)
        for inputs, changed, tokens, message in [
            ([corpus[0]], other, tokenizer, r"there -> now\): validation_fraction 0.1 -> 0.2; seed 5 -> 6\. Use"),
            (
                one,
                SETTINGS,
                tokenizer,
                r"there -> now\): input 1 .*b\.txt, \d+ bytes.* -> absent; input 2 .* -> absent",
            ),
            ([corpus[0]], SETTINGS, train_tokenizer(["x"], 300), "holds data of another tokenizer"),
        ]:
            with pytest.raises(ValueError, match=message):
                prepare(list(map(str, inputs)), output, tokens, changed, quiet=True)
            assert contents(output) == before


def test_changed_input_is_refused(corpus, reference, tmp_path, tokenizer):
    moved = tmp_path / "in"
    shutil.copytree(corpus[0], moved)
    interrupted((moved, *corpus[1:]), reference, tmp_path / "out")
    os.utime(moved / "b.txt", (1, 1))
    with pytest.raises(
        ValueError, match=r"input 1 .*b\.txt, \d+ bytes, changed at \d+ ns -> .*changed at 1000000000 ns\."
    ):
        prepare([str(moved)], tmp_path / "out", tokenizer, SETTINGS, quiet=True)


def test_input_that_changes_meanwhile_is_an_error(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(rows(make_texts(3)))
    ((piece,),) = divide(find_files([str(file)]), 1 << 20)
    found = read_rows(piece, "text")
    next(found)
    file.write_text(rows(make_texts(4)))
    with pytest.raises(DataError, match=r"a\.jsonl: was changed while it was read"):
        list(found)
    file.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read any more"):
        list(read_rows(piece, "text"))


def test_unusable_arguments(corpus, tmp_path, tokenizer):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    good = str(corpus[0] / "b.txt")
    for inputs, output, message in [
        ([good], tmp_path / "used", "used: holds other files"),
        ([good], tmp_path / "used" / "file", "file: is a file; choose a folder"),
        ([good, good], tmp_path / "out", r"b\.txt: is among the inputs twice"),
        ([str(tmp_path / "empty")], tmp_path / "out", r"empty: no \.txt, .* files in this folder"),
        ([str(tmp_path / "no*.txt")], tmp_path / "out", r"no\*\.txt: no such file or folder, and as a pattern"),
        ([str(tmp_path / "used" / "file")], tmp_path / "out", "file: cannot read files of this kind"),
        ([""], tmp_path / "out", "an input is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            prepare(inputs, output, tokenizer, quiet=True)
    with pytest.raises(ValueError, match="workers must be at least 1, not 0"):
        prepare([good], tmp_path / "out", tokenizer, workers=0)
    for values, message in [
        ({"validation_fraction": 1.0}, "validation_fraction must be at least 0 and less than 1, not 1.0"),
        ({"shard_size": 0}, "shard_size must be positive, not 0"),
        ({"seed": -1}, "seed must be at least 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Settings(**values)
    for arguments, message in [
        ([], "--input is missing; only --verify goes without"),
        ([f"--verify={tmp_path}"], "dataset.json: cannot be read"),
    ]:
        done = run(*arguments)
        assert done.returncode == (3 if "--verify" in str(arguments) else 2)
        assert message in done.stderr and done.stderr.count("\n") == 1


# Broken inputs


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path.read_bytes()


def broken_inputs(folder):
    """Names, contents, the problem's message, and how many documents are good."""
    packed = gzip.compress(rows(make_texts(300), "text").encode())
    file = folder / "x"
    whole = write_parquet(file, text=make_texts(200))
    spoiled = bytearray(whole)
    spoiled[10:60] = bytes(50)
    latin = pyarrow.array([b"good", b"\xff\xfe"]).cast(pyarrow.binary())
    latin = pyarrow.Array.from_buffers(pyarrow.string(), 2, latin.buffers())
    return [
        ("a.jsonl", b'{"text": "good"}\n\n{"text": \n{"text": "good"}\n', r"a\.jsonl, line 3: not a JSON object", 2),
        ("a.jsonl", b'{"text": "good"}\n{"body": "x"}\n', r'a\.jsonl, line 2: every row .* field "text"', 1),
        ("a.jsonl", b'{"text": 3}\n', r'a\.jsonl, line 1: every row .* string field "text"', 0),
        ("a.jsonl", b'{"text": " "}\n', r'a\.jsonl, line 1: the field "text" holds no text', 0),
        ("a.jsonl", b'{"text": "\xff"}\n{"text": "good"}', r"a\.jsonl, line 1: not a JSON object in UTF-8", 1),
        ("a.jsonl.gz", packed[: len(packed) // 2], r"a\.jsonl\.gz, line \d+: the gzip file is cut off or broken", None),
        ("a.jsonl.gz", b"plain", r"a\.jsonl\.gz, line 1: the gzip file is cut off or broken", 0),
        ("a.jsonl.gz", gzip.compress(b'{"text": "good"}\nx\n', mtime=0), r"a\.jsonl\.gz, line 2: not a JSON object", 1),
        ("a.txt", b"\xff\xfe", r"a\.txt: not UTF-8 text", 0),
        ("a.txt", b" \n", r"a\.txt: the file holds no text", 0),
        ("a.txt.gz", packed[:50], r"a\.txt\.gz: not a whole gzip file", 0),
        ("a.parquet", b"PAR1 no", r"a\.parquet, row 1: the Parquet file is broken", 0),
        ("a.parquet", whole[:-9], r"a\.parquet, row 1: the Parquet file is broken", 0),
        ("a.parquet", bytes(spoiled), r"a\.parquet, row 1: the Parquet file is broken", 0),
        ("a.parquet", write_parquet(file, body=["x"]), r"a\.parquet: no column 'text' among body", 0),
        ("a.parquet", write_parquet(file, text=[1]), r"a\.parquet: column 'text' holds int64, not strings", 0),
        ("a.parquet", write_parquet(file, text=["good", None, "good"]), r"a\.parquet, row 2: the field \"text\"", 2),
        ("a.parquet", write_parquet(file, text=latin), r"a\.parquet, row 2: not UTF-8 text", 1),
    ]  # fmt: skip


def test_broken_inputs_are_named_and_can_be_left_out(tmp_path):
    for name, content, message, good in broken_inputs(tmp_path):
        (tmp_path / name).write_bytes(content)
        pieces = [piece for part in divide(find_files([str(tmp_path / name)]), 1 << 20) for piece in part]
        found = [row for piece in pieces for row in read_rows(piece, "text")]
        problems = [row.problem for row in found if row.text is None]
        assert len(problems) == 1, (name, message, problems)
        with pytest.raises(DataError, match=message):
            raise DataError(problems[0])
        texts = [row.text for row in found if row.text is not None]
        assert good is None or len(texts) == good, (name, message)
        assert all(0 <= row.done <= 1 for row in found)


def test_command_stops_at_a_bad_row_or_counts_it(corpus, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(rows(make_texts(20)) + "{\n" + rows(make_texts(20, 1)) + '{"body": 1}\n')
    arguments = [
        f"--input={file},{corpus[0] / 'b.txt'}",
        f"--output={tmp_path / 'out'}",
        f"--tokenizer={corpus[2]}/tokenizer.json",
    ]
    done = run(*arguments)
    assert done.returncode == 3
    (said,) = (line for line in done.stderr.splitlines() if " of the input, " not in line)  # on a slow machine
    assert said.startswith(f"error: {file}, line 21: not a JSON object")
    assert not (tmp_path / "out" / "dataset.json").exists() and not list((tmp_path / "out").glob("*.array_record"))
    changed = run(*arguments, "--skip_bad")
    assert changed.returncode == 2 and "skip_bad False -> True" in changed.stderr
    shutil.rmtree(tmp_path / "out")
    done = run(*arguments, "--skip_bad")
    assert done.returncode == 0 and f"skipped 2 broken rows or files: {file}, line 21: not a JSON" in done.stderr
    assert f"{file}, line 42: every row must" in done.stderr and "41 documents" in done.stdout
    assert read_manifest(tmp_path / "out").skipped == 2


def test_two_runs_keep_apart(corpus, tmp_path, tokenizer):
    (tmp_path / "out").mkdir()
    lock = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="out: another process is writing it"):
        prepare([str(corpus[0])], tmp_path / "out", tokenizer, quiet=True)
    os.close(lock)


def test_nothing_to_train_on_is_an_error(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(" ")
    with pytest.raises(DataError, match=r"a\.txt and the other inputs: no document is left to train on"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer, Settings(skip_bad=True), quiet=True)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", text=["x"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"needs pyarrow, which is not installed: pip install 'twotower_jax\[data\]'"):
        divide(find_files([str(tmp_path / "a.parquet")]), 100)


# Parts


@settings(max_examples=40)
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=30), min_size=1, max_size=12),
    st.integers(1, 120),
    st.booleans(),
)
def test_lines_divided_anywhere_come_out_once(tmp_path_factory, texts, part_bytes, ends):
    texts = [text + "." for text in texts]
    file = tmp_path_factory.mktemp("lines") / "a.jsonl"
    content = "".join(
        json.dumps({"text": text}, ensure_ascii=False) + "\n" * (1 + i % 2) for i, text in enumerate(texts)
    )
    file.write_bytes((content if ends else content.rstrip("\n")).encode())
    parts = divide(find_files([str(file)]), part_bytes)
    assert len(parts) == -(-file.stat().st_size // part_bytes)
    found = [row for part in parts for piece in part for row in read_rows(piece, "text")]
    assert [row.text for row in found] == texts and not any(row.problem for row in found)


def test_text_may_stand_in_another_field(tmp_path):
    texts = make_texts(4)
    (tmp_path / "a.jsonl").write_text(rows(texts[:2], "body"))
    write_parquet(tmp_path / "b.parquet", text=["no", "no"], body=texts[2:])
    parts = divide(find_files([str(tmp_path)]), 1 << 20)
    assert [row.text for part in parts for piece in part for row in read_rows(piece, "body")] == texts


def test_small_files_and_row_groups_share_parts(corpus, tmp_path):
    files = [File(f"{i}.txt", 10, 0) for i in range(7)]
    assert [len(part) for part in divide(files, 30)] == [3, 3, 1]
    ((file,),) = [find_files([str(corpus[0] / "d.parquet")])]
    groups = [[(piece.start, piece.stop) for piece in part] for part in divide([file], 1)]
    assert groups == [[(i, i + 1)] for i in range(5)]
    assert [[(piece.start, piece.stop) for piece in part] for part in divide([file], 1 << 30)] == [[(0, 5)]]
    rows = [row.text for part in divide([file], 1) for piece in part for row in read_rows(piece, "text")]
    assert rows == make_texts(120, 3)
