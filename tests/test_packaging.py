"""What an installation holds."""

import tomllib

from helpers import ROOT


def test_every_folder_of_the_package_is_installed():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    found = {
        ".".join((name, *file.parent.relative_to(ROOT / folder).parts))
        for name, folder in setup["package-dir"].items()
        for file in (ROOT / folder).rglob("*.py")
    }
    assert set(setup["packages"]) == found
    assert setup["package-dir"]["twotower_jax.configs"] == "configs"  # Where `shipped` looks.
