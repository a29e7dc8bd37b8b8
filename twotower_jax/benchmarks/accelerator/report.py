"""What was measured as Markdown: a table for each part, and what failed."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from twotower_jax.benchmarks._kernel_goals import Measured, goals
from twotower_jax.benchmarks.accelerator.results import TRIES

Record = dict[str, Any]


def versions(environment: dict[str, Any]) -> str:
    """In a line."""
    return ", ".join(f"{name} {version}" for name, version in environment["versions"].items())


def summary(part: str, outcome: dict[str, Any]) -> str:
    """What a unit came to, in a few words."""
    if "error" in outcome:
        return f"FAILED: {outcome['error']}"
    result = outcome["result"]
    if part == "errors":
        return _two_errors(result)
    if part == "speed":
        times = [f"{case['case']} {_milliseconds(case)}" for case in result["cases"]]
        return "; ".join(times)
    if part == "passes":
        return f"{_milliseconds(result)}, {_of_roofline(result)} of the roofline"
    if part == "train":
        return f"{_milliseconds(result)}, {result['flops'] / result['seconds'] / result['rate']:.0%} of the matrix rate"
    return f"{result['tokens_per_second']:,.0f} tokens/s"


def text(environment: dict[str, Any]) -> str:
    """The report on one device under one set of versions."""
    records = list(environment["units"].values())
    done = {part: [r for r in records if r["part"] == part and "result" in r] for part in _TABLES}
    dates = sorted(record["date"] for record in records) or [time.strftime("%Y-%m-%d")]
    lines = [
        f"# Measured on {environment['device']}",
        "",
        f"{versions(environment)}; {environment['runtime']}. Shapes of {environment['model']}. {dates[0][:10]}"
        + (f" to {dates[-1][:10]}" if dates[0][:10] != dates[-1][:10] else "")
        + ", by `python launch/benchmark.py accelerator`.",
    ]
    for part, (title, table) in _TABLES.items():
        if done[part]:
            lines += ["", f"## {title}", "", *table(done[part])]
    if failed := [record for record in records if "result" not in record]:
        lines += ["", "## What failed", "", *_failed(failed)]
    return "\n".join(lines) + "\n"


def _table(*columns: str, numbers: int, rows: Iterable[tuple]) -> Iterator[str]:
    """`numbers`: how many of the last columns are numbers."""
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * (len(columns) - numbers) + "--:|" * numbers
    yield from (f"| {' | '.join(map(str, row))} |" for row in rows)


def _two_errors(result: Record) -> str:
    gradients = result["gradients"]
    return f"{result['outputs']:.1e}" + ("" if gradients is None else f", {gradients:.1e}")


def _milliseconds(result: Record) -> str:
    return f"{result['seconds'] * 1e3:,.3f} ms" if "seconds" in result else f"FAILED: {result['error']}"


def _of_roofline(result: Record) -> str:
    return f"{result['must_move'] / result['bandwidth'] / result['seconds']:.0%}"


def _errors(records: list[Record]) -> Iterator[str]:
    yield "‖found − exact‖ / ‖exact‖, exact in float64 of the same inputs; of outputs and of gradients the worst array."
    yield ""

    def problem(record: Record) -> tuple:
        return tuple(record["parameters"][name] for name in ("op", "problem", "dtype"))

    of_xla = {problem(r): r["result"] for r in records if r["parameters"]["implementation"] == "xla"}

    def row(record: Record) -> tuple:
        result, xla = record["result"], of_xla.get(problem(record))
        gradients = result["gradients"]
        times = ""
        if xla:
            pairs = [(result[name], xla[name]) for name in ("outputs", "gradients")]
            times = f"{max(own / max(other, 1e-30) for own, other in pairs if None not in (own, other)):.1f}"
        op, kind, dtype = problem(record)
        own = f"{result['outputs']:.1e}", "" if gradients is None else f"{gradients:.1e}"
        return op, kind, dtype, record["parameters"]["implementation"], *own, times

    ordered = sorted(records, key=problem)
    columns = "op", "problem", "inputs", "implementation", "outputs", "gradients", "times XLA's"
    yield from _table(*columns, numbers=3, rows=map(row, ordered))


def _speed(records: list[Record]) -> Iterator[str]:
    yield "Fractions are of a large matrix product and of a copy in the same turns as each form."
    yield ""
    cases: dict[str, list[tuple[Record, Record]]] = {}
    for record in records:
        for case in record["result"]["cases"]:
            cases.setdefault(case["case"], []).append((case, record["result"]))
    rows, measured = [], []
    for name, forms in cases.items():
        xla = [case["seconds"] for case, _ in forms if case["form"] == "xla" and "seconds" in case]
        for case, ceilings in forms:
            if "error" in case:
                rows.append((name, case["form"], case["error"], "", "", "", ""))
                continue
            seconds = case["seconds"]
            of_rate = case["operations"] / ceilings["rate"] / seconds
            of_bandwidth = case["must_move"] / ceilings["bandwidth"] / seconds
            against = f"{seconds / xla[0]:.2f}" if xla else ""
            temporaries = f"{case['temporaries'] / 2**20:,.1f} MiB"
            rows.append(
                (name, case["form"], _milliseconds(case), against, f"{of_rate:.1%}", f"{of_bandwidth:.1%}", temporaries)
            )
            measured.append(Measured(name, case["form"], seconds, case["temporaries"], of_bandwidth))
    columns = "case", "form", "median", "against xla", "of matrix rate", "of bandwidth", "temporaries"
    yield from _table(*columns, numbers=5, rows=rows)
    if reached := list(goals(measured)):
        yield from (
            "",
            "| case | our fastest form | reaches | wanted on an H200, of the 30B model |",
            "|---|---|---|---|",
        )
        yield from reached


def _passes(records: list[Record]) -> Iterator[str]:
    yield "The roofline: the time that the bytes which a pass must move take at the rate of a copy in the same process."
    yield ""

    def row(record: Record) -> tuple:
        parameters, result = record["parameters"], record["result"]
        least = result["must_move"] / result["bandwidth"] * 1e3
        return (
            parameters["pass"], len(parameters["layers"]), parameters["batch"], _milliseconds(result),
            f"{result['must_move'] / 1e9:,.3f}", f"{least:,.3f} ms", _of_roofline(result),
        )  # fmt: skip

    columns = "pass", "layers", "batch", "median", "GB to move", "roofline", "of the roofline"
    yield from _table(*columns, numbers=6, rows=map(row, records))


def _train(records: list[Record]) -> Iterator[str]:
    def row(record: Record) -> tuple:
        parameters, result = record["parameters"], record["result"]
        speed = result["flops"] / result["seconds"]
        of_peak = "" if result["peak"] is None else f"{speed / result['peak']:.1%}"
        return (
            f"{parameters['layers']}, {parameters['rows']} × {parameters['sequence']} tokens", _milliseconds(result),
            f"{result['tokens'] / result['seconds']:,.0f}", f"{speed / 1e12:,.3f}", of_peak,
            f"{speed / result['rate']:.1%}", f"{result['temporaries'] / 2**30:,.2f} GiB",
        )  # fmt: skip

    columns = "step", "median", "tokens/s", "model TFLOP/s", "of the data sheet's peak", "of a large product's rate"
    yield from _table(*columns, "temporaries", numbers=6, rows=map(row, records))


def _generate(records: list[Record]) -> Iterator[str]:
    def row(record: Record) -> tuple:
        parameters, result = record["parameters"], record["result"]
        evaluations = f"{result['denoiser_evaluations']:.2f} + {result['context_evaluations']:.2f}"
        return parameters["mode"], parameters["batch"], evaluations, f"{result['tokens_per_second']:,.0f}"

    columns = "mode", "batch", "evaluations per token, denoiser + context", "tokens/s"
    yield from _table(*columns, numbers=3, rows=map(row, records))


def _failed(records: list[Record]) -> Iterator[str]:
    def row(record: Record) -> tuple:
        again = "no more" if record["tries"] >= TRIES else "once more by the next call"
        return (
            record["part"],
            record["name"],
            record.get("error", "begun, and nothing was heard of it").replace("|", "/"),
            again,
        )

    yield from _table("part", "what", "said", "tried", numbers=0, rows=map(row, records))


# In order of value.
_TABLES = {
    "errors": ("Errors", _errors),
    "speed": ("Speed of the kernels", _speed),
    "passes": ("Passes at full width", _passes),
    "train": ("The train step at full width", _train),
    "generate": ("Generation", _generate),
}
