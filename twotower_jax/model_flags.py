"""The flags of every command that computes with a checkpoint: where it is and how it is computed."""

import pathlib

import jax
from absl import flags

from twotower_jax.checkpoint.load import load
from twotower_jax.kernels import Backends
from twotower_jax.parameters import Params, cast, parameter_table
from twotower_jax.tower import Execution
from twotower_jax.two_tower import TwoTower

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of the checkpoint.", required=True)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and activations.")
KERNELS = flags.DEFINE_list("kernels", [], "OP=IMPLEMENTATION, several with commas; ops left out choose by platform.")


def load_model() -> tuple[TwoTower, Params, pathlib.Path]:
    """The model of the flags, its parameters, and the folder that holds its tokenizer.

    Raises:
      ValueError, OSError, CheckpointError: see `checkpoint.load.load`; ValueError also for --kernels.
    """
    # A scan over stacked layers compiles sooner, which counts on a CPU, but copies the experts out of the stack.
    execution = Execution(
        dtype=DTYPE.value, scan_layers=jax.default_backend() == "cpu", backends=Backends.parse(KERNELS.value)
    )
    model, params, folder = load(CHECKPOINT.value, execution=execution)
    return model, cast(parameter_table(model), params, DTYPE.value), folder
