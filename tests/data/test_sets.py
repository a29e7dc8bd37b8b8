"""Tests of data on disk: shards, prepared folders, Megatron sets, and what config.data names."""

import hashlib
import json
import resource
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from twotower_jax.data import PackedSequences, TrainingData, pack_documents, save_tokenizer, train_tokenizer
from twotower_jax.data.documents import DataError, held_out
from twotower_jax.data.megatron import MegatronDocuments, is_megatron
from twotower_jax.data.mixture import Mixture
from twotower_jax.data.opening import Data, Packing
from twotower_jax.data.prepare import prepare
from twotower_jax.data.prepared import Manifest, PreparedDocuments, is_prepared, read_manifest, verify
from twotower_jax.data.shards import RECORD_TOKENS, ShardReader, ShardWriter

VOCAB_SIZE = 300


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat; " * 20, "nothing is lost; " * 20], VOCAB_SIZE)


def make_documents(lengths, vocab_size=VOCAB_SIZE, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, n).astype(np.int32) for n in lengths]


def write_prepared(folder, tokenizer, shards, dtype="<u2"):
    """A prepared folder with these shards: pairs of split and documents."""
    folder.mkdir(exist_ok=True)
    save_tokenizer(tokenizer, folder)
    listed = []
    for number, (split, arrays) in enumerate(shards):
        name = f"{split}-{number:06d}-000.array_record"
        writer = ShardWriter(folder / name, np.dtype(dtype))
        for ids in arrays:
            writer.add(ids)
        listed.append(writer.finish(name, split))
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    manifest = Manifest(digest, tokenizer.get_vocab_size(), np.dtype(dtype).name, {}, [], 0, listed)
    manifest.write(folder)
    return folder


def packing(length=16, fraction=0.0, align=None, vocab_size=VOCAB_SIZE):
    return Packing(length, vocab_size, fraction, 0, align)


def all_ids(windows):
    return np.stack([windows[i]["ids"] for i in range(len(windows))])


# Shards


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_shard_gives_back_any_stretch(tmp_path, dtype):
    # One document longer than several records, more documents than a record of lengths takes, and none but short ones.
    arrays = make_documents([3 * RECORD_TOKENS + 5, *[1] * (RECORD_TOKENS + 3), 0, 70], 60_000)
    writer = ShardWriter(tmp_path / "shard", np.dtype(dtype))
    for ids in arrays:
        writer.add(ids)
    shard = writer.finish("shard", "train")
    line, lengths = np.concatenate(arrays), [len(ids) for ids in arrays]
    assert (shard.tokens, shard.documents) == (len(line), len(arrays))
    assert shard.size == (tmp_path / "shard").stat().st_size
    reader = ShardReader(tmp_path / "shard", shard, np.dtype(dtype))
    rng = np.random.default_rng(0)
    edges = [0, 1, RECORD_TOKENS - 1, RECORD_TOKENS, RECORD_TOKENS + 1, 2 * RECORD_TOKENS]
    for what, wanted in ((reader.tokens, line), (reader.lengths, np.array(lengths))):
        for start in [*edges, *rng.integers(0, len(wanted), 20)]:
            stop = min(len(wanted), start + int(rng.integers(1, 2 * RECORD_TOKENS)))
            if start < stop:
                np.testing.assert_array_equal(what(start, stop), wanted[start:stop])


def test_full_disk_is_an_error(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = ShardWriter(tmp_path / "shard", np.dtype("<u4"))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(OSError, match="shard: cannot be written .*File too large"):
            for ids in make_documents([5000] * 20):
                writer.add(ids)
            writer.finish("shard", "train")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Prepared folders


@settings(max_examples=10)
@given(st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=8), min_size=1, max_size=4), st.integers(0, 99))
def test_prepared_folder_is_its_documents_in_order(tmp_path_factory, tokenizer, lengths, seed):
    shards = [make_documents(part, seed=seed) for part in lengths]
    held = make_documents([50], seed=1)
    folder = write_prepared(tmp_path_factory.mktemp("set") / "set", tokenizer,
                            [*(("train", arrays) for arrays in shards), ("validation", held)])  # fmt: skip
    arrays = [ids for part in shards for ids in part]
    line = np.concatenate(arrays)
    if len(line) < 16:
        with pytest.raises(ValueError, match=rf"set: {len(line)} tokens do not fill one window of sequence_length 16"):
            Data(str(folder)).windows(tokenizer, packing())
        return
    training, none = Data(str(folder)).windows(tokenizer, packing())
    assert none is None
    np.testing.assert_array_equal(all_ids(training), PackedSequences(line, 16, VOCAB_SIZE).windows)
    training, validation = Data(str(folder)).windows(tokenizer, packing(fraction=0.5, align=4))
    np.testing.assert_array_equal(all_ids(validation)[:, :16], held[0][:48].reshape(3, 16))
    counted = np.concatenate([training[i]["ids"][training[i]["counted"]] for i in range(len(training))])
    np.testing.assert_array_equal(counted, line[: len(counted)])


@pytest.fixture
def folder(tmp_path, tokenizer):
    shards = [("train", make_documents([900, 70], seed=1)), ("train", make_documents([40] * 9, seed=2)),
              ("validation", make_documents([33], seed=3))]  # fmt: skip
    return write_prepared(tmp_path / "set", tokenizer, shards)


def test_manifest_round_trips(folder):
    manifest = read_manifest(folder)
    assert [manifest.total("train", what) for what in ("tokens", "documents")] == [1330, 11]
    assert json.loads((folder / "dataset.json").read_text())["totals"]["validation"] == {"tokens": 33, "documents": 1}
    manifest.write(folder)
    assert read_manifest(folder) == manifest == verify(folder)


def test_changed_and_missing_files_are_found_before_they_are_read(folder):
    file = folder / "train-000001-000.array_record"
    whole = file.read_bytes()
    for content, message in [
        (whole[:-1], r"train-000001.*: has \d+ bytes, recorded were \d+"),
        (whole[:700] + bytes([whole[700] ^ 1]) + whole[701:], "train-000001.*: its content is not what was recorded"),
        (bytes(len(whole)), "train-000001.*: its content is not what was recorded"),
    ]:
        file.write_bytes(content)
        for look in (verify, lambda path: PreparedDocuments(path, "train")):
            with pytest.raises(DataError, match=message):
                look(folder)
    file.unlink()
    with pytest.raises(ValueError, match="train-000001.*cannot be read"):
        PreparedDocuments(folder, "train")
    file.write_bytes(whole)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: is not the tokenizer"):
        PreparedDocuments(folder, "train")


def test_large_sets_are_not_hashed_but_broken_records_are_found(folder, monkeypatch):
    monkeypatch.setattr("twotower_jax.data.prepared._HASHED_BYTES", 0)
    file = folder / "train-000000-000.array_record"
    whole = bytearray(file.read_bytes())
    whole[900] ^= 1  # within the tokens: ArrayRecord has a hash of its own there
    file.write_bytes(whole)
    documents = PreparedDocuments(folder, "train")
    with pytest.raises(DataError, match=r"train-000000-000.*(records 0 to 1|ArrayRecord)"):
        documents.read(0, 900)
    np.testing.assert_array_equal(documents.read(970, 1330), np.concatenate(make_documents([40] * 9, seed=2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "not the manifest of a data set of version 1"),
        ({"dtype": "int64"}, "dtype 'int64' is neither"),
        ({"vocab_size": "300"}, "does not have just the fields"),
        ({"more": 1}, "does not have just the fields"),
        ({"shards": [3]}, "not a shard: 3"),
        (
            {"shards": [dict(name="../x", split="train", tokens=1, documents=1, size=1, sha256="")]},
            "is not in the data",
        ),
        ({"shards": [dict(name="x", split="test", tokens=1, documents=1, size=1, sha256="")]}, "split 'test'"),
        ({"shards": [dict(name="x", split="train", tokens=-1, documents=1, size=1, sha256="")]}, "counts that cannot"),
    ],
)
def test_bad_manifests_are_named(folder, change, message):
    file = folder / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError, match=rf"dataset\.json: .*{message}"):
        read_manifest(folder)
    file.write_text("{")
    with pytest.raises(DataError, match=r"dataset\.json: "):
        read_manifest(folder)


def test_wrong_counts_are_found(folder):
    file = folder / "dataset.json"
    values = json.loads(file.read_text())
    values["shards"][0]["tokens"] = 5 * RECORD_TOKENS
    file.write_text(json.dumps(values))
    with pytest.raises(DataError, match="holds 2 records where 6 were recorded"):
        PreparedDocuments(folder, "train").read(0, 1)
    values["shards"][0]["tokens"] = 971
    file.write_text(json.dumps(values))
    with pytest.raises(DataError, match="records 0 to 1 are shorter than recorded"):
        PreparedDocuments(folder, "train").read(0, 971)


def test_many_shards_are_read_with_few_open(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("twotower_jax.data.prepared._OPEN_SHARDS", 2)
    arrays = make_documents([17] * 12)
    documents = PreparedDocuments(
        write_prepared(tmp_path / "set", tokenizer, [("train", [a]) for a in arrays]), "train"
    )
    line = np.concatenate(arrays)
    for start in (0, 100, 3, 60):
        np.testing.assert_array_equal(documents.read(start, start + 60), line[start : start + 60])
    assert len(documents._readers) == 2


# Megatron sets


def write_megatron(prefix, documents, dtype, layout="mmap", modes=None):
    """A set of documents, each a list of sequences; returns the prefix."""
    sequences = [sequence for document in documents for sequence in document]
    sizes = np.array([len(sequence) for sequence in sequences])
    starts, borders = np.cumsum([0, *sizes]), np.cumsum([0, *map(len, documents)])
    prefix.with_suffix(".bin").write_bytes(np.concatenate(sequences).astype(dtype).tobytes())
    codes = {"u1": 1, "i1": 2, "i2": 3, "i4": 4, "i8": 5, "u2": 8}
    code, width = codes[dtype[1:]], np.dtype(dtype).itemsize
    if layout == "mmap":
        index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sizes), len(borders))
        index += sizes.astype("<i4").tobytes() + (starts[:-1] * width).astype("<i8").tobytes()
        index += borders.astype("<i8").tobytes() + (b"" if modes is None else bytes(modes))
    else:
        index = b"TNTIDX\0\0" + struct.pack("<QQQQQQ", 1, code, width, len(sizes), len(sizes), len(borders))
        for array in (np.arange(len(sizes) + 1), starts, sizes, borders):
            index += array.astype("<i8").tobytes()
    prefix.with_suffix(".idx").write_bytes(index)
    return prefix


megatron_documents = st.lists(st.lists(st.integers(0, 9), min_size=0, max_size=3), min_size=1, max_size=20).filter(
    lambda documents: sum(map(sum, documents)) > 0
)


@given(
    megatron_documents, st.sampled_from(["<u1", "<i1", "<i2", "<i4", "<i8", "<u2"]), st.sampled_from(["mmap", "old"])
)
def test_megatron_sets_read_as_written(tmp_path_factory, lengths, dtype, layout):
    documents = [make_documents(document, 100) for document in lengths]
    modes = [0] * sum(map(len, lengths)) if layout == "mmap" and len(lengths) % 2 else None
    prefix = write_megatron(tmp_path_factory.mktemp("set") / "set", documents, dtype, layout, modes)
    read = MegatronDocuments(prefix)
    wanted = [len(np.concatenate([np.zeros(0, int), *document])) for document in documents]
    assert read.count == len(documents) and read.tokens == sum(wanted)
    assert read.lengths(0, read.count).tolist() == wanted
    assert read.lengths(read.count // 2, read.count).tolist() == wanted[read.count // 2 :]
    np.testing.assert_array_equal(
        read.read(0, read.tokens), np.concatenate([sequence for document in documents for sequence in document])
    )


def test_megatron_split_holds_documents_out(tmp_path, tokenizer):
    arrays = make_documents([7] * 400)
    prefix = write_megatron(tmp_path / "set", [[ids] for ids in arrays], "<u2")
    out = held_out(0, 400, fraction=0.1, seed=0)
    for named in ("set", "set.bin", "set.idx"):
        training, validation = Data(str(prefix.with_name(named))).windows(tokenizer, packing(fraction=0.1))
    for windows, chosen in ((training, ~out), (validation, out)):
        stream = np.concatenate([ids for ids, own in zip(arrays, chosen, strict=True) if own])
        np.testing.assert_array_equal(all_ids(windows), PackedSequences(stream, 16, VOCAB_SIZE).windows)
    whole = Data(str(prefix)).windows(tokenizer, packing())[0]
    with pytest.raises(ValueError, match=r": held_out 0.1 by seed 0 -> absent, tokens \d+ -> 2800$"):
        TrainingData(whole, batch_size=2, seed=0).set_state(TrainingData(training, batch_size=2, seed=0).get_state())


def test_megatron_identity_sees_changed_tokens(tmp_path):
    arrays = make_documents([3000] * 3)
    first = MegatronDocuments(write_megatron(tmp_path / "a", [arrays], "<i4")).identity()
    assert MegatronDocuments(write_megatron(tmp_path / "b", [arrays], "<i4")).identity() == first
    arrays[1][17] += 1
    changed = MegatronDocuments(write_megatron(tmp_path / "c", [arrays], "<i4")).identity()
    assert {name for name in first if first[name] != changed[name]} == {"bin_sample_sha256"}


def idx(prefix, change):
    """Changes the index as a bytearray."""
    content = bytearray(prefix.with_suffix(".idx").read_bytes())
    result = change(content)
    prefix.with_suffix(".idx").write_bytes(content if result is None else result)


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("mmap", lambda b: b"", r"set\.idx: is not an index of Megatron-LM"),
        ("mmap", lambda b: b"XX" + b[2:], r"set\.idx: is not an index of Megatron-LM"),
        ("mmap", lambda b: b[:20], "ends within its header"),
        ("old", lambda b: b[:20], "ends within its header"),
        ("mmap", lambda b: b.__setitem__(9, 2), "has version 2"),
        ("mmap", lambda b: b.__setitem__(17, 7), "has numbers that are no integers; known are uint8"),
        ("mmap", lambda b: b.__setitem__(17, 9), "has an unknown type of token, 9"),
        ("mmap", lambda b: b.__setitem__(25, 255), r"has \d+ bytes after its header where its counts need \d+"),
        ("mmap", lambda b: b[:-1], r"has \d+ bytes after its header where its counts need \d+"),
        ("old", lambda b: b + b"\0", r"has \d+ bytes after its header where its counts need \d+"),
        ("mmap", lambda b: b + b"\0\1\0", "sequences that are not text"),
        ("old", lambda b: b.__setitem__(24, 4), "3 lengths for 3 sequences, tokens of 4 bytes"),
        ("mmap", lambda b: b.__setitem__(34 + 4, 8), "sequence 1 has length 8 and offset 10|sequence 2 has length"),
        ("mmap", lambda b: b.__setitem__(34 + 12 + 8, 9), "sequence 1 has length 6 and offset 9; .* should be 10"),
        ("mmap", lambda b: b.__setitem__(34 + 8, 8), r"set\.bin: has 18 uint16 tokens, set\.idx lists 19"),
        ("mmap", lambda b: b.__setitem__(34 + 36 + 16, 2), "do not begin at sequence 0 and end at sequence 3"),
        ("mmap", lambda b: b.__setitem__(34 + 36, 1), "do not begin at sequence 0 and end at sequence 3"),
        ("mmap", lambda b: b.__setitem__(34 + 36 + 8, 4), "document 1 ends before it begins"),
    ],
)
def test_broken_megatron_sets_are_named(tmp_path, layout, change, message):
    prefix = write_megatron(tmp_path / "set", [make_documents([5, 6]), make_documents([7])], "<u2", layout)
    idx(prefix, change)
    with pytest.raises(DataError, match=message):
        MegatronDocuments(prefix)


def test_cut_megatron_data_are_named(tmp_path):
    prefix = write_megatron(tmp_path / "set", [make_documents([5, 6])], "<u2")
    file = tmp_path / "set.bin"
    whole = file.read_bytes()
    for content, message in [
        (whole[:-1], "no whole number of uint16"),
        (whole[:-2], "has 10 uint16 tokens"),
        (b"", "0"),
    ]:
        file.write_bytes(content)
        with pytest.raises(DataError, match=rf"set\.bin: .*{message}"):
            MegatronDocuments(prefix)
    file.unlink()
    assert not is_megatron(prefix)


# What config.data names


def test_text_gives_the_same_windows_as_before(tmp_path, tokenizer):
    texts = [f"the cat sat on mat {i}" for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = Data(str(tmp_path)).windows(tokenizer, packing(fraction=0.2))
    wanted = pack_documents(
        texts, tokenizer, sequence_length=16, vocab_size=VOCAB_SIZE, validation_fraction=0.2, seed=0
    )
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a.windows, b.windows)
    apart = Data(str(tmp_path)).windows(tokenizer, packing(fraction=0.2, align=8))
    for a, b in zip(apart, wanted, strict=True):
        counted = np.concatenate([a[i]["ids"][a[i]["counted"]] for i in range(len(a))])
        np.testing.assert_array_equal(counted[: b.windows.size], b.windows.ravel()[: len(counted)])
    assert Data(str(tmp_path)).tokenizer(280).get_vocab_size() <= 280


def test_mixture_of_all_kinds(tmp_path, folder, tokenizer):
    write_megatron(tmp_path / "mega", [[ids] for ids in make_documents([30] * 30)], "<u2")
    (tmp_path / "text.txt").write_text("the cat sat on the mat; " * 30)
    entries = {"m": {"path": "mega", "weight": 0.5}, "p": {"path": "set", "weight": 0.3},
               "t": {"path": "text.txt", "weight": 0.2}}  # fmt: skip
    (tmp_path / "mixture.json").write_text(json.dumps(entries))
    data = Data(str(tmp_path / "mixture.json"))
    assert data.tokenizer(VOCAB_SIZE).to_str() == tokenizer.to_str()  # the prepared folder's: m has none
    training, validation = data.windows(tokenizer, packing())
    assert isinstance(training, Mixture) and validation is None and list(training.sources) == ["m", "p", "t"]
    batch = next(TrainingData(training, batch_size=20, seed=0))
    lines = {name: {row.tobytes() for row in all_ids(source)} for name, source in training.sources.items()}
    counts = {name: sum(row.tobytes() in own for row in batch["ids"]) for name, own in lines.items()}
    assert counts == {"m": 10, "p": 6, "t": 4}


def test_validation_of_a_mixture_is_that_of_its_sources(tmp_path, folder, tokenizer):
    write_megatron(tmp_path / "mega", [[ids] for ids in make_documents([30] * 60)], "<u2")
    entries = {name: {"path": path, "weight": 1} for name, path in (("m", "mega"), ("p", "set"))}
    (tmp_path / "mixture.json").write_text(json.dumps(entries))
    both = Data(str(tmp_path / "mixture.json")).windows(tokenizer, packing(fraction=0.2))[1]
    parts = [Data(str(tmp_path / path)).windows(tokenizer, packing(fraction=0.2))[1] for path in ("mega", "set")]
    np.testing.assert_array_equal(all_ids(both), np.concatenate([all_ids(part) for part in parts]))


def test_data_that_do_not_fit_the_run_are_refused(tmp_path, folder, tokenizer):
    other = train_tokenizer(["something else entirely; " * 20], VOCAB_SIZE)
    with pytest.raises(ValueError, match="set: was prepared with another tokenizer than the run's"):
        Data(str(folder)).windows(other, packing())
    prefix = write_megatron(tmp_path / "mega", [make_documents([30])], "<u2")
    with pytest.raises(ValueError, match="data holds tokens without a tokenizer: set init_from"):
        Data(str(prefix)).tokenizer(VOCAB_SIZE)
    windows = Data(str(prefix)).windows(tokenizer, packing(vocab_size=10))[0]
    with pytest.raises(ValueError, match=r"mega: window 0: id \d+ at position \d+ lies outside the vocabulary of 10"):
        next(TrainingData(windows, batch_size=1, seed=0))
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        Data(str(tmp_path / "nowhere"))
    assert not is_prepared(tmp_path)


def test_documents_closed_by_other_tokens_are_refused_or_warned_of(tmp_path, folder, tokenizer, capsys):
    """Token 2 closes these; any of the model's end tokens will do."""
    with pytest.raises(
        ValueError, match=r"closed by token 2, the model's texts end with 7 or 9; prepare .* --eos=7, or"
    ):
        Data(str(folder)).windows(tokenizer, packing()._replace(end_tokens=(7, 9)))
    (both, _), (one, _) = (
        Data(str(folder)).windows(tokenizer, packing()._replace(end_tokens=ids)) for ids in ((7, 2), (2,))
    )
    np.testing.assert_array_equal(all_ids(both), all_ids(one))
    prefix = write_megatron(tmp_path / "mega", [[np.append(ids, 2)] for ids in make_documents([30] * 9)], "<u2")
    for ids, warned in (((2,), False), ((7, 2), False), ((7, 9), True)):
        Data(str(prefix)).windows(tokenizer, packing()._replace(end_tokens=ids))
        said = capsys.readouterr().err
        assert (
            ("mega: its documents end with 2, the model's texts with 7 or 9: it will" in said) == warned == bool(said)
        )


def test_resuming_on_other_shards_is_refused(tmp_path, tokenizer):
    arrays = make_documents([100] * 6)
    one, two = (
        write_prepared(tmp_path / name, tokenizer, [("train", arrays[:cut]), ("train", arrays[cut:])])
        for name, cut in (("one", 2), ("two", 3))
    )
    first, second = (
        TrainingData(Data(str(folder)).windows(tokenizer, packing())[0], batch_size=2, seed=0) for folder in (one, two)
    )
    with pytest.raises(ValueError, match=r"\(saved -> now\): sha256 \w+ -> \w+$"):
        second.set_state(first.get_state())


def test_tokens_of_a_vocabulary_with_holes_do_not_wrap(tmp_path):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<SPECIAL_3>": 3, "a": 4, "b": 71_023}
    sparse = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    (tmp_path / "a.txt").write_text("abba")
    manifest = prepare([str(tmp_path / "a.txt")], tmp_path / "out", sparse, quiet=True)
    assert (manifest.dtype, manifest.vocab_size) == ("uint32", 71_024)
    assert PreparedDocuments(tmp_path / "out", "train").read(0, 5).tolist() == [4, 71_023, 71_023, 4, 2]
