"""The table of docs/guide/scale.md: the published model on all hardware that it is planned for, row by row.

Rows are kept in a JSON file as they come, so that what was interrupted goes on, and one row can be made again by
itself.
"""

import datetime
import importlib.metadata
import json
import pathlib
from typing import Any, NamedTuple

import jax

from twotower_jax.outputs import write_file
from twotower_jax.planning import checks
from twotower_jax.planning.hardware import GIB
from twotower_jax.planning.plan import HEADROOM, UTILIZATION
from twotower_jax.planning.report import PUBLISHED_TOKENS

# Dollars for an hour of a chip, assumed: nobody has asked a vendor. `compile.py --prices` takes others.
PRICES = {"v5p": 4.0, "v6e": 2.7, "tpu7x": 10.0, "h200": 4.0}


class Row(NamedTuple):
    """Hardware, what is compiled for it, and what the config is to have otherwise there."""

    topology: str
    serve: bool = False
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.topology} serve" if self.serve else self.topology


# A host of H200s has eight, which share the experts.
_ON_H200 = ("--config.mesh.expert=8",)
ROWS = (
    Row("v5p:8x8x4"),
    Row("v6e:16x16"),
    Row("tpu7x:4x4x8"),
    Row("h200:256", flags=_ON_H200),
    Row("h200:1", serve=True, flags=("--batch_size=64", "--capacity=4096")),
)

_SHOWN = 2  # Kinds of forbidden buffers that the table names.

Results = dict[str, dict[str, Any]]


def load(path: pathlib.Path) -> Results:
    """The rows made so far, by name; none where there is no file.

    Raises:
      ValueError: if the file holds something else.
    """
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        results = None
    if not isinstance(results, dict) or not all(isinstance(figures, dict) for figures in results.values()):
        raise ValueError(f"{path}: not a file of this table's rows; name another, or remove it")
    return {row.name: results[row.name] for row in ROWS if row.name in results}


def store(path: pathlib.Path, row: str, figures: dict[str, Any]) -> None:
    """Adds a row to the file, or replaces it, with what compiled it and when."""
    versions = {"jax": jax.__version__}
    for package in ("libtpu", "jax-cuda13-plugin"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    date = datetime.date.today().isoformat()
    results = load(path) | {row: figures | {"date": date, "versions": versions}}
    write_file(path, json.dumps(results, indent=1) + "\n")


def markdown(results: Results, prices: dict[str, float]) -> str:
    """The rows as two tables: training, a column for each hardware, and serving."""
    training = [results[row.name] for row in ROWS if row.name in results and not row.serve]
    serving = [results[row.name] for row in ROWS if row.name in results and row.serve]
    parts = [_table(_TRAINING, training, prices)] if training else []
    parts += [_table(_SERVING, serving, prices)] if serving else []
    return "\n\n".join(parts)


def parse_prices(given: list[str]) -> dict[str, float]:
    """`PRICES`, with those of "v5p=3.5" and the like in their place.

    Raises:
      ValueError: for anything else.
    """
    prices = dict(PRICES)
    for text in given:
        generation, _, price = text.partition("=")
        try:
            if generation not in prices or not float(price) > 0:
                raise ValueError
        except ValueError:
            raise ValueError(f"--prices: {text!r} is not GENERATION=DOLLARS ({', '.join(PRICES)})") from None
        prices[generation] = float(price)
    return prices


def _table(lines, columns: list[dict[str, Any]], prices: dict[str, float]) -> str:
    rows = [["" if name is None else name, *(show(column, prices) for column in columns)] for name, show in lines]
    rows.insert(1, ["---", *["--:"] * len(columns)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _gib(name: str):
    return lambda plan, _: f"{plan[name] / GIB:.2f}"


def _days(plan: dict[str, Any]) -> float:
    return PUBLISHED_TOKENS / plan["tokens_per_second"] / 86400


def _dollars(plan: dict[str, Any], prices: dict[str, float]) -> float:
    return prices[plan["hardware"].partition(":")[0]]


def _in_all(plan: dict[str, Any], _) -> str:
    return f"{plan['total'] / GIB:.2f} of {plan['memory'] / GIB:.0f}"


def _check(name: str):
    def show(plan: dict[str, Any], _) -> str:
        found = plan["gates"][name]
        return "; ".join(found) or "none" if len(found) <= _SHOWN else f"of {len(found)} kinds, see the file"

    return show


def _cost(plan: dict[str, Any], prices: dict[str, float]) -> str:
    dollars = _days(plan) * 24 * plan["chips"] * _dollars(plan, prices)
    return f"${dollars / 1e6:.2f} M at ${_dollars(plan, prices):.2f}"


def _needs(function: int):
    return lambda plan, _: f"{plan['functions'][function]['temporaries'] / GIB:.2f}"


_TRAINING = [
    ("one train step", lambda plan, _: plan["hardware"]),
    ("chips, devices", lambda plan, _: f"{plan['chips']}, {plan['devices']}"),
    ("mesh", lambda plan, _: " × ".join(f"{axis} {size}" for axis, size in plan["mesh"].items())),
    ("weights, GiB a device", _gib("weights")),
    ("optimizer", _gib("optimizer")),
    ("activations (all temporaries)", _gib("activations")),
    ("in all", _in_all),
    (f"fits with {HEADROOM:.0%} free", lambda plan, _: "yes" if plan["fits"] else "no"),
    ("weights copied into other tiles, once a step", _gib("retiled")),
    (checks.STATES, _check(checks.STATES)),
    (checks.DENSE, _check(checks.DENSE)),
    (checks.WEIGHT_COPIES, _check(checks.WEIGHT_COPIES)),
    ("compiling, by the clock", lambda plan, _: f"{plan['lower_seconds'] + plan['compile_seconds']:,.0f} s"),
    ("compiling, processor seconds", lambda plan, _: f"{plan['processor_seconds']:,.0f}"),
    ("tokens a step", lambda plan, _: f"{plan['tokens']:,}"),
    ("FLOPs a step, analytic", lambda plan, _: f"{plan['flops'] / 1e12:,.0f} T"),
    (f"tokens/s at {UTILIZATION:.0%} of the peak", lambda plan, _: f"{plan['tokens_per_second'] / 1e6:.2f} M"),
    ("days for 2.1 T tokens", lambda plan, _: f"{_days(plan):.1f}"),
    ("chip-hours", lambda plan, _: f"{_days(plan) * 24 * plan['chips']:,.0f}"),
    ("dollars, at an assumed price a chip-hour", _cost),
]

_SERVING = [
    ("serving on one device", lambda plan, _: plan["hardware"]),
    ("rows, positions, block", lambda plan, _: f"{plan['batch']}, {plan['capacity']}, {plan['block_size']}"),
    ("weights, GiB", _gib("weights")),
    ("caches", _gib("cache")),
    ("more, for a piece of a prompt", _needs(0)),
    ("more, for an evaluation of the denoiser", _needs(1)),
    ("more, for the extension of the cache", _needs(2)),
    ("in all", _in_all),
    (f"fits with {HEADROOM:.0%} free", lambda plan, _: "yes" if plan["fits"] else "no"),
    (checks.WEIGHT_COPIES, _check(checks.WEIGHT_COPIES)),
    ("compiling, by the clock", lambda plan, _: f"{sum(f['compile_seconds'] for f in plan['functions']):,.0f} s"),
    ("compiling, processor seconds", lambda plan, _: f"{plan['processor_seconds']:,.0f}"),
]
