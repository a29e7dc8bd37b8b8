"""Breaks checkpoint folders in seeded ways and counts how each is met: refused in one clear message, or loaded exactly.

Anything else (another exception, other values than the folder holds, something left over, more than a second of work)
is a failure. The ways are those of `_mutations.py`; the same seed gives the same folders.
"""

import collections
import contextlib
import io
import json
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

import jax
import numpy as np
from absl import flags

from campaigns._mutations import CONVERTED, HUGGING_FACE, Mutation
from twotower_jax import parameters
from twotower_jax.benchmarks._synthetic import tensors_of
from twotower_jax.checkpoint import store
from twotower_jax.checkpoint.convert import convert
from twotower_jax.checkpoint.export import stored_tensors
from twotower_jax.checkpoint.folder_writing import write_folder
from twotower_jax.checkpoint.manifest import digest_file
from twotower_jax.config import ModelConfig
from twotower_jax.files import CheckpointError
from twotower_jax.parameters import parameter_table
from twotower_jax.two_tower import Backbone, TwoTower

REFUSED, EXACT = "refused", "loaded exactly"
_SECONDS = 1.0  # Processor seconds that a refusal may take in the command; tests do not look at the clock.
_CONFIG = ModelConfig(
    vocab_size=24,
    hidden_size=8,
    hybrid_override_pattern="M*EM*E-",
    mamba_num_heads=2,
    mamba_head_dim=4,
    ssm_state_size=4,
    n_groups=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    intermediate_size=12,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=6,
    moe_shared_expert_intermediate_size=10,
)


class Target(NamedTuple):
    """A kind of folder, the ways to break it, and what is done with it.

    Attributes:
      attempt: `(folder, output)`: loads or converts; raises CheckpointError, or returns what is wrong with the result,
        "" for nothing.
    """

    folder: pathlib.Path
    mutations: dict[str, Mutation]
    attempt: Callable[[pathlib.Path, pathlib.Path], str]


class Outcome(NamedTuple):
    """What became of one broken folder.

    Attributes:
      verdict: REFUSED, EXACT, or what went wrong.
      seconds: of processor time, which other work on the machine does not change.
    """

    target: str
    mutation: str
    verdict: str
    seconds: float


def define_flags() -> None:
    flags.DEFINE_integer("mutations", 2000, "How many folders to break.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the first; each further one has the next.")


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    outcomes = []
    start = time.monotonic()
    for number, outcome in enumerate(run(flags.FLAGS.mutations, flags.FLAGS.seed), 1):
        outcomes.append(outcome)
        if outcome.verdict not in (REFUSED, EXACT):
            print(f"seed {flags.FLAGS.seed + number - 1}: {outcome}", flush=True)
        elif number % 100 == 0:
            print(f"{number} of {flags.FLAGS.mutations}, {time.monotonic() - start:.0f} s", flush=True)
    print(table(outcomes))
    slow = [outcome for outcome in outcomes if outcome.verdict == REFUSED and outcome.seconds > _SECONDS]
    for outcome in slow:
        print(f"more than {_SECONDS} s to refuse: {outcome}")
    if slow or any(outcome.verdict not in (REFUSED, EXACT) for outcome in outcomes):
        raise SystemExit(1)


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as a Markdown table, one row for each way."""
    rows = collections.defaultdict(list)
    for outcome in outcomes:
        rows[outcome.target, outcome.mutation].append(outcome)
        rows["all", ""].append(outcome)
    lines = ["| folder | broken | tries | refused | loaded exactly | else | slowest refusal |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|")
    for (target, mutation), found in sorted(rows.items()):
        counts = collections.Counter(outcome.verdict for outcome in found)
        slowest = max((outcome.seconds for outcome in found if outcome.verdict == REFUSED), default=0.0)
        other = len(found) - counts[REFUSED] - counts[EXACT]
        cells = (target, mutation, len(found), counts[REFUSED], counts[EXACT], other, f"{slowest * 1000:.0f} ms")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def run(count: int, seed: int) -> Iterator[Outcome]:
    """Breaks `count` folders, in turn of each kind."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        targets = _targets(pathlib.Path(scratch) / "whole")
        kinds = [(name, mutation) for name, target in targets.items() for mutation in target.mutations]
        for number in range(seed, seed + count):
            name, mutation = kinds[number % len(kinds)]
            yield _try(pathlib.Path(scratch) / "broken", name, targets[name], mutation, Random(number))


def _try(scratch: pathlib.Path, name: str, target: Target, mutation: str, rng: Random) -> Outcome:
    folder, output = scratch / "folder", scratch / "output"
    shutil.copytree(target.folder, folder)
    target.mutations[mutation](folder, rng)
    before = _state(folder)
    start = time.process_time()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            verdict = target.attempt(folder, output) or EXACT
    except CheckpointError as error:
        verdict = REFUSED if str(folder) in str(error) else f"names no file: {error}"
    except BaseException as error:  # Whatever else comes out is what this looks for.
        verdict = f"{type(error).__name__}: {error}"
    seconds = time.process_time() - start
    if verdict == REFUSED:
        left = sorted(entry.name for entry in scratch.iterdir() if entry.name != "folder")
        if left:
            verdict = f"left over: {left}"
    if pathlib.Path("executed").exists():
        verdict = "executed foreign code"
    if _state(folder) != before:
        verdict = "changed the folder"
    shutil.rmtree(scratch)
    return Outcome(name, mutation, verdict, seconds)


def _state(folder: pathlib.Path) -> list[tuple]:
    """Names, sizes and times of everything in a folder."""
    states = ((path, path.lstat()) for path in sorted(folder.rglob("*")))
    return [(str(path), state.st_mode, state.st_size, state.st_mtime_ns) for path, state in states]


def _targets(whole: pathlib.Path) -> dict[str, Target]:
    """Whole folders of each kind."""
    whole.mkdir()
    targets = {}
    for name, model in (("two-tower", TwoTower(_CONFIG)), ("backbone", Backbone(_CONFIG))):
        tensors = tensors_of(parameter_table(model), seed=1)
        size = sum(tensor.size for tensor in tensors.values())
        small = {"config.json": json.dumps(_CONFIG.to_hf(), indent=1).encode(), "tokenizer.json": b"{}"}
        with contextlib.redirect_stderr(io.StringIO()):
            write_folder(whole / name, tensors, small, size // 2)
        targets[name] = Target(whole / name, HUGGING_FACE, _convert)
    known = {file.name: digest_file(file).sha256 for file in (whole / "two-tower").iterdir()}
    data_only = {"data bits": HUGGING_FACE["data bits"], "any file": HUGGING_FACE["any file"]}
    targets["two-tower, hashes known"] = Target(
        whole / "two-tower", data_only, lambda folder, output: _convert(folder, output, known)
    )
    with contextlib.redirect_stderr(io.StringIO()):
        convert(whole / "two-tower", whole / "converted")
    flat = {path: np.asarray(array) for path, array in parameters.flatten(store.load(whole / "converted")[1]).items()}

    def load(folder: pathlib.Path, output: pathlib.Path) -> str:
        found = parameters.flatten(store.load(folder)[1])
        same = found.keys() == flat.keys() and all(_equal(flat[path], np.asarray(found[path])) for path in flat)
        return "" if same else "loaded other values"

    targets["converted"] = Target(whole / "converted", CONVERTED, load)
    return targets


def _convert(folder: pathlib.Path, output: pathlib.Path, expected: dict[str, str] | None = None) -> str:
    """Converts, and holds the result against the source as the simplest of readers sees it."""
    convert(folder, output, expected=expected or {})
    found = {name: tensor.read() for name, tensor in stored_tensors(store.open_store(output)).items()}
    source = {}
    for file in folder.glob("*.safetensors"):
        source |= naive_read(file)
    for name, (dtype, shape, content) in source.items():
        for target in _targets_of(name):
            tensor = found[target]
            if (str(tensor.dtype), list(tensor.shape), tensor.tobytes()) != (dtype, shape, content):
                return f"{name}: other values"
    return ""


def naive_read(path: pathlib.Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of the tensors of a file, without any check."""
    blob = path.read_bytes()
    start = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:start])
    header.pop("__metadata__", None)
    dtypes = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    return {
        name: (dtypes[entry["dtype"]], entry["shape"], blob[slice(*(start + o for o in entry["data_offsets"]))])
        for name, entry in header.items()
    }


def _targets_of(name: str) -> list[str]:
    if name.startswith("backbone."):
        return [name.replace("backbone.", tower, 1) for tower in ("context_tower.", "denoiser_tower.")]
    return [name]


def _equal(first: np.ndarray, second: np.ndarray) -> bool:
    return (first.dtype, first.shape, first.tobytes()) == (second.dtype, second.shape, second.tobytes())
