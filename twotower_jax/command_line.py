"""What every command does alike: flags and paths parsed, errors reported in one line on stderr, no traceback.

Exit statuses: 0 done; 2 a flag, path or value that cannot be used; 3 a checkpoint that is broken or not of this model;
5 training diverged; 6 a checkpoint could not be saved; 130 interrupted (Ctrl-C, SIGTERM, or SIGHUP); 141 whoever read
the output has closed it. What the user named and is not there counts as 2, what is there and is broken as 3. With
`--verbosity=1` the traceback is printed too; `--version` prints the version alone.
"""

import _thread
import contextlib
import errno
import gc
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from absl import app, flags, logging

import twotower_jax
from twotower_jax import compilation_cache
from twotower_jax.files import CheckpointError
from twotower_jax.paths import is_address, local_path

USAGE, BROKEN_CHECKPOINT, DIVERGED, NOT_SAVED, INTERRUPTED, CLOSED_PIPE = 2, 3, 5, 6, 130, 141
# What a person, a shell or a scheduler sends to end a program.
_INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# An error's line is cut to this many characters: lists of names, and what libraries say, may be of any length.
_LONGEST_LINE = 2000

_CACHE_GB = flags.DEFINE_float(
    "cache_gb",
    None,
    "GB of this machine's disk for copies of what is read from gs://, s3:// and hf:// where a file is needed: prepared "
    "data, Megatron sets, checkpoints in Orbax's own layout. Default: TWOTOWER_CACHE_GB, or else 16.",
    lower_bound=0,
)

# A flag belongs to the command that defines it with DEFINE_path, not to this module.
flags.disclaim_key_flags()


class _LocalPathParser(flags.ArgumentParser):
    syntactic_help = "a path of this machine; ~ and file:// are understood"

    def parse(self, argument: str) -> str:
        if is_address(argument):
            raise ValueError(f"{argument} is an address of a store; this takes a path of this machine")
        return _PathParser().parse(argument)


class _PathParser(flags.ArgumentParser):
    syntactic_help = "a path or an address; ~, file://, gs://, s3:// and hf:// are understood"

    def parse(self, argument: str) -> str:
        if not argument:
            raise ValueError("is empty; give a path, or leave the flag out")
        return local_path(super().parse(argument))


def DEFINE_path(  # noqa: N802 (absl's style)
    name: str, default: str | None, help: str, local: bool = False, **options
) -> flags.FlagHolder:
    """A flag that is a path, or unless `local` an address of a store; every flag that names a file or folder is one."""
    parser = _LocalPathParser() if local else _PathParser()
    return flags.DEFINE(parser, name, default, help, serializer=flags.ArgumentSerializer(), **options)


class _PathOrBool(flags.Flag):
    """A flag whose value is True where it stands alone."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.boolean = True

    def _parse(self, value):
        words = {"true": True, True: True, "false": None}
        return words[value] if value in words else super()._parse(value)


def DEFINE_path_or_bool(name: str, default: str | None, help: str) -> flags.FlagHolder:  # noqa: N802 (absl's style)
    """A flag that may stand alone, its value then being True, or have a path: one called `true` is written ./true."""
    return flags.DEFINE_flag(_PathOrBool(_PathParser(), flags.ArgumentSerializer(), name, default, help))


def refuse_given(holders: Iterable[flags.FlagHolder], why: str) -> None:
    """Refuses flags that were given and that nothing looks at.

    Args:
      why: "with --verify", to go on with after "changes nothing".

    Raises:
      ValueError: naming the first of them.
    """
    for holder in holders:
        if holder.present:
            raise ValueError(f"--{holder.name} changes nothing {why}; leave it out")


def numbers[T: (int, float)](holder: flags.FlagHolder, kind: type[T], least: T | None = None) -> list[T]:
    """The numbers of a list flag.

    Raises:
      ValueError: naming the flag, for none at all, what is no number, or one below `least`.
    """
    given = f"--{holder.name}={','.join(holder.value)}"
    what = "whole numbers" if kind is int else "numbers"
    try:
        found = [kind(text) for text in holder.value]
    except ValueError:
        raise ValueError(f"{given}: not a list of {what}") from None
    if not found:
        raise ValueError(f"{given}: give a number, or several with commas")
    if least is not None and min(found) < least:
        raise ValueError(f"{given}: must be at least {least}")
    return found


def read_flags() -> None:
    """Parses the flags, if that is not done yet.

    A command calls it between its flags and the imports that take seconds: --help, --version and what is misspelled
    wait for none of them.
    """
    if flags.FLAGS.is_parsed():
        return
    if "--version" in sys.argv[1:]:
        show(twotower_jax.__version__, 0)
    # Shown by --help, as if the command had defined it.
    for name in (compilation_cache.FLAG, _CACHE_GB.name):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    app.define_help_flags()
    logging.use_absl_handler()
    _print_anything()
    try:
        try:
            rest = _parse(sys.argv)
        finally:
            _unwritten()
    except BrokenPipeError:
        _leave_closed_pipe()
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; every setting is a --flag=value", USAGE)


def run(main: Callable[[], None], *, cache: bool = True, statuses: Mapping[type[Exception], int] | None = None) -> None:
    """Parses the flags unless `read_flags` has, runs `main`, and exits.

    Compiled programs are kept for the next start; without `cache`, for what measures compiling, only if a flag says so.

    ValueError and OSError are taken to be about what the user gave, and become one line, as do the errors of `statuses`
    with a status of their own; anything else is a bug and keeps its traceback.
    """

    statuses = statuses or {}

    def guarded(_: Sequence[str]) -> None:
        try:
            if "jax" in sys.modules:  # prepare.py does without, and its workers start the sooner
                from twotower_jax.jax_settings import check_settings

                check_settings()
                compilation_cache.enable(flags.FLAGS[compilation_cache.FLAG].value, by_default=cache)
            if _CACHE_GB.value is not None:
                os.environ["TWOTOWER_CACHE_GB"] = str(_CACHE_GB.value)  # for what this process starts, too
            main()
            if problem := _unwritten():
                fail(problem, USAGE)
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
            fail(said(error), USAGE)
        except (RuntimeError, AssertionError) as error:
            if reason := _out_of_memory(error) or _no_devices():
                logging.debug("traceback", exc_info=True)
                fail(reason, USAGE)
            raise

    _listen()
    try:
        read_flags()
        try:
            app.run(guarded, flags_parser=lambda argv: argv[:1])
        finally:
            _unwritten()
    except KeyboardInterrupt:
        for number in _INTERRUPTIONS:
            signal.signal(number, signal.SIG_IGN)
    except BrokenPipeError:
        _leave_closed_pipe()
    # Only here does nothing hold what the interrupted frames had: semaphores, for one, which would be reported as lost.
    gc.collect()
    with contextlib.suppress(OSError):  # of a terminal that is gone
        print("error: interrupted; nothing was left half-written", file=sys.stderr, flush=True)
    # Not sys.exit, which waits for threads of JAX that may wait for an accelerator.
    os._exit(INTERRUPTED)


def show(text: str, status: int) -> None:
    """Prints what a command shows of itself before it has flags, and exits."""
    try:
        print(text)
        if problem := _unwritten():
            fail(problem, USAGE)
    except BrokenPipeError:
        _leave_closed_pipe()
    sys.exit(status)


def _leave_closed_pipe() -> None:
    _drop_output()
    sys.exit(CLOSED_PIPE)


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


def _listen() -> None:
    """Has what ends a program raise KeyboardInterrupt, unless the command listens itself or it is ignored (nohup)."""
    for number in _INTERRUPTIONS:
        handler = signal.getsignal(number)
        if handler in (signal.SIG_DFL, signal.default_int_handler) or getattr(handler, "while_importing", False):
            signal.signal(number, _interrupt)
    sys.unraisablehook = _interrupt_again


def _interrupt(*_) -> None:
    """Raises KeyboardInterrupt, except while an earlier one is being cleaned up after."""
    error = sys.exception()
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return
        error = error.__context__
    raise KeyboardInterrupt


def _interrupt_again(unraisable: Any, show: Callable[[Any], None] = sys.unraisablehook) -> None:
    """Ctrl-C that comes while a callback of the garbage collector runs, JAX's for one, would be lost there."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        # A little later, when the callback has returned.
        threading.Timer(0.02, _thread.interrupt_main).start()
    else:
        show(unraisable)


def _print_anything() -> None:
    """Lets what the terminal's encoding cannot show be printed as escapes, instead of failing after all the work."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _unwritten() -> str:
    """Why what was printed cannot be written (a full disk, for one), or "" if it can; it is lost then.

    Raises:
      BrokenPipeError: if nobody reads it any more.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output()
        return f"standard output: {error.strerror}"
    return ""


def _drop_output() -> None:
    """Sends standard output nowhere: Python flushes once more at its end, and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _out_of_memory(error: Exception) -> str:
    """What JAX says of memory that it could not get, or "" if the error is another one."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        return ""
    reason = str(error).partition("RESOURCE_EXHAUSTED:")[2].strip().splitlines()[0]
    return f"{reason} More devices would hold it, or fewer rows at a time, shorter ones, or smaller blocks"


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
    words: Sequence[str] = ()
    try:
        words = _config_words(argv)
        nones = [word for word in words if word.startswith("--config.") and word.endswith("=None")]
        rest = flags.FLAGS([word for word in words if word not in nones])
        for word in nones:
            _set_none(word)
    except BrokenPipeError:  # of --help
        raise
    except SystemExit as error:
        if not any(_HELP.match(word) for word in argv[1:]):  # a config file's own
            fail(_of_config(words, error) or f"SystemExit: {error}", USAGE)
        sys.exit(0)  # absl ends with 1 after --help
    except Exception as error:  # a config file is the user's own code and may raise anything
        logging.debug("traceback", exc_info=True)
        fail(_unknown_field(argv, error) or _of_config(words, error) or said(error), USAGE)
    if not flags.FLAGS["verbosity"].present:
        # JAX reports every accelerator that it did not find at absl's default level.
        logging.set_verbosity(logging.WARNING)
    return rest


_HELP = re.compile(r"--?(help|\?)")
# What absl says of --flag=VALUE that is to be a bool, as the repr of a tuple.
_RAW_BOOLEAN = re.compile(r"\('Non-boolean argument to boolean flag', .*\)", re.DOTALL)
_CONFIG = re.compile(r"--?config=(.*)", re.DOTALL)


def _config_words(argv: Sequence[str]) -> list[str]:
    """`argv` with the path of --config=FILE, which is ml_collections' own flag, as this machine has it; and with =
    where `--config FILE` or `--config.FIELD None` stand apart.

    Raises:
      ValueError: if there is no such file.
    """
    words, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        if rest and (word in ("--config", "-config") or word.startswith("--config.") and rest[0] == "None"):
            word = f"{word}={rest.pop(0)}"
        if found := _CONFIG.fullmatch(word):
            path = local_path(found[1])
            # A colon begins what the file is told, such as the hardware.
            if not os.path.isfile(path.partition(":")[0]):
                raise ValueError(f"--config={found[1]}: there is no such file; give one of configs/ or your own")
            word = f"--config={path}"
        words.append(word)
    return words


def _of_config(words: Sequence[str], error: BaseException) -> str | None:
    """The line for an error of the config file itself, which may be any."""
    given = next((word for word in words if _CONFIG.fullmatch(word)), None)
    if given is None or isinstance(error, flags.Error):
        return None
    told = said(error).removeprefix("Configuration is not available because of an earlier failure to load:").strip()
    return f"{given}: {type(error).__name__}: {told}"


def said(error: BaseException) -> str:
    """What an error says, of the system's with the path first. A KeyError's own text is the repr of that."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # of what names the files that it writes
        return f"standard output: {error.strerror}"
    told = error.args[0] if isinstance(error, KeyError) and error.args else error
    return _RAW_BOOLEAN.sub("is neither true nor false", str(told)) or type(error).__name__


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
            if name.startswith("--config.") and re.search(rf"\b({'|'.join(map(re.escape, parts))})\b", said(error)):
                return (
                    f"{name}: the configuration has no such field; see twotower_jax/train/config.py for those there are"
                )
    return None
