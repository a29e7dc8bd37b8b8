"""The flags of every command that computes with a checkpoint: where it is and how it is computed."""

from absl import flags

from twotower_jax import command_line
from twotower_jax.choices import QUANTIZATIONS

CHECKPOINT = command_line.DEFINE_path("checkpoint", None, "Folder of the checkpoint.", required=True)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and activations.")
QUANTIZE = flags.DEFINE_enum(
    "quantize", None, QUANTIZATIONS,
    "Store weights in fewer bits as they are read: the routed experts in 8 or 4, other matrices in 8.",
)  # fmt: skip
KERNELS = flags.DEFINE_list("kernels", [], "OP=IMPLEMENTATION, several with commas; ops left out choose by platform.")
MESH = flags.DEFINE_list(
    "mesh", [], "AXIS=DEVICES, several with commas: data, fsdp, expert, tensor; -1 for all that are left."
)
EOS = flags.DEFINE_list(
    "eos", [], "Token ids that end a text, several with commas, in place of those that the checkpoint names."
)
