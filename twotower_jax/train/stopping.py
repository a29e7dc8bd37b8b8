"""SIGTERM and SIGINT as a wish to stop: noted when they come, looked at between steps.

Imports nothing heavy, so that a command can listen before it imports anything else.
"""

import signal

# Of a command that stopped because it was told to, and goes on when it is run again (EX_TEMPFAIL).
STOPPED = 75

_received = ""


def listen() -> None:
    """From now on both signals are only noted; a second SIGINT raises KeyboardInterrupt."""
    signal.signal(signal.SIGTERM, _note)
    signal.signal(signal.SIGINT, _note)


def requested() -> str:
    """The name of the signal that came, or ""."""
    return _received


def _note(number: int, _) -> None:
    global _received
    _received = signal.Signals(number).name
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)
