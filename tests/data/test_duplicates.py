"""Copies of documents that are left out: against exact similarities, against another index, and by prepare.py."""

import random
import shutil

import datasketch
import numpy as np
import pytest

from twotower_jax.data import EOS_ID, duplicates, encode, train_tokenizer
from twotower_jax.data.duplicates import Fingerprinter, Near, choose, joined, ngrams
from twotower_jax.data.prepare import Settings, prepare
from twotower_jax.data.prepared import PreparedDocuments, read_manifest


def make_texts(count, words=60, seed=0):
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(5000)}" for _ in range(words)) for _ in range(count)]


def changed(text, share, rng):
    """A copy of which a share of the words is another."""
    words = text.split()
    for i in rng.sample(range(len(words)), round(share * len(words))):
        words[i] = f"x{rng.randrange(10**6)}"
    return " ".join(words)


def similarity(a, b, n):
    """Jaccard's, of sets of n-grams, literally."""
    one, two = (
        {tuple(words[i : i + n]) for i in range(len(words) - n + 1)} or {tuple(words)}
        for words in (text.lower().split() for text in (a, b))
    )
    return len(one & two) / len(one | two)


def left_out(texts, near, folder, parts=3):
    """The numbers of the texts that are left out, found in several parts, and the counts."""
    folder.mkdir()
    fingerprinter = Fingerprinter(near)
    borders = np.linspace(0, len(texts), parts + 1).astype(int)
    for number, (start, stop) in enumerate(zip(borders, borders[1:], strict=False)):
        middle = (start + stop) // 2
        pieces = [fingerprinter(texts[a:b], range(a, b)) for a, b in ((start, middle), (middle, stop))]
        joined(pieces).save(folder, number)
    rows, counts = choose(folder, parts, near)
    return np.concatenate(rows).tolist(), counts


def test_exact_copies_of_the_first_are_left_out(tmp_path):
    texts = ["b", "a", "b", "c", "a", "b", "B", "b "]
    assert left_out(texts, None, tmp_path / "one") == ([2, 4, 5], {"exact": 3})
    assert left_out(["a", "b"], None, tmp_path / "two", parts=4) == ([], {"exact": 0})


@pytest.mark.parametrize(
    ("threshold", "ngram", "permutations"), [(0.8, 5, 128), pytest.param(0.5, 2, 256, marks=pytest.mark.whole)]
)
def test_near_copies_are_those_of_exact_similarity(tmp_path, threshold, ngram, permutations):
    """Within four standard deviations of the estimate from the threshold either may happen; beyond, what is right."""
    rng = random.Random(7)
    texts = make_texts(40, 200)
    shares = (0, 0.005, 0.01, 0.02, 0.04, 0.1, 0.2, 0.3)
    texts += [changed(rng.choice(texts), share, rng) for share in shares for _ in range(9)]
    rng.shuffle(texts)
    found, counts = left_out(texts, Near(threshold, ngram, permutations), tmp_path / "out")
    margin = 4 * (threshold * (1 - threshold) / permutations) ** 0.5
    kept, surely, surely_not = [], 0, 0
    for number, text in enumerate(texts):
        most = max((similarity(text, texts[i], ngram) for i in kept), default=0.0)
        if most >= min(1.0, threshold + margin):
            assert number in found
            surely += 1
        elif most < threshold - margin:
            assert number not in found
            surely_not += 1
        if number not in found:
            kept.append(number)
    assert surely >= 10 and surely_not >= 40 and counts["exact"] + counts["near"] == len(found)
    assert counts["exact"] == len(texts) - len(set(texts)) >= 1


def test_texts_that_have_nothing_in_common_all_stay(tmp_path):
    assert left_out(make_texts(6), Near(), tmp_path / "out") == ([], {"exact": 0, "near": 0})
    assert left_out([], Near(), tmp_path / "none", parts=1) == ([], {"exact": 0, "near": 0})


def test_the_choice_is_that_of_an_index_that_grows(tmp_path):
    """datasketch's own, asked for each document in order, then compared by signature."""
    rng = random.Random(1)
    texts = make_texts(30, 40, 1)
    texts += [changed(rng.choice(texts), rng.choice([0, 0.02, 0.05, 0.1]), rng) for _ in range(60)]
    near = Near(0.7, 3, 64)
    fingerprinter = Fingerprinter(near)
    index = datasketch.MinHashLSH(0.7, 64, weights=(0.1, 0.9))
    wanted, kept = [], {}
    for number, text in enumerate(texts):
        minhash = datasketch.MinHash(64, hashvalues=fingerprinter.signature(text), scheme="affine32")
        if any(minhash.jaccard(kept[other]) >= 0.7 for other in index.query(minhash)):
            wanted.append(number)
        else:
            index.insert(number, minhash)
            kept[number] = minhash
    assert 20 < len(wanted) < 60
    for parts in (1, 4):
        assert left_out(texts, near, tmp_path / str(parts), parts)[0] == wanted


def test_what_texts_are_compared_by():
    assert ngrams("The cat, the CAT\nsat", 2) == {"the cat", "cat the", "cat sat"}
    assert ngrams("One", 5) == {"one"} and ngrams("?!", 5) == {"?!"}
    long = Fingerprinter(Near(0.8, 1, 16)).signature(" ".join(map(str, range(70_000))))
    parts = [Fingerprinter(Near(0.8, 1, 16)).signature(" ".join(map(str, r))) for r in (range(9), range(9, 70_000))]
    np.testing.assert_array_equal(long, np.minimum(*parts))


def test_bad_settings_are_refused():
    for settings, message in (
        ({"dedup": "fuzzy"}, "dedup must be one of exact, near, not 'fuzzy'"),
        ({"dedup_threshold": 0.0}, "dedup_threshold must be more than 0 and at most 1, not 0.0"),
        ({"dedup_ngram": 0}, "dedup_ngram must be at least 1, not 0"),
        ({"dedup_permutations": 1}, "dedup_permutations must be 2 to 4096, not 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Settings(**{"dedup": "near"} | settings)
    assert Settings().values() == Settings(dedup="").values() and "dedup" not in Settings().values()
    assert Settings(dedup="exact").values().keys() - Settings().values().keys() == {"dedup"}


@pytest.mark.whole
@pytest.mark.parametrize("workers", [2, 1])
def test_prepare_leaves_copies_out_and_goes_on_without_reading_again(tmp_path, monkeypatch, workers):
    """Over files and parts, broken rows among them, in any number of processes; interrupted after the first reading."""
    texts, rng = make_texts(40), random.Random(3)
    near = changed(texts[3], 0.02, rng)
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    rows = [*texts[:20], texts[2], None, near]
    lines = [f'{{"text": "{text}"}}\n' if text else "{\n" for text in rows]
    (folder / "a.jsonl").write_text("".join(lines))
    for number, text in enumerate([texts[5], *texts[20:], near]):
        (folder / f"b{number:02d}.txt").write_text(text)
    tokenizer = train_tokenizer(texts, 300)
    settings = Settings(skip_bad=True, shard_size=2000, dedup="near")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(duplicates, "choose", lambda *arguments: (_ for _ in ()).throw(OSError("no space")))
        prepare([str(folder)], output, tokenizer, settings, workers=workers, quiet=True)
    made = {file: file.stat().st_mtime_ns for file in output.glob("progress/*.npy")}
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda folder, **_: made.update((file, made[file] - file.stat().st_mtime_ns)
                                                                   for file in made))  # fmt: skip
        manifest = prepare([str(folder)], output, tokenizer, settings, workers=workers, quiet=True)
    assert made and not any(made.values())
    assert manifest.copies == {"exact": 3, "near": 1} and manifest.skipped == 1
    documents = PreparedDocuments(output, "train")
    ends = np.cumsum(documents.lengths(0, documents.count))
    found = [ids.tolist() for ids in np.split(documents.read(0, documents.tokens), ends[:-1])]
    assert found == [[*ids.tolist(), EOS_ID] for ids in encode(tokenizer, texts)]
    assert len(manifest.shards) > 2 and read_manifest(output) == manifest
    with pytest.raises(ValueError, match="dedup near -> absent"):
        prepare([str(folder)], output, tokenizer, Settings(skip_bad=True, shard_size=2000), quiet=True)
