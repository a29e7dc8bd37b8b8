"""For the person watching: what a run holds in memory, and a profile of some of its steps."""

import math
import pathlib
from typing import Any, NamedTuple

import jax


class Profile(NamedTuple):
    """The steps first … last, counted from 1, to be traced into `folder` for TensorBoard or Perfetto."""

    first: int
    last: int
    folder: pathlib.Path

    @classmethod
    def parse(cls, text: str, folder: pathlib.Path) -> "Profile":
        """From "A:B".

        Raises:
          ValueError: if it is not that.
        """
        first, colon, last = text.partition(":")
        if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
            raise ValueError(f"profile_steps={text!r} is not FIRST:LAST, two steps counted from 1")
        return cls(int(first), int(last), folder)


class Profiler:
    """Traces the steps of a `Profile`, if there is one."""

    def __init__(self, profile: Profile | None):
        self._profile, self._running = profile, False

    def before(self, step: int) -> None:
        """Is called before a step begins."""
        if self._profile and not self._running and self._profile.first <= step <= self._profile.last:
            jax.profiler.start_trace(self._profile.folder)
            self._running = True

    def after(self, step: int, result: Any) -> str:
        """Is called after a step with something that it computes; returns what there is to say."""
        if not self._running or step < self._profile.last:
            return ""
        jax.block_until_ready(result)
        self.stop()
        return f"profile of steps {self._profile.first} to {step} in {self._profile.folder}"

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends a trace that is under way."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def bytes_per_device(tree: Any) -> int:
    """What arrays take on one device, by their shardings."""
    return sum(
        array.dtype.itemsize * math.prod(array.sharding.shard_shape(array.shape)) for array in jax.tree.leaves(tree)
    )


def readable_bytes(count: float) -> str:
    """
    >>> readable_bytes(1536), readable_bytes(3 * 2**30)
    ('1.5 KiB', '3.0 GiB')
    """
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count, units = count / 1024, units[1:]
    return f"{count:.1f} {units[0]}" if units[0] != "bytes" else f"{count} bytes"


def memory_line(trained: Any, optimizer: Any, frozen: Any) -> str:
    """Bytes a device by kind."""
    parts = {"trained weights": trained, "optimizer": optimizer, "frozen weights": frozen}
    sizes = {name: bytes_per_device(tree) for name, tree in parts.items()}
    listed = ", ".join(f"{readable_bytes(size)} {name}" for name, size in sizes.items() if size)
    return f"memory of each device: {readable_bytes(sum(sizes.values()))}: {listed}"
