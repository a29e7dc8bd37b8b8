"""AdamW against Muon at equal training tokens and at the same learning rates.

For each seed and rate it trains the backbone of `launch/benchmark.py drafts` with either, and validates it once, on the
same windows of held-out text. The error is the standard error over these windows.
"""

import pathlib
import tempfile

import jax
from absl import flags

from twotower_jax import command_line
from twotower_jax.benchmarks._small import define_data_flag, small_config
from twotower_jax.train.loop import train
from twotower_jax.train.optimizers import OPTIMIZERS


def define_flags() -> None:
    define_data_flag()
    flags.DEFINE_integer("steps", 200, "Of each run.", lower_bound=1)
    flags.DEFINE_integer("seeds", 2, "Runs of each kind.", lower_bound=1)
    flags.DEFINE_list("learning_rates", ["3e-3"], "Each with all optimizers.")
    flags.DEFINE_list("optimizers", list(OPTIMIZERS), "Of these, several with commas.")


def main() -> None:
    rates = command_line.numbers(flags.FLAGS["learning_rates"], float)
    steps, found = flags.FLAGS.steps, {}
    for seed in range(flags.FLAGS.seeds):
        for rate in rates:
            for name in flags.FLAGS.optimizers:
                config = small_config(seed, steps, learning_rate=rate, final_learning_rate=rate / 100, optimizer=name)
                with tempfile.TemporaryDirectory() as scratch:
                    row = train(config, pathlib.Path(scratch) / "run", lambda line: None).metrics
                found.setdefault((rate, name), []).append(row)
                loss, error = row["validation_loss"], row["validation_loss_stderr"]
                print(f"{name}, learning rate {rate:g}, seed {seed}: {loss:.4f} ± {error:.4f}", flush=True)
    tokens = steps * config.batch_size * config.sequence_length
    print(f"\njax {jax.__version__}, {jax.devices()[0].device_kind}, {tokens:,} tokens a run, seeds one by one\n")
    print("| learning rate | optimizer | validation loss | tokens per second |\n|--:|---|---|---|")
    for (rate, name), rows in found.items():
        losses = "; ".join(f"{row['validation_loss']:.3f} ± {row['validation_loss_stderr']:.3f}" for row in rows)
        print(f"| {rate:g} | {name} | {losses} | {'; '.join(f'{row["tokens_per_second"]:,.0f}' for row in rows)} |")
