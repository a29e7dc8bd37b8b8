"""Text made into a folder of prepared data, by several processes, resumable after any interruption.

The input is divided into parts, each of which becomes shards of its own. What a part becomes depends on its text and
the settings alone, and the manifest lists parts in the order of the input, so the result has the same bytes whatever
the number of processes and of interruptions. While it is made, the folder holds

    progress/plan.json   the settings and the input files, by which a run that goes on is known to be the same
    progress/NNNNNN.json of each finished part, the shards it gave: the part is not done again
    progress/NNNNNN.*.npy where copies are left out, of each part what tells them, and which of its rows they are; the
                         input is read once for that, before any of it is tokenized
    progress/*.PID       shards that a process is writing; they get their names when all of their part are on the disk

and it is complete when dataset.json stands there. In a store it is the same, but shards are made on this machine's disk
and sent whole, and a lease in place of a lock keeps other writers out. Input files are told by size and time of change,
not by hash: all of them would have to be read again to find that nothing has changed, and the error to be expected of a
time, that it changed without the content, leads to a refusal and to no wrong data.
"""

import contextlib
import dataclasses
import multiprocessing
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tokenizers import Tokenizer

from twotower_jax.atomic import WRITING, locked_folder
from twotower_jax.data import duplicates, inputs, prepared, shards
from twotower_jax.data.conversations import JOINS, Coder
from twotower_jax.data.documents import DataError
from twotower_jax.data.duplicates import Fingerprinter
from twotower_jax.data.inputs import File, Slice
from twotower_jax.data.parts import (
    PROGRESS,
    SHOWN_PROBLEMS,
    Part,
    Settings,
    copies_file,
    make_fingerprints,
    make_part,
    start_worker,
    token_dtype,
)
from twotower_jax.data.prepared import TRAIN, Manifest, read_json, read_manifest, write_json
from twotower_jax.data.tokenizer import EOS_ID, id_range, load_tokenizer, save_tokenizer
from twotower_jax.outputs import check_writable
from twotower_jax.paths import AnyPath, as_path, in_store

_PLAN, _COPIES = "plan.json", "copies.json"

# Bytes of text that make a token, near enough: parts of the input are as large as a shard should become.
_BYTES_PER_TOKEN = 4

_SHOWN_DIFFERENCES = 8


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

    With `settings.dedup` copies of earlier documents are left out, whatever file they are in; see duplicates.py. The
    input is then read twice.

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
    output = as_path(output)
    if in_store(output):
        check_writable(output)
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
    with _alone(output) as check:
        if prepared.is_prepared(output):
            manifest = read_manifest(output)
            _refuse_differences(output, _identity(manifest.settings, manifest.inputs), _wanted(settings, files, False))
            _refuse_other_tokenizer(output, tokenizer)
            _remove(output / PROGRESS)
            return manifest
        _begin(output, tokenizer, settings, files, tokenizer_folder if settings.template_sha256 else None)
        parts = inputs.divide(files, settings.shard_size * _BYTES_PER_TOKEN)
        copies = _find_copies(output, settings, parts, workers, quiet) if settings.dedup else None
        done = _finished_parts(output, len(parts))
        left = {number: part for number, part in enumerate(parts) if number not in done}
        progress = _Progress(_weights(parts), done, quiet)
        if left:
            done |= _run(make_part, output, settings, left, workers, progress)
        check()
        return _complete(output, tokenizer, settings, files, [done[number] for number in range(len(parts))], copies)


@contextlib.contextmanager
def _alone(output: AnyPath) -> Iterator[Callable[[], None]]:
    """Keeps every other process that would write the folder out; gives what raises if one took this one for dead."""
    busy = f"{output}: another process is writing it"
    if in_store(output):
        from twotower_jax.stores.lease import held

        with held(output / WRITING, busy) as lease:
            yield lease.check
    else:
        with locked_folder(output, busy):
            yield lambda: None


def _remove(folder: AnyPath) -> None:
    if in_store(folder):
        folder.remove_tree()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _begin(
    output: AnyPath,
    tokenizer: Tokenizer,
    settings: Settings,
    files: Sequence[File],
    source: str | pathlib.Path | None,
) -> None:
    """Sees whether the folder is new or of the same run, and clears what was left half-written."""
    folder, wanted = output / PROGRESS, _wanted(settings, files, True)
    if (folder / _PLAN).exists():
        _refuse_differences(output, read_json(folder / _PLAN), wanted)
        if (output / "tokenizer.json").exists():
            _refuse_other_tokenizer(output, tokenizer)
    elif any(entry.name not in (PROGRESS, WRITING) for entry in output.iterdir()):
        raise ValueError(f"{output}: holds other files; choose a new or empty folder")
    folder.mkdir(exist_ok=True)
    for file in () if in_store(folder) else folder.iterdir():
        if file.suffix not in (".json", ".npy"):
            file.unlink()
    write_json(folder / _PLAN, wanted)
    save_tokenizer(tokenizer, output, settings.end_token, None if source is None else as_path(source))


def _find_copies(
    output: AnyPath, settings: Settings, parts: list[list[Slice]], workers: int, quiet: bool
) -> dict[str, int]:
    """Writes for each part which of its rows are left out as copies; returns how many there are of each kind."""
    Fingerprinter(settings.near)  # so that a package that is missing is met here
    folder = output / PROGRESS
    if not (folder / _COPIES).exists():
        left = {number: part for number, part in enumerate(parts) if not duplicates.are_saved(folder, number)}
        done = [number for number in range(len(parts)) if number not in left]
        if left:
            progress = _Progress(_weights(parts), done, quiet, "looking for copies: ")
            _run(make_fingerprints, output, settings, left, workers, progress)
        rows, counts = duplicates.choose(folder, len(parts), settings.near)
        for number, own in enumerate(rows):
            duplicates.save_array(copies_file(output, number), own)
        write_json(folder / _COPIES, counts)
    return read_json(folder / _COPIES)


def _wanted(settings: Settings, files: Sequence[File], with_times: bool) -> dict[str, Any]:
    return _identity(settings.values(), [file._asdict() for file in files], with_times)


def _identity(settings: dict[str, Any], files: list[dict[str, Any]], with_times: bool = False) -> dict[str, Any]:
    """What makes a run what it is, as one flat dictionary."""
    values = dict(settings)
    for number, file in enumerate(files):
        when = f", changed at {file['changed']} ns" if with_times else ""
        values[f"input {number}"] = f"{file['path']}, {file['size']} bytes{when}"
    return values


def _refuse_differences(output: AnyPath, saved: dict[str, Any], now: dict[str, Any]) -> None:
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


def _refuse_other_tokenizer(output: AnyPath, tokenizer: Tokenizer) -> None:
    if load_tokenizer(output).to_str() != tokenizer.to_str():
        raise ValueError(f"{output} holds data of another tokenizer; use the same one, or another folder")


def _finished_parts(output: AnyPath, count: int) -> dict[int, Part]:
    """The parts whose record and whose shards, by name and size, are there."""
    found = {}
    there = {entry.name for entry in (output / PROGRESS).iterdir()}
    for number in range(count):
        path = output / PROGRESS / f"{number:06d}.json"
        if path.name in there:
            raw = read_json(path)
            part = Part(**raw | {"shards": [shards.parse(shard) for shard in raw["shards"]]})
            with contextlib.suppress(DataError, ValueError):
                for shard in part.shards:
                    shards.check(output / shard.name, shard, content=False)
                found[number] = part
    return found


def _complete(
    output: AnyPath,
    tokenizer: Tokenizer,
    settings: Settings,
    files: Sequence[File],
    parts: list[Part],
    copies: dict[str, int] | None,
) -> Manifest:
    listed = [shard for part in parts for shard in part.shards]
    manifest = Manifest(
        tokenizer_sha256=shards.size_and_sha256(output / "tokenizer.json")[1],
        vocab_size=id_range(tokenizer),
        dtype=token_dtype(tokenizer).name,
        settings=settings.values(),
        inputs=[{"path": file.path, "size": file.size} for file in files],
        skipped=sum(part.skipped for part in parts),
        shards=listed,
        copies=copies,
    )
    if not manifest.total(TRAIN, "documents"):
        raise DataError(f"{files[0].path} and the other inputs: no document is left to train on")
    if manifest.skipped:
        shown = [problem for part in parts for problem in part.problems][:SHOWN_PROBLEMS]
        dots = "; ..." if manifest.skipped > len(shown) else ""
        print(f"skipped {manifest.skipped:,} broken rows or files: {'; '.join(shown)}{dots}", file=sys.stderr)
    if left_out := sum(part.left_out for part in parts):
        names = [name for part in parts for name in part.members]
        print(inputs.said_of_members(left_out, names), file=sys.stderr)
    manifest.write(output)
    _remove(output / PROGRESS)
    return manifest


def _run[T](
    work: Callable[[int, list[Slice]], T],
    output: AnyPath,
    settings: Settings,
    parts: dict[int, list[Slice]],
    workers: int,
    progress: "_Progress",
) -> dict[int, T]:
    """Gives the parts to worker processes; returns what the work gives of each."""
    context = multiprocessing.get_context("spawn")
    weight, tokens = context.Value("d", 0.0), context.Value("q", 0)
    stop = context.Event()
    done: dict[int, T] = {}
    with ProcessPoolExecutor(
        min(workers, len(parts)),
        context,
        initializer=start_worker,
        initargs=(str(output), settings, weight, tokens, stop),
    ) as pool:
        try:
            running = {pool.submit(work, number, part): number for number, part in parts.items()}
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


def _weights(parts: list[list[Slice]]) -> list[int]:
    return [sum(piece.weight for piece in part) for part in parts]


class _Progress:
    """Tokens a second and time left, on stderr: twice a second, or every 10 s where nobody watches."""

    def __init__(self, weights: list[int], done: Collection[int], quiet: bool, label: str = ""):
        self._total = max(1, sum(weights))
        self._before = sum(weights[number] for number in done)
        self._quiet, self._label = quiet, label
        self._start = self._printed = time.monotonic()

    def show(self, weight: float, tokens: int, last: bool = False) -> None:
        """Prints a line if it is time, or `last`, given what has been read and made since the start."""
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if self._quiet or not (last or now - self._printed >= (0.5 if terminal else 10)):
            return
        self._printed, seconds = now, max(now - self._start, 1e-9)
        share = min(1.0, (self._before + weight) / self._total)
        left = (self._total - self._before - weight) * seconds / weight if weight else float("inf")
        made = "" if self._label else f"{tokens:,} tokens, {tokens / seconds:,.0f} tokens/s, "
        line = (
            f"{self._label}{share:.1%} of the input, {made}{seconds:.0f} s, "
            f"{f'{max(0, left):.0f} s left' if weight else 'time left unknown'}"
        )
        print(line, end="\n" if last or not terminal else "\r", file=sys.stderr, flush=True)
