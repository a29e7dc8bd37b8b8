"""What every command does alike: flags and paths parsed, errors reported in one line on stderr, no traceback.

Exit statuses: 0 done; 2 a flag, path or value that cannot be used; 3 a checkpoint that is broken or not of this model;
5 training diverged; 6 a checkpoint could not be saved; 130 interrupted (Ctrl-C); 141 whoever read the output
has closed it. With `--verbosity=1` the traceback is printed too.
"""

import _thread
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import app, flags, logging

from twotower_jax import compilation_cache
from twotower_jax.files import CheckpointError
from twotower_jax.paths import local_path

USAGE, BROKEN_CHECKPOINT, DIVERGED, NOT_SAVED, INTERRUPTED, CLOSED_PIPE = 2, 3, 5, 6, 130, 141
# An error's line is cut to this many characters: lists of names, and what libraries say, may be of any length.
_LONGEST_LINE = 2000

# A flag belongs to the command that defines it with DEFINE_path, not to this module.
flags.disclaim_key_flags()


class _PathParser(flags.ArgumentParser):
    syntactic_help = "a path; ~ and file:// are understood"

    def parse(self, argument: str) -> str:
        return local_path(super().parse(argument))


def DEFINE_path(name: str, default: str | None, help: str, **options) -> flags.FlagHolder:  # noqa: N802 (absl's style)
    """A flag that is a path of this machine; every flag that names a file or folder is one."""
    return flags.DEFINE(_PathParser(), name, default, help, serializer=flags.ArgumentSerializer(), **options)


def run(main: Callable[[], None], *, cache: bool = True, statuses: Mapping[type[Exception], int] | None = None) -> None:
    """Parses the flags, runs `main`, and exits.

    Compiled programs are kept for the next start; without `cache`, for what measures compiling, only if a flag says so.

    ValueError and OSError are taken to be about what the user gave, and become one line, as do the errors of `statuses`
    with a status of their own; anything else is a bug and keeps its traceback.
    """

    statuses = statuses or {}

    def guarded(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            fail(f"unexpected argument {argv[1]!r}; every setting is a --flag=value", USAGE)
        try:
            if "jax" in sys.modules:  # prepare.py does without, and its workers start the sooner
                from twotower_jax.jax_settings import check_settings

                check_settings()
                compilation_cache.enable(flags.FLAGS[compilation_cache.FLAG].value, by_default=cache)
            main()
            _flush()
        except CheckpointError as error:
            logging.debug("traceback", exc_info=True)
            fail(str(error), BROKEN_CHECKPOINT)
        except BrokenPipeError:
            raise
        except tuple(statuses) as error:
            logging.debug("traceback", exc_info=True)
            fail(str(error), next(status for kind, status in statuses.items() if isinstance(error, kind)))
        except (ValueError, OSError) as error:
            logging.debug("traceback", exc_info=True)
            fail(str(error), USAGE)
        except (RuntimeError, AssertionError):
            if reason := _no_devices():
                logging.debug("traceback", exc_info=True)
                fail(reason, USAGE)
            raise

    # Shown by --help, as if the command had defined it.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[compilation_cache.FLAG])
    _print_anything()
    if getattr(signal.getsignal(signal.SIGINT), "while_importing", False):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.unraisablehook = _interrupt_again
    try:
        try:
            app.run(guarded, flags_parser=_parse)
        finally:
            _flush()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("error: interrupted; nothing was left half-written", file=sys.stderr, flush=True)
        # Not sys.exit, which waits for threads of JAX that may wait for an accelerator.
        os._exit(INTERRUPTED)
    except BrokenPipeError:
        # Python flushes once more at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(CLOSED_PIPE)


def _interrupt_again(unraisable: Any, show: Callable[[Any], None] = sys.unraisablehook) -> None:
    """Ctrl-C that comes while a callback of the garbage collector runs, JAX's for one, would be lost there."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        # A little later, when the callback has returned.
        threading.Timer(0.02, _thread.interrupt_main).start()
    else:
        show(unraisable)


def fail(message: str, status: int) -> None:
    """Prints one line on stderr and exits."""
    print(one_line(f"error: {message}"), file=sys.stderr)
    sys.exit(status)


def one_line(message: str) -> str:
    """A message without line breaks, its middle left out if it is too long to be read."""
    line = " ".join(message.split())
    if len(line) > _LONGEST_LINE:
        line = f"{line[: _LONGEST_LINE * 2 // 3]} … {line[-_LONGEST_LINE // 3 :]}"
    return line


def _print_anything() -> None:
    """Lets what the terminal's encoding cannot show be printed as escapes, instead of failing after all the work."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _no_devices() -> str:
    """Why JAX finds nothing to compute on, or "" if it does or was not used."""
    if "jax" not in sys.modules:
        return ""
    import jax

    try:
        jax.devices()
    except Exception as error:  # JAX raises several kinds here, an AssertionError without text among them
        reason = (str(error) or "no such device is here").splitlines()[0]
        asked = f" with JAX_PLATFORMS={jax.config.jax_platforms}" if jax.config.jax_platforms else ""
        return f"JAX finds nothing to compute on{asked}: {reason}; JAX_PLATFORMS=cpu computes on the processor"
    return ""


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        nones = [word for word in argv if word.startswith("--config.") and word.endswith("=None")]
        rest = flags.FLAGS(_config_paths([word for word in argv if word not in nones]))
        for word in nones:
            _set_none(word)
    except BrokenPipeError:  # of --help
        raise
    except SystemExit:  # absl's --help, after which it exits with 1
        sys.exit(0)
    except Exception as error:  # a config file is the user's own code and may raise anything
        logging.debug("traceback", exc_info=True)
        fail(_unknown_field(argv, error) or _said(error), USAGE)
    if not flags.FLAGS["verbosity"].present:
        # JAX reports every accelerator that it did not find at absl's default level.
        logging.set_verbosity(logging.WARNING)
    return rest


def _config_paths(argv: Sequence[str]) -> list[str]:
    """`argv` with the paths of --config=FILE as this machine has them: that flag is ml_collections' own."""
    match = re.compile(r"(--?config=)(.*)", re.DOTALL)
    return [found[1] + local_path(found[2]) if (found := match.fullmatch(word)) else word for word in argv]


def _said(error: Exception) -> str:
    """What an error says. A KeyError's own text is the repr of that."""
    told = error.args[0] if isinstance(error, KeyError) and error.args else error
    return str(told) or type(error).__name__


def _set_none(word: str) -> None:
    """--config.FIELD=None, which the parsers of typed fields refuse or take for text; `freeze` says who may be None."""
    *parents, field = word.removeprefix("--config.").removesuffix("=None").split(".")
    config = flags.FLAGS.config
    for parent in parents:
        config = config[parent]
    config[field] = None


def _unknown_field(argv: Sequence[str], error: Exception) -> str | None:
    """The line for --config.FIELD=VALUE with a field that the configuration does not have; what is raised names it."""
    if isinstance(error, (KeyError, AttributeError)):
        for word in argv:
            name = word.partition("=")[0]
            parts = name.removeprefix("--config.").split(".")
            if name.startswith("--config.") and re.search(rf"\b({'|'.join(map(re.escape, parts))})\b", _said(error)):
                return (
                    f"{name}: the configuration has no such field; see twotower_jax/train/config.py for those there are"
                )
    return None
