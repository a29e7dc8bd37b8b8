"""Compiles the train step of a config for hardware that is not there, and says whether it fits.

    python launch/compile.py --config=configs/nano30b.py --topology=v5p:8x8x4 [--config.mesh.expert=8 …]

Topologies are TPUs, such as v5p:8x8x4, v6e:16x16 or tpu7x:4x4x8 (package libtpu), and NVIDIA H200s, such as h200:64
(packages jax-cuda13-plugin and jax-cuda13-pjrt). Several may be given, separated by commas. Ends with status 1 if one
does not fit or holds a buffer that the design rules out.
"""

import json
import os

# Nothing runs here: no accelerator is looked for.
os.environ["JAX_PLATFORMS"] = "cpu"

from absl import flags
from ml_collections import config_flags

from twotower_jax import command_line
from twotower_jax.planning import hardware, report
from twotower_jax.planning.plan import plan_step
from twotower_jax.train.config import freeze

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/ or your own.", lock_config=True)
TOPOLOGY = flags.DEFINE_list("topology", None, "What to compile for.")
JSON = flags.DEFINE_string("json", None, "Also write the figures to this file, a JSON list.")
flags.mark_flags_as_required(["config", "topology"])


def main() -> None:
    config = freeze(CONFIG.value)
    found = [hardware.find(name) for name in TOPOLOGY.value]
    plans = []
    for one in found:
        plans.append(plan_step(config, one))
        print(report.describe(plans[-1]), flush=True)
    if JSON.value:
        with open(JSON.value, "w", encoding="utf-8") as file:
            json.dump([report.as_json(plan) for plan in plans], file, indent=2)
    if not all(plan.fits and not any(gate.found for gate in plan.gates) for plan in plans):
        command_line.fail("not every step fits its hardware without forbidden buffers; see above", status=1)


if __name__ == "__main__":
    command_line.run(main)
