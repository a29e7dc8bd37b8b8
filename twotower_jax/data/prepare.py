"""Text made into a folder of prepared data, by several processes, resumable after any interruption.

The input is divided into parts, each of which becomes shards of its own. What a part becomes depends on its text and
the settings alone, and the manifest lists parts in the order of the input, so the result has the same bytes whatever
the number of processes and of interruptions. While it is made, the folder holds

    progress/plan.json   the settings and the input files, by which a run that goes on is known to be the same
    progress/NNNNNN.json of each finished part, the shards it gave: the part is not done again
    progress/*.PID       shards that a process is writing; they get their names when all of their part are on the disk

and it is complete when dataset.json stands there. Input files are told by size and time of change, not by hash: all of
them would have to be read again to find that nothing has changed, and the error to be expected of a time, that it
changed without the content, leads to a refusal and to no wrong data.
"""

import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
import pathlib
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from twotower_jax.atomic import locked_folder
from twotower_jax.data import inputs, prepared, shards
from twotower_jax.data.conversations import JOINS, Coder, Encoding
from twotower_jax.data.documents import DataError
from twotower_jax.data.inputs import File, Row, Slice
from twotower_jax.data.prepared import TRAIN, VALIDATION, Manifest, read_json, read_manifest, write_json
from twotower_jax.data.rows import Field
from twotower_jax.data.shards import Shard, ShardWriter
from twotower_jax.data.tokenizer import EOS_ID, encode, id_range, load_tokenizer, save_tokenizer

_PROGRESS, _PLAN = "progress", "plan.json"

# Bytes of text that make a token, near enough: parts of the input are as large as a shard should become.
_BYTES_PER_TOKEN = 4

# Characters, or documents, that are tokenized at a time.
_CHUNK_CHARACTERS, _CHUNK_DOCUMENTS = 1 << 20, 1024

_SHOWN_PROBLEMS, _SHOWN_DIFFERENCES = 3, 8


@dataclasses.dataclass(frozen=True)
class Settings:
    """How text becomes data.

    Attributes:
      text_field: of JSON Lines and Parquet, where a row's text stands.
      validation_fraction: the chance of each document to be held out.
      seed: of that choice.
      shard_size: tokens in a shard, about.
      skip_bad: leave out what is broken, and count it, instead of giving up.
      end_token: the token that closes every document.
      end_tokens: of conversations, all that end an answer, the first of which closes one that has none.
      template_sha256: of conversations, that of their chat template, "" without one; None for other texts. `prepare`
        sees to it.

    Raises:
      ValueError: at construction, for values that cannot be.
    """

    text_field: str = "text"
    validation_fraction: float = 0.0
    seed: int = 0
    shard_size: int = 1 << 28
    skip_bad: bool = False
    end_token: int = EOS_ID
    end_tokens: tuple[int, ...] = ()
    template_sha256: str | None = None

    def __post_init__(self):
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must be at least 0 and less than 1, not {self.validation_fraction}")
        if self.shard_size < 1:
            raise ValueError(f"shard_size must be positive, not {self.shard_size}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be at least 0 and less than 2**32, not {self.seed}")

    @property
    def conversational(self) -> bool:
        return self.template_sha256 is not None

    def values(self) -> dict[str, Any]:
        """JSON-able, those of conversations only where there are some."""
        values = dataclasses.asdict(self) | {"end_tokens": list(self.end_tokens)}
        if not self.conversational:
            del values["end_tokens"], values["template_sha256"]
        return values


class Part(NamedTuple):
    """What became of a part: its shards, how much was broken with the first problems as lines, and how many files of
    archives were left out as no text, with the first names."""

    shards: list[Shard]
    skipped: int = 0
    problems: Sequence[str] = ()
    left_out: int = 0
    members: Sequence[str] = ()


def prepare(
    sources: Sequence[str],
    output: str | pathlib.Path,
    tokenizer: Tokenizer,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    *,
    workers: int = 1,
    quiet: bool = False,
    tokenizer_folder: str | pathlib.Path | None = None,
) -> Manifest:
    """Makes a folder of prepared data, or goes on where an interrupted run stopped.

    Each document's tokens are followed by `settings.end_token`, and nothing else is added, as in packing.py. A
    document is held out by the hash of its text and the seed, so copies of one document stay on one side.

    Where the first row is a conversation, all rows are to be. What they become is said in conversations.py.

    Args:
      sources: files, folders and patterns; see `inputs.find_files`.
      output: the folder; new, empty, or of an interrupted run.
      tokenizer: its files become part of the data.
      settings: see `Settings`.
      workers: processes, each of which tokenizes in one thread.
      quiet: print no progress.
      tokenizer_folder: where the tokenizer's chat template is, for conversations; it becomes part of the data.

    Raises:
      ValueError: the folder holds something else or data of other settings or inputs (the message lists what differs),
        another process is writing it, or the inputs cannot be used.
      DataError: the input is broken, and `skip_bad` is not set; or holds no document.
      OSError: reading or writing failed, or a worker died.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    if tokenizer.id_to_token(settings.end_token) is None:
        raise ValueError(
            f"the tokenizer has no token {settings.end_token} to close documents with; give one with --eos"
        )
    output = pathlib.Path(output)
    files = inputs.find_files(sources, settings.text_field, report=lambda line: quiet or print(line, file=sys.stderr))
    if inputs.holds_conversations(files, settings.text_field):
        ends = settings.end_tokens or (settings.end_token,)
        coder = Coder(tokenizer, tokenizer_folder, ends)  # so that a template that cannot be used is met here
        settings = dataclasses.replace(settings, end_tokens=ends, template_sha256=coder.template_sha256)
        if coder.joins and not quiet:
            print(JOINS, file=sys.stderr)
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: is a file; choose a folder")
    output.mkdir(parents=True, exist_ok=True)
    with locked_folder(output, f"{output}: another process is writing it"):
        if prepared.is_prepared(output):
            manifest = read_manifest(output)
            _refuse_differences(output, _identity(manifest.settings, manifest.inputs), _wanted(settings, files, False))
            _refuse_other_tokenizer(output, tokenizer)
            shutil.rmtree(output / _PROGRESS, ignore_errors=True)
            return manifest
        _begin(output, tokenizer, settings, files, tokenizer_folder if settings.template_sha256 else None)
        parts = inputs.divide(files, settings.shard_size * _BYTES_PER_TOKEN)
        done = _finished_parts(output, len(parts))
        left = {number: part for number, part in enumerate(parts) if number not in done}
        progress = _Progress(_weights(parts), done, quiet)
        if left:
            done |= _run(output, settings, left, min(workers, len(left)), progress)
        return _complete(output, tokenizer, settings, files, [done[number] for number in range(len(parts))])


def _begin(
    output: pathlib.Path,
    tokenizer: Tokenizer,
    settings: Settings,
    files: Sequence[File],
    source: str | pathlib.Path | None,
) -> None:
    """Sees whether the folder is new or of the same run, and clears what was left half-written."""
    folder, wanted = output / _PROGRESS, _wanted(settings, files, True)
    if (folder / _PLAN).exists():
        _refuse_differences(output, read_json(folder / _PLAN), wanted)
        if (output / "tokenizer.json").exists():
            _refuse_other_tokenizer(output, tokenizer)
    elif any(entry != folder for entry in output.iterdir()):
        raise ValueError(f"{output}: holds other files; choose a new or empty folder")
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        if file.suffix != ".json":
            file.unlink()
    write_json(folder / _PLAN, wanted)
    save_tokenizer(tokenizer, output, settings.end_token, None if source is None else pathlib.Path(source))


def _wanted(settings: Settings, files: Sequence[File], with_times: bool) -> dict[str, Any]:
    return _identity(settings.values(), [file._asdict() for file in files], with_times)


def _identity(settings: dict[str, Any], files: list[dict[str, Any]], with_times: bool = False) -> dict[str, Any]:
    """What makes a run what it is, as one flat dictionary."""
    values = dict(settings)
    for number, file in enumerate(files):
        when = f", changed at {file['changed']} ns" if with_times else ""
        values[f"input {number}"] = f"{file['path']}, {file['size']} bytes{when}"
    return values


def _refuse_differences(output: pathlib.Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    saved = {"end_token": EOS_ID} | saved  # Sets made before there was a choice do not name it.
    names = [name for name in saved | now if saved.get(name) != now.get(name)]
    lines = [f"{name} {saved.get(name, 'absent')} -> {now.get(name, 'absent')}" for name in names]
    if len(lines) > _SHOWN_DIFFERENCES:
        lines[_SHOWN_DIFFERENCES:] = [f"and {len(lines) - _SHOWN_DIFFERENCES} more"]
    if lines:
        raise ValueError(
            f"{output} holds data of other settings or inputs (there -> now): {'; '.join(lines)}. Use the same ones, "
            "or another folder"
        )


def _refuse_other_tokenizer(output: pathlib.Path, tokenizer: Tokenizer) -> None:
    if load_tokenizer(output).to_str() != tokenizer.to_str():
        raise ValueError(f"{output} holds data of another tokenizer; use the same one, or another folder")


def _finished_parts(output: pathlib.Path, count: int) -> dict[int, Part]:
    """The parts whose record and whose shards, by name and size, are there."""
    found = {}
    for number in range(count):
        path = output / _PROGRESS / f"{number:06d}.json"
        if path.exists():
            raw = read_json(path)
            part = Part(**raw | {"shards": [shards.parse(shard) for shard in raw["shards"]]})
            with contextlib.suppress(DataError, ValueError):
                for shard in part.shards:
                    shards.check(output / shard.name, shard, content=False)
                found[number] = part
    return found


def _complete(
    output: pathlib.Path, tokenizer: Tokenizer, settings: Settings, files: Sequence[File], parts: list[Part]
) -> Manifest:
    listed = [shard for part in parts for shard in part.shards]
    manifest = Manifest(
        tokenizer_sha256=shards.size_and_sha256(output / "tokenizer.json")[1],
        vocab_size=id_range(tokenizer),
        dtype=_dtype(tokenizer).name,
        settings=settings.values(),
        inputs=[{"path": file.path, "size": file.size} for file in files],
        skipped=sum(part.skipped for part in parts),
        shards=listed,
    )
    if not manifest.total(TRAIN, "documents"):
        raise DataError(f"{files[0].path} and the other inputs: no document is left to train on")
    if manifest.skipped:
        shown = [problem for part in parts for problem in part.problems][:_SHOWN_PROBLEMS]
        dots = "; ..." if manifest.skipped > len(shown) else ""
        print(f"skipped {manifest.skipped:,} broken rows or files: {'; '.join(shown)}{dots}", file=sys.stderr)
    if left_out := sum(part.left_out for part in parts):
        names = [name for part in parts for name in part.members]
        print(inputs.said_of_members(left_out, names), file=sys.stderr)
    manifest.write(output)
    shutil.rmtree(output / _PROGRESS)
    return manifest


def _run(
    output: pathlib.Path, settings: Settings, parts: dict[int, list[Slice]], workers: int, progress: "_Progress"
) -> dict[int, Part]:
    """Gives the parts to worker processes."""
    context = multiprocessing.get_context("spawn")
    weight, tokens = context.Value("d", 0.0), context.Value("q", 0)
    stop = context.Event()
    done: dict[int, Part] = {}
    with ProcessPoolExecutor(
        workers, context, initializer=_start_worker, initargs=(str(output), settings, weight, tokens, stop)
    ) as pool:
        try:
            running = {pool.submit(_make_part, number, part): number for number, part in parts.items()}
            while running:
                finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in finished:
                    done[running.pop(future)] = future.result()
                progress.show(weight.value, tokens.value)
            progress.show(weight.value, tokens.value, last=True)
        except BrokenProcessPool:
            raise OSError(f"{output}: a worker process died (out of memory?); the same command goes on") from None
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return done


# In the worker processes.


class _Worker(NamedTuple):
    output: pathlib.Path
    settings: Settings
    tokenizer: Tokenizer
    coder: Coder | None
    weight: Any
    tokens: Any
    stop: Any


_worker: _Worker


def _start_worker(output: str, settings: Settings, weight: Any, tokens: Any, stop: Any) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop
    folder = pathlib.Path(output)
    tokenizer, coder = load_tokenizer(folder), None
    if settings.conversational:
        coder = Coder(tokenizer, folder if settings.template_sha256 else None, settings.end_tokens)
    _worker = _Worker(folder, settings, tokenizer, coder, weight, tokens, stop)
    # Nobody would tell a worker whose parent was killed; it would wait for its next part for ever.
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    wait_for([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _make_part(number: int, part: list[Slice]) -> Part:
    """Tokenizes a part and writes its shards and its record."""
    output, settings, tokenizer = _worker.output, _worker.settings, _worker.tokenizer
    writers = {s: _SplitWriter(number, s, output / _PROGRESS, settings.shard_size, _dtype(tokenizer))
               for s in (TRAIN, VALIDATION)}  # fmt: skip
    skipped, problems, left_out, members = 0, [], 0, []
    encoding = None if _worker.coder is None else Encoding(_worker.coder)
    for rows, weight in _chunks(part, settings.text_field if encoding is None else encoding):
        if _worker.stop.is_set():
            raise InterruptedError("another part failed")
        for problem in (row.problem for row in rows if row.problem):
            if not settings.skip_bad:
                raise DataError(problem)
            skipped += 1
            problems = [*problems, problem][:_SHOWN_PROBLEMS]
        for member in (row.left_out for row in rows if row.left_out):
            left_out += 1
            members = [*members, member][:_SHOWN_PROBLEMS]
        texts = [row.text for row in rows if row.text is not None]
        tokens = 0
        if encoding is None:
            end = np.int32(settings.end_token)
            documents = ((np.append(ids, end), None) for ids in encode(tokenizer, texts))
        else:
            documents = [encoding.turns[text] for text in texts]
            encoding.turns.clear()
        for text, (ids, parts) in zip(texts, documents, strict=True):
            split = VALIDATION if _is_held_out(text, settings) else TRAIN
            writers[split].add(ids, parts)
            tokens += len(ids)
        with _worker.weight.get_lock():
            _worker.weight.value += weight
            _worker.tokens.value += tokens
    made = [pair for writer in writers.values() for pair in writer.finish()]
    for partial, shard in made:
        os.replace(partial, output / shard.name)
    result = Part([shard for _, shard in made], skipped, problems, left_out, members)
    values = result._asdict() | {"shards": [shard._asdict() for shard in result.shards]}
    write_json(output / _PROGRESS / f"{number:06d}.json", values)
    return result


class _SplitWriter:
    """The shards of one split of one part; a new one begins where the next document would exceed the size."""

    def __init__(self, part: int, split: str, folder: pathlib.Path, shard_size: int, dtype: np.dtype):
        self._stem, self._split, self._folder = f"{split}-{part:06d}", split, folder
        self._shard_size, self._dtype = shard_size, dtype
        self._current: ShardWriter | None = None
        self._done: list[tuple[pathlib.Path, Shard]] = []

    def add(self, ids: np.ndarray, parts: np.ndarray | None = None) -> None:
        if self._current is not None and self._current.tokens + len(ids) > self._shard_size:
            self._close()
        if self._current is None:
            self._current = ShardWriter(self._partial(), self._dtype)
        self._current.add(ids, parts)

    def finish(self) -> list[tuple[pathlib.Path, Shard]]:
        """Each shard and where it lies for now."""
        if self._current is not None:
            self._close()
        return self._done

    def _close(self) -> None:
        self._done.append((self._partial(), self._current.finish(self._name(), self._split)))
        self._current = None

    def _name(self) -> str:
        return f"{self._stem}-{len(self._done):03d}.array_record"

    def _partial(self) -> pathlib.Path:
        return self._folder / f"{self._name()}.{os.getpid()}"


def _chunks(part: list[Slice], field: Field) -> Iterator[tuple[list[Row], float]]:
    """The rows of a part, some at a time, and the weight of the input that they took."""
    rows: list[Row] = []
    characters = given = before = 0.0
    for piece in part:
        for row in inputs.read_rows(piece, field):
            rows.append(row)
            characters += len(row.text or "")
            if characters >= _CHUNK_CHARACTERS or len(rows) >= _CHUNK_DOCUMENTS:
                at = before + row.done * piece.weight
                yield rows, at - given
                rows, characters, given = [], 0, at
        before += piece.weight
    yield rows, before - given


def _is_held_out(text: str, settings: Settings) -> bool:
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=settings.seed.to_bytes(4, "little")).digest()
    return int.from_bytes(digest, "little") < settings.validation_fraction * 2**64


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if max(id_range(tokenizer), EOS_ID + 1) <= 1 << 16 else "<u4")


def _weights(parts: list[list[Slice]]) -> list[int]:
    return [sum(piece.weight for piece in part) for part in parts]


class _Progress:
    """Tokens a second and time left, on stderr: twice a second, or every 10 s where nobody watches."""

    def __init__(self, weights: list[int], done: dict[int, Part], quiet: bool):
        self._total = max(1, sum(weights))
        self._before = sum(weights[number] for number in done)
        self._quiet = quiet
        self._start = self._printed = time.monotonic()

    def show(self, weight: float, tokens: int, last: bool = False) -> None:
        """Prints a line if it is time, or `last`, given what has been read and made since the start."""
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if self._quiet or not (last or now - self._printed >= (0.5 if terminal else 10)):
            return
        self._printed, seconds = now, max(now - self._start, 1e-9)
        share = min(1.0, (self._before + weight) / self._total)
        left = (self._total - self._before - weight) * seconds / weight if weight else float("inf")
        line = (
            f"{share:.1%} of the input, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s, {seconds:.0f} s, "
            f"{f'{max(0, left):.0f} s left' if weight else 'time left unknown'}"
        )
        print(line, end="\n" if last or not terminal else "\r", file=sys.stderr, flush=True)
