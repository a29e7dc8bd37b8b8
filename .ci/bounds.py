"""Prints a constraint NAME==VERSION for the lowest declared version of every dependency in pyproject.toml."""

import pathlib
import re
import tomllib

# What no test needs: the site, accelerators' own packages, and the published code's, which takes gigabytes.
LEFT_OUT = ("docs", "cuda", "tpu", "parity")


def bounds(pyproject: str) -> dict[str, str]:
    """The lowest version of each dependency by name, from the text of pyproject.toml.

    Raises:
      ValueError: for a requirement that is not NAME>=VERSION, or two lowest versions of one name.
    """
    project = tomllib.loads(pyproject)["project"]
    groups = {"": project["dependencies"]} | project["optional-dependencies"]
    found: dict[str, str] = {}
    for group, requirements in groups.items():
        for requirement in requirements if group not in LEFT_OUT else ():
            parts = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?>=([\d.]+)", requirement)
            if parts is None:
                raise ValueError(f"{requirement}: not of the form NAME>=VERSION")
            name, version = parts.groups()
            if found.setdefault(name, version) != version:
                raise ValueError(f"{name}: {found[name]} and {version} are both its lowest version")
    return found


if __name__ == "__main__":
    text = (pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    print("\n".join(f"{name}=={version}" for name, version in bounds(text).items()))
