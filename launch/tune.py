"""Finds the setting of diffusion for a checkpoint, given prompts and this machine: how fast, and how near to AR.

    python launch/tune.py --checkpoint=DIR --prompts=prompts.jsonl --output=tuning --min_agreement=0.9
    python launch/tune.py --checkpoint=DIR --prompts=prompts.jsonl --output=tuning --write

Runs AR and every combination of thresholds, steps and blocks on all prompts, greedily. The folder gets results.json,
plot.svg, and generation_config.json with the fastest setting of at least that agreement. --write puts that file into
the checkpoint's folder too (other fields of one that is there are kept), where launch/generate.py follows it. With
--tasks, which are those of launch/evaluate.py, the mean score takes the place of agreement, and --min_retained of
--min_agreement.
"""

import environment  # noqa: F401, first: it says what is missing

# isort: split
import contextlib
import json
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import TextIO

from absl import flags

from twotower_jax import command_line, model_flags, strategy_flags

flags.adopt_module_key_flags(model_flags)
flags.adopt_module_key_flags(strategy_flags)
_PROMPTS = command_line.DEFINE_path("prompts", None, 'JSON Lines: {"text": ...} or {"ids": [...]}.', required=True)
_OUTPUT = command_line.DEFINE_path("output", None, "Folder for the results; made if it does not exist.", required=True)
_THRESHOLDS = flags.DEFINE_list(
    "thresholds", ["0.6", "0.8", "0.9"], "Confidence thresholds to try, of strategies that have one."
)
_STEPS = flags.DEFINE_list("steps", ["4", "8", "16"], "Most evaluations per block to try.")
_BLOCKS = flags.DEFINE_list("blocks", ["8", "16"], "Block sizes to try; none above what was trained.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "New tokens of each row.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Rows computed together.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Timed runs of each setting, of which the median counts.", lower_bound=1)
_MIN_AGREEMENT = flags.DEFINE_float(
    "min_agreement", 0.9, "Least part of equal tokens that a chosen setting has.", lower_bound=0.0, upper_bound=1.0
)
_TASKS = flags.DEFINE_list("tasks", [], "Judge settings by these tasks of launch/evaluate.py instead of agreement.")
_INCLUDE_PATH = command_line.DEFINE_path(
    "include_path", None, "With --tasks: a folder of task files of your own.", local=True
)
_LIMIT = flags.DEFINE_integer("limit", None, "With --tasks: at most so many questions of each.", lower_bound=1)
_MIN_RETAINED = flags.DEFINE_float(
    "min_retained", 0.98, "With --tasks: least part of AR's mean score that a chosen setting keeps.", lower_bound=0.0
)
_IGNORE_EOS = flags.DEFINE_bool("ignore_eos", False, "Go on after an end-of-text token, so that all rows are as long.")
_WRITE = flags.DEFINE_bool("write", False, "Also write generation_config.json into the checkpoint's folder.")

if __name__ == "__main__":
    command_line.read_flags()

import jax

from twotower_jax import model_from_flags
from twotower_jax.checkpoint import manifest
from twotower_jax.checkpoint.load import contents
from twotower_jax.data import load_tokenizer
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.diffusion.strategies import knobs
from twotower_jax.evaluation.environment import settle_environment
from twotower_jax.generation.operating_point import FILE, merged, read_operating_point
from twotower_jax.generation.placement import TowerMeshes
from twotower_jax.generation.prompts import prompt_ids, read_prompts
from twotower_jax.generation.settings import Settings
from twotower_jax.generation.trained import trained_block_size
from twotower_jax.generation.tune import Point, Sweep, grid, sweep
from twotower_jax.outputs import check_writable, output_file, output_folder
from twotower_jax.parameters import Params
from twotower_jax.paths import as_path, in_store
from twotower_jax.two_tower import TwoTower
from twotower_jax.visualize.tradeoff import plot

_RESULTS = "results.json", "plot.svg"
# Lengths of the contexts of --tasks=needle and key_value.
_LENGTH = 512


def _check_writable(folder: pathlib.Path) -> None:
    """A converted checkpoint that has the file has its hash too, and would count as broken with another one."""
    listed = folder / manifest.NAME
    if listed.exists() and FILE in manifest.read(folder).files:
        raise ValueError(f"--write: {listed} holds the hash of {FILE}; tune the Hugging Face folder and convert again")
    if in_store(folder):
        check_writable(folder)
    elif not os.access(folder, os.W_OK):
        raise ValueError(f"--write: {folder} cannot be written")


def main() -> None:
    strategy_flags.register()
    if not _TASKS.value:
        command_line.refuse_given((_INCLUDE_PATH, _LIMIT, _MIN_RETAINED), "without --tasks")
    elif _MIN_AGREEMENT.present:
        raise ValueError("--min_agreement changes nothing with --tasks: --min_retained says how much is kept")
    strategy, options = strategy_flags.STRATEGY.value, strategy_flags.options()
    if _THRESHOLDS.present and ("confidence_threshold" in options or "confidence_threshold" not in knobs(strategy)):
        given = "--strategy_options" if "confidence_threshold" in options else f"--strategy={strategy}"
        raise ValueError(f"--thresholds={','.join(_THRESHOLDS.value)} changes nothing with {given}")
    sizes = command_line.numbers(_STEPS, int), command_line.numbers(_BLOCKS, int)
    samplings = grid(command_line.numbers(_THRESHOLDS, float), *sizes, strategy, options)
    settings = Settings(
        max_new_tokens=_MAX_NEW_TOKENS.value,
        batch_size=_BATCH_SIZE.value,
        ignore_eos=_IGNORE_EOS.value,
        eos=model_from_flags.end_tokens(),
    )
    rows = read_prompts(_PROMPTS.value)
    read_operating_point(model_flags.CHECKPOINT.value)  # What is merged at the end must be readable.
    checkpoint = as_path(model_flags.CHECKPOINT.value)
    contents(checkpoint)  # As --write must find a checkpoint.
    if _WRITE.value:
        _check_writable(checkpoint)
    with output_folder(_OUTPUT.value) as output, contextlib.ExitStack() as stack:
        # Opened first, so that a file that cannot be written is known before the sweep; all appear at its end.
        files = {name: stack.enter_context(output_file(output / name)) for name in (*_RESULTS, FILE)}
        there = checkpoint / FILE
        if _WRITE.value and (in_store(there) or os.path.realpath(there) != os.path.realpath(output / FILE)):
            files["--write"] = stack.enter_context(output_file(there))
        _tune(rows, samplings, settings, files)


def _tune(rows: list[dict], samplings: list[SamplingConfig], settings: Settings, files: Mapping[str, TextIO]) -> None:
    model, params, folder, placement = model_from_flags.load_model()
    model_from_flags.warn_if_untrained(folder, "tuning", "train a denoiser on it first (config.init_from)")
    trained = trained_block_size(folder)
    usable = [sampling for sampling in samplings if trained is None or sampling.block_size <= trained]
    if not usable:
        raise ValueError(f"--blocks={','.join(_BLOCKS.value)}: all are larger than the trained block of {trained}")
    if len(usable) < len(samplings):
        print(f"warning: blocks larger than the trained one of {trained} are left out", file=sys.stderr)
    tokenizer = load_tokenizer(folder) if any("text" in row for row in rows) else None
    quality = _quality(model, params, folder, placement) if _TASKS.value else None
    try:
        measured = sweep(
            model,
            params,
            prompt_ids(rows, tokenizer),
            settings,
            usable,
            _ROUNDS.value,
            lambda message: print(message, file=sys.stderr, flush=True),
            placement,
            quality,
        )
    except FloatingPointError as error:
        command_line.fail(f"{model_flags.CHECKPOINT.value}: {error}", command_line.BROKEN_CHECKPOINT)
    best = measured.best(_MIN_RETAINED.value if _TASKS.value else _MIN_AGREEMENT.value)
    content = merged(folder, best.sampling, trained)
    results = json.dumps(_results(measured, best, len(rows)), indent=2) + "\n"
    for name, file in files.items():
        # Beside the results stands what --write writes.
        file.write({_RESULTS[0]: results, _RESULTS[1]: plot(measured, best)}.get(name, content))
    _show(measured, best)


def _quality(model: TwoTower, params: Params, folder: pathlib.Path, placement: TowerMeshes):
    """The mean score of settings over --tasks."""
    settle_environment()
    # Imported when that is settled.
    from twotower_jax.evaluation.answering import Local
    from twotower_jax.evaluation.answers import Answers
    from twotower_jax.evaluation.table import evaluate, find_tasks

    tasks, answers = find_tasks(_TASKS.value, include_path=_INCLUDE_PATH.value, lengths=[_LENGTH]), Answers()
    tokenizer = load_tokenizer(folder)

    def quality(settings: Settings) -> float:
        answerers = {"it": Local(model, params, tokenizer, settings, placement=placement, answers=answers)}
        done = evaluate(tasks, answerers, ar=None, folder=folder, limit=_LIMIT.value, speed_questions=0)
        found = done.quality("it")
        if found is None:
            raise ValueError(f"--tasks={','.join(_TASKS.value)}: none has a score that is better the higher it is")
        return found

    return quality


def _results(measured: Sweep, best: Point, prompts: int) -> dict:
    return {
        "version": 1,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "mesh": model_flags.MESH.value,
        "dtype": model_flags.DTYPE.value,
        "prompts": prompts,
        "max_new_tokens": _MAX_NEW_TOKENS.value,
        "batch_size": _BATCH_SIZE.value,
        "rounds": _ROUNDS.value,
        "ignore_eos": _IGNORE_EOS.value,
        "min_agreement": _MIN_AGREEMENT.value,
        **({"tasks": _TASKS.value, "min_retained": _MIN_RETAINED.value} if _TASKS.value else {}),
        "strategy": best.sampling.strategy,
        "strategy_options": dict(best.sampling.strategy_options),
        "ar": measured.ar.row(),
        "points": [point.row() for point in measured.points],
        "tokens_per_evaluation_to_break_even": measured.needed,
        "chosen": best.row(),
    }


def _show(measured: Sweep, best: Point) -> None:
    scored = measured.ar.quality is not None
    score = " score |" if scored else ""
    print(
        f"| block | steps | threshold | tokens per evaluation | tokens/s |{score} agreement | to first difference | "
        "nats | |"
    )
    print("|---|---|---|---|---|---|---|---|---|" + "---|" * scored)
    for point in (measured.ar, *measured.points):
        setting = " | ".join(point.setting())
        notes = ["front"] * point.pareto + ["chosen"] * (point is best)
        speed = f"{point.tokens_per_evaluation:.2f} | {point.tokens_per_second:,.1f}"
        quality = f"{point.quality:.4f} | " if scored else ""
        quality += f"{point.agreement:.3f} | {point.agreement_prefix:.3f} | {point.log_likelihood:.3f}"
        print(f"| {setting} | {speed} | {quality} | {', '.join(notes)} |")
    print()
    for size, needed in measured.needed.items():
        most = max(p.tokens_per_evaluation for p in measured.points if p.sampling.block_size == size)
        print(f"blocks of {size}: as fast as AR from {needed:.2f} tokens per evaluation on; at most here {most:.2f}")
    faster = sum(p.tokens_per_second >= measured.ar.tokens_per_second for p in measured.points)
    print(f"{faster} of {len(measured.points)} settings are at least as fast as AR")
    if scored and best.quality < _MIN_RETAINED.value * measured.ar.quality:
        print(f"no setting keeps {_MIN_RETAINED.value:g} of AR's score; chosen is the one of most, {best.quality:.4f}")
    if not scored and best.agreement < _MIN_AGREEMENT.value:
        print(
            f"no setting agrees with AR in {_MIN_AGREEMENT.value:g} of the tokens; chosen is the one of most "
            f"agreement, {best.agreement:.3f}"
        )
    if best.tokens_per_second < measured.ar.tokens_per_second:
        print("the chosen setting is slower than --mode=ar")


if __name__ == "__main__":
    command_line.run(main)
