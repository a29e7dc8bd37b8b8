"""Compiles the train step of a config for hardware that is not there, and says whether it fits.

    python launch/compile.py --config=configs/nano30b.py --topology=v5p:8x8x4 [--config.mesh.expert=8 …]
    python launch/compile.py --config=configs/nano30b.py --topology=h200:1 --serve --batch_size=64 --capacity=4096
    python launch/compile.py --config=configs/nano30b.py --table=scale.json [--topology=v6e:16x16] [--prices=v5p=3.5]
    python launch/compile.py --config=configs/nano4b.py --table=scale.json --programs=DIR [--page=PAGE.md] [--again]

    python launch/compile.py --config=configs/nano4b.py --least [--batch_size=4 --capacity=2048]
    python launch/compile.py --config=configs/nano30b.py --least --config.lora.rank=32

The second compiles what generation runs on one device, both towers in bfloat16 or --quantize, instead of the train
step. The third makes the table of docs/guide/scale.md, the fourth that of docs/reports/nano4b.md: every row that the
file lacks, each in a process of its own, and prints the table; with --topology it makes these rows again, and no
others. --page puts the table into a page, --programs keeps the compiled programs in a folder, and --again predicts
times from them once more, with other rates say, without compiling. The last two compile nothing: they print what state
and weights take at the least on the hardware that configs/nano4b.py names, and what the step of an adapter takes on one
device.

Topologies are TPUs, such as v5p:8x8x4, v6e:16x16 or tpu7x:4x4x8 (package libtpu), and NVIDIA GPUs, such as h200:64,
h100:1 or l4:1 (packages jax-cuda13-plugin and jax-cuda13-pjrt). Several may be given, separated by commas. Ends with
status 1 if one does not fit or holds a buffer that the design rules out. A step of the 30B model takes 10 GB of memory
to compile.
"""

import environment  # noqa: F401, first: it says what is missing

# isort: split
import gzip
import importlib.util
import inspect
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Any

# Nothing runs here: no accelerator is looked for.
os.environ["JAX_PLATFORMS"] = "cpu"

from absl import flags
from ml_collections import config_flags

from twotower_jax import command_line
from twotower_jax.choices import QUANTIZATIONS

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/ or your own.", lock_config=True)
TOPOLOGY = flags.DEFINE_list("topology", [], "What to compile for.")
SERVE = flags.DEFINE_bool("serve", False, "Compile generation on one device instead of the train step.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "With --serve: rows together.", lower_bound=1)
CAPACITY = flags.DEFINE_integer("capacity", 4096, "With --serve: positions of a row.", lower_bound=1)
QUANTIZE = flags.DEFINE_enum("quantize", None, QUANTIZATIONS, "With --serve: weights in fewer bits.")
JSON = command_line.DEFINE_path("json", None, "Also write the figures to this file, a JSON list.", local=True)
TABLE = command_line.DEFINE_path(
    "table",
    None,
    "A JSON file with the rows of docs/guide/scale.md and nano4b.md, to be completed and printed.",
    local=True,
)
PAGE = command_line.DEFINE_path(
    "page", None, "With --table: a page to put the table into, between its two lines.", local=True
)
PROGRAMS = command_line.DEFINE_path(
    "programs", None, "A folder for the compiled programs, gzip of HLO text.", local=True
)
AGAIN = flags.DEFINE_bool("again", False, "With --table and --programs: only predict again, from what is kept there.")
LEAST = flags.DEFINE_bool("least", False, "Print what configs/nano4b.py needs at the least; nothing is compiled.")
PRICES = flags.DEFINE_list("prices", [], "With --table: dollars an hour of a chip, GENERATION=DOLLARS.")
flags.mark_flag_as_required("config")

if __name__ == "__main__":
    command_line.read_flags()

from twotower_jax.planning import hardware, least, report, serving, table
from twotower_jax.planning.plan import plan_step
from twotower_jax.planning.predict import as_figures, predict
from twotower_jax.planning.rates import RATES
from twotower_jax.quantization import METHODS
from twotower_jax.train.config import TrainConfig, check_given, freeze


def main() -> None:
    _refuse_unused()
    config = freeze(CONFIG.value)
    notes = check_given(config, config_flags.get_override_values(flags.FLAGS["config"]))
    if LEAST.value:
        if config.lora.rank:
            command_line.refuse_given([BATCH_SIZE, CAPACITY], "with --least and an adapter, which is not served here")
            print(least.adapter_markdown(config))
        else:
            print(least.markdown(_on, rows=BATCH_SIZE.value, capacity=CAPACITY.value))
        return
    if TABLE.value:
        fine = _make_table(pathlib.Path(TABLE.value))
    elif TOPOLOGY.value:
        found = [hardware.find(name) for name in TOPOLOGY.value]
        plans = [_serve(config, one) if SERVE.value else _train(config, one) for one in found]
        if JSON.value:
            pathlib.Path(JSON.value).write_text(json.dumps(plans, indent=1), encoding="utf-8")
        fine = all(map(_is_fine, plans))
    else:
        raise ValueError("give --topology, --table for all of docs/guide/scale.md, or --least")
    for line in notes:
        print(f"warning: {line}", file=sys.stderr)
    if not fine:
        command_line.fail("not everything fits its hardware without forbidden buffers; see above", status=1)


def _refuse_unused() -> None:
    """Refuses flags that the kind of call does not look at."""
    if LEAST.value:
        command_line.refuse_given(
            [TOPOLOGY, SERVE, QUANTIZE, JSON, TABLE, PRICES, PAGE, PROGRAMS, AGAIN], "with --least"
        )
    elif TABLE.value:
        given = SERVE, QUANTIZE, BATCH_SIZE, CAPACITY, JSON
        command_line.refuse_given(given, "with --table, whose rows say what is compiled")
        if not PROGRAMS.value:
            command_line.refuse_given([AGAIN], "without --programs, the folder with the rows' programs")
    else:
        command_line.refuse_given([PRICES, PAGE, AGAIN], "without --table")
        if not SERVE.value:
            command_line.refuse_given([QUANTIZE, BATCH_SIZE, CAPACITY], "without --serve")


def _on(name: str) -> TrainConfig:
    """The config for hardware that it knows by this name."""
    path = _config_file()
    module = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("config", path))
    spec.loader.exec_module(module)
    if not inspect.signature(module.get_config).parameters:
        raise ValueError(f"--config={path}: its get_config takes no name of hardware, which --least needs")
    return freeze(module.get_config(name))


def _is_fine(plan: dict[str, Any]) -> bool:
    return plan["fits"] and not any(plan["gates"].values())


def _kept(program: str) -> None:
    """Writes a compiled program into the folder for them, if there is one: 0.hlo.gz and so on."""
    if PROGRAMS.value:
        folder = pathlib.Path(PROGRAMS.value)
        folder.mkdir(parents=True, exist_ok=True)
        number = sum(1 for _ in folder.glob("*.hlo.gz"))
        (folder / f"{number}.hlo.gz").write_bytes(gzip.compress(program.encode()))


def _train(config: TrainConfig, one: hardware.Hardware) -> dict[str, Any]:
    plan = plan_step(config, one, keep=_kept)
    print(report.describe(plan), flush=True)
    return report.as_json(plan)


def _serve(config: TrainConfig, one: hardware.Hardware) -> dict[str, Any]:
    model, block_size = config.model_config(config.vocab_size), config.block_sizes[-1]
    rows = {"batch": BATCH_SIZE.value, "capacity": CAPACITY.value}
    method = METHODS.get(QUANTIZE.value)
    plan = serving.plan_serving(model, one, block_size=block_size, quantize=method, keep=_kept, **rows)
    print(serving.describe(plan), flush=True)
    return serving.as_json(plan)


def _make_table(path: pathlib.Path) -> bool:
    """Makes the rows that are missing or asked for; returns whether all of the table is as it should be."""
    name = pathlib.Path(_config_file()).stem
    prices, rows = table.parse_prices(PRICES.value), table.rows_of(name)
    if unknown := sorted(set(TOPOLOGY.value) - {row.topology for row in rows}):
        known = ", ".join(dict.fromkeys(row.topology for row in rows))
        raise ValueError(f"--topology={unknown[0]} is no row of the table, which has {known}")
    for row in rows:
        results = table.load(path)
        if AGAIN.value:
            if row.name in results and _programs_of(row).exists():
                table.write(path, results | {row.name: _predicted_again(row, results[row.name])})
        elif row.topology in TOPOLOGY.value or not TOPOLOGY.value and row.name not in results:
            table.store(path, row.name, _row(row))
    results = table.load(path)
    text = table.markdown(results, prices, name)
    print(text, flush=True)
    if PAGE.value:
        table.replace(pathlib.Path(PAGE.value), name, text)
    return all(_is_fine(results[row.name]) for row in rows if row.name in results)


def _config_file() -> str:
    """The path of --config, without what stands after its colon."""
    return config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]


def _programs_of(row: table.Row) -> pathlib.Path:
    """The folder for a row's programs."""
    return pathlib.Path(PROGRAMS.value) / re.sub(r"[ :]", "-", row.name)


def _row(row: table.Row) -> dict[str, Any]:
    """Compiles one row in a process of its own, so that what it needs of memory is given back."""
    with tempfile.TemporaryDirectory() as folder:
        figures = pathlib.Path(folder) / "figures.json"
        # The config as it was given here, with the row's own changes after it.
        given = [f"--config={_config_file()}{row.variant and f':{row.variant}'}"]
        given += [
            f"--config.{name}={value}"
            for name, value in config_flags.get_override_values(flags.FLAGS["config"]).items()
        ]
        if PROGRAMS.value:
            shutil.rmtree(_programs_of(row), ignore_errors=True)
            given.append(f"--programs={_programs_of(row)}")
        done = subprocess.run([sys.executable, __file__, *given, f"--json={figures}", *row.options], check=False)
        if not figures.exists():
            raise ValueError(f"{row.name} was not compiled (status {done.returncode}); its message is above")
        return json.loads(figures.read_text(encoding="utf-8"))[0]


def _predicted_again(row: table.Row, figures: dict[str, Any]) -> dict[str, Any]:
    """A row's figures with what its programs, as they were compiled, take by today's rates."""
    rates = RATES[row.topology.partition(":")[0]]

    def again(number: int, old: dict[str, Any]) -> dict[str, Any]:
        program = gzip.decompress((_programs_of(row) / f"{number}.hlo.gz").read_bytes()).decode()
        if not program:
            return {}
        return {"predicted": as_figures(predict(program, rates, figures["peak_flops"], old["kernel_flops"]))}

    if row.serve:
        return figures | {"functions": [old | again(n, old) for n, old in enumerate(figures["functions"])]}
    return report.utilized(figures | again(0, figures))


if __name__ == "__main__":
    command_line.run(main, cache=False)
