"""Documents that are copies of earlier ones, to the letter or nearly: how they are found, and which are left out.

Each document has a digest of its text, and for near copies a MinHash signature (Broder 1997) of its n-grams of words,
of which the share of equal numbers estimates the Jaccard similarity of two sets of n-grams. Signatures are compared
where one of their bands is equal (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4).

The first of equal documents in the order of the input stays. After that, in order, a document stays unless a document
that stays has an estimated similarity of the threshold or more to it. What one document is found to be depends on the
documents before it alone.
"""

import dataclasses
import hashlib
import io
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from twotower_jax.paths import AnyPath, in_store

KINDS = ("exact", "near")

# How much worse it is not to compare two near copies than to compare two that are none, in choosing bands.
_MISSED, _COMPARED = 0.9, 0.1

# N-grams that are hashed at a time: 128 permutations of them take 32 MiB.
_NGRAMS_AT_A_TIME = 1 << 16


@dataclasses.dataclass(frozen=True)
class Near:
    """What makes documents near copies.

    Attributes:
      threshold: the least Jaccard similarity, as estimated.
      ngram: words, runs of letters and digits in small letters, of which a set is made. A text with fewer is one, of
        all of them; one without any is itself.
      permutations: numbers in a signature, p. The standard deviation of an estimate of J is √(J(1−J)/p).

    Raises:
      ValueError: at construction, for values that cannot be.
    """

    threshold: float = 0.8
    ngram: int = 5
    permutations: int = 128

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise ValueError(f"dedup_threshold must be more than 0 and at most 1, not {self.threshold}")
        if self.ngram < 1:
            raise ValueError(f"dedup_ngram must be at least 1, not {self.ngram}")
        if not 2 <= self.permutations <= 1 << 12:
            raise ValueError(f"dedup_permutations must be 2 to 4096, not {self.permutations}")


class Fingerprints(NamedTuple):
    """The documents of a part that are text, in order.

    Attributes:
      rows: the number of each among the rows of the part, int64 (documents,).
      digests: of the texts, uint64 (documents, 2).
      signatures: uint32 (documents, p); p is 0 where near copies do not matter.
      bands: a hash of each band of each signature, uint64 (bands, documents).
    """

    rows: np.ndarray
    digests: np.ndarray
    signatures: np.ndarray
    bands: np.ndarray

    def save(self, folder: AnyPath, part: int) -> None:
        """Writes them; what is there under its name is whole."""
        for name, array in self._asdict().items():
            save_array(_file(folder, part, name), array)


class Fingerprinter:
    """Makes fingerprints. It compares texts that are equal or nearly so in any process alike."""

    def __init__(self, near: Near | None):
        """`near` is None where exact copies alone matter.

        Raises:
          ValueError: datasketch is needed and not installed.
        """
        self.near, self.bands, self._band_rows = near, 0, 0
        if near is None:
            return
        datasketch = _datasketch()
        index = datasketch.MinHashLSH(near.threshold, near.permutations, weights=(_COMPARED, _MISSED))
        self.bands, self._band_rows = index.b, index.r
        self._new = datasketch.MinHash(near.permutations, seed=1, scheme="affine32").copy

    def __call__(self, texts: Sequence[str], rows: Sequence[int]) -> Fingerprints:
        """`rows` are the texts' numbers."""
        digests = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
        signatures = np.zeros((len(texts), 0 if self.near is None else self.near.permutations), np.uint32)
        bands = np.zeros((self.bands, len(texts)), np.uint64)
        for number, text in enumerate(texts if self.near is not None else ()):
            signatures[number] = self.signature(text)
            own = signatures[number].astype("<u4", copy=False)
            for band in range(self.bands):
                part = own[band * self._band_rows : (band + 1) * self._band_rows].tobytes()
                bands[band, number] = int.from_bytes(hashlib.blake2b(part, digest_size=8).digest(), "little")
        return Fingerprints(np.asarray(rows, np.int64), np.frombuffer(digests, "<u8").reshape(-1, 2), signatures, bands)

    def signature(self, text: str) -> np.ndarray:
        """uint32 (p,)."""
        grams = [gram.encode() for gram in ngrams(text, self.near.ngram)]
        minhash = self._new()
        for start in range(0, len(grams), _NGRAMS_AT_A_TIME):
            minhash.update_batch(grams[start : start + _NGRAMS_AT_A_TIME])
        return minhash.hashvalues


def ngrams(text: str, length: int) -> set[str]:
    """The set that a text is compared by; see `Near`."""
    words = re.findall(r"\w+", text.lower())
    if not words:
        return {text}
    return {" ".join(words[i : i + length]) for i in range(max(1, len(words) - length + 1))}


def joined(pieces: Sequence[Fingerprints]) -> Fingerprints:
    """Those of several stretches of a part, at least one."""
    rows, digests, signatures, bands = zip(*pieces, strict=True)
    return Fingerprints(
        np.concatenate(rows), np.concatenate(digests), np.concatenate(signatures), np.concatenate(bands, axis=1)
    )


def are_saved(folder: AnyPath, part: int) -> bool:
    """Whether a part has its fingerprints."""
    return all(_file(folder, part, name).exists() for name in Fingerprints._fields)


def choose(folder: AnyPath, parts: int, near: Near | None) -> tuple[list[np.ndarray], dict[str, int]]:
    """Which documents are left out, by the fingerprints of all parts.

    Takes about 75 bytes of memory for each document, and a signature for each that another resembles.

    Returns:
      Of each part, the numbers of the rows that are left out, int64, ascending; and how many documents of each kind.
    """
    sizes = [len(_load(folder, part, "rows")) for part in range(parts)]
    ends = np.cumsum([0, *sizes])
    stays = _first_of_equal(np.concatenate([np.zeros((0, 2), "<u8"), *_each(folder, parts, "digests")]))
    counts = {"exact": int((~stays).sum())}
    if near is not None:
        before = int(stays.sum())
        _leave_out_near(folder, ends, stays, near)
        counts["near"] = before - int(stays.sum())
    rows = [
        _load(folder, part, "rows")[~stays[start:stop]]
        for part, (start, stop) in enumerate(zip(ends, ends[1:], strict=False))
    ]
    return rows, counts


def _first_of_equal(digests: np.ndarray) -> np.ndarray:
    """Whether each of some values is the first of its kind, bool (n,); `digests` is (n, 2)."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # of equal ones in their order
    first = np.ones(len(order), bool)
    first[1:] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
    found = np.empty(len(order), bool)
    found[order] = first
    return found


def _leave_out_near(folder: AnyPath, ends: np.ndarray, stays: np.ndarray, near: Near) -> None:
    """Takes near copies out of `stays`, bool (documents,)."""
    documents, buckets = _in_one_bucket(folder, ends, stays)
    wanted = near.threshold * near.permutations - 1e-9
    kept: dict[int, list[int]] = {}  # of each bucket, its documents that stay: places in `signatures`
    signatures: list[np.ndarray] = []
    part, own = -1, None
    starts = np.flatnonzero(np.diff(documents, prepend=-1))
    for start, stop in zip(starts, np.append(starts[1:], len(documents)), strict=False):
        document = int(documents[start])
        if document >= ends[part + 1]:
            part = int(np.searchsorted(ends, document, side="right")) - 1
            own = _load(folder, part, "signatures", mapped=True)
        signature = np.array(own[document - ends[part]])
        mine = buckets[start:stop].tolist()
        others = sorted({place for bucket in mine for place in kept.get(bucket, ())})
        if others:
            equal = np.stack([signatures[place] for place in others]) == signature
            if equal.sum(axis=1).max() >= wanted:
                stays[document] = False
                continue
        for bucket in mine:
            kept.setdefault(bucket, []).append(len(signatures))
        signatures.append(signature)


def _in_one_bucket(folder: AnyPath, ends: np.ndarray, stays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The documents of `stays` that have a band in common with another, and its number: pairs ordered by document."""
    parts, numbers = len(ends) - 1, np.flatnonzero(stays)
    documents, buckets, first = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for band in range(len(_load(folder, 0, "bands", mapped=True)) if parts else 0):
        hashes = np.concatenate([_load(folder, part, "bands", mapped=True)[band] for part in range(parts)])[stays]
        order = np.argsort(hashes, kind="stable")
        new = np.diff(hashes[order], prepend=hashes[order[:1]] + np.uint64(1)) != 0
        bucket = np.cumsum(new) - 1
        shared = np.bincount(bucket)[bucket] > 1
        documents.append(numbers[order[shared]])
        buckets.append(first + bucket[shared])
        first += len(hashes)
    documents, buckets = np.concatenate(documents), np.concatenate(buckets)
    order = np.argsort(documents, kind="stable")
    return documents[order], buckets[order]


def _each(folder: AnyPath, parts: int, name: str) -> list[np.ndarray]:
    return [_load(folder, part, name) for part in range(parts)]


def _load(folder: AnyPath, part: int, name: str, mapped: bool = False) -> np.ndarray:
    # An empty array cannot be mapped.
    path = _file(folder, part, name)
    if in_store(path):
        return load_array(path)
    try:
        return np.load(path, mmap_mode="r" if mapped else None)
    except ValueError:
        return np.load(path)


def _file(folder: AnyPath, part: int, name: str) -> AnyPath:
    return folder / f"{part:06d}.{name}.npy"


def load_array(path: AnyPath) -> np.ndarray:
    """What `save_array` wrote."""
    return np.load(io.BytesIO(path.read_bytes()))


def save_array(path: AnyPath, array: np.ndarray) -> None:
    """Writes an array: all of it or nothing."""
    if in_store(path):
        content = io.BytesIO()
        np.save(content, array)
        path.write_bytes(content.getvalue())
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    with partial.open("wb") as file:
        np.save(file, array)
    os.replace(partial, path)


def _datasketch() -> Any:
    try:
        import datasketch
    except ImportError:
        raise ValueError(
            "dedup=near needs datasketch, which is not installed: pip install 'twotower_jax[data]'"
        ) from None
    return datasketch
