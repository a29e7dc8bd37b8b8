"""The flags of an adapter beside a checkpoint's weights, which commands that compute with one share."""

from typing import Any

from absl import flags

from twotower_jax import command_line
from twotower_jax.choices import APPLIED_TO

TOWER_HELP = (
    "Which tower an adapter of a backbone changes; default: the one that it was trained in, if its files say so, else "
    "both of a backbone's checkpoint, and otherwise the context tower."
)
ADAPTER = command_line.DEFINE_path("adapter", None, "Folder of a LoRA adapter in PEFT's files, of this checkpoint.")
ADAPTER_TOWER = flags.DEFINE_enum("adapter_tower", None, APPLIED_TO, TOWER_HELP)


def given() -> dict[str, Any]:
    """The arguments of `model_from_flags.load_model` and `checkpoint.load.load` that the flags stand for.

    Raises:
      ValueError: for --adapter_tower without --adapter.
    """
    if ADAPTER.value is None:
        command_line.refuse_given([ADAPTER_TOWER], "without --adapter")
    return {"adapter": ADAPTER.value, "adapter_tower": ADAPTER_TOWER.value}
