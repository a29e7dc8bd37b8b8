"""Writes a checkpoint as a Hugging Face folder, bit for bit what it was converted from; or an adapter as PEFT's files.

    python launch/export.py --checkpoint=DIR --output=HF_DIR [--tower=both|context|denoiser]
    python launch/export.py --checkpoint=WORKDIR --output=ADAPTER_DIR --adapter
    python launch/export.py --checkpoint=WORKDIR --output=HF_DIR --merge
    python launch/export.py --checkpoint=DIR --output=HF_DIR --adapter=ADAPTER_DIR
    python launch/export.py --checkpoint=DIR --output=HF_DIR --packed=0.15

The second is of a workdir that holds an adapter (config.lora), the third adds its update to its base, the fourth that
of PEFT's files to any checkpoint. The last is small and not bit for bit, see docs/guide/conversion.md.
"""

import environment  # noqa: F401, first: it says what is missing

# isort: split
import math
import re

from absl import flags

from twotower_jax import command_line
from twotower_jax.choices import APPLIED_TO, TOWERS

_CHECKPOINT = command_line.DEFINE_path(
    "checkpoint", None, "Converted checkpoint, training workdir or Hugging Face folder.", required=True
)
_OUTPUT = command_line.DEFINE_path("output", None, "The folder to make; must not exist.", required=True)
_TOWER = flags.DEFINE_enum("tower", "both", TOWERS, "One tower makes a single-tower folder (NemotronHForCausalLM).")
_MAX_SHARD_SIZE = flags.DEFINE_string("max_shard_size", "5GB", "Of one file, in bytes or with KB, MB or GB.")
_CHECK = flags.DEFINE_bool("check", True, "Compare the checkpoint's files with their recorded hashes.")
_ADAPTER = command_line.DEFINE_path_or_bool(
    "adapter", None, "Alone: write the workdir's adapter as PEFT's files. With a folder of these: merge them."
)
_MERGE = flags.DEFINE_bool("merge", False, "Add the update of the workdir's adapter to its base.")
_ADAPTER_TOWER = flags.DEFINE_enum(
    "adapter_tower", None, APPLIED_TO, "Which tower an adapter of a backbone changes; see launch/generate.py."
)
_PACKED = flags.DEFINE_float(
    "packed", None, "Round matrices to multiples of this part of a row's root mean square, and compress them: at "
    "0.14 to some five bits a number, for a small model that travels with a program.", lower_bound=1e-3, upper_bound=1,
)  # fmt: skip

if __name__ == "__main__":
    command_line.read_flags()

import jax

from twotower_jax.checkpoint.export import export, export_adapter
from twotower_jax.paths import as_path

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # Nothing here is worth an accelerator.
    checkpoint, output = as_path(_CHECKPOINT.value), as_path(_OUTPUT.value)
    limit = parse_size(_MAX_SHARD_SIZE.value)
    if _ADAPTER.value is True:
        if _MERGE.value:
            raise ValueError("--adapter writes the adapter by itself and --merge a whole folder: give one of the two")
        command_line.refuse_given([_MAX_SHARD_SIZE, _ADAPTER_TOWER, _PACKED], "with --adapter")
        count = export_adapter(checkpoint, output, _TOWER.value)
    else:
        folder = _ADAPTER.value or None
        if _PACKED.value is not None:
            command_line.refuse_given([_MAX_SHARD_SIZE], "with --packed, which writes one file")
        if folder is None:
            command_line.refuse_given([_ADAPTER_TOWER], "without --adapter=DIR")
        count = export(
            *(checkpoint, output, _TOWER.value, limit),
            verify=_CHECK.value,
            merge=_MERGE.value or folder is not None,
            adapter=None if folder is None else as_path(folder),
            adapter_tower=_ADAPTER_TOWER.value,
            coarseness=_PACKED.value,
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
