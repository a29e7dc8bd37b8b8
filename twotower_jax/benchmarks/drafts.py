"""What teaches a denoiser to draft for its context tower, at equal training tokens; and how busy experts are kept.

For each seed it trains a small backbone, with and without balance, and on the balanced one denoisers: on masked tokens
alone, with distillation from the context tower, and on the context tower's own samples. Then it continues held-out
text. Two tables, the seeds one after the other in each cell.
"""

import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags

from twotower_jax.benchmarks._small import define_data_flag, small_config
from twotower_jax.checkpoint.load import load
from twotower_jax.data import load_tokenizer
from twotower_jax.data.sampled import SampleSettings, write_sampled
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation import Settings, generate
from twotower_jax.generation.sampled import continued
from twotower_jax.train.config import TrainConfig
from twotower_jax.train.loop import train
from twotower_jax.train.metrics import Row
from twotower_jax.train.placement import Placement
from twotower_jax.train.setup import look
from twotower_jax.train.start import make_start
from twotower_jax.train.step import split
from twotower_jax.train.validation import Validation

_PROMPT, _NEW, _PROMPTS = 32, 64, 16
_FIELDS = ("loss", "expert_load", "expert_entropy")
_OBJECTIVES = ("masked tokens", "and distillation", "masked tokens of its own samples")


def define_flags() -> None:
    define_data_flag()
    flags.DEFINE_integer("steps", 300, "Of each run.", lower_bound=1)
    flags.DEFINE_integer("seeds", 2, "Runs of each kind.", lower_bound=1)
    flags.DEFINE_integer("samples", 512, "Documents of the context tower's own, of 128 tokens.", lower_bound=1)
    flags.DEFINE_float("weight", 1.0, "Of distillation.")


def main() -> None:
    loads: dict[str, list[Row]] = {"balanced": [], "as it comes": []}
    drafts: dict[str, list[tuple[float, ...]]] = {name: [] for name in _OBJECTIVES}
    for seed in range(flags.FLAGS.seeds):
        with tempfile.TemporaryDirectory() as scratch:
            _run_seed(seed, pathlib.Path(scratch), loads, drafts)
    tokens = flags.FLAGS.steps * _config(0).batch_size * _config(0).sequence_length
    print(f"\njax {jax.__version__}, {jax.devices()[0].device_kind}, {tokens:,} tokens a run, seeds one by one\n")
    print("| backbone | validation loss | busiest expert, by layer | entropy, by layer |")
    print("|---|---|---|---|")
    for name, rows in loads.items():
        cells = ["; ".join(_numbers(row[f"validation_{field}"]) for row in rows)
                 for field in _FIELDS]  # fmt: skip
        print(f"| {name} | {' | '.join(cells)} |")
    print(
        "\n| denoiser trained on | masked loss | drafts kept a block | tokens per evaluation: speculative | diffusion |"
    )
    print("|---|---|---|---|---|")
    for name, results in drafts.items():
        print(
            f"| {name} | {' | '.join('; '.join(f'{v:.2f}' for v in column) for column in zip(*results, strict=True))} |"
        )


def _run_seed(seed: int, folder: pathlib.Path, loads: dict[str, list[Row]], drafts: dict[str, list]) -> None:
    backbone = folder / "backbone"
    loads["balanced"].append(_train(_config(seed), backbone))
    unbalanced = {"router_bias_rate": 0.0, "router_balance_loss": 0.0}
    loads["as it comes"].append(_train(_config(seed, **unbalanced), folder / "unbalanced"))
    for name, rows in loads.items():
        print(f"{name}: {', '.join(f'{field} {rows[-1][f"validation_{field}"]}' for field in _FIELDS)}", flush=True)
    prompts = _prompts(_config(seed), folder / "look")
    _sample(seed, backbone, prompts, folder / "samples")
    denoiser = {"objective": "denoiser", "init_from": str(backbone)}
    changes = ({}, {"distillation.weight": flags.FLAGS.weight}, {"data": str(folder / "samples")})
    masked_loss = _masked_loss(_config(seed, **denoiser), folder / "look")
    for name, change in zip(_OBJECTIVES, changes, strict=True):
        workdir = folder / name.replace(" ", "-")
        _train(_config(seed, **denoiser | change), workdir)
        drafts[name].append((masked_loss(workdir), *_measure(workdir, prompts["validation"])))
        print(f"{name}: {', '.join(f'{v:.3f}' for v in drafts[name][-1])}", flush=True)


def _config(seed: int, **changes: Any) -> TrainConfig:
    return small_config(seed, flags.FLAGS.steps, **changes)


def _train(config: TrainConfig, workdir: pathlib.Path) -> Row:
    print(f"{workdir.name}, seed {config.seed}", flush=True)
    return train(config, workdir, lambda line: None).metrics


def _prompts(config: TrainConfig, workdir: pathlib.Path) -> dict[str, list[np.ndarray]]:
    """Beginnings of windows of both splits."""
    start = make_start(config, look(config, workdir))
    windows = {"train": (start.training, flags.FLAGS.samples), "validation": (start.validation, _PROMPTS)}
    return {
        split: [np.asarray(of[i]["ids"][:_PROMPT]) for i in np.linspace(0, len(of) - 1, min(count, len(of)), dtype=int)]
        for split, (of, count) in windows.items()
    }


def _sample(seed: int, backbone: pathlib.Path, prompts: dict[str, list[np.ndarray]], output: pathlib.Path) -> None:
    model, params, _ = load(backbone)
    settings = Settings(
        mode="ar",
        max_new_tokens=128 - _PROMPT,
        sampling=SamplingConfig(temperature=1.0),
        seed=seed,
        batch_size=64,
        ignore_eos=True,
    )
    documents = continued(model, params, prompts["train"], settings)
    made = SampleSettings(str(backbone), seed=seed, validation_fraction=0.02)
    write_sampled(documents, output, load_tokenizer(backbone), made, [])


def _masked_loss(config: TrainConfig, workdir: pathlib.Path) -> Callable[[pathlib.Path], float]:
    """What gives the masked loss of a run on the text that the settings hold out, whatever it trained on."""
    start = make_start(config, look(config, workdir))
    validation = Validation(start.validation, start.objective, Placement(None, config.batch_size), config.batch_size)
    validate = validation.compiled(config.block_size)
    return lambda run: validation.run(validate, *split(start.objective, load(run).params))["loss"]


def _measure(workdir: pathlib.Path, prompts: list[np.ndarray]) -> tuple[float, float, float]:
    model, params, _ = load(workdir)

    def results(mode: str, **sampling: Any):
        settings = Settings(
            mode=mode,
            max_new_tokens=_NEW,
            sampling=SamplingConfig(block_size=16, steps_per_block=16, **sampling),
            batch_size=len(prompts),
            ignore_eos=True,
        )
        return list(generate(model, params, prompts, settings))

    drafted, diffused = results("speculative"), results("diffusion", confidence_threshold=0.5)
    kept = np.mean([row.acceptance_length for row in drafted])
    return (float(kept), *(sum(len(row.tokens) for row in rows) / sum(row.denoiser_evaluations for row in rows)
                           for rows in (drafted, diffused)))  # fmt: skip


def _numbers(value: Any) -> str:
    return ", ".join(f"{v:.2f}" for v in (value if isinstance(value, list) else [value]))
