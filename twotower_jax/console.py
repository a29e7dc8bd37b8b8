"""`twotower COMMAND …`: the commands of launch/ from anywhere, with an installation and without a clone.

    twotower train --config=configs/tiny.py --workdir=runs/tiny

is `python launch/train.py` with the same flags. A config that the package ships is found by its path in the repository,
unless a file of that path is there.
"""

import pathlib
import runpy
import sys

import twotower_jax

_USAGE = 2


def folder(name: str) -> pathlib.Path:
    """Where `name`, a folder of the repository that is installed with the package, lies: in a checkout beside it."""
    package = pathlib.Path(__file__).resolve().parent
    return next((f for f in (package / name, package.parent / name) if f.is_dir()), package / name)


def commands() -> list[str]:
    """The names of all commands."""
    return sorted(file.stem for file in folder("launch").glob("*.py") if file.stem != "environment")


def main() -> None:
    """Runs the command that the first argument names, as if its file had been run."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name == "--version":
        print(twotower_jax.__version__)
        return
    if name in ("--help", "-h"):
        print(f"usage: twotower COMMAND [--FLAG=VALUE …]\ncommands: {', '.join(commands())}")
        print("twotower COMMAND --help lists the flags of a command; --version tells the version.")
        return
    if name not in commands():
        print(f"error: there is no command {name!r}; there are {', '.join(commands())}", file=sys.stderr)
        sys.exit(_USAGE)
    file = folder("launch") / f"{name}.py"
    sys.argv = [f"twotower {name}", *map(_with_shipped_config, arguments)]
    sys.path.insert(0, str(file.parent))  # as for a file that is run, which imports its neighbor `environment`
    runpy.run_path(str(file), run_name="__main__")


def _with_shipped_config(argument: str) -> str:
    flag, _, value = argument.partition("=")
    path, colon, rest = value.partition(":")
    shipped = folder("configs") / pathlib.Path(path).name
    if flag.lstrip("-") != "config" or pathlib.Path(path).parent != pathlib.Path("configs") or not shipped.is_file():
        return argument
    return argument if pathlib.Path(path).exists() else f"{flag}={shipped}{colon}{rest}"


if __name__ == "__main__":
    main()
