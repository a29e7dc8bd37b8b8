"""Where a run's arrays lie: its mesh, the state on it, and the rows of a batch that each process reads."""

import contextlib
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from twotower_jax.sharding import MeshShape, batch_sharding, make_mesh
from twotower_jax.train.objectives import Documents

# What batches call the fields of `Documents`; the last two are of conversations.
DOCUMENTS = ("document_start", "counted", "token_weight", "turn")


class Batch(NamedTuple):
    """A batch as this process read it, its rows (B / P, L) int32, and as the step gets it, global arrays.

    Attributes:
      ids: (B, L). index: (B,), each row's number, of which its noise is a function.
      documents: where documents lie side by side and are not to know of one another; else None.
    """

    rows: np.ndarray
    ids: jax.Array | np.ndarray
    index: jax.Array | np.ndarray
    documents: Documents | None


def choose_mesh(shape: MeshShape) -> Mesh | None:
    """The mesh of a run, None for a single device.

    One process uses as many devices as the shape says, by default one; several processes use all they have, by
    default for parts of the batch.

    Raises:
      ValueError: if the shape does not fit the devices.
    """
    devices = jax.devices()
    if jax.process_count() > 1:
        return make_mesh(MeshShape(data=-1) if shape == MeshShape() else shape)
    sizes = dataclasses.astuple(shape)
    mesh = make_mesh(shape, devices if -1 in sizes else devices[: math.prod(sizes)])
    return None if mesh.size == 1 else mesh


class Placement:
    """Puts the batches and the state of a run where they belong.

    Rows are read in equal, consecutive shares, one for each set of processes whose devices hold the same rows of a
    batch. Where on the mesh a row comes to lie is the mesh's affair, and nothing depends on it.

    Attributes:
      reading: this process's share, as arguments of `TrainingData` and `validation_batches`.
      numbers: (B / P,) the numbers of the rows that this process reads.
      order: (B,) the number of each row of a global array, on the host.
    """

    def __init__(self, mesh: Mesh | None, batch_size: int):
        """Raises ValueError if two processes hold some rows in common and others not."""
        self.mesh = mesh
        shares = [tuple(range(batch_size))] if mesh is None else _shares(mesh, batch_size)
        mine = 0 if mesh is None else next(i for i, share in enumerate(shares) if share[0] in _held(mesh, batch_size))
        self.reading = {"process_index": mine, "process_count": len(shares)}
        size = batch_size // len(shares)
        self.numbers = mine * size + np.arange(size, dtype=np.int32)
        self._places = np.array(shares[mine])
        self.order = np.empty(batch_size, np.int32)
        self.order[np.concatenate(shares)] = np.arange(batch_size)
        self.index = self.order if mesh is None else self._global(self.order)

    @property
    def everywhere(self) -> NamedSharding | None:
        """The sharding of what every device has whole."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def ids_sharding(self) -> NamedSharding | None:
        """The sharding of token ids (B, L)."""
        return None if self.mesh is None else batch_sharding(self.mesh)

    def in_force(self) -> contextlib.AbstractContextManager:
        """While what is compiled and called is to be divided over the mesh."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def rows(self, rows: np.ndarray) -> jax.Array | np.ndarray:
        """A global array (B, …) of the rows that this process has read of it."""
        if self.mesh is None:
            return rows
        whole = np.zeros((len(self.order), *rows.shape[1:]), rows.dtype)
        whole[self._places] = rows  # the others are asked of other processes
        return self._global(whole)

    def batch(self, read: dict[str, np.ndarray]) -> Batch:
        """What `TrainingData` or `validation_batches` yield, placed."""
        documents = None
        if "document_start" in read:
            told = [name for name in DOCUMENTS if name in read]
            documents = Documents(*(self.rows(read[name]) for name in told))
        return Batch(read["ids"], self.rows(read["ids"]), self.index, documents)

    def whole(self, value: Any) -> Any:
        """A value that every process has, on every device."""
        return value if self.mesh is None else place(value, self.everywhere)

    def _global(self, whole: np.ndarray) -> jax.Array:
        sharding = batch_sharding(self.mesh, whole.ndim)
        return jax.make_array_from_callback(whole.shape, sharding, lambda part: whole[part])


def place(value: Any, sharding: NamedSharding) -> jax.Array:
    """An array where it belongs: moved if it is on the mesh already, otherwise from this process's copy of it."""
    if isinstance(value, jax.Array) and value.sharding.device_set == sharding.device_set:
        return jax.device_put(value, sharding)
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])


def _held(mesh: Mesh, batch_size: int, process: int | None = None) -> tuple[int, ...]:
    """The rows of a batch that a process's devices hold; of this process by default."""
    process = jax.process_index() if process is None else process
    places = batch_sharding(mesh, 1).devices_indices_map((batch_size,))
    held = {
        row
        for device, (part,) in places.items()
        if device.process_index == process
        for row in range(*part.indices(batch_size))
    }
    return tuple(sorted(held))


def _shares(mesh: Mesh, batch_size: int) -> list[tuple[int, ...]]:
    """The different sets of rows that processes hold, each to be read by those that do."""
    processes = sorted({device.process_index for device in mesh.devices.flat})
    shares = sorted({_held(mesh, batch_size, process) for process in processes})
    if sum(map(len, shares)) != batch_size or len({len(share) for share in shares}) > 1:
        raise ValueError(
            "mesh: the devices of one process hold rows that are partly another's; make data × fsdp × expert a "
            "multiple or a divisor of the number of processes"
        )
    return shares
