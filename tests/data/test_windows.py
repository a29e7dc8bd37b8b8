"""Tests of windows over documents, mixtures and their batches, against literal packing in memory."""

import hashlib
import itertools
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from twotower_jax.data import EOS_ID, PAD_ID, PackedSequences, TrainingData, validation_batches
from twotower_jax.data.documents import ArrayDocuments, held_out
from twotower_jax.data.mixture import Mixture, read_mixture
from twotower_jax.data.windows import Concatenation, DocumentWindows

VOCAB_SIZE = 1000


def make_documents(lengths, seed=0):
    """Documents of these lengths, each closed by the end-of-text token; no other token is that or padding."""
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(4, VOCAB_SIZE, n - 1), EOS_ID).astype(np.int32) if n else np.zeros(0, np.int32)
            for n in lengths]  # fmt: skip


def open_windows(arrays, length, **options):
    documents = ArrayDocuments(arrays, {"sha256": hashlib.sha256(np.concatenate(arrays)).hexdigest()})
    return DocumentWindows(documents, length, VOCAB_SIZE, name="numbers", **options)


def literal_windows(arrays, length, align):
    """What `DocumentWindows` should give, one token at a time."""
    line = []  # (id, where its document begins, counted)
    for array in arrays:
        begin = len(line)
        line += [(int(i), begin, True) for i in array]
        while len(line) % align:
            line.append((PAD_ID, begin, False))
    return [
        {
            "ids": [i for i, _, _ in line[at : at + length]],
            "document_start": [max(begin - at, 0) for _, begin, _ in line[at : at + length]],
            "counted": [counted for _, _, counted in line[at : at + length]],
        }
        for at in range(0, len(line) - length + 1, length)
    ]


lengths = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)


@given(lengths, st.sampled_from([1, 2, 4, 8]), st.integers(1, 6), st.booleans(), st.integers(0, 99))
def test_windows_equal_literal_packing(lengths, align, blocks, leave_out, seed):
    arrays, length = make_documents(lengths, seed), align * blocks
    kept = np.random.default_rng(seed).random(len(arrays)) < 0.6 if leave_out else np.ones(len(arrays), bool)
    keep = (lambda start, stop: kept[start:stop]) if leave_out else None
    expected = literal_windows([a for a, k in zip(arrays, kept, strict=True) if k], length, align)
    if not expected:
        with pytest.raises(
            ValueError, match=rf"numbers: \d+ tokens do not fill one window of sequence_length {length}:"
        ):
            open_windows(arrays, length, align=align, keep=keep)
        return
    windows = open_windows(arrays, length, align=align, keep=keep)
    assert len(windows) == len(expected) and windows.tokens == windows.windows.size == len(expected) * length
    for index, wanted in enumerate(expected):
        found = windows[index]
        assert {name: value.dtype for name, value in found.items()} == {
            "ids": np.int32,
            "document_start": np.int32,
            "counted": bool,
        }
        assert {name: value.tolist() for name, value in found.items()} == wanted
    with pytest.raises(IndexError, match=f"no window {len(expected)} among {len(expected)}"):
        windows[len(expected)]


@settings(max_examples=150)
@given(lengths, st.sampled_from([1, 2, 8]), st.integers(1, 4), st.floats(0.05, 0.7), st.integers(0, 2**32 - 1))
@example([5, 7, 1, 8], 8, 1, 0.0, 0)  # the second document is left out
def test_counted_tokens_belong_to_kept_documents(lengths, align, blocks, fraction, seed):
    left_out = held_out(0, len(lengths), fraction=fraction, seed=seed) if fraction else np.array([0, 1, 0, 0], bool)
    # Every token tells its document.
    arrays = [np.full(n, 4 + number, np.int32) for number, n in enumerate(lengths)]
    for kept in (left_out, ~left_out):
        line = literal_windows([a for a, k in zip(arrays, kept, strict=True) if k], align * blocks, align)
        if line:
            windows = open_windows(arrays, align * blocks, align=align, keep=lambda a, b, kept=kept: kept[a:b])
            found = [windows[i] for i in range(len(windows))]
            assert [{name: value.tolist() for name, value in window.items()} for window in found] == line
            counted = np.concatenate([window["ids"][window["counted"]] for window in found])
            assert kept[counted - 4].all()


@given(lengths, st.integers(1, 12), st.booleans())
def test_without_alignment_windows_are_the_stream(lengths, length, leave_out):
    arrays = make_documents(lengths)
    kept = np.arange(len(arrays)) % 3 != 1 if leave_out else np.ones(len(arrays), bool)
    stream = np.concatenate([np.zeros(0, np.int32), *(a for a, k in zip(arrays, kept, strict=True) if k)])
    if len(stream) >= length:
        windows = open_windows(arrays, length, keep=(lambda start, stop: kept[start:stop]) if leave_out else None)
        found = [windows[i] for i in range(len(windows))]
        assert all(list(window) == ["ids"] for window in found)
        wanted = PackedSequences(stream, length, VOCAB_SIZE).windows
        np.testing.assert_array_equal(np.stack([window["ids"] for window in found]), wanted)


def test_many_blocks_of_documents():
    # More documents than are summed up at a time, with stretches of nothing among them.
    lengths = np.random.default_rng(0).integers(0, 9, 150_000)
    lengths[2_000:70_000] = 0
    arrays = np.split(np.arange(lengths.sum()) % (VOCAB_SIZE - 4) + 4, np.cumsum(lengths)[:-1])
    windows = open_windows(arrays, 64, align=4)
    spans = -(-lengths // 4) * 4
    begins = np.cumsum(spans) - spans
    assert len(windows) == spans.sum() // 64
    for index in [0, 1, len(windows) // 2, len(windows) - 1, *range(0, len(windows), 997)]:
        window = windows[index]
        wanted = np.full(64, PAD_ID)
        inside = np.flatnonzero((begins < 64 * index + 64) & (begins + lengths > 64 * index))
        for number in inside:
            for place, token in zip(itertools.count(begins[number] - 64 * index), arrays[number], strict=False):
                if 0 <= place < 64:
                    wanted[place] = token
        np.testing.assert_array_equal(window["ids"], wanted)
        np.testing.assert_array_equal(window["counted"], wanted != PAD_ID)


def test_window_errors():
    arrays = make_documents([10, 10])
    with pytest.raises(ValueError, match="sequence_length must be positive, not 0"):
        open_windows(arrays, 0)
    for align in (0, 3):
        with pytest.raises(ValueError, match=f"sequence_length 8 is not a multiple of align {align}"):
            open_windows(arrays, 8, align=align)
    arrays[1][4] = VOCAB_SIZE
    windows = open_windows(arrays, 5)
    windows[1]
    with pytest.raises(ValueError, match=f"numbers: window 2: id {VOCAB_SIZE} at position 4 lies outside the vocab"):
        windows[2]


# Held-out documents


@given(st.integers(0, 10**12), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_held_out_is_a_function_of_seed_and_number(start, count, seed):
    whole = held_out(start, start + count, fraction=0.3, seed=seed)
    apart = [held_out(i, i + 1, fraction=0.3, seed=seed)[0] for i in range(start, start + count)]
    np.testing.assert_array_equal(whole, apart)
    more = held_out(start, start + count, fraction=0.5, seed=seed)
    assert (whole <= more).all()  # a larger share only adds documents


def test_held_out_share_and_independence():
    chosen = [held_out(0, 200_000, fraction=0.05, seed=seed) for seed in (0, 1)]
    for one in chosen:  # five standard deviations of a binomial are 0.0024
        assert abs(one.mean() - 0.05) < 0.0024
        assert abs((one[1:] & one[:-1]).mean() - 0.05**2) < 0.0006
    assert abs((chosen[0] & chosen[1]).mean() - 0.05**2) < 0.0006
    assert not held_out(0, 1000, fraction=0.0, seed=0).any()


# Mixtures


def sources(counts, length=4):
    """Windows by name; every token of window i of source s is 100 s + i."""
    return {
        f"s{number}": PackedSequences(np.repeat(100 * number + np.arange(count), length), length, 1000)
        for number, count in enumerate(counts)
    }


weights = st.lists(st.fractions(Fraction(1, 50), 50, max_denominator=1000), min_size=1, max_size=6)


@given(weights, st.integers(0, 10**15), st.integers(1, 60))
def test_mixture_gives_every_source_its_share_in_order(weights, start, count):
    names = [f"s{i}" for i in range(len(weights))]
    mixture = Mixture(sources([20] * len(weights)), dict(zip(names, weights, strict=True)))
    assert sum(mixture.shares.values()) == 1
    given_before = {}
    for row in range(start, start + count):
        number, before = mixture.locate(row)
        assert before == given_before.get(number, before)  # one after the other, none twice
        given_before[number] = before + 1
        assert abs(before - row * mixture.shares[names[number]]) < max(2, len(names))


@given(weights)
def test_mixture_starts_every_source_at_its_beginning(weights):
    mixture = Mixture(sources([20] * len(weights)), {f"s{i}": w for i, w in enumerate(weights)})
    first = {}
    for row in range(20_000):
        number, before = mixture.locate(row)
        first.setdefault(number, before)
        if len(first) == len(weights):
            break
    assert set(first.values()) == {0} and len(first) == len(weights)


def mixed(counts=(20, 30, 25), weights=(5, 3, 2)):
    return Mixture(sources(counts), {f"s{i}": Fraction(w) for i, w in enumerate(weights)})


def take(data, count):
    return [next(data)["ids"] for _ in range(count)]


def test_mixture_of_one_is_the_source():
    alone, mixture = (TrainingData(s, batch_size=3, seed=4) for s in (sources([20])["s0"], mixed([20], [7])))
    np.testing.assert_array_equal(take(alone, 15), take(mixture, 15))


def test_mixed_batches_hold_the_shares_and_shuffled_epochs():
    rows = np.concatenate(take(TrainingData(mixed(), batch_size=10, seed=1), 60))[:, 0]
    for number, (count, share) in enumerate([(20, 5), (30, 3), (25, 2)]):
        own = rows[rows // 100 == number] % 100
        assert len(own) == 60 * share
        for epoch in range(len(own) // count):
            np.testing.assert_array_equal(np.sort(own[epoch * count :][:count]), np.arange(count))
        assert (own[:count] != own[count : 2 * count]).any()


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**12))
def test_mixed_batches_do_not_depend_on_processes_and_resume_anywhere(process_count, rows, step):
    batch_size = rows * process_count
    whole = TrainingData(mixed(), batch_size=batch_size, seed=3)
    state = {**json.loads(json.dumps(whole.get_state())), "step": step}
    whole.set_state(state)
    expected = take(whole, 3)
    for first in range(3):
        parts = []
        for process in range(process_count):
            part = TrainingData(
                mixed(), batch_size=batch_size, seed=3, process_index=process, process_count=process_count
            )
            part.set_state({**state, "step": step + first})
            parts.append(next(part)["ids"])
        np.testing.assert_array_equal(np.concatenate(parts), expected[first])


def test_other_mixtures_are_refused_field_by_field():
    data = TrainingData(mixed(), batch_size=2, seed=0)
    data.set_state(TrainingData(mixed(weights=(50, 30, 20)), batch_size=2, seed=0).get_state())  # the same shares
    with pytest.raises(ValueError, match=r": s0.share 1/3 -> 1/2, s1.share 1/3 -> 3/10, s2.share 1/3 -> 1/5$"):
        data.set_state(TrainingData(mixed(weights=(1, 1, 1)), batch_size=2, seed=0).get_state())
    with pytest.raises(ValueError, match=r": s1.sha256 \w+ -> \w+, s1.tokens 124 -> 120$"):
        data.set_state(TrainingData(mixed(counts=(20, 31, 25)), batch_size=2, seed=0).get_state())
    with pytest.raises(
        ValueError, match=r": batch_size 4 -> 2, s0.share 5/8 -> 1/2, .* s2.sha256 absent -> \w+, s2.share "
    ):
        data.set_state(TrainingData(mixed((20, 30), (5, 3)), batch_size=4, seed=0).get_state())


def test_document_borders_reach_the_batches():
    arrays = make_documents([13, 5, 30, 8, 2, 17, 40, 9])
    windows = open_windows(arrays, 16, align=8)
    literal = literal_windows(arrays, 16, 8)
    epoch = [next(TrainingData(windows, batch_size=len(windows), seed=0))]
    validation = list(validation_batches(windows, 4))
    for batches, count in ((epoch, len(windows)), (validation, len(windows))):
        rows = [{name: batch[name][i].tolist() for name in ("ids", "document_start", "counted")}
                for batch in batches for i in range(len(batch["ids"]))]  # fmt: skip
        assert sorted(map(str, rows[:count])) == sorted(map(str, literal))
    last = validation[-1]
    assert len(windows) == 9 and last["weight"].tolist() == [1, 0, 0, 0]
    assert (last["ids"][1:] == PAD_ID).all() and not last["counted"][1:].any()
    align8, align16 = (TrainingData(open_windows(arrays, 16, align=a), batch_size=2, seed=0) for a in (8, 16))
    with pytest.raises(ValueError, match="reset_at_documents aligned to 8 -> aligned to 16, tokens"):
        align16.set_state(align8.get_state())


def test_concatenation_is_one_after_the_other():
    parts = list(sources([2, 3, 1]).values())
    both = Concatenation(parts)
    assert len(both) == 6 and both.tokens == both.windows.size == 24 and both.sequence_length == 4
    assert [int(both[i]["ids"][0]) for i in range(6)] == [0, 1, 100, 101, 102, 200]
    ids = np.concatenate([batch["ids"] for batch in validation_batches(both, 4)])[:, 0]
    assert ids.tolist() == [0, 1, 100, 101, 102, 200, PAD_ID, PAD_ID]


# Mixture files


def test_mixture_file(tmp_path):
    file = tmp_path / "mixture.json"
    file.write_text('{"b": {"path": "/data/b", "weight": 0.1}, "a": {"path": "here/a", "weight": 3}}')
    entries = read_mixture(file)
    assert entries["a"] == (str(tmp_path / "here/a"), 3) and entries["b"] == ("/data/b", Fraction(1, 10))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not an object of sources"),
        ("{}", "not an object of sources"),
        ('{"a": {"path": "x"}}', "'a' does not have just a path and a weight"),
        ('{"a": {"path": "x", "weight": 1, "weigth": 2}}', "'a' does not have just a path and a weight"),
        ('{"a": {"path": 3, "weight": 1}}', "'a' does not have just a path and a weight"),
        ('{"a": {"path": "x", "weight": 0}}', "'a' has weight 0, which is not a positive number"),
        ('{"a": {"path": "x", "weight": true}}', "'a' has weight True"),
        ('{"a": {"path": "x", "weight": NaN}}', "'a' has weight nan"),
        ('{"a": {"path": "x", "weight": "1"}}', "'a' has weight '1'"),
        ('{"a": {"path": "x", "weight": 1}, "a": {"path": "y", "weight": 1}}', "a name stands twice"),
    ],
)
def test_bad_mixture_files_are_named(tmp_path, text, message):
    file = tmp_path / "mixture.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"mixture\.json: .*{message}.*a mixture looks like"):
        read_mixture(file)
