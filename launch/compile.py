"""Compiles the train step of a config for hardware that is not there, and says whether it fits.

    python launch/compile.py --config=configs/nano30b.py --topology=v5p:8x8x4 [--config.mesh.expert=8 …]
    python launch/compile.py --config=configs/nano30b.py --topology=h200:1 --serve --batch_size=64 --capacity=4096

The second compiles what generation runs on one device, both towers in bfloat16 or --quantize, instead of the train
step.
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
from twotower_jax.planning import hardware, report, serving
from twotower_jax.planning.plan import Plan, plan_step
from twotower_jax.quantization import METHODS
from twotower_jax.train.config import TrainConfig, freeze

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/ or your own.", lock_config=True)
TOPOLOGY = flags.DEFINE_list("topology", None, "What to compile for.")
SERVE = flags.DEFINE_bool("serve", False, "Compile generation on one device instead of the train step.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "With --serve: rows together.", lower_bound=1)
CAPACITY = flags.DEFINE_integer("capacity", 4096, "With --serve: positions of a row.", lower_bound=1)
QUANTIZE = flags.DEFINE_enum("quantize", None, list(METHODS), "With --serve: weights in fewer bits.")
JSON = flags.DEFINE_string("json", None, "Also write the figures to this file, a JSON list.")
flags.mark_flags_as_required(["config", "topology"])


def main() -> None:
    config = freeze(CONFIG.value)
    found = [hardware.find(name) for name in TOPOLOGY.value]
    if SERVE.value:
        fit = [_serve(config, one) for one in found]
    else:
        plans = [_train(config, one) for one in found]
        fit = [plan.fits and not any(gate.found for gate in plan.gates) for plan in plans]
        if JSON.value:
            with open(JSON.value, "w", encoding="utf-8") as file:
                json.dump([report.as_json(plan) for plan in plans], file, indent=2)
    if not all(fit):
        command_line.fail("not everything fits its hardware without forbidden buffers; see above", status=1)


def _train(config: TrainConfig, one: hardware.Hardware) -> Plan:
    plan = plan_step(config, one)
    print(report.describe(plan), flush=True)
    return plan


def _serve(config: TrainConfig, one: hardware.Hardware) -> bool:
    model, block_size = config.model_config(config.vocab_size), config.block_sizes[-1]
    rows = {"batch": BATCH_SIZE.value, "capacity": CAPACITY.value}
    plan = serving.plan_serving(model, one, block_size=block_size, quantize=METHODS.get(QUANTIZE.value), **rows)
    print(serving.describe(plan), flush=True)
    return plan.fits


if __name__ == "__main__":
    command_line.run(main)
