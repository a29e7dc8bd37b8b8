"""What every command imports first, before anything that may be missing or takes seconds to import.

Says in one line what is not installed, or which setting of the environment JAX cannot read; and until the command
listens itself (`command_line.run`), an interruption ends it with a line. Any Python can read this file.
"""

import importlib
import importlib.util
import multiprocessing
import os
import signal
import sys

_USAGE, _INTERRUPTED = 2, 130
# `benchmark.py accelerator`, which a machine has to run that has nothing but what JAX and Flax need.
_BARE = sys.argv[1:2] == ["accelerator"]


def _check_packages():
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if _BARE and importlib.util.find_spec("twotower_jax") is None:
        sys.path.append(root)
        importlib.import_module("twotower_jax").__path__.append(root)  # where kernels/ and configs/ are
    for package in ("jax", "flax", "numpy") if _BARE else ("absl", "jax", "twotower_jax"):
        if importlib.util.find_spec(package) is None:
            print(
                f"error: the package {package!r} is not installed for {sys.executable}; activate the environment that "
                f"has it (source .venv/bin/activate), or install it: pip install -e {root}",
                file=sys.stderr,
            )
            sys.exit(_USAGE)


def _leave(*_):
    os.write(2, b"error: interrupted; nothing had begun\n")
    os._exit(_INTERRUPTED)


_leave.while_importing = True
_show = sys.excepthook


def _say(kind, error, traceback):
    """One line for a setting that JAX refuses while it is imported."""
    last = traceback
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    where = "" if last is None else last.tb_frame.f_code.co_filename.replace(os.sep, "/")
    if issubclass(kind, ValueError) and where.endswith("jax/_src/config.py"):
        print(f"error: JAX cannot read a setting of the environment: {error}", file=sys.stderr, flush=True)
        os._exit(_USAGE)
    _show(kind, error, traceback)


_check_packages()
sys.excepthook = _say
if multiprocessing.current_process().name != "MainProcess":  # parent_process() does not tell yet
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a worker; its parent says when to stop
else:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _leave)
