"""The tables of docs/guide/scale.md and docs/reports/nano4b.md: models on all hardware that they are planned for.

Rows are kept in one JSON file as they come, so that what was interrupted goes on, and one row can be made again by
itself. A page has a model's tables between two lines (`replace`).
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
# Tokens that a run of a small model may have.
RUNS = {"1 B": 1e9, "10 B": 1e10, "100 B": 1e11}


class Row(NamedTuple):
    """A config file's name, hardware, what is compiled for it, and what the config is to have otherwise there.

    Attributes:
      variant: what stands after the colon of --config. flags: of launch/compile.py.
    """

    config: str
    topology: str
    serve: bool = False
    flags: tuple[str, ...] = ()
    variant: str = ""
    quantize: str = ""

    @property
    def name(self) -> str:
        model = "" if self.config == "nano30b" else f"{self.config} "
        return f"{model}{self.topology}{' serve' if self.serve else ''}{self.quantize and f' {self.quantize}'}"

    @property
    def options(self) -> list[str]:
        """All flags of this row but the config."""
        given = [f"--topology={self.topology}", *self.flags]
        given += [f"--quantize={self.quantize}"] if self.quantize else []
        return [*given, "--serve"] if self.serve else given


def _serving(config: str, topology: str, rows: int, quantize: str = "") -> Row:
    return Row(config, topology, True, (f"--batch_size={rows}", "--capacity=4096"), quantize=quantize)


ROWS = (
    Row("nano30b", "v5p:8x8x4"),
    Row("nano30b", "v6e:16x16"),
    Row("nano30b", "tpu7x:4x4x8"),
    # A host of H200s has eight, which share the experts.
    Row("nano30b", "h200:256", flags=("--config.mesh.expert=8",)),
    _serving("nano30b", "h200:1", 64),
    Row("nano4b", "h200:1", variant="h200"),
    Row("nano4b", "h100:1", variant="h100"),
    Row("nano4b", "v5e:2x4", variant="v5e-8"),
    Row("nano4b", "v6e:2x4", variant="v6e-8"),
    Row("nano4b", "v5p:4x4x4", variant="v5p-64"),
    _serving("nano4b", "l4:1", 8),
    _serving("nano4b", "h100:1", 64),
    _serving("nano4b", "v6e:1x1", 8),
    _serving("nano4b", "v5e:1x1", 8),
    _serving("nano4b", "v5e:1x1", 8, "int8"),
)

_SHOWN = 2  # Kinds of forbidden buffers that the table names.
_NOTHING = "–"

Results = dict[str, dict[str, Any]]


def rows_of(config: str) -> list[Row]:
    """The rows of a config file, by its name without folder and ending.

    Raises:
      ValueError: if it has none.
    """
    found = [row for row in ROWS if row.config == config]
    if not found:
        known = ", ".join(dict.fromkeys(row.config for row in ROWS))
        raise ValueError(f"--table: there are no rows for a config named {config!r} (there are for {known})")
    return found


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
    write(path, load(path) | {row: figures | {"date": date, "versions": versions}})


def write(path: pathlib.Path, results: Results) -> None:
    """Writes all rows."""
    results = {row.name: results[row.name] for row in ROWS if row.name in results}
    write_file(path, json.dumps(results, indent=1) + "\n")


def markdown(results: Results, prices: dict[str, float], config: str = "nano30b") -> str:
    """A model's rows as two tables: training, a column for each hardware, and serving."""
    rows = [row for row in rows_of(config) if row.name in results]
    training = [results[row.name] for row in rows if not row.serve]
    serving = [results[row.name] for row in rows if row.serve]
    published = config == "nano30b"
    runs = _PUBLISHED_RUN if published else _SMALL_RUNS
    parts = [_table([*_TRAINING, *runs, *_PREDICTED], training, prices)] if training else []
    parts += [_table(_SERVING, serving, prices)] if serving else []
    return "\n\n".join(parts)


def replace(page: pathlib.Path, config: str, text: str) -> None:
    """Puts a model's tables into a page, in the place of those between its two lines `<!-- CONFIG: … -->`.

    Raises:
      ValueError: if the page has no such lines.
    """
    before, begin, rest = page.read_text(encoding="utf-8").partition(_border(config, "rows"))
    _, end, after = rest.partition(_border(config, "end"))
    if not begin or not end:
        raise ValueError(f"{page}: no lines {_border(config, 'rows')!r} and {_border(config, 'end')!r}")
    write_file(page, f"{before}{begin}\n\n{text}\n\n{end}{after}")


def _border(config: str, word: str) -> str:
    return f"<!-- {config}: {word} -->"


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


def _days(plan: dict[str, Any], tokens: float = PUBLISHED_TOKENS) -> float:
    return tokens / plan["tokens_per_second"] / 86400


def _days_of(tokens: float):
    return lambda plan, _: f"{_days(plan, tokens):.2f}"


def _dollars(plan: dict[str, Any], prices: dict[str, float]) -> float:
    return prices[plan["hardware"].partition(":")[0]]


def _in_all(plan: dict[str, Any], _) -> str:
    return f"{plan['total'] / GIB:.2f} of {plan['memory'] / GIB:.0f}"


def _fits(plan: dict[str, Any], _) -> str:
    refused = plan.get("refused") or next((f["refused"] for f in plan.get("functions", ()) if f.get("refused")), None)
    return "yes" if plan["fits"] else f"no: {refused}" if refused else "no"


def _mesh(plan: dict[str, Any], _) -> str:
    return " × ".join(f"{axis} {size}" for axis, size in plan["mesh"].items()) or "one device"


def _check(name: str):
    def show(plan: dict[str, Any], _) -> str:
        found = plan["gates"].get(name)
        if found is None:
            return _NOTHING
        return "; ".join(found) or "none" if len(found) <= _SHOWN else f"of {len(found)} kinds, see the file"

    return show


def _cost(plan: dict[str, Any], prices: dict[str, float]) -> str:
    dollars = _days(plan) * 24 * plan["chips"] * _dollars(plan, prices)
    return f"${dollars / 1e6:.2f} M at ${_dollars(plan, prices):.2f}"


def _needs(function: int):
    return lambda plan, _: f"{plan['functions'][function]['temporaries'] / GIB:.2f}"


def _rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second / 1e6:.2f} M" if tokens_per_second >= 1e6 else f"{tokens_per_second:,.0f}"


def _predicted(show):
    """A line of the prediction; rows that were compiled before there was one, or that do not fit, have none."""
    return lambda plan, _: show(plan, plan["predicted"]) if plan.get("predicted") else _NOTHING


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 or not value else f"{value:.3f}"


def _link_bytes(plan: dict[str, Any], found: dict[str, Any]) -> str:
    return "; ".join(f"{kind} {size / GIB:.1f}" for kind, size in found["link_bytes"].items()) or "none"


def _call(function: int):
    """Milliseconds of one of the functions, and what limits it."""

    def show(plan: dict[str, Any], _) -> str:
        found = plan["functions"][function].get("predicted")
        return f"{1e3 * found['seconds']:.2f}, {found['limit']}" if found else _NOTHING

    return show


def _served(evaluations: int):
    """Tokens a second of all rows, with so many evaluations of the denoiser for every block."""

    def show(plan: dict[str, Any], _) -> str:
        _, evaluation, extension = (function.get("predicted") for function in plan["functions"])
        if not evaluation or not extension:
            return _NOTHING
        seconds = evaluations * evaluation["seconds"] + extension["seconds"]
        return f"{plan['batch'] * plan['block_size'] / seconds:,.0f}"

    return show


_TRAINING = [
    ("one train step", lambda plan, _: plan["hardware"]),
    ("chips, devices", lambda plan, _: f"{plan['chips']}, {plan['devices']}"),
    ("mesh", _mesh),
    ("weights, GiB a device", _gib("weights")),
    ("optimizer", _gib("optimizer")),
    ("activations (all temporaries)", _gib("activations")),
    ("in all", _in_all),
    (f"fits with {HEADROOM:.0%} free", _fits),
    ("weights copied into other tiles, once a step", _gib("retiled")),
    (checks.STATES, _check(checks.STATES)),
    (checks.DENSE, _check(checks.DENSE)),
    (checks.WEIGHT_COPIES, _check(checks.WEIGHT_COPIES)),
    ("compiling, by the clock", lambda plan, _: f"{plan['lower_seconds'] + plan['compile_seconds']:,.0f} s"),
    ("compiling, processor seconds", lambda plan, _: f"{plan['processor_seconds']:,.0f}"),
    ("tokens a step", lambda plan, _: f"{plan['tokens']:,}"),
    ("FLOPs a step, analytic", lambda plan, _: f"{plan['flops'] / 1e12:,.0f} T"),
    (f"tokens/s at {UTILIZATION:.0%} of the peak", lambda plan, _: _rate(plan["tokens_per_second"])),
]
_PUBLISHED_RUN = [
    ("days for 2.1 T tokens", lambda plan, _: f"{_days(plan):.1f}"),
    ("chip-hours", lambda plan, _: f"{_days(plan) * 24 * plan['chips']:,.0f}"),
    ("dollars, at an assumed price a chip-hour", _cost),
]
_SMALL_RUNS = [(f"days for {name} tokens", _days_of(tokens)) for name, tokens in RUNS.items()]
_PREDICTED = [
    ("predicted time of a step, s", _predicted(lambda plan, found: _seconds(found["seconds"]))),
    ("of it products", _predicted(lambda plan, found: _seconds(found["arithmetic"]))),
    ("memory traffic", _predicted(lambda plan, found: _seconds(found["memory"]))),
    ("links, with nothing else to do", _predicted(lambda plan, found: _seconds(found["exposed"]))),
    ("links, during other work, not in the sum", _predicted(lambda plan, found: _seconds(found["hidden"]))),
    ("GiB sent by each device", _predicted(_link_bytes)),
    ("limited by", _predicted(lambda plan, found: found["limit"])),
    ("predicted utilization", _predicted(lambda plan, found: f"{found['utilization']:.0%}")),
    ("tokens/s as predicted", _predicted(lambda plan, found: _rate(plan["tokens"] / found["seconds"]))),
]

_SERVING = [
    ("serving on one device", lambda plan, _: plan["hardware"]),
    ("weights in", lambda plan, _: plan["method"] or "bfloat16"),
    ("rows, positions, block", lambda plan, _: f"{plan['batch']}, {plan['capacity']}, {plan['block_size']}"),
    ("weights, GiB", _gib("weights")),
    ("caches", _gib("cache")),
    ("more, for a piece of a prompt", _needs(0)),
    ("more, for an evaluation of the denoiser", _needs(1)),
    ("more, for the extension of the cache", _needs(2)),
    ("in all", _in_all),
    (f"fits with {HEADROOM:.0%} free", _fits),
    (checks.WEIGHT_COPIES, _check(checks.WEIGHT_COPIES)),
    ("compiling, by the clock", lambda plan, _: f"{sum(f['compile_seconds'] for f in plan['functions']):,.0f} s"),
    ("compiling, processor seconds", lambda plan, _: f"{plan['processor_seconds']:,.0f}"),
    ("predicted ms of a prompt's piece, and what limits it", _call(0)),
    ("of an evaluation", _call(1)),
    ("of an extension", _call(2)),
    *((f"tokens/s with {n} evaluation{'s' * (n > 1)} per block", _served(n)) for n in (16, 4, 1)),
]
