"""What every command does alike: flags parsed and errors reported in one line on stderr, without a traceback.

Exit statuses: 0 done; 2 a flag, path or value that cannot be used; 3 a checkpoint that is broken or not of this model.
With `--verbosity=1` the traceback is printed as well.
"""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from twotower_jax.checkpoint.safetensors_file import CheckpointError

USAGE, BROKEN_CHECKPOINT = 2, 3


def run(main: Callable[[], None]) -> None:
    """Parses the flags, runs `main`, and exits.

    ValueError and OSError are taken to be about what the user gave, and become one line; anything else is a bug and
    keeps its traceback.
    """

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            fail(f"unexpected argument {argv[1]!r}; every setting is a --flag=value", USAGE)
        try:
            main()
        except CheckpointError as error:
            logging.debug("traceback", exc_info=True)
            fail(str(error), BROKEN_CHECKPOINT)
        except (ValueError, OSError) as error:
            logging.debug("traceback", exc_info=True)
            fail(str(error), USAGE)

    app.run(guarded, flags_parser=_parse)


def fail(message: str, status: int) -> None:
    """Prints one line on stderr and exits."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        nones = [word for word in argv if word.startswith("--config.") and word.endswith("=None")]
        rest = flags.FLAGS([word for word in argv if word not in nones])
        for word in nones:
            _set_none(word)
    except SystemExit:  # absl's --help, after which it exits with 1
        sys.exit(0)
    except Exception as error:  # noqa: BLE001: a config file is the user's own code and may raise anything
        logging.debug("traceback", exc_info=True)
        fail(_unknown_field(argv, error) or str(error) or type(error).__name__, USAGE)
    if not flags.FLAGS["verbosity"].present:
        # JAX reports every accelerator that it did not find at absl's default level.
        logging.set_verbosity(logging.WARNING)
    return rest


def _set_none(word: str) -> None:
    """--config.FIELD=None, which the parsers of typed fields refuse or take for text; `freeze` says who may be None."""
    *parents, field = word.removeprefix("--config.").removesuffix("=None").split(".")
    config = flags.FLAGS.config
    for parent in parents:
        config = config[parent]
    config[field] = None


def _unknown_field(argv: Sequence[str], error: Exception) -> str | None:
    """Of --config.FIELD=VALUE with a field that the configuration does not have, of which only the name is raised."""
    if isinstance(error, (KeyError, AttributeError)):
        for word in argv:
            name = word.partition("=")[0]
            if name.startswith("--config.") and name.rpartition(".")[2] == str(error).strip("\"'"):
                return (
                    f"{name}: the configuration has no such field; see twotower_jax/train/config.py for those there are"
                )
    return None
