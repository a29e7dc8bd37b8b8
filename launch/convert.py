"""Converts a Hugging Face folder, two towers or one, into a checkpoint of this program.

    python launch/convert.py --source=HF_DIR --output=DIR [--quantize=int8|int4]

A single tower (NemotronHForCausalLM) becomes both towers. The source may also be a Hub id, with --revision. What is
quantized can be used, and neither exported nor trained.
"""

import environment  # noqa: F401, first: it says what is missing

# isort: split
import sys

from absl import flags

from twotower_jax import command_line
from twotower_jax.choices import QUANTIZATIONS, TIME_INITS

_SOURCE = command_line.DEFINE_path(
    "source", None, "Hugging Face folder or Hub id; with --dry_run also a JSON (.gz) list of names and shapes.",
    required=True,
)  # fmt: skip
_OUTPUT = command_line.DEFINE_path("output", None, "The folder to make; must not exist. Needed without --dry_run.")
_REVISION = flags.DEFINE_string("revision", None, "Branch, tag or commit of a Hub id; recorded as the commit.")
_TIME_INIT = flags.DEFINE_enum(
    "time_init", "identity", TIME_INITS,
    "For a single tower: identity makes the denoiser compute exactly what the tower computes; reference draws the "
    "tables from N(0, 1/D) as the published code does.",
)  # fmt: skip
_SHA256 = command_line.DEFINE_path(
    "sha256", None, "File of lines 'SHA256  NAME', as sha256sum prints, that must be met."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the mapping and the totals; read no data, write nothing.")
_QUANTIZE = flags.DEFINE_enum(
    "quantize", None, QUANTIZATIONS, "Write weights in fewer bits: the routed experts in 8 or 4, other matrices in 8."
)
_VERIFY = flags.DEFINE_bool("verify", False, "Read source and result again and compare every tensor.")

if __name__ == "__main__":
    command_line.read_flags()

import jax

from twotower_jax.checkpoint import hub, listing
from twotower_jax.checkpoint.convert import convert
from twotower_jax.data.tokenizer import unread_tokenizer
from twotower_jax.paths import as_path
from twotower_jax.quantization import METHODS


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # Nothing here is worth an accelerator.
    if _DRY_RUN.value:
        command_line.refuse_given([_OUTPUT, _REVISION, _SHA256, _VERIFY], "with --dry_run, which reads no data")
        path = as_path(_SOURCE.value)
        if not path.exists():
            raise ValueError(f"{path}: no such folder or list; --dry_run downloads nothing")
        print(listing.dry_run(path, _TIME_INIT.value, METHODS.get(_QUANTIZE.value)))
        return
    if _OUTPUT.value is None:
        raise ValueError("--output is missing; only --dry_run goes without")
    source = hub.resolve(_SOURCE.value, _REVISION.value)
    expected = hub.recorded_hashes(source.path)
    if _SHA256.value is not None:
        expected |= hub.read_hashes(as_path(_SHA256.value))
    result = convert(
        source.path,
        as_path(_OUTPUT.value),
        time_init=_TIME_INIT.value,
        name=source.name,
        revision=source.revision,
        expected=expected,
        verify=_VERIFY.value,
        quantize=METHODS.get(_QUANTIZE.value),
    )
    if _TIME_INIT.present and result.kind == "two_tower":
        print(f"warning: {_SOURCE.value}: has two towers, so that --time_init changed nothing", file=sys.stderr)
    if problem := unread_tokenizer(source.path):
        print(f"warning: {source.path}: {problem}; the result has no tokenizer", file=sys.stderr)
    print(f"{_OUTPUT.value}: {result.parameters:,} parameters in {result.tensors:,} tensors")


if __name__ == "__main__":
    command_line.run(main)
