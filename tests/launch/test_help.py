"""What a command says of its flags, at once: without JAX and whatever else takes seconds to import."""

import ast
import dataclasses
import subprocess
import sys

import pytest

from helpers import ROOT
from twotower_jax import choices
from twotower_jax.diffusion import SCHEDULES, STRATEGIES
from twotower_jax.quantization import METHODS
from twotower_jax.reinforce.loop import ReinforceConfig
from twotower_jax.reinforce.rewards import REWARDS

# What all others need for their flags takes seconds to import, or their flags are those of a part.
COMMANDS = sorted(
    file.stem for file in (ROOT / "launch").glob("*.py") if "command_line.read_flags()" in file.read_text()
)
# Each in a process of its own, forked where what they share has been imported.
RUN = """
import contextlib, os, runpy, sys
import ml_collections.config_flags, twotower_jax.command_line
for file in sys.argv[1:]:
    if os.fork() == 0:
        name, *words = file.split(":")
        sys.argv = [name, *words]
        sys.path[0] = os.path.dirname(name)
        try:
            runpy.run_path(name, run_name="__main__")
        except SystemExit as end:
            heavy = sorted({"jax", "flax", "numpy"} & sys.modules.keys())
            print(f"{file} ended with {end.code}, imported {heavy}", flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def said() -> str:
    """What all commands print on --help, and some on other words, and a line after each."""
    words = [f"{ROOT}/launch/{name}.py:--help" for name in COMMANDS]
    words += [f"{ROOT}/twotower_jax/console.py:train:--help"]
    words += [f"{ROOT}/launch/train.py:--version", f"{ROOT}/launch/generate.py:--checkpont=x"]
    done = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True, check=True)
    assert done.stderr == "error: Unknown command line flag 'checkpont'. Did you mean: checkpoint ?\n"
    return done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_jax(said, name):
    assert f"{ROOT}/launch/{name}.py:--help ended with 0, imported []\n" in said


def test_neither_does_the_installed_command_nor_the_version_nor_a_typo(said):
    assert f"\n{ROOT}/twotower_jax/console.py:train:--help ended with 0, imported []\n" in said
    assert f"\n{ROOT}/launch/train.py:--version ended with 0, imported []\n" in said
    assert f"\n{ROOT}/launch/generate.py:--checkpont=x ended with 2, imported []\n" in said


@pytest.mark.parametrize(
    "names, things",
    [("STRATEGIES", STRATEGIES), ("SCHEDULES", SCHEDULES), ("QUANTIZATIONS", METHODS), ("REWARDS", REWARDS)],
)
def test_the_names_are_those_of_what_there_is(names, things):
    own = things.sources() if hasattr(things, "sources") else {}
    assert getattr(choices, names) == tuple(name for name in things if name not in own)


def test_the_defaults_of_reinforcement_are_those_of_its_settings():
    code = "from absl import flags; import reinforce; print({n: flags.FLAGS[n].default for n in flags.FLAGS})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "launch", capture_output=True, text=True, check=True)
    defaults = ast.literal_eval(done.stdout.splitlines()[-1])
    fields = {field.name: field.default for field in dataclasses.fields(ReinforceConfig)}
    shared = fields.keys() & defaults.keys() - {"checkpoint"}
    assert len(shared) == 13 and {name: defaults[name] for name in shared} == {name: fields[name] for name in shared}
