"""Writes a checkpoint as a Hugging Face folder, bit for bit what it was converted from.

python launch/export.py --checkpoint=DIR --output=HF_DIR [--tower=both|context|denoiser]
"""

import environment  # noqa: F401, first: it says what is missing

# isort: split
import math
import pathlib
import re

import jax
from absl import flags

from twotower_jax import command_line
from twotower_jax.checkpoint.export import TOWERS, export

_CHECKPOINT = command_line.DEFINE_path(
    "checkpoint", None, "Converted checkpoint, training workdir or Hugging Face folder.", required=True
)
_OUTPUT = command_line.DEFINE_path("output", None, "The folder to make; must not exist.", required=True)
_TOWER = flags.DEFINE_enum("tower", "both", TOWERS, "One tower makes a single-tower folder (NemotronHForCausalLM).")
_MAX_SHARD_SIZE = flags.DEFINE_string("max_shard_size", "5GB", "Of one file, in bytes or with KB, MB or GB.")
_CHECK = flags.DEFINE_bool("check", True, "Compare the checkpoint's files with their recorded hashes.")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # Nothing here is worth an accelerator.
    count = export(
        pathlib.Path(_CHECKPOINT.value),
        pathlib.Path(_OUTPUT.value),
        _TOWER.value,
        parse_size(_MAX_SHARD_SIZE.value),
        verify=_CHECK.value,
    )
    print(f"{_OUTPUT.value}: {count:,} tensors")


def parse_size(text: str) -> int:
    """Bytes of a text such as 5GB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)?", text.strip(), re.IGNORECASE)
    size = float(match[1]) * _UNITS[(match[2] or "").upper()] if match else math.inf
    if not math.isfinite(size):
        raise ValueError(f"--max_shard_size={text} is no number of bytes, such as 5GB")
    return int(size)


if __name__ == "__main__":
    command_line.run(main)
