"""How often a request to a store is made again, and what is said in the end."""

import contextlib
import itertools
import random
import time
from collections.abc import Callable, Iterator

# Before a run trains, somebody waits for the first answer; while it trains, an hour of work waits for the store.
_IMPATIENT_SECONDS = 15.0
# Without a byte for this long a request has failed, and another one may do better.
ATTEMPT_SECONDS = 10.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 8.0
_SHORT_TRIES = 5

_jitter = random.SystemRandom()  # The generators with seeds are left alone.


class StoreError(OSError):
    """A store that does not do what it was asked for; the message says which object, and why."""


class Transient(StoreError):
    """What may pass: too many requests, a fault of the server, no answer, or fewer bytes than there are."""


class Short(Transient):
    """Fewer bytes, or other ones, than the store says there are; so it stays where an object really is another."""


class Changed(StoreError):
    """An object is there, or is another one, where a writer said what had to be there."""


class _Patience:
    seconds = _IMPATIENT_SECONDS


@contextlib.contextmanager
def patient(seconds: float) -> Iterator[None]:
    """Has all requests of this process tried again for that long in place of 15 s."""
    before, _Patience.seconds = _Patience.seconds, seconds
    try:
        yield
    finally:
        _Patience.seconds = before


def retried[T](what: str, request: Callable[[float, int], T]) -> T:
    """Makes a request, again and again with growing pauses of random length, until it is answered or patience ends.

    Args:
      what: the object's address, for messages.
      request: of the seconds that it may take and the number of the try, from 1; raises Transient for what may pass.

    Raises:
      StoreError: any that is not Transient at once; the last one that is when patience has ended.
    """
    end = time.monotonic() + _Patience.seconds
    for attempt in itertools.count(1):
        try:
            return request(max(0.1, end - time.monotonic()), attempt)
        except Transient as error:
            pause = min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE) * (0.5 + _jitter.random())
            if time.monotonic() + pause >= end or isinstance(error, Short) and attempt == _SHORT_TRIES:
                tries = "1 try" if attempt == 1 else f"{attempt} tries"
                raise StoreError(f"{what}: {error}; given up after {tries}") from error
            time.sleep(pause)
