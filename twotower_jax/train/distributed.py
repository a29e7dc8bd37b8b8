"""Several processes as one run: starting them, agreeing, and noticing that one is lost."""

import contextlib
import faulthandler
import os
import re
import sys
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# After this long without a sign of life a process counts as lost, and JAX's runtime ends the others.
HEARTBEAT_SECONDS = 60

# How JAX's runtime, Gloo and the coordination service report that another process does not answer.
_LOST = re.compile(r"(UNKNOWN|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|INTERNAL|FAILED_PRECONDITION): ")


class ProcessLost(RuntimeError):
    """Another process of the run does not answer any more."""


def initialize(coordinator: str = "", num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins this process to a run; before anything else is done with JAX.

    Args:
      coordinator: HOST:PORT of process 0, with the two numbers; without all three they are found out, which works on
        TPU pods and under Slurm and Open MPI.

    Raises:
      ValueError: if the run cannot be joined.
    """
    # Where the runtime aborts, its own message and the supervisor's say why; Python's stacks would bury them.
    faulthandler.disable()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for itself; see `stopping`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator or None, num_processes, process_id, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"cannot join the other processes: {str(error).splitlines()[0]}") from error


def leave(status: int, *, together: bool) -> None:
    """Ends a process that has joined others; returns in one that has not.

    Args:
      together: all processes leave for the same reason now, so they wait for one another. Otherwise this one goes at
        once, and leaves it to the others to notice.
    """
    if jax.distributed.is_initialized():
        if together:
            jax.distributed.shutdown()
        sys.stdout.flush()
        os._exit(status)


def is_leader() -> bool:
    """Whether this process writes what only one may write."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has called it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def noticing_loss() -> Iterator[None]:
    """Turns an error that says that another process is gone into ProcessLost."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        cause = error.__cause__ or error
        if jax.process_count() > 1 and _LOST.match(str(cause)):
            raise ProcessLost(
                f"process {jax.process_index()} of {jax.process_count()} has lost another one "
                f"({str(cause).splitlines()[0]}); run all of them again to go on from the newest checkpoint"
            ) from error
        raise


class Agreement:
    """Lets every process know the largest of a small number that each gives, once per step, without waiting for it."""

    def __init__(self):
        self._several = jax.process_count() > 1
        if self._several:
            mesh = Mesh(np.array(jax.devices()), ("all",))
            self._apart = NamedSharding(mesh, PartitionSpec("all"))
            self._largest = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._previous: jax.Array | None = None

    def exchange(self, number: int) -> int:
        """Gives this step's number; returns the largest of the step before, or of now where there is one process."""
        if not self._several:
            return number
        previous, self._previous = self._previous, self._start(number)
        return 0 if previous is None else int(previous)

    def now(self, number: int) -> int:
        """The largest number given now; waits for it."""
        return int(self._start(number)) if self._several else number

    def _start(self, number: int) -> jax.Array:
        mine = np.full(jax.local_device_count(), number, np.int32)
        return self._largest(jax.make_array_from_process_local_data(self._apart, mine))
