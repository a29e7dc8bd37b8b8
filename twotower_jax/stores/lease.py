"""One writer at a time where there are no locks: an object that its holder writes again and again.

A writer that finds it asks whether its holder still lives. On this machine the process table tells. Elsewhere the
object does: one that the store's clock says is old, or that stays the same for as long as a lease lasts, is of a dead
run and taken over; one that changes meanwhile is of a run that lives. No two clocks are compared. Whoever writes the
object says which version it replaces, so that of two that take it over one is refused, and a holder that was taken for
dead learns of it.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator

from twotower_jax.stores.clients import ABSENT
from twotower_jax.stores.path import StorePath
from twotower_jax.stores.retrying import Changed, StoreError

# A holder that has not renewed for this long may be taken for dead.
SECONDS = 30.0
_RENEWED_EVERY = 5.0
_LOOKED_AT_EVERY = 1.0


class LeaseLost(StoreError):
    """Another writer took this one for dead and has begun to write."""


class Lease:
    """An object held by this process; see `held`.

    Attributes:
      lost: whether another writer has it.
    """

    def __init__(self, path: StorePath):
        self.lost = False
        self._path, self._version = path, ABSENT
        self._owner = {"owner": uuid.uuid4().hex, **_this_process()}
        self._count, self._renewed = 0, 0.0
        self._turn, self._ended = threading.Lock(), threading.Event()

    def check(self) -> None:
        """Is called before what only the holder may do.

        Raises:
          LeaseLost: if another writer has taken over.
          StoreError: if the store does not answer.
        """
        if self.lost:
            raise LeaseLost(f"{self._path}: another process took this one for dead and goes on in its place")
        if time.monotonic() - self._renewed > SECONDS / 2:
            self._renew()

    def take(self, busy: str) -> None:
        """Waits for at most `SECONDS` where it cannot be seen whether its holder lives.

        Raises:
          ValueError: saying `busy` if it does.
        """
        while True:
            try:
                return self._write(ABSENT)
            except Changed:
                pass
            try:
                version = self._of_dead(busy)
                print(f"{self._path}: its holder is dead; taken over", file=sys.stderr)
                return self._write(version)
            except (FileNotFoundError, Changed):  # given up, or taken by somebody else, just now
                continue

    def _of_dead(self, busy: str) -> str:
        """The version of a holder that is dead."""
        found = self._path.info()
        holder = _parsed(self._path.read_bytes())
        if _is_dead(holder) or found.age is not None and found.age > SECONDS:
            return found.version
        what = f"{busy} (on {holder.get('host', 'another machine')}, process {holder.get('pid', '?')})"
        if _is_here(holder):
            raise ValueError(what)
        print(f"{self._path}: waiting for up to {SECONDS:.0f} s to see whether its holder lives", file=sys.stderr)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            time.sleep(_LOOKED_AT_EVERY)
            if self._path.info().version != found.version:
                raise ValueError(what)
        return found.version

    def keep(self) -> None:
        """Renews in a thread until `release`."""
        threading.Thread(target=self._keep, daemon=True).start()

    def release(self) -> None:
        self._ended.set()
        with self._turn:
            if not self.lost:
                with contextlib.suppress(OSError):
                    self._path.unlink(expected=self._version)

    def _keep(self) -> None:
        while not self._ended.wait(_RENEWED_EVERY):
            with contextlib.suppress(StoreError):  # which `check` meets again, where somebody listens
                self._renew()
            if self.lost:
                return

    def _renew(self) -> None:
        with self._turn:
            if self.lost or self._ended.is_set():
                return
            try:
                self._write(self._version)
            except Changed:
                self.lost = True
                raise LeaseLost(f"{self._path}: another process took this one for dead") from None

    def _write(self, expected: str) -> None:
        began, self._count = time.monotonic(), self._count + 1
        text = json.dumps(self._owner | {"renewals": self._count})
        self._version = self._path.write(text.encode(), expected)
        self._renewed = began


@contextlib.contextmanager
def held(path: StorePath, busy: str) -> Iterator[Lease]:
    """Holds the lease of this name while the block runs.

    Raises:
      ValueError: saying `busy` if a process that lives has it.
      StoreError: if the store does not let it be written.
    """
    lease = Lease(path)
    lease.take(busy)
    lease.keep()
    try:
        yield lease
    finally:
        lease.release()


def _this_process() -> dict[str, str]:
    return {"host": socket.gethostname(), "machine": _machine(), "pid": str(os.getpid()), "began": _began(os.getpid())}


def _machine() -> str:
    """What two processes that see one another's numbers have in common."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _began(pid: int) -> str:
    """When a process began, since numbers are given again; "" if there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _is_here(holder: dict[str, str]) -> bool:
    return bool(holder.get("machine")) and holder["machine"] == _machine()


def _is_dead(holder: dict[str, str]) -> bool:
    """Whether a holder ran on this machine and does so no more."""
    if not _is_here(holder) or not str(holder.get("pid", "")).isdecimal():
        return False
    return _began(int(holder["pid"])) != holder.get("began")


def _parsed(content: bytes) -> dict[str, str]:
    with contextlib.suppress(ValueError):
        found = json.loads(content)
        if isinstance(found, dict):
            return found
    return {}
