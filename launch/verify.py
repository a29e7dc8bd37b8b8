"""Certifies a conversion by numbers: what the checkpoint computes against what the published code computed once.

    python launch/verify.py --source=HF_DIR --checkpoint=DIR

Prints the drift of every recorded array, layer by layer, and how many tokens and evaluations of recorded generations
agree. Exit status 3 if anything lies beyond the tolerance.
"""

import environment  # noqa: F401, first: it says what is missing

# isort: split
import pathlib

from absl import flags

from twotower_jax import command_line

_SOURCE = command_line.DEFINE_path("source", None, "The Hugging Face folder that was converted.", required=True)
_CHECKPOINT = command_line.DEFINE_path("checkpoint", None, "The checkpoint to certify, of any kind.", required=True)
_EXPECTED = command_line.DEFINE_path(
    "expected",
    None,
    "Folder of expected.safetensors and generation.json; by default the source or its parent.",
    local=True,
)
_TOLERANCE = flags.DEFINE_float("tolerance", 2e-4, "Largest drift, absolute, or relative to values above 1.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "To compute in.")

if __name__ == "__main__":
    command_line.read_flags()

import jax.numpy as jnp

from twotower_jax import certify
from twotower_jax.checkpoint import load, manifest
from twotower_jax.checkpoint.store import MANIFEST
from twotower_jax.execution import Execution
from twotower_jax.files import CheckpointError, check_folder
from twotower_jax.paths import as_path


def main() -> None:
    source, checkpoint = as_path(_SOURCE.value), as_path(_CHECKPOINT.value)
    check_folder(source, "give the Hugging Face folder that was converted")
    recorded = _recorded(source)
    context_only = False
    if (checkpoint / MANIFEST).exists():
        listed = manifest.read(checkpoint)
        context_only = listed.kind == "single_tower"
        manifest.verify(source, listed.source_files, listed.source_files)
        print(f"{checkpoint} was converted from these very {len(listed.source_files)} files of {source}")
        if listed.method is not None:
            print(f"its weights are quantized ({listed.method.name}): the drift is what that costs; see --tolerance")
    loaded = load.load(checkpoint, execution=Execution(dtype=jnp.dtype(_DTYPE.value)))
    report = certify.certify(loaded.model, loaded.params, recorded, context_only=context_only)
    print(report.text(_TOLERANCE.value))
    if not report.holds(_TOLERANCE.value):
        raise CheckpointError(f"{checkpoint}: does not compute the numbers recorded in {recorded}")


def _recorded(source: pathlib.Path) -> pathlib.Path:
    if _EXPECTED.value is not None:
        if not (folder := pathlib.Path(_EXPECTED.value) / certify.NUMBERS).exists():
            raise ValueError(f"--expected={_EXPECTED.value}: holds no {certify.NUMBERS}")
        return folder.parent
    for folder in (source, source.resolve().parent):
        if (folder / certify.NUMBERS).exists():
            return folder
    raise ValueError(f"{source}: no {certify.NUMBERS} there or beside it; say with --expected where it is")


if __name__ == "__main__":
    command_line.run(main)
