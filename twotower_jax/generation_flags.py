"""The flags of how to generate, which commands that generate share."""

import sys
from typing import Any

from absl import flags

from twotower_jax import model_flags, strategy_flags
from twotower_jax.diffusion import SCHEDULES, SamplingConfig
from twotower_jax.diffusion.strategies import knobs
from twotower_jax.generation.operating_point import FILE, read_operating_point
from twotower_jax.generation.settings import MODES, Settings

flags.adopt_module_key_flags(strategy_flags)
MODE = flags.DEFINE_string("mode", "diffusion", f"One of {', '.join(MODES)}.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "New tokens of each row, a multiple of the block or not.")
BLOCK_SIZE = flags.DEFINE_integer("block_size", 16, "Tokens denoised together; at most what was trained.")
STEPS = flags.DEFINE_integer("steps_per_block", None, "Most denoiser evaluations per block; default: the block size.")
THRESHOLD = flags.DEFINE_float("confidence_threshold", None, "Commit tokens surer than this (strategies that have it).")
SCHEDULE = flags.DEFINE_string("schedule", None, f"Of the other strategies: one of {', '.join(SCHEDULES)}.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Sample among the k most probable tokens; 0: all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample among the most probable tokens that hold this much; 1: all.")
SEED = flags.DEFINE_integer("seed", 0, "Of sampling.")
IGNORE_EOS = flags.DEFINE_bool("ignore_eos", False, "Go on after an end-of-text token.")
TOLERANCE = flags.DEFINE_float(
    "tolerance", 0.0, "Mode speculative: keep a draft at least 1 - this as probable as AR's best; 0: AR's tokens only."
)
PREFILL_CHUNK = flags.DEFINE_integer("prefill_chunk", 512, "Prompts are read in pieces of at most this many tokens.")
MAX_CACHE_GB = flags.DEFINE_float(
    "max_cache_gb", None, "Refuse to start if a device's caches need more; default: what it has free."
)


def settings(**others: Any) -> Settings:
    """What the flags say; `others` are the settings that have no flag here.

    Raises:
      ValueError: for values that cannot be used; CheckpointError for a broken generation_config.json.
    """
    schedule = {} if SCHEDULE.value is None else {"schedule": SCHEDULE.value}
    sampling = SamplingConfig(
        **_sampling_values(),
        temperature=TEMPERATURE.value,
        top_k=TOP_K.value,
        top_p=TOP_P.value,
        **schedule,
    )
    return Settings(
        mode=MODE.value,
        max_new_tokens=MAX_NEW_TOKENS.value,
        sampling=sampling,
        seed=SEED.value,
        ignore_eos=IGNORE_EOS.value,
        eos=model_flags.end_tokens(),
        prefill_chunk=PREFILL_CHUNK.value,
        tolerance=TOLERANCE.value,
        max_cache_gb=MAX_CACHE_GB.value,
        **others,
    )


def warn_of_unused() -> None:
    """Says which flags were given and do nothing in this mode: scripts give the same ones in all modes."""
    of_blocks = BLOCK_SIZE, STEPS, THRESHOLD, strategy_flags.STRATEGY, strategy_flags.OPTIONS, SCHEDULE
    given = [f"--{flag.name}" for flag in of_blocks if flag.present]
    if MODE.value in ("ar", "mock_ar") and given:
        print(f"warning: {', '.join(given)}: not looked at with --mode={MODE.value}, token by token", file=sys.stderr)


def _sampling_values() -> dict[str, Any]:
    """Block size, steps, strategy and threshold: the flags given, then what the checkpoint says, then defaults."""
    chosen = read_operating_point(model_flags.CHECKPOINT.value)
    strategy_flag = strategy_flags.STRATEGY
    given = {flag.name: flag.value for flag in (BLOCK_SIZE, STEPS, strategy_flag, THRESHOLD) if flag.present}
    options = strategy_flags.options()
    strategy = given.get("strategy", chosen.get("strategy", strategy_flag.value))
    theirs = chosen.pop("strategy_options", {}) if strategy == chosen.get("strategy", strategy) else {}
    chosen.pop("strategy_options", None)  # They are another strategy's.
    if theirs := {knob: value for knob, value in theirs.items() if knob not in options}:
        chosen["strategy_options"] = theirs
    if options.keys() & chosen.keys() or "confidence_threshold" not in knobs(strategy):
        chosen.pop("confidence_threshold", None)  # Given as an option, or the strategy has none.
    followed = {name: value for name, value in chosen.items() if name not in given}
    if followed and MODE.value in ("diffusion", "speculative"):
        settings = ", ".join(f"{name}={value}" for name, value in followed.items())
        print(f"{FILE} of the checkpoint: {settings}", file=sys.stderr)
    if options:
        given["strategy_options"] = theirs | options
    values = {"block_size": BLOCK_SIZE.value, "strategy": strategy_flag.value} | chosen | given
    return {"steps_per_block": values["block_size"]} | values
