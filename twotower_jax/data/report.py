"""What a folder of prepared data holds: documents, lengths, tokens, copies, and how much packing pads."""

import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from twotower_jax.data.conversation_windows import ConversationWindows
from twotower_jax.data.documents import DataError
from twotower_jax.data.prepared import TRAIN, VALIDATION, PreparedConversations, PreparedDocuments, open_prepared
from twotower_jax.data.tokenizer import load_tokenizer
from twotower_jax.visualize.charts import bar_chart

_PERCENTS = (0, 1, 5, 25, 50, 75, 95, 99, 100)
_READ_TOKENS, _READ_DOCUMENTS = 1 << 20, 1 << 16
_SHOWN_CHARACTERS = 60


def report(folder: str | pathlib.Path, *, sequence_length: int, aligns: Sequence[int], top: int) -> dict[str, Any]:
    """What the training documents are, JSON-able; of those held out the totals alone.

    All tokens are read once. Takes about 100 bytes of memory for each document.

    Args:
      folder: of prepared data.
      sequence_length: L, of the windows that packing is reckoned for.
      aligns: multiples at which documents, or answers of conversations, begin where they are kept apart; each must
        divide L.
      top: how many copies and tokens are listed.

    Raises:
      CheckpointError: the data are broken. ValueError: the lengths do not fit together.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length must be positive, not {sequence_length}")
    for align in aligns:
        if align < 1 or sequence_length % align:
            raise ValueError(f"align {align} does not divide sequence_length {sequence_length}")
    documents = open_prepared(folder, TRAIN)
    manifest = documents.manifest
    lengths = np.concatenate([documents.lengths(start, stop) for start, stop in _blocks(documents.count)])
    tokenizer = load_tokenizer(folder)
    counts, digests = _tokens_and_digests(documents, lengths, manifest.vocab_size)
    used = np.flatnonzero(counts)
    return {
        "documents": {split: manifest.total(split, "documents") for split in (TRAIN, VALIDATION)},
        "tokens": {split: manifest.total(split, "tokens") for split in (TRAIN, VALIDATION)},
        "shards": len(manifest.shards),
        "left_out": {"broken": manifest.skipped} | (manifest.copies or {}),
        "lengths": _lengths(lengths),
        "vocabulary": {
            "size": manifest.vocab_size,
            "used": len(used),
            "most_frequent": [
                {"id": int(i), "text": tokenizer.decode([int(i)], skip_special_tokens=False), "count": int(counts[i])}
                for i in used[np.argsort(-counts[used], kind="stable")][:top]
            ],
        },
        "copies": _copies(documents, lengths, digests, tokenizer, top),
        "packing": _packing(documents, lengths, sequence_length, aligns),
    }


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, _READ_DOCUMENTS):
        yield start, min(start + _READ_DOCUMENTS, count)


def _tokens_and_digests(
    documents: PreparedDocuments, lengths: np.ndarray, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """How often each token occurs, int64 (vocabulary,), and a digest of each document, uint64 (documents, 2)."""
    counts, digests, ends = np.zeros(vocab_size, np.int64), bytearray(), np.cumsum(lengths)
    first = 0
    while first < documents.count:
        start = int(ends[first] - lengths[first])
        last = max(first + 1, int(np.searchsorted(ends, start + _READ_TOKENS, side="right")))
        ids = documents.read(start, int(ends[last - 1]))
        found = np.bincount(ids, minlength=vocab_size)
        if len(found) > vocab_size:
            raise DataError(f"a token id {int(ids.max())} lies outside the vocabulary of {vocab_size}")
        counts += found
        for one in np.split(ids, ends[first : last - 1] - start):
            digests += hashlib.blake2b(one.tobytes(), digest_size=16).digest()
        first = last
    return counts, np.frombuffer(bytes(digests), "<u8").reshape(-1, 2)


def _lengths(lengths: np.ndarray) -> dict[str, Any]:
    bins = np.frexp(lengths.astype(np.float64) - 0.5)[1]  # 2^(n-1) < length <= 2^n
    return {
        "mean": float(lengths.mean()),
        "percentiles": {str(p): int(np.percentile(lengths, p, method="inverted_cdf")) for p in _PERCENTS},
        "histogram": [
            {
                "up_to": 1 << int(n),
                "documents": int((bins == n).sum()),
                "tokens": int(lengths[bins == n].sum()),
            }
            for n in range(int(bins.min()), int(bins.max()) + 1)
        ],
    }


def _copies(documents: PreparedDocuments, lengths: np.ndarray, digests: np.ndarray, tokenizer, top: int):
    _, first, counts = np.unique(digests, axis=0, return_index=True, return_counts=True)
    starts = np.cumsum(lengths) - lengths
    order = np.lexsort((first, -counts))
    listed = []
    for number in order[counts[order] > 1][:top]:
        i = int(first[number])
        ids = documents.read(int(starts[i]), int(starts[i] + min(lengths[i], _SHOWN_CHARACTERS)))
        text = " ".join(tokenizer.decode(ids.tolist()).split())[:_SHOWN_CHARACTERS]
        listed.append({"times": int(counts[number]), "tokens": int(lengths[i]), "text": text})
    again = np.ones(len(lengths), bool)
    again[first] = False
    return {"documents": int(again.sum()), "tokens": int(lengths[again].sum()), "most_frequent": listed}


def _packing(documents: PreparedDocuments, lengths: np.ndarray, sequence_length: int, aligns: Sequence[int]):
    total, ends = int(lengths.sum()), np.cumsum(lengths)
    if isinstance(documents, PreparedConversations):
        windows = {
            align: ConversationWindows(
                documents,
                sequence_length,
                documents.manifest.vocab_size,
                name="the conversations",
                align=align,
                padding_weight=0.0,
                end_token=documents.manifest.end_token,
            )
            for align in aligns
        }
        apart = [
            {
                "align": align,
                "windows": len(w),
                "padding": 1 - w.filled / w.tokens,
                "cut": w.cut,
                "left_out": w.left_out,
            }
            for align, w in windows.items()
        ]
        return {"sequence_length": sequence_length, "apart": apart}
    crossing = (ends - lengths) // sequence_length != (ends - 1) // sequence_length
    together = {
        "windows": total // sequence_length,
        "tokens_left_over": total % sequence_length,
        "documents_in_several_windows": int(crossing.sum()),
    }
    apart = []
    for align in aligns:
        line = int((-(-lengths // align) * align).sum())
        apart.append({"align": align, "windows": line // sequence_length, "padding": 1 - total / line})
    return {"sequence_length": sequence_length, "together": together, "apart": apart}


def text(found: dict[str, Any]) -> str:
    """A report as lines to read."""
    documents, tokens, lengths, packing = (found[name] for name in ("documents", "tokens", "lengths", "packing"))
    frequent = found["vocabulary"]["most_frequent"]
    left_out = ", ".join(f"{count:,} {kind}" for kind, count in found["left_out"].items())
    lines = [
        f"documents: {documents[TRAIN]:,} to train on, {documents[VALIDATION]:,} held out, {found['shards']:,} shards",
        f"left out when the set was made: {left_out}",
        f"tokens: {tokens[TRAIN]:,} to train on, {tokens[VALIDATION]:,} held out",
        f"vocabulary: {found['vocabulary']['used']:,} of {found['vocabulary']['size']:,} tokens occur; most often "
        + ", ".join(f"{one['text']!r} {one['count'] / tokens[TRAIN]:.1%}" for one in frequent),
        f"tokens in a document: {lengths['mean']:,.1f} in the mean",
        "  " + ", ".join(f"{p}%: {length:,}" for p, length in lengths["percentiles"].items()),
        *(
            f"  up to {one['up_to']:,}: {one['documents']:,} documents, {one['tokens']:,} tokens"
            for one in lengths["histogram"]
        ),
        f"copies of earlier documents: {found['copies']['documents']:,}, {found['copies']['tokens']:,} tokens",
        *(f"  {one['times']:,} times, {one['tokens']:,} tokens: {one['text']}" for one in
          found["copies"]["most_frequent"]),
    ]  # fmt: skip
    lines.append(f"windows of {packing['sequence_length']:,} tokens")
    if "together" in packing:
        one = packing["together"]
        lines.append(
            f"  documents end to end: {one['windows']:,}, no padding, {one['tokens_left_over']:,} tokens left over, "
            f"{one['documents_in_several_windows'] / documents[TRAIN]:.1%} of the documents in several windows"
        )
    for one in packing["apart"]:
        more = f", {one['cut']:,} cut, {one['left_out']:,} left out" if "cut" in one else ""
        lines.append(f"  apart, at multiples of {one['align']}: {one['windows']:,}, {one['padding']:.1%} padding{more}")
    return "\n".join(lines)


def charts(found: dict[str, Any]) -> dict[str, str]:
    """SVG by name."""
    histogram = found["lengths"]["histogram"]
    made = {
        f"{what}_by_length": bar_chart(
            f"{what.capitalize()} by the document's length in tokens",
            [
                (f"{one['up_to']:,}", one[what], f"up to {one['up_to']:,} tokens: {one[what]:,} {what}")
                for one in histogram
            ],
        )
        for what in ("documents", "tokens")
    }
    made["padding"] = bar_chart(
        f"Padding of documents apart in windows of {found['packing']['sequence_length']:,}, %",
        [
            (str(one["align"]), 100 * one["padding"], f"at multiples of {one['align']}: {one['padding']:.2%}")
            for one in found["packing"]["apart"]
        ],
    )
    copies = found["copies"]["most_frequent"]
    made["copies"] = bar_chart(
        f"Documents that occur most often ({found['copies']['documents']:,} copies in all)",
        [(str(i), one["times"], f"{one['times']:,} times: {one['text']}") for i, one in enumerate(copies, 1)],
    )
    return made


def write(found: dict[str, Any], folder: pathlib.Path) -> None:
    """Writes report.json, report.txt and the charts."""
    (folder / "report.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder / "report.txt").write_text(text(found) + "\n", encoding="utf-8")
    for name, chart in charts(found).items():
        (folder / f"{name}.svg").write_text(chart, encoding="utf-8")
