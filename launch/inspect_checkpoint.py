"""Prints what a checkpoint folder of any kind holds, without reading its arrays.

python launch/inspect_checkpoint.py --checkpoint=DIR [--arrays] [--json]
"""

import environment  # noqa: F401, first: it says what is missing

# isort: split
import json

from absl import flags

from twotower_jax import command_line

_CHECKPOINT = command_line.DEFINE_path(
    "checkpoint", None, "Converted checkpoint, training workdir or Hugging Face folder.", required=True
)
_ARRAYS = flags.DEFINE_bool("arrays", False, "List every array.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object, arrays included.")

if __name__ == "__main__":
    command_line.read_flags()

import jax

from twotower_jax.checkpoint import inspection
from twotower_jax.paths import as_path


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    description = inspection.describe(as_path(_CHECKPOINT.value))
    print(json.dumps(description, indent=1) if _JSON.value else inspection.text(description, contents=_ARRAYS.value))


if __name__ == "__main__":
    command_line.run(main)
