"""The settings that `launch/tune.py` chose for a checkpoint, in its generation_config.json.

The file is Hugging Face's and may hold fields of its own, which are kept and not followed: `launch/generate.py` takes
block_size, steps_per_block, confidence_threshold and strategy from it, and nothing else. `trained_block_size`, which
tuning writes too, keeps what was known of training apart from what was chosen (see trained.py).
"""

import json
import os
import pathlib
from typing import Any

from twotower_jax.diffusion import STRATEGIES, SamplingConfig
from twotower_jax.files import CheckpointError, read_json

FILE = "generation_config.json"
_KINDS = {"block_size": int, "steps_per_block": int, "confidence_threshold": float, "strategy": str}


def read_operating_point(folder: str | pathlib.Path) -> dict[str, Any]:
    """Those of the four settings that the folder's file has; none where there is no file.

    Raises:
      CheckpointError: naming the file, if it is not a JSON object or one of the settings is not of its kind.
    """
    path = pathlib.Path(folder) / FILE
    if not os.path.lexists(path):
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
        if (
            kind is int
            and value < 1
            or kind is float
            and not 0 <= value <= 1
            or kind is str
            and value not in STRATEGIES
        ):
            raise CheckpointError(f"{path}: {name}={value!r} is out of range")
        found[name] = value
    return found


def merged(folder: str | pathlib.Path, sampling: SamplingConfig, trained: int | None) -> str:
    """The file's new content: what it holds, and the operating point in place of another one.

    Raises:
      CheckpointError: if the folder has such a file that cannot be read.
    """
    path = pathlib.Path(folder) / FILE
    values = read_json(path) if os.path.lexists(path) else {}
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    chosen = {name: getattr(sampling, name) for name in _KINDS} | {"trained_block_size": trained}
    return json.dumps(values | chosen, indent=2) + "\n"
