"""How fast batches are read from each kind of data, how fast text is prepared, and what a train step needs of them.

Makes its own data in a temporary folder, and removes them afterwards.
"""

import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from absl import flags

from twotower_jax import command_line
from twotower_jax.benchmarks import _input_processes
from twotower_jax.data import TrainingData, python_documentation, save_tokenizer, train_tokenizer
from twotower_jax.data.opening import Data, Packing
from twotower_jax.data.prepare import Settings, prepare
from twotower_jax.data.prepared import PreparedDocuments
from twotower_jax.planning.plan import UTILIZATION
from twotower_jax.train.config import freeze, shipped
from twotower_jax.train.flops import PEAK_FLOPS, step_flops

_ROOT = pathlib.Path(__file__).parents[2]
_VOCAB_SIZE = 8192

# Hosts, by the devices that JAX counts: of which each feeds so many.
_HOSTS = {"TPU v5": 4, "TPU v6e": 8, "NVIDIA H200": 8, "TPU7x": 8}


def define_flags() -> None:
    command_line.DEFINE_path("directory", None, "Where to work; default is the system's temporary folder.")
    flags.DEFINE_integer("megabytes", 48, "Text to prepare and to read.", lower_bound=1)
    flags.DEFINE_float("seconds", 3.0, "How long to read from each kind.", lower_bound=0.1)
    flags.DEFINE_list("workers", ["1", "2", "8"], "Processes that prepare, or that read the rows of a batch together.")
    flags.DEFINE_bool("train", True, "Also train some steps of configs/tiny.py, for comparison.")


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    workers = command_line.numbers(flags.FLAGS["workers"], int, 1)
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}", flush=True)
    with tempfile.TemporaryDirectory(dir=flags.FLAGS.directory) as scratch:
        folder = pathlib.Path(scratch)
        _make_text(folder / "text")
        documents = python_documentation()
        tokenizer = train_tokenizer(documents, _VOCAB_SIZE)
        for count in workers:
            prepared = folder / f"prepared{count}"
            _measure_prepare(folder / "text", prepared, tokenizer, count)
        _make_megatron(prepared, folder / "megatron")
        entries = {"prepared": {"path": str(prepared), "weight": 0.7}, "megatron": {"path": "megatron", "weight": 0.3}}
        (folder / "mixture.json").write_text(json.dumps(entries))
        save_tokenizer(tokenizer, folder / "tokenizer")
        (folder / "memory.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        sources = {
            "text in memory": (folder / "memory.jsonl", None),
            "prepared": (prepared, None),
            "prepared, documents told apart": (prepared, 32),
            "Megatron": (folder / "megatron", None),
            "Megatron, documents told apart": (folder / "megatron", 32),
            "mixture 0.7 : 0.3": (folder / "mixture.json", None),
        }
        for length, batch_size in ((256, 64), (8192, 4)):
            for name, (path, align) in sources.items():
                packing = Packing(length, _VOCAB_SIZE, 0.01, 0, align)
                clock, processor = _reading_rates(Data(str(path)).windows(tokenizer, packing)[0], batch_size)
                print(f"read, {batch_size} x {length}, {name}: {clock / 1e6:.1f} M tokens/s, {processor / 1e6:.1f} M a "
                      "second of processor time", flush=True)  # fmt: skip
        for length, batch_size in ((256, 64), (8192, 8)):
            packing = Packing(length, _VOCAB_SIZE, 0.01, 0, 32)
            for count in (count for count in workers if batch_size % count == 0):
                clock, processor = _input_processes.rates(
                    prepared, folder / "tokenizer", packing, batch_size, count, flags.FLAGS.seconds
                )
                print(f"read by {count} processes, {batch_size} x {length}, prepared, documents told apart: "
                      f"{clock / 1e6:.1f} M tokens/s, {processor / 1e6:.1f} M a second of processor time; with a core "
                      f"each {count * processor / 1e6:.1f} M", flush=True)  # fmt: skip
        if flags.FLAGS.train:
            print(f"train, configs/tiny.py on this machine: {_training_rate(folder):,.0f} tokens/s", flush=True)
    for name in ("nano4b", "nano30b"):
        config = freeze(shipped(name))
        flops = step_flops(config, config.model_config(config.vocab_size), config.block_sizes[-1])
        a_token = flops / (config.batch_size * config.sequence_length)
        for kind, devices in _HOSTS.items():
            needed = UTILIZATION * PEAK_FLOPS[kind] * devices / a_token
            print(f"{name} on a host of {devices} devices of {kind}, by arithmetic: {needed:,.0f} tokens/s")


def _make_text(folder: pathlib.Path) -> None:
    """JSON Lines of paragraphs of Python's documentation in random order, in files of 8 MB."""
    folder.mkdir()
    paragraphs = [part for page in python_documentation() for part in page.split("\n\n") if part.strip()]
    rng, size = np.random.default_rng(0), 8_000_000
    for number in range(max(1, flags.FLAGS.megabytes * 1_000_000 // size)):
        with (folder / f"{number:03d}.jsonl").open("w", encoding="utf-8") as file:
            while file.tell() < size:
                chosen = rng.integers(0, len(paragraphs), rng.integers(2, 40))
                file.write(json.dumps({"text": "\n\n".join(paragraphs[i] for i in chosen)}) + "\n")


def _measure_prepare(text: pathlib.Path, output: pathlib.Path, tokenizer, workers: int) -> None:
    settings = Settings(validation_fraction=0.01, shard_size=1 << 21)
    started, used = time.monotonic(), _children_seconds()
    manifest = prepare([str(text)], output, tokenizer, settings, workers=workers, quiet=True)
    seconds, processor = time.monotonic() - started, _children_seconds() - used
    tokens = manifest.total("train", "tokens") + manifest.total("validation", "tokens")
    size = sum(file["size"] for file in manifest.inputs)
    print(f"prepare, workers={workers}: {tokens / seconds / 1e6:.2f} M tokens/s, {size / seconds / 1e6:.1f} MB/s, "
          f"{seconds:.0f} s with starting the processes; {tokens / processor / 1e6:.2f} M tokens per processor second",
          flush=True)  # fmt: skip


def _children_seconds() -> float:
    """Processor time of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _make_megatron(prepared: pathlib.Path, prefix: pathlib.Path) -> None:
    """The training documents of a prepared folder as a Megatron set."""
    documents = PreparedDocuments(prepared, "train")
    lengths = documents.lengths(0, documents.count).astype("<i4")
    documents.read(0, documents.tokens).astype("<i4").tofile(prefix.with_suffix(".bin"))
    offsets = 4 * (np.cumsum(lengths, dtype="<i8") - lengths)
    header = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + bytes([4])
    header += len(lengths).to_bytes(8, "little") + (len(lengths) + 1).to_bytes(8, "little")
    borders = np.arange(len(lengths) + 1, dtype="<i8")
    prefix.with_suffix(".idx").write_bytes(header + lengths.tobytes() + offsets.tobytes() + borders.tobytes())


def _reading_rates(windows, batch_size: int) -> tuple[float, float]:
    """Tokens a second by the clock, and a second of processor time, of an iterator that only gives batches."""
    data = TrainingData(windows, batch_size=batch_size, seed=0)
    next(data)
    started, used, tokens = time.monotonic(), time.process_time(), 0
    while time.monotonic() - started < flags.FLAGS.seconds:
        tokens += next(data)["ids"].size
    return tokens / (time.monotonic() - started), tokens / (time.process_time() - used)


def _training_rate(folder: pathlib.Path) -> float:
    """Tokens a second of the demonstration's steps 11 to 20."""
    command = [sys.executable, _ROOT / "launch" / "train.py", f"--config={_ROOT / 'configs' / 'tiny.py'}",
               f"--workdir={folder / 'run'}", "--config.steps=20", "--config.validation_fraction=0.0"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"training failed with status {done.returncode}: {done.stderr}")
    rows = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return json.loads(rows[-1])["tokens_per_second"]
