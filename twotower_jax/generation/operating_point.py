"""The settings that `launch/tune.py` chose for a checkpoint, in its generation_config.json.

The file is Hugging Face's and may hold fields of its own, which are kept and not followed: `launch/generate.py` takes
block_size, steps_per_block, confidence_threshold, strategy and strategy_options from it, and nothing else.
`trained_block_size`, which tuning writes too, keeps what was known of training apart from what was chosen (see
trained.py).
"""

import json
import pathlib
from typing import Any

from twotower_jax.diffusion import SamplingConfig
from twotower_jax.diffusion.strategies import knobs, make_strategy
from twotower_jax.files import CheckpointError, is_there, read_json
from twotower_jax.paths import as_path

FILE = "generation_config.json"
_KINDS = {
    "block_size": int,
    "steps_per_block": int,
    "confidence_threshold": float,
    "strategy": str,
    "strategy_options": dict,
}


def read_operating_point(folder: str | pathlib.Path) -> dict[str, Any]:
    """Those of the five settings that the folder's file has; none where there is no file.

    Raises:
      CheckpointError: naming the file, if it is not a JSON object, one of the settings is not of its kind, or the
        strategy is none that is registered or has no such knobs.
    """
    path = as_path(folder) / FILE
    if not is_there(path):
        return {}
    values = read_json(path)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    found = {}
    for name, kind in _KINDS.items():
        value = values.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float if kind is float else kind):
            raise CheckpointError(f"{path}: {name} must be of type {kind.__name__}, not {value!r}")
        if kind is int and value < 1 or kind is float and not 0 <= value <= 1:
            raise CheckpointError(f"{path}: {name}={value!r} is out of range")
        found[name] = value
    try:
        if "strategy" in found or "strategy_options" in found:
            make_strategy(found.get("strategy", SamplingConfig.strategy), found.get("strategy_options", {}))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; one of your own is known with --register=FILE.py") from None
    return found


def merged(folder: str | pathlib.Path, sampling: SamplingConfig, trained: int | None) -> str:
    """The file's new content: what it holds, and the operating point in place of another one.

    Raises:
      CheckpointError: if the folder has such a file that cannot be read.
    """
    path = as_path(folder) / FILE
    values = read_json(path) if is_there(path) else {}
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    chosen = {name: getattr(sampling, name) for name in _KINDS} | {"strategy_options": dict(sampling.strategy_options)}
    for name, unused in (
        ("confidence_threshold", "confidence_threshold" not in knobs(sampling.strategy)),
        ("strategy_options", not sampling.strategy_options),
    ):
        if unused:
            values.pop(name, None)
            del chosen[name]
    chosen["trained_block_size"] = trained
    return json.dumps(values | chosen, indent=2) + "\n"
