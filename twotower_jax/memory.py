"""What the devices of a run can hold, asked before anything is allocated: an accelerator's free memory, or the host's.

The system ends a process that takes more memory than there is without a word, and an accelerator's allocator after
minutes of loading. Shapes and shardings say beforehand what a model's arrays take at the least.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

GIB = 2**30
# A cgroup's limit and use in bytes, versions 2 and 1, beneath where the groups are mounted.
_GROUPS = (("", "memory.max", "memory.current"), ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"))
# What the system takes back from a group's use if it needs it: files read before.
_RECLAIMABLE = ("inactive_file", "total_inactive_file")


class Room(NamedTuple):
    """Free memory.

    Attributes:
      free: bytes, of each device, or of the host where devices share its memory.
      where: whose, in words. shared: whether the devices share it.
    """

    free: int
    where: str
    shared: bool = False


def room(devices: Sequence[Any], root: pathlib.Path = pathlib.Path("/")) -> Room | None:
    """What the fullest of this process's devices has free, or the host where they are CPUs; None where nothing says.

    Args:
      root: of the file system that describes the host.
    """
    devices = [device for device in devices if device.process_index == jax.process_index()]
    if any(device.platform == "cpu" for device in devices):
        free = host_free(root)
        return None if free is None else Room(free, "this machine has free", shared=True)
    found = []
    for device in devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            found.append(Room(stats["bytes_limit"] - stats.get("bytes_in_use", 0), f"{device.device_kind} has free"))
    return min(found, default=None)


def host_free(root: pathlib.Path = pathlib.Path("/")) -> int | None:
    """Bytes that this process can still have: what the system has available, or less if a cgroup is limited."""
    free = [_available(root), *(_left_in(group) for group in _groups(root))]
    return min((size for size in free if size is not None), default=None)


def sharded_bytes(leaf: Any, sharding: jax.sharding.Sharding | None = None) -> int:
    """What an array or a shape takes of one device.

    Args:
      leaf: with `shape` and `dtype`. sharding: None takes the leaf's own, and without one the whole.
    """
    sharding = sharding if sharding is not None else getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


def temporaries(compiled: jax.stages.Compiled) -> int | None:
    """Bytes a device that a compiled program needs beside its arguments; None where the backend does not say."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def check_holds(
    needed: Mapping[str, int], devices: Sequence[Any], divide: str, fewer: str = "", available: Room | None = None
) -> None:
    """Refuses what the devices cannot hold.

    Args:
      needed: bytes of each device by kind, the least that there will be.
      devices: all that are used; those of CPU platforms share the host's memory.
      divide: the setting that divides it over more devices. fewer: what makes it smaller, in words, if anything does.
      available: what there is; None asks.

    Raises:
      ValueError: in one line, with the numbers and what would fit.
    """
    available = room(devices) if available is None else available
    here = sum(device.process_index == jax.process_index() for device in devices)
    total = sum(needed.values())
    if available is None or total * (here if available.shared else 1) <= available.free:
        return
    parts = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in needed.items() if size)
    if available.shared:
        each = f" on each of {here} devices" if here > 1 else ""
        fits = f"a machine with more than {total * here / GIB:.0f} GiB free would fit"
    else:
        each = " on each device" if len(devices) > 1 else ""
        least = -(-total * len(devices) // max(available.free, 1))
        fits = f"at least {least} such devices would, with {divide} to divide it over them"
    raise ValueError(
        f"the model does not fit: it needs at least {total / GIB:.1f} GiB{each} ({parts}), and {available.where} "
        f"{available.free / GIB:.1f} GiB; {fits}{fewer and f'; or {fewer}'}"
    )


def _available(root: pathlib.Path) -> int | None:
    for line in _lines(root / "proc/meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable" and (number := value.partition("kB")[0].strip()).isdecimal():
            return int(number) * 1024
    return None


def _groups(root: pathlib.Path) -> list[tuple[pathlib.Path, str, str]]:
    """The control groups that this process is in and their parents: folder and names of limit and use."""
    found = []
    for line in _lines(root / "proc/self/cgroup"):
        controllers, _, path = line.partition(":")[2].partition(":")
        version = 0 if not controllers else 1 if "memory" in controllers.split(",") else None
        if version is None:
            continue
        mount, *names = _GROUPS[version]
        # Within a container the path may be the host's, and not be there; then the root is the container's own.
        path = pathlib.PurePosixPath(path.strip().lstrip("/"))
        found += [(root / "sys/fs/cgroup" / mount / part, *names) for part in (path, *path.parents)]
    return list(dict.fromkeys(found))


def _left_in(group: tuple[pathlib.Path, str, str]) -> int | None:
    folder, limit, use = group
    limit, use = (next(iter(_lines(folder / name)), "").strip() for name in (limit, use))
    if not limit.isdecimal() or not use.isdecimal():
        return None
    stat = dict(line.rsplit(" ", 1) for line in _lines(folder / "memory.stat") if " " in line)
    reclaimable = next((int(stat[name]) for name in reversed(_RECLAIMABLE) if name in stat), 0)
    return max(0, int(limit) - max(0, int(use) - reclaimable))


def _lines(path: pathlib.Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
