"""The measurement of an accelerator: what comes next, what is noted of what hangs and dies, what it imports."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from helpers import ROOT
from twotower_jax import kernels
from twotower_jax.benchmarks import _error_cases
from twotower_jax.benchmarks.accelerator import bare, command, errors, report, units
from twotower_jax.benchmarks.accelerator.results import Results, digest

# In place of the worker: units that are what their names say, and a line in a file for each that is asked for.
WORKER = """
import json, os, signal, sys, time
out = os.fdopen(int(sys.argv[-1].partition("=")[2]), "w")
def say(v): print(json.dumps(v), file=out, flush=True)
here = os.path.dirname(__file__)
plan = json.load(open(os.path.join(here, "plan.json")))
if "error" in plan:
    say(plan)
    sys.exit()
of_unit = {"op": "ssd", "problem": "mild", "dtype": "float32", "implementation": "xla"}
parts = [{"part": "errors", "parameters": of_unit, "sources": ""} | unit for unit in plan.pop("units")]
say(plan | {"units": parts})
for line in sys.stdin:
    name = parts[int(line)]["name"]
    with open(os.path.join(here, "asked"), "a") as log:
        print(name, file=log)
    if name == "hangs":
        time.sleep(60)
    if name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    say({"error": "ValueError: no", "leaves": True} if name == "fails" else {"result": {"outputs": 1, "gradients": 2}})
"""
HERE = {"device": "chip", "runtime": "", "model": "tiny", "versions": {"jax": "1"}}


class Machine:
    """One with a plan of units, whose workers are the above."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.output = folder, folder / "out"
        (folder / "worker.py").write_text(WORKER)

    def plan(self, *planned: dict, **changes) -> None:
        (self.folder / "plan.json").write_text(json.dumps(HERE | {"units": planned} | changes))

    def call(self, minutes: float = 1, *words: str) -> list[str]:
        """What was asked of the worker in one call."""
        (self.folder / "asked").write_text("")
        status = command.main(self.folder / "worker.py", [f"--minutes={minutes}", f"--output={self.output}", *words])
        assert status == 0
        return (self.folder / "asked").read_text().split()

    def units(self) -> dict:
        environments = json.loads((self.output / "results.json").read_text())["environments"]
        return {key.removeprefix("errors: "): unit for key, unit in environments[-1]["units"].items()}


@pytest.fixture
def machine(tmp_path):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield Machine(tmp_path)
    for number, handler in before.items():
        signal.signal(number, handler)


def unit(name: str, seconds: float = 5.0, **fields) -> dict:
    return {"name": name, "seconds": seconds} | fields


def test_what_would_not_end_in_time_is_left_for_the_next_call(machine, capsys):
    machine.plan(unit("first"), unit("long", 500), unit("second"))
    assert machine.call(1) == ["first", "second"]
    assert "2 of 3 units are done; 0 failed" in capsys.readouterr().out
    assert machine.call(10) == ["long"]
    assert machine.call(10) == []
    assert machine.call(10, "--list") == [] and "done or given up" in capsys.readouterr().out


def test_what_hangs_or_dies_or_fails_is_noted_skipped_and_tried_once_more(machine, capsys):
    machine.plan(*(unit(name, 0.5) for name in ("hangs", "dies", "fails", "good")))
    assert machine.call() == ["hangs", "dies", "fails", "good"]
    found = machine.units()
    assert [found[name].get("error") for name in ("hangs", "dies", "fails", "good")] == [
        "was ended: it took longer than 0.5 s",
        "ended the process that measured it (SIGKILL)",
        "ValueError: no",
        None,
    ]
    assert found["good"]["result"] == {"outputs": 1, "gradients": 2}
    text = (machine.output / "report.md").read_text()
    assert "| errors | dies | ended the process that measured it (SIGKILL) | once more by the next call |" in text
    machine.plan(*(unit(name, 0.5) for name in ("hangs", "dies", "fails", "good", "new")))
    assert machine.call() == ["new", "hangs", "dies", "fails"]
    assert machine.call() == [] and "no more" in (machine.output / "report.md").read_text()


def test_what_changed_is_measured_again(machine):
    machine.plan(unit("one"), unit("two"))
    machine.call()
    of_other = {"op": "ssd", "problem": "mild", "dtype": "bfloat16", "implementation": "xla"}
    machine.plan(unit("one", sources="new"), unit("two", parameters=of_other), unit("three"))
    assert machine.call() == ["one", "two", "three"]
    machine.plan(unit("one"), versions={"jax": "2"})
    assert machine.call() == ["one"]
    environments = json.loads((machine.output / "results.json").read_text())["environments"]
    assert [(one["versions"]["jax"], len(one["units"])) for one in environments] == [("1", 3), ("2", 1)]
    machine.plan(unit("three"))
    assert machine.call() == []


def test_a_process_that_is_killed_leaves_a_mark_and_one_that_is_interrupted_none(tmp_path):
    file = tmp_path / "results.json"
    one = unit("one", part="errors", parameters={}, sources="")
    for tries in 0, 1:
        results = Results(file)
        results.enter(HERE)
        assert results.tries(one) == tries
        results.begin(one)
        results.take_back(one)
        results.begin(one)
    results = Results(file)
    results.enter(HERE)
    assert results.tries(one) is None
    assert "begun, and nothing was heard of it" in report.text(results.everything["environments"][-1])


def test_what_cannot_be_used_is_said_in_a_line(machine, tmp_path, capsys):
    machine.plan()
    (machine.folder / "plan.json").write_text('{"error": "RuntimeError: no device"}')
    words = [f"--output={machine.output}"]
    assert command.main(machine.folder / "worker.py", words) == 2
    assert re.fullmatch(r"error: RuntimeError: no device; see \S+worker.log\n", capsys.readouterr().err)
    machine.plan(unit("one"))
    assert command.main(machine.folder / "worker.py", [*words, "--only=two"]) == 2
    assert capsys.readouterr().err == "error: --only=two: no unit has that in its name; --list shows them\n"
    (machine.output / "results.json").write_text("[]")
    assert command.main(machine.folder / "worker.py", words) == 2
    assert "results.json: not results of this command" in capsys.readouterr().err
    for wrong in "--minutes=0", "--parts=speeds", "--model=nano":
        with pytest.raises(SystemExit) as left:
            command.main(machine.folder / "worker.py", [wrong])
        assert left.value.code == 2 and capsys.readouterr().err.startswith("error: argument")


def test_a_digest_is_of_what_the_files_hold(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.py").write_text("1")
    first = digest(tmp_path, ["a"])
    (tmp_path / "a" / "notes.md").write_text("2")
    assert digest(tmp_path, ["a"]) == first != digest(tmp_path, ["a/one.py", "a"])
    (tmp_path / "a" / "one.py").write_text("2")
    assert digest(tmp_path, ["a"]) != first


def test_the_report_divides_what_was_measured():
    def record(part, parameters, result):
        return {"part": part, "name": "", "parameters": parameters, "date": "2026-01-02 03:04", "result": result}

    def error(name, outputs, gradients):
        parameters = {"op": "ssd", "problem": "mild", "dtype": "float32", "implementation": name}
        return record("errors", parameters, {"outputs": outputs, "gradients": gradients})

    def speed(form, seconds):
        case = {"case": "ssd", "form": form, "seconds": seconds, "temporaries": 2**20, "operations": 1e9}
        result = {"cases": [case | {"must_move": 1e6}], "rate": 1e12, "bandwidth": 1e9}
        return record("speed", {"op": "ssd", "form": form}, result)

    passed = {"pass": "AR step", "layers": "ME*", "batch": 64}
    step = {"layers": "ME*", "rows": 1, "sequence": 1000}
    of_step = {"seconds": 0.5, "flops": 1e14, "rate": 4e14, "peak": 1e15, "tokens": 1000, "temporaries": 2**30}
    generated = {"tokens_per_second": 1234.5, "denoiser_evaluations": 0.25, "context_evaluations": 0.0625}
    records = [
        error("xla", 1e-7, 2e-7),
        error("mosaic_gpu", 2e-7, 8e-7),
        speed("xla", 0.004),
        speed("mosaic_gpu", 0.002),
        record("passes", passed, {"seconds": 0.01, "must_move": 5e9, "bandwidth": 1e12}),
        record("train", step, of_step),
        record("generate", {"mode": "diffusion", "batch": 64}, generated),
    ]
    text = report.text(HERE | {"units": dict(enumerate(records))})
    for row in (
        "| ssd | mild | float32 | mosaic_gpu | 2.0e-07 | 8.0e-07 | 4.0 |",
        "| ssd | mosaic_gpu | 2.000 ms | 0.50 | 50.0% | 50.0% | 1.0 MiB |",
        "| AR step | 3 | 64 | 10.000 ms | 5.000 | 5.000 ms | 50% |",
        "| ME*, 1 × 1000 tokens | 500.000 ms | 2,000 | 200.000 | 20.0% | 50.0% | 1.00 GiB |",
        "| diffusion | 64 | 0.25 + 0.06 | 1,234 |",
    ):
        assert row in text.splitlines()
    assert "chip" in text and "jax 1" in text and "2026-01-02" in text


@pytest.fixture(scope="module")
def plan():
    """The units of a processor, by name."""
    return {f"{one.part}: {one.name}": one for one in units.plan(list(command.PARTS), units.scale("tiny"))}


def test_units_have_names_of_their_own_and_all_parts_come_early(plan):
    scale = units.scale("tiny")
    listed = units.plan(list(command.PARTS), scale)
    assert len(plan) == len(listed)
    firsts = [next(i for i, one in enumerate(listed) if one.part == part) for part in command.PARTS]
    assert firsts == sorted(firsts) and firsts[-1] < len(listed) / 2
    assert {one.part for one in units.plan(["train", "speed"], scale)} == {"train", "speed"}
    for one in listed:
        assert all((ROOT / name).exists() for name in one.sources)
        json.dumps(one.parameters)


@pytest.mark.whole
def test_kernels_are_measured(plan):
    found = plan["errors: causal_conv, inputs of 1, xla, float32"].run()
    assert 0 < found["outputs"] < 1e-6 and 0 < found["gradients"] < 1e-6
    found = plan["speed: block_scan, xla"].run()
    assert [case["case"] for case in found["cases"]][:1] == ["block_scan, 16 tokens"]
    assert all(case["seconds"] > 0 and case["must_move"] > 0 for case in found["cases"])
    assert found["rate"] > 0 and found["bandwidth"] > 0


@pytest.mark.whole
@pytest.mark.parametrize("layers", [4, 5])
@pytest.mark.parametrize("name", ["evaluation", "AR step"])
def test_passes_are_measured(plan, name, layers):
    found = plan[f"passes: {name}, batch 2, {layers} layers"].run()
    assert found["seconds"] > 0 and found["must_move"] > 0 and found["bandwidth"] > 0


@pytest.mark.whole
@pytest.mark.parametrize("mode", ["diffusion", "ar", "speculative"])
def test_generation_is_measured(plan, mode):
    found = plan[f"generate: {mode}, batch 2, 4 layers"].run()
    assert found["tokens_per_second"] > 0 and found["context_evaluations"] > 0


@pytest.mark.parametrize("model", ["nano30b", pytest.param("nano4b", marks=pytest.mark.whole)])
def test_the_published_shapes_are_planned(model):
    """Where there is no accelerator nothing of them runs, but what there is to do is known."""
    scale = units.scale(model)._replace(memory=139 * 2**30)
    listed = units.plan(list(command.PARTS), scale)
    assert all(set(scale.model.hybrid_override_pattern) == set(one) for one in (scale.beginning, scale.one_of_each))
    deepest = max(len(one.parameters["layers"]) for one in listed if one.part == "passes")
    assert deepest > 40  # 126 GB of weights in bfloat16, or all 42 layers
    assert any("expert_mlp" in one.name for one in listed) == (model == "nano30b")


ALLOWED = "jax jaxlib flax numpy optax ml_dtypes triton jax_triton twotower_jax"
HOOK = f"""
import builtins, os, sys
class Hidden:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in ("jaxtyping", "ml_collections"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
real, allowed = builtins.__import__, {{*sys.stdlib_module_names, *{ALLOWED.split()!r}, "jaxtyping", "ml_collections"}}
def checked(name, globals=None, locals=None, fromlist=(), level=0):
    who = (globals or {{}}).get("__name__", "")
    if not level and who.startswith("twotower_jax") and name.split(".")[0] not in allowed:
        raise ModuleNotFoundError(f"{{who}} imports {{name}}", name=name)
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = checked
sys.meta_path[:] = [Hidden, *(f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__"))]
sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]
"""


@pytest.mark.parametrize(
    "name",
    [
        "errors: causal_conv, inputs of 1, xla, float32",
        *(pytest.param(part, marks=pytest.mark.whole) for part in ("train: ", "generate: ar", "errors: ssd, mild")),
    ],
)
def test_it_needs_jax_flax_and_numpy_and_no_installation(tmp_path, name):
    (tmp_path / "sitecustomize.py").write_text(HOOK)
    arguments = [ROOT / "launch/benchmark.py", "accelerator", "--minutes=30", f"--only={name}", "--output=out"]
    run = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    log = tmp_path / "out" / "worker.log"
    assert run.returncode == 0, run.stderr + (log.read_text() if log.exists() else "")
    assert "; 0 failed;" in run.stdout, log.read_text()


def test_stand_ins_do_what_configs_need():
    config = bare.ConfigDict({"mesh": {"data": 1}, "steps": 3})
    config.update({"mesh": {"fsdp": 2}, "steps": 4}, seed=5)
    config.mesh.data = -1
    config.model = {"width": 8}
    config.model.width = 16
    assert config.to_dict() == {"mesh": {"data": -1, "fsdp": 2}, "steps": 4, "seed": 5, "model": {"width": 16}}
    with pytest.raises(AttributeError):
        _ = config.size
    module = bare._jaxtyping()
    assert module.Float[module.Array, "B L"] | None


@pytest.mark.whole
@pytest.mark.parametrize(
    ("kind", "platform", "model"),
    [("NVIDIA H200", "gpu", "nano30b"), ("NVIDIA H200", "gpu", "nano4b"), ("TPU v5p", "tpu", "nano30b")],
)
def test_kernels_take_the_problems_of_the_published_shapes(kind, platform, model, monkeypatch):
    """They are traced for a device that is not there, without arrays."""
    scale = units.scale(model)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(_error_cases, "_normal", lambda rng, dtype, *sizes: jnp.zeros(sizes, dtype))
    mesh = AbstractMesh((1,), ("device",), abstract_device=AbstractDevice(kind, 132, platform))
    traced = 0
    for _, case in errors._cases(scale):
        case = errors._here(case)
        for name, dtypes in case.implementations.items():
            # The plain product of jax.lax is not traced for devices that are not there.
            if name == _error_cases.RAGGED or kernels.platform_of(case.op, name) != platform:
                continue
            for dtype in dtypes:

                def run(case=case, name=name, dtype=dtype):
                    return case.run(name, *case.arrays(np.random.default_rng(0), jnp.dtype(dtype)))

                with jax.sharding.use_abstract_mesh(mesh):
                    jax.eval_shape(run)
                traced += 1
    assert traced > 20
