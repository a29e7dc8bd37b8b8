"""The whole story on two CPU cores, in some minutes and without a download.

    python launch/quickstart.py

Pretrains a small backbone on the documentation that ships with Python, trains a denoiser tower on top of it with the
backbone frozen, continues a few prompts in three modes, and compares. It runs the code of the other commands with
configs/tiny.py; what it leaves in --workdir works with all of them. A second call goes on where the first one stopped.
"""

import environment  # noqa: F401, first: it says what is missing

# isort: split
import importlib.util
import pathlib
import time

from absl import flags

from twotower_jax import command_line
from twotower_jax.checkpoint.load import Loaded, load
from twotower_jax.checkpoint.orbax_steps import SaveError
from twotower_jax.data import encode, load_tokenizer
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation import Result, Settings, generate
from twotower_jax.train.config import TrainConfig, freeze
from twotower_jax.train.loop import train

_WORKDIR = command_line.DEFINE_path("workdir", "runs/quickstart", "Where both training runs go.")
_STEPS = flags.DEFINE_integer("steps", None, "Steps of each training; default: those of configs/tiny.py.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "New tokens per prompt.", lower_bound=1)

PROMPTS = (
    "Return a new list",
    "The str class",
    "Raise ValueError if the",
    "This module provides",
    "If the file cannot be opened",
    "A dictionary maps",
    "This function is called when",
    "Convert the argument to",
)
MODES = {
    "diffusion": "denoiser, a block of 16 at a time",
    "ar": "context tower, a token at a time",
    "mock_ar": "denoiser, a token at a time (a check)",
}


def _tiny_config(**changes) -> TrainConfig:
    file = pathlib.Path(__file__).parent.parent / "configs" / "tiny.py"
    spec = importlib.util.spec_from_file_location("tiny", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.update(changes)
    if _STEPS.value is not None:
        config.steps = _STEPS.value
    return freeze(config)


def _stage(title: str, config: TrainConfig, workdir: pathlib.Path) -> list[str]:
    print(f"\n== {title}\n", flush=True)
    started = time.monotonic()
    result = train(config, workdir)
    metrics = result.metrics
    return [
        title,
        str(result.step),
        f"{metrics['loss']:.3f}",
        f"{metrics['validation_loss']:.3f}",
        f"{metrics['tokens_per_second']:,.0f}",
        f"{time.monotonic() - started:.0f} s",
    ]


def _timed(loaded: Loaded, prompts: list, settings: Settings) -> tuple[list[Result], float]:
    """Results, and the seconds of a second run, which compiles nothing."""
    list(generate(loaded.model, loaded.params, prompts, settings))
    started = time.monotonic()
    results = list(generate(loaded.model, loaded.params, prompts, settings))
    return results, time.monotonic() - started


def _print_table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    workdir = pathlib.Path(_WORKDIR.value)
    backbone, denoiser = workdir / "backbone", workdir / "denoiser"
    stages = [
        _stage("1. pretrain a backbone, next tokens", _tiny_config(objective="autoregressive"), backbone),
        _stage(
            "2. train a denoiser on it, masked tokens",
            _tiny_config(objective="denoiser", init_from=str(backbone)),
            denoiser,
        ),
    ]

    print("\n== 3. generate\n", flush=True)
    loaded = load(denoiser)
    tokenizer = load_tokenizer(loaded.tokenizer_folder)
    prompts = encode(tokenizer, PROMPTS)
    rows = []
    for mode, what in MODES.items():
        settings = Settings(
            mode=mode,
            max_new_tokens=_MAX_NEW_TOKENS.value,
            sampling=SamplingConfig(block_size=16, steps_per_block=16),
            batch_size=len(PROMPTS),
            ignore_eos=True,
        )
        results, seconds = _timed(loaded, prompts, settings)
        print(f"-- {mode}: {what}\n{PROMPTS[0]}{tokenizer.decode(results[0].tokens)}\n", flush=True)
        new = sum(len(r.tokens) for r in results)
        evaluations = sum(r.denoiser_evaluations for r in results)
        per_evaluation = f"{new / evaluations:.2f}" if evaluations else "-"
        rows.append([f"{mode}: {what}", per_evaluation, f"{new / seconds:,.0f}"])

    print("== What happened\n")
    _print_table(["stage", "steps", "loss", "validation loss", "tokens/s", "time"], stages)
    print()
    _print_table([f"mode, {len(PROMPTS)} prompts together", "tokens per denoiser evaluation", "tokens/s"], rows)
    print(f"\nMore of it: python launch/generate.py --checkpoint={denoiser} --prompt='The list object'")


if __name__ == "__main__":
    command_line.run(main, statuses={FloatingPointError: command_line.DIVERGED, SaveError: command_line.NOT_SAVED})
