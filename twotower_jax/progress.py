"""How far long work has come, on stderr: rate and time left."""

import sys
import threading
import time

_TERMINAL_INTERVAL, _FILE_INTERVAL = 0.5, 10.0


class Progress:
    """Counts bytes of `total` from any thread; prints at most twice a second, or every 10 s where nobody watches."""

    def __init__(self, label: str, total: int):
        self._label, self._total = label, total
        self._done = 0
        self._start = self._printed = time.monotonic()
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            terminal = sys.stderr.isatty()
            if now - self._printed >= (_TERMINAL_INTERVAL if terminal else _FILE_INTERVAL):
                self._printed = now
                print(self.line(now), end="\r" if terminal else "\n", file=sys.stderr, flush=True)

    def finish(self) -> None:
        print(self.line(time.monotonic()), file=sys.stderr, flush=True)

    def line(self, now: float) -> str:
        """The state as one line."""
        seconds = max(now - self._start, 1e-9)
        rate = self._done / seconds
        left = (self._total - self._done) / rate if rate else 0.0
        unit, name = (1e9, "GB") if self._total >= 1e9 else (1e6, "MB")
        return (
            f"{self._label}: {self._done / unit:.2f} of {self._total / unit:.2f} {name}, {rate / unit:.2f} {name}/s, "
            f"{seconds:.0f} s, {left:.0f} s left"
        )


class Counted(Progress):
    """Counts things, of which `total` are to come."""

    def line(self, now: float) -> str:
        """The state as one line."""
        seconds = max(now - self._start, 1e-9)
        left = (self._total - self._done) * seconds / self._done if self._done else 0.0
        return f"{self._label}: {self._done} of {self._total}, {seconds:.0f} s, {left:.0f} s left"
