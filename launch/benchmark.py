"""Runs one of the measurements of the numbers in the docs.

python launch/benchmark.py accelerator --minutes=8
python launch/benchmark.py conversion --directory=DIR
python launch/benchmark.py campaign --mutations=2000
python launch/benchmark.py compile_time
python launch/benchmark.py block_memory
python launch/benchmark.py kernels --shape=nano --dtype=bfloat16
python launch/benchmark.py forms
python launch/benchmark.py peers
python launch/benchmark.py kernel_errors --op=ssd
python launch/benchmark.py kernel_compile --topology=h200:1
python launch/benchmark.py generation
python launch/benchmark.py serving_engine --checkpoint=DIR
python launch/benchmark.py quantization --checkpoint=DIR --rows=rows.jsonl
python launch/benchmark.py drafts
python launch/benchmark.py optimizers
python launch/benchmark.py data
python launch/benchmark.py shuffle
python launch/benchmark.py serving
python launch/benchmark.py kills --kills=30 --terms=20
python launch/benchmark.py store_kills --kills=25 --terms=5
python launch/benchmark.py stores
"""

import environment  # noqa: F401, first: it says what is missing

# isort: split
import importlib
import pathlib
import pkgutil
import sys

if sys.argv[1:2] == ["accelerator"]:  # needs less than the others: neither their flags nor what they import
    from twotower_jax.benchmarks.accelerator import command

    sys.exit(command.main(pathlib.Path(__file__).resolve(), sys.argv[2:]))

from twotower_jax import benchmarks, command_line

_SUPPORT = pathlib.Path(__file__).parents[1] / "tests" / "support"
# Modules of tests/support/campaigns, of which the tests run a slice.
_CAMPAIGNS = ("campaign", "kills", "store_kills", "stores")


def _module(name: str) -> str:
    """The full name of a measurement's module, which can be imported from now on."""
    if name not in _CAMPAIGNS:
        return f"{benchmarks.__name__}.{name}"
    if not (_SUPPORT / "campaigns").is_dir():
        command_line.fail(
            f"{name} needs the repository's tests, and there is no {_SUPPORT}/campaigns", command_line.USAGE
        )
    sys.path.insert(0, str(_SUPPORT))
    return f"campaigns.{name}"


if __name__ == "__main__":
    names = [module.name for module in pkgutil.iter_modules(benchmarks.__path__) if module.name[0] != "_"]
    names = sorted([*names, *_CAMPAIGNS])
    if len(sys.argv) < 2 or sys.argv[1] in ("--help", "-h", "-help"):
        text = f"{__doc__}\nMeasurements: {', '.join(names)}. Each answers --help."
        command_line.show(text, 0 if len(sys.argv) > 1 else command_line.USAGE)
    if sys.argv[1] not in names:
        command_line.fail(f"unknown measurement {sys.argv[1]!r}; there are {', '.join(names)}", command_line.USAGE)
    module = importlib.import_module(_module(sys.argv.pop(1)))
    module.define_flags()
    command_line.run(module.main, cache=False)
