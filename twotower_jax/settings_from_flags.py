"""What the flags of `generation_flags` stand for: settings. Imported after them, since it takes seconds."""

import sys
from typing import Any

from twotower_jax import strategy_flags
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.diffusion.strategies import knobs
from twotower_jax.generation.operating_point import FILE, read_operating_point
from twotower_jax.generation.settings import Settings
from twotower_jax.generation_flags import (
    BLOCK_SIZE,
    IGNORE_EOS,
    MAX_CACHE_GB,
    MAX_NEW_TOKENS,
    MODE,
    PREFILL_CHUNK,
    SCHEDULE,
    SEED,
    STEPS,
    TEMPERATURE,
    THRESHOLD,
    TOLERANCE,
    TOP_K,
    TOP_P,
)
from twotower_jax.model_flags import CHECKPOINT
from twotower_jax.model_from_flags import end_tokens


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
        eos=end_tokens(),
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
    chosen = read_operating_point(CHECKPOINT.value)
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
