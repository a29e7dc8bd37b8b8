"""Tests of twotower_jax.data: sources, tokenizer, packing, batches. Everything runs on the host, from fixed seeds."""

import itertools
import json
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower_jax.data import (
    BOS_ID,
    EOS_ID,
    MASK_ID,
    PAD_ID,
    PackedSequences,
    TrainingData,
    encode,
    load_tokenizer,
    pack_documents,
    python_documentation,
    read_documents,
    save_tokenizer,
    train_tokenizer,
    validation_batches,
)

VOCAB_SIZE = 300
SPECIAL_TEXT = ["<unk>", "<s>", "</s>", "<SPECIAL_3>"]

properties = settings(deadline=None, derandomize=True, max_examples=25)


@pytest.fixture(scope="module")
def documentation():
    return python_documentation()


@pytest.fixture(scope="module")
def tokenizer():
    words = ["the cat sat on the mat", "def f(x): return x", "for every token there is a window", "nothing is lost"]
    return train_tokenizer([f"{word}; " * 20 for word in words], VOCAB_SIZE)


def packed(count, length=4):
    """`count` windows; every token of window i is i, so that a batch shows which windows it holds."""
    return PackedSequences(np.repeat(np.arange(count), length), length, vocab_size=count)


# Grain's shuffle takes 65536 / count microseconds a window below that many, so the tests of order avoid tiny counts.
counts = st.integers(20, 50)


def take(data, count):
    return [next(data)["ids"] for _ in range(count)]


# Sources


@pytest.mark.whole
def test_python_documentation_is_reference_text(documentation):
    assert sum(len(page) for page in documentation) > 1_500_000
    assert len(set(documentation)) == len(documentation)
    assert min(len(page) for page in documentation) >= 200
    json_page = next(page for page in documentation if page.startswith("json\n"))
    assert "json.dumps(obj, *, skipkeys=False, ensure_ascii=True" in json_page
    decoder_page = next(page for page in documentation if "json.decoder.JSONDecoder.raw_decode(self, s, idx=0)" in page)
    assert "index in ``s`` where the document ended" in decoder_page
    assert not any("test.support" in page[:40] for page in documentation)
    "".join(documentation).encode("utf-8")


def test_read_folder_sorted_recursive_distinct(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.txt").write_text("from b/z\n\nsecond paragraph", encoding="utf-8")
    (tmp_path / "c.txt").write_text("row one", encoding="utf-8")  # a copy of a row below
    (tmp_path / "a.jsonl").write_text('{"text": "row one"}\n\n{"text": "zwei\u2028Zeilen", "n": 1}\n', encoding="utf-8")
    (tmp_path / "notes.md").write_text("not read", encoding="utf-8")
    expected = ["row one", "zwei\u2028Zeilen", "from b/z\n\nsecond paragraph"]
    assert read_documents(tmp_path) == expected
    assert read_documents(str(tmp_path / "a.jsonl")) == expected[:2]
    assert read_documents(tmp_path / "b" / "z.txt") == expected[2:]


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_byte_order_mark_is_not_text(tmp_path, suffix):
    file = tmp_path / f"bom.{suffix}"
    file.write_text("plain" if suffix == "txt" else '{"text": "plain"}', encoding="utf-8-sig")
    assert read_documents(file) == ["plain"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text", r"a\.csv: cannot read files of this kind \(\.csv\); known"),
        ("noname", b"text", r"noname: cannot read files of this kind \(without suffix\)"),
        ("a.txt", b" \n", r"a\.txt: the file holds no text"),
        ("a.txt", b"\xff\xfe", r"a\.txt: not UTF-8"),
        ("a.jsonl", b"\n", r"a\.jsonl: the file holds no rows"),
        ("a.jsonl", b'{"text": "good"}\n\n{"text": ', r"a\.jsonl, line 3: not a JSON object"),
        ("a.jsonl", b'{"text": "good"}\n"text"\n', r'a\.jsonl, line 2: every row must .* "text"'),
        ("a.jsonl", b'{"content": "x"}', r'a\.jsonl, line 1: every row must .* "text"'),
        ("a.jsonl", b'{"text": 3}', r'a\.jsonl, line 1: every row must .* "text"'),
        ("a.jsonl", b'{"text": ""}', r'a\.jsonl, line 1: the field "text" holds no text'),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl, line 1: .* surrogates not allowed"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl, line 1: not a JSON object in UTF-8"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: not a JSON object"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)


def test_missing_path_and_empty_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt: no such file or folder"):
        read_documents(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match=r"no \.txt, \.jsonl, .* files in this folder"):
        read_documents(tmp_path)


# Tokenizer


def test_layout_is_the_published_one(tokenizer):
    assert (PAD_ID, BOS_ID, EOS_ID, MASK_ID) == (0, 1, 2, 3)
    assert [tokenizer.id_to_token(i) for i in range(4)] == SPECIAL_TEXT
    assert [tokenizer.id_to_token(i) for i in (4, 5, 36)] == ["!", '"', "A"]
    assert tokenizer.get_vocab_size() == VOCAB_SIZE


def test_training_is_deterministic_and_learns(documentation):
    documents = documentation[:40]
    first, second = train_tokenizer(documents, 512), train_tokenizer(documents, 512)
    assert first.to_str() == second.to_str()
    text = documents[7]
    assert len(encode(first, [text])[0]) < 0.6 * len(text.encode())


@properties
@given(st.lists(st.lists(st.one_of(st.text(), st.sampled_from(SPECIAL_TEXT))).map("".join), max_size=3))
def test_encoding_round_trips_and_never_gives_special_ids(tokenizer, texts):
    arrays = encode(tokenizer, texts)
    assert [tokenizer.decode(ids.tolist()) for ids in arrays] == texts
    for ids in arrays:
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert (ids > MASK_ID).all()


def test_encoding_in_chunks_keeps_order(tokenizer):
    texts = [str(i) for i in range(2500)]
    assert [tokenizer.decode(ids.tolist()) for ids in encode(tokenizer, texts)] == texts


@properties
@given(st.lists(st.integers(0, VOCAB_SIZE + 50)))
def test_decoding_never_raises(tokenizer, ids):
    assert isinstance(tokenizer.decode(ids), str)
    assert isinstance(tokenizer.decode(ids, skip_special_tokens=False), str)


def test_saved_tokenizer_loads_the_same(tokenizer, tmp_path):
    folder = tmp_path / "new" / "folder"
    save_tokenizer(tokenizer, folder)
    names = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(file.name for file in folder.iterdir()) == names
    roles = json.loads((folder / "special_tokens_map.json").read_text())
    assert roles == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert roles.items() <= json.loads((folder / "tokenizer_config.json").read_text()).items()
    loaded = load_tokenizer(folder)
    assert loaded.to_str() == tokenizer.to_str()
    text = "the cat</s><s>"
    np.testing.assert_array_equal(encode(loaded, [text])[0], encode(tokenizer, [text])[0])


def test_limits_in_a_tokenizer_file_are_dropped(tokenizer, tmp_path):
    save_tokenizer(tokenizer, tmp_path)
    file = load_tokenizer(tmp_path)
    file.enable_truncation(3)
    file.enable_padding(length=50)
    file.save(str(tmp_path / "tokenizer.json"))
    text = "the cat sat on the mat"
    np.testing.assert_array_equal(encode(load_tokenizer(tmp_path), [text])[0], encode(tokenizer, [text])[0])


def test_tokenizer_errors(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size 259 .* 260"):
        train_tokenizer(["text"], 259)
    assert train_tokenizer(["text"], 260).get_vocab_size() == 260
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(tmp_path)
    for content in (b"{", b'{"version": "1.0"}', b"\xff"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
            load_tokenizer(tmp_path)


# Packing


def test_text_is_closed_by_the_end_token_of_the_model(tokenizer):
    windows, _ = pack_documents(
        ["one two", "three"], tokenizer, sequence_length=2, vocab_size=320, validation_fraction=0.0, seed=0, end_token=9
    )
    closed = [[*ids, 9] for ids in encode(tokenizer, ["one two", "three"])]
    line = windows.windows.reshape(-1).tolist()
    assert any(line == (a + b)[: len(line)] for a, b in (closed, closed[::-1])) and 9 in line


@properties
@given(st.lists(st.integers(0, 99), min_size=1, max_size=60), st.integers(1, 12))
def test_windows_are_the_stream_without_its_tail(tokens, length):
    tokens = np.array(tokens)
    if len(tokens) < length:
        with pytest.raises(ValueError, match=f"{len(tokens)} tokens .* sequence_length {length}"):
            PackedSequences(tokens, length, 100)
        return
    sequences = PackedSequences(tokens, length, 100)
    ids = np.stack([sequences[i]["ids"] for i in range(len(sequences))])
    assert ids.dtype == np.int32 and ids.shape == (len(tokens) // length, length)
    np.testing.assert_array_equal(ids.ravel(), tokens[: ids.size])


@pytest.mark.parametrize("bad", [-1, 100])
def test_invalid_ids_are_named(bad):
    tokens = np.arange(20)
    tokens[13:] = bad
    with pytest.raises(ValueError, match=rf"id {bad} at position 13 .* vocabulary of 100"):
        PackedSequences(tokens, 4, 100)


def test_windows_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        packed(2)[0]["ids"][0] = 7


def test_sequence_length_must_be_positive():
    with pytest.raises(ValueError, match="sequence_length must be positive, not 0"):
        PackedSequences(np.arange(3), 0, 3)


def pack(tokenizer, documents, sequence_length=1, validation_fraction=0.2, seed=0, vocab_size=VOCAB_SIZE):
    return pack_documents(
        documents,
        tokenizer,
        sequence_length=sequence_length,
        vocab_size=vocab_size,
        validation_fraction=validation_fraction,
        seed=seed,
    )


def documents_in(tokenizer, sequences):
    ids = sequences.windows.ravel()
    assert ids[-1] == EOS_ID
    return [tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, np.flatnonzero(ids == EOS_ID) + 1)[:-1]]


distinct_texts = st.lists(st.text(min_size=1), min_size=2, max_size=12, unique=True)


@properties
@given(distinct_texts, st.floats(0, 0.5, exclude_min=True), st.integers(0, 2**32))
def test_packing_loses_no_token_and_splits_whole_documents(tokenizer, documents, fraction, seed):
    # Windows of one token leave no tail, so the documents can be read back in full.
    training, validation = pack(tokenizer, documents, validation_fraction=fraction, seed=seed)
    if training.windows.flat[-1] != EOS_ID:  # the last document was divided, to leave something to train on
        total = len(training) + len(validation)
        assert len(validation) - 1 < max(fraction * total, 1) <= max(len(validation), 1)
        *whole, tail = np.split(held := validation.windows.ravel(), np.flatnonzero(held == EOS_ID)[:-1] + 1)
        divided = np.concatenate([training.windows.ravel(), tail])
        wanted = [np.append(ids, EOS_ID) for ids in encode(tokenizer, documents)]
        assert sorted(map(list, [*whole, divided])) == sorted(map(list, wanted))
        return
    held_out = documents_in(tokenizer, validation)
    assert sorted(documents_in(tokenizer, training) + held_out) == sorted(documents)
    total = len(training) + len(validation)
    assert len(validation) >= fraction * total
    assert len(validation) - len(encode(tokenizer, held_out[-1:])[0]) - 1 < max(fraction * total, 1)


@properties
@given(st.integers(1, 8), st.integers(2, 20), st.integers(0, 99))
def test_no_training_window_holds_held_out_text(tokenizer, length, count, seed):
    # Each document repeats a character of its own, so every token tells its document.
    training, validation = pack(tokenizer, [chr(65 + i) * 40 for i in range(count)], length, seed=seed)
    assert set(training.windows.flat) & set(validation.windows.flat) <= {EOS_ID}


@properties
@given(distinct_texts, st.integers(2, 5), st.integers(0, 99))
def test_sequence_length_only_changes_the_cut(tokenizer, documents, length, seed):
    stream = pack(tokenizer, documents, validation_fraction=0, seed=seed)[0].windows.ravel()
    if len(stream) >= length:
        windows, validation = pack(tokenizer, documents, length, validation_fraction=0, seed=seed)
        assert validation is None
        np.testing.assert_array_equal(windows.windows.ravel(), stream[: len(stream) // length * length])


def test_seed_decides_order_and_split(tokenizer):
    documents = [f"document {i}" for i in range(30)]
    first, again, other = (pack(tokenizer, documents, seed=seed)[0].windows for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert first.tobytes() != other.tobytes()


@properties
@given(st.integers(3, 80), st.integers(1, 4), st.integers(0, 50))
def test_the_tail_of_a_single_document_is_held_out(tokenizer, count, length, hundredths):
    ids = np.append(encode(tokenizer, ["xyz" * count])[0], EOS_ID)
    wanted = max(-(-hundredths * len(ids) // 100), length)
    if hundredths and len(ids) - wanted >= length:
        training, validation = pack(tokenizer, ["xyz" * count], length, validation_fraction=hundredths / 100)
        head, tail = ids[:-wanted], ids[-wanted:]
        np.testing.assert_array_equal(training.windows.ravel(), head[: len(head) // length * length])
        np.testing.assert_array_equal(validation.windows.ravel(), tail[: wanted // length * length])


def test_packing_errors(tokenizer):
    with pytest.raises(ValueError, match="no documents"):
        pack(tokenizer, [])
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=f"validation_fraction .* not {fraction}"):
            pack(tokenizer, ["a", "b"], validation_fraction=fraction)
    with pytest.raises(ValueError, match="1 documents with 6 tokens .* sequence_length 4 .* validation_fraction 0"):
        pack(tokenizer, ["zzzzz"], sequence_length=4)
    with pytest.raises(ValueError, match="2 documents with 4 tokens .* sequence_length 3"):
        pack(tokenizer, ["a", "b"], sequence_length=3)
    with pytest.raises(ValueError, match=r"id \d+ at position \d+ .* vocabulary of 10"):
        pack(tokenizer, ["abc", "def"], vocab_size=10)


# Training batches


def test_one_window_can_fill_every_batch():
    data = TrainingData(packed(1), batch_size=3, seed=0)
    np.testing.assert_array_equal(take(data, 2), np.zeros((2, 3, 4)))


@properties
@given(counts, st.integers(1, 30), st.integers(0, 2**40))
def test_every_epoch_visits_every_window_once(count, batch_size, seed):
    batches = take(TrainingData(packed(count), batch_size=batch_size, seed=seed), -(-2 * count // batch_size))
    for ids in batches:
        assert ids.shape == (batch_size, 4) and ids.dtype == np.int32
        assert (ids == ids[:, :1]).all()
    epochs = np.concatenate(batches)[: 2 * count, 0].reshape(2, count)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), [np.arange(count)] * 2)


def test_order_depends_on_epoch_and_seed():
    first, second = (next(TrainingData(packed(200), batch_size=400, seed=seed))["ids"][:, 0] for seed in (0, 1))
    orders = [first[:200], first[200:], second[:200], second[200:]]
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).mean() < 0.1


@properties
@given(counts, st.integers(1, 4), st.integers(0, 15), st.integers(0, 5))
def test_resuming_equals_going_on(count, batch_size, before, elsewhere):
    def fresh():
        return TrainingData(packed(count), batch_size=batch_size, seed=5)

    data = fresh()
    take(data, before)
    state = json.loads(json.dumps(data.get_state()))
    assert state["step"] == before
    expected = take(data, 3)
    resumed = fresh()
    take(resumed, elsewhere)  # what a restored iterator did before must not matter
    resumed.set_state(state)
    assert resumed.get_state() == state
    np.testing.assert_array_equal(take(resumed, 3), expected)


def test_resuming_far_ahead_replays_nothing():
    class CountingSequences(PackedSequences):
        reads = 0

        def __getitem__(self, index):
            type(self).reads += 1
            return super().__getitem__(index)

    data = TrainingData(CountingSequences(np.arange(40), 4, 40), batch_size=2, seed=0)
    data.set_state({**data.get_state(), "step": 10**15})
    next(data)
    assert data.get_state()["step"] == 10**15 + 1
    assert CountingSequences.reads <= 2 * 6  # the batch, and those read ahead


def test_replaced_iterators_leave_no_threads():
    data = TrainingData(packed(5), batch_size=2, seed=0)
    before = threading.active_count()
    for step in range(20):
        data.set_state({**data.get_state(), "step": step})
        next(data)
    assert threading.active_count() <= before + 2


@properties
@given(counts, st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_process_slices_concatenate_to_the_global_batch(count, process_count, rows, step):
    batch_size = rows * process_count
    whole = TrainingData(packed(count), batch_size=batch_size, seed=3)
    parts = [
        TrainingData(packed(count), batch_size=batch_size, seed=3, process_index=p, process_count=process_count)
        for p in range(process_count)
    ]
    whole_state = {**whole.get_state(), "step": step}
    for data in (whole, *parts):
        data.set_state(whole_state)  # the state of one process count serves every other
    for _ in range(2):
        np.testing.assert_array_equal(np.concatenate([next(part)["ids"] for part in parts]), next(whole)["ids"])


def test_state_of_other_data_is_refused_field_by_field():
    data = TrainingData(packed(6), batch_size=2, seed=0)
    state = TrainingData(packed(6), batch_size=3, seed=1).get_state()
    with pytest.raises(ValueError, match=r"\(saved -> now\): batch_size 3 -> 2, seed 1 -> 0$"):
        data.set_state(state)
    with pytest.raises(ValueError, match=r": sequence_length 8 -> 4, sha256 \w{64} -> \w{64}$"):
        data.set_state(TrainingData(packed(3, 8), batch_size=2, seed=0).get_state())
    changed = np.repeat(np.arange(6), 4)
    changed[9] = 0
    with pytest.raises(ValueError, match=r": sha256 \w{64} -> \w{64}$"):
        data.set_state(TrainingData(PackedSequences(changed, 4, 6), batch_size=2, seed=0).get_state())
    with pytest.raises(ValueError, match=r": seed absent -> 0, shards 1 -> absent$"):
        saved = {name: value for name, value in data.get_state()["data"].items() if name != "seed"}
        data.set_state({"step": 0, "data": {**saved, "shards": 1}})


@pytest.mark.parametrize("step", [{}, {"step": None}, {"step": 2.0}, {"step": "2"}, {"step": -1}])
def test_malformed_state_is_refused(step):
    data = TrainingData(packed(6), batch_size=2, seed=0)
    take(data, 2)
    identity = {"data": data.get_state()["data"]}
    for state in (identity | step, {"step": 2}, {"step": 2, "data": 3}, {"next_index": 2}, None):
        with pytest.raises(ValueError, match="not a state of the training data"):
            data.set_state(state)
    assert data.get_state() == identity | {"step": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 1), "batch_size 0 must be a positive multiple of process_count 1"),
        ((4, 0, 3), "batch_size 4 must be a positive multiple of process_count 3"),
        ((4, 2, 2), r"process_index 2 is outside \[0, process_count 2\)"),
        ((4, -1, 2), r"process_index -1 is outside \[0, process_count 2\)"),
    ],
)
def test_impossible_shares_are_refused(arguments, message):
    batch_size, index, count = arguments
    with pytest.raises(ValueError, match=message):
        TrainingData(packed(4), batch_size=batch_size, seed=0, process_index=index, process_count=count)
    with pytest.raises(ValueError, match=message):
        next(validation_batches(packed(4), batch_size, process_index=index, process_count=count))


# Validation batches


@properties
@given(st.integers(1, 12), st.sampled_from([1, 2, 3]), st.integers(1, 4))
def test_validation_visits_every_window_once(count, process_count, rows):
    sequences, batch_size = packed(count), rows * process_count
    per_process = [
        list(validation_batches(sequences, batch_size, process_index=p, process_count=process_count))
        for p in range(process_count)
    ]
    ids, weights = [], []
    for parts in zip(*per_process, strict=True):
        for part in parts:
            assert part["ids"].shape == (rows, 4) and part["ids"].dtype == np.int32
            assert part["weight"].shape == (rows,) and part["weight"].dtype == np.float32
            ids.append(part["ids"])
            weights.append(part["weight"])
    ids, weights = np.concatenate(ids), np.concatenate(weights)
    np.testing.assert_array_equal(ids[:count], sequences.windows)
    assert (ids[count:] == PAD_ID).all()
    np.testing.assert_array_equal(weights, np.arange(len(ids)) < count)
    assert len(ids) - count < batch_size
