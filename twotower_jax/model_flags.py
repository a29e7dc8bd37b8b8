"""The flags of every command that computes with a checkpoint: where it is and how it is computed."""

import pathlib
import sys
from typing import NamedTuple

import jax
from absl import flags

from twotower_jax import command_line
from twotower_jax.checkpoint.load import load
from twotower_jax.execution import Execution
from twotower_jax.generation.placement import Placement, parse_mesh, place
from twotower_jax.generation.trained import untrained_denoiser
from twotower_jax.kernels import Backends
from twotower_jax.parameters import Params, cast, parameter_table
from twotower_jax.quantization import METHODS
from twotower_jax.tokens import parse_ids
from twotower_jax.two_tower import TwoTower

CHECKPOINT = command_line.DEFINE_path("checkpoint", None, "Folder of the checkpoint.", required=True)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and activations.")
QUANTIZE = flags.DEFINE_enum(
    "quantize", None, list(METHODS),
    "Store weights in fewer bits as they are read: the routed experts in 8 or 4, other matrices in 8.",
)  # fmt: skip
KERNELS = flags.DEFINE_list("kernels", [], "OP=IMPLEMENTATION, several with commas; ops left out choose by platform.")
MESH = flags.DEFINE_list(
    "mesh", [], "AXIS=DEVICES, several with commas: data, fsdp, expert, tensor; -1 for all that are left."
)
EOS = flags.DEFINE_list(
    "eos", [], "Token ids that end a text, several with commas, in place of those that the checkpoint names."
)
_SMALL = 256 * 2**20  # Bytes.


class Loaded(NamedTuple):
    """A model, its parameters where `placement` has them, and the folder that holds its tokenizer."""

    model: TwoTower
    params: Params
    folder: pathlib.Path
    placement: Placement


def end_tokens() -> tuple[int, ...] | None:
    """The tokens of --eos; None without it.

    Raises:
      ValueError: if they are no token ids.
    """
    return parse_ids(EOS.value, "--eos") if EOS.value else None


def load_model(apart: bool = False) -> Loaded:
    """The model of the flags; with `apart` each tower on a mesh of its own.

    Raises:
      ValueError, OSError, CheckpointError: see `checkpoint.load.load`; ValueError also for --kernels and --mesh.
    """
    placement = place(parse_mesh(MESH.value), apart=apart)
    scan_layers = jax.default_backend() == "cpu" and is_small(pathlib.Path(CHECKPOINT.value))
    execution = Execution(dtype=DTYPE.value, scan_layers=scan_layers, backends=Backends.parse(KERNELS.value))
    places = None if placement.context is None else placement.parameter_sharding
    model, params, folder = load(CHECKPOINT.value, execution=execution, sharding=places, quantize=QUANTIZE.value)
    placement.check(model.config)
    return Loaded(model, cast(parameter_table(model), params, DTYPE.value), folder, placement)


def warn_if_untrained(folder: pathlib.Path, what: str, remedy: str) -> None:
    """Says on stderr that `what` uses a denoiser that never trained, and what to do."""
    if untrained_denoiser(folder):
        print(
            f"warning: {CHECKPOINT.value} is a backbone: its denoiser never trained, and {what} uses it; {remedy}",
            file=sys.stderr,
        )


def is_small(folder: pathlib.Path) -> bool:
    """Whether a checkpoint, by its size on disk, is computed so quickly that compiling is what takes time.

    Then layers are better stacked and scanned, which compiles fewer of them. But a scan copies each layer's weights out
    of the stack, every time it comes to it, and where they do not stay in a processor's caches that takes several times
    as long as the rest: a token of `ar` with 100 million parameters a tower took 71 ms of processor time, and 11 ms
    with layers one by one.
    """
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < _SMALL
