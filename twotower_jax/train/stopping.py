"""Signals as a wish to stop: noted when they come, looked at between steps.

SIGTERM and SIGINT, and those that schedulers send some minutes before the end: SIGUSR1, SIGUSR2, and SIGHUP, which a
terminal sends too when it is closed.

Imports nothing heavy, so that a command can listen before it imports anything else.
"""

import signal
from collections.abc import Callable
from typing import Any

# Exit status of a command that stopped because it was told to, and goes on when it is run again (EX_TEMPFAIL).
STOPPED = 75

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

_received = ""


def listen() -> None:
    """From now on the signals are only noted; a second SIGINT raises KeyboardInterrupt."""
    handle(_note)


def handle(handler: Callable[[int, Any], None]) -> None:
    """Has the signals call `handler`, except a SIGHUP that is ignored already, as under nohup."""
    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def requested() -> str:
    """The name of the signal that came, or ""."""
    return _received


def _note(number: int, _) -> None:
    global _received
    _received = signal.Signals(number).name
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)
