"""What an installation holds."""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

import twotower_jax
from helpers import ROOT
from twotower_jax import console


def test_every_folder_of_the_package_is_installed():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {
        ".".join((name, *file.parent.relative_to(ROOT / folder).parts))
        for name, folder in setup["package-dir"].items()
        for file in (ROOT / folder).rglob("*.py")
    }
    assert set(setup["packages"]) == found
    assert setup["package-dir"]["twotower_jax.configs"] == "configs"  # Where `shipped` looks.
    assert setup["package-dir"]["twotower_jax.launch"] == "launch"  # Where `twotower` looks.


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="needs pip to build a wheel")
def test_a_wheel_works_without_the_clone(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("twotower_jax", "kernels", "launch", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*build, "-w", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    shutil.rmtree(source)
    environment = os.environ | {"PYTHONPATH": str(site)}

    def run(*arguments):
        command = [sys.executable, "-P", "-m", "twotower_jax.console", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert {file.name for file in (ROOT / "configs/quickstart").iterdir()} <= {
        file.name for file in (site / "twotower_jax/configs/quickstart").iterdir()
    }
    checkpoint = ROOT / "tests/recorded/tiny/checkpoint"
    assert run("--version").stdout.strip() == twotower_jax.__version__
    shown = run("inspect_checkpoint", f"--checkpoint={checkpoint}")
    assert shown.returncode == 0 and "MEMEM*E" in shown.stdout, shown.stderr
    # A shipped config is found; and the trace of what is missing names the installation, not the clone.
    refused = run("train", "--config=configs/tiny.py", "--workdir=runs", "--config.steps=0")
    assert refused.returncode == 2 and "steps=0" in refused.stderr, refused.stderr


def test_a_command_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["twotower", "trian"])
    with pytest.raises(SystemExit) as left:
        console.main()
    assert left.value.code == 2 and "train" in capsys.readouterr().err


def test_a_config_of_the_user_goes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = console._with_shipped_config("--config=configs/nano4b.py:h200")
    assert shipped == f"--config={ROOT / 'configs/nano4b.py'}:h200"
    pathlib.Path("configs").mkdir()
    pathlib.Path("configs/nano4b.py").touch()
    assert console._with_shipped_config("--config=configs/nano4b.py:h200") == "--config=configs/nano4b.py:h200"
    assert console._with_shipped_config("--workdir=configs/tiny.py") == "--workdir=configs/tiny.py"


def _lowest():
    spec = importlib.util.spec_from_file_location("bounds", ROOT / ".ci/bounds.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_lowest_versions_of_all_dependencies_are_tested():
    """`.ci/lowest` derives them from pyproject.toml and runs a slice that touches each of them."""
    declared = _lowest().bounds((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert declared["jax"] == "0.11.2"  # What accelerators are found with.
    lines = [line.split() for line in (ROOT / ".ci/lowest.txt").read_text(encoding="utf-8").splitlines()[1:]]
    assert sorted(package for _, *packages in lines for package in packages) == sorted(declared)
    assert all((ROOT / path).exists() for path, *_ in lines)


def test_every_dependency_says_its_lowest_version_and_all_extras_the_same():
    bounds, text = _lowest().bounds, (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert {name: bounds(text)[name] for name in ("absl-py", "moto")} == {"absl-py": "2", "moto": "5.2"}
    with pytest.raises(ValueError, match=rf"pyarrow: {bounds(text)['pyarrow']} and 99 are both"):
        bounds(re.sub(r'data = \["pyarrow>=\d+"', 'data = ["pyarrow>=99"', text))
    with pytest.raises(ValueError, match="optax: not of the form"):
        bounds(text.replace('"optax>=0.2.8"', '"optax"'))


def test_private_names_of_jax_stand_in_one_file_of_the_package_and_one_of_the_tests():
    """Each says for which versions they are so."""
    files = [
        file for folder in ("twotower_jax", "kernels", "launch", "tests") for file in (ROOT / folder).rglob("*.py")
    ]
    private = re.compile(r"^\s*(?:from|import) (?:jax|jaxlib)\.(?:_src|_\w+)", re.MULTILINE)
    found = {str(file.relative_to(ROOT)) for file in files if private.search(file.read_text(encoding="utf-8"))}
    assert found == {"kernels/hardware/versions.py", "tests/support/interpreters.py"}
