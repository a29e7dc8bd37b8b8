"""One engine on a mesh over several processes: process 0 is talked to, the others do as it does.

Every process makes the same engine, on the same mesh. In process 0 `Leader` stands in its place, with the same methods;
in the others `follow` takes what the leader was told since its last step, and steps with it. All of them come to know
the same tokens, and so keep the same table; nothing but requests and cancellations is sent from host to host.
"""

import pickle
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from twotower_jax.generation.engine import Engine
from twotower_jax.generation.request import Request
from twotower_jax.generation.rows import Progress

# Bytes of what is always sent; more is sent after it.
_HEADER = 1024
_STEP, _CLOSE = "step", "close"


class Leader:
    """The engine of process 0 as all processes have it. `Engine` says what the methods do.

    `close` lets the others go, and must be called; they wait for the next `step`, or `close`, until then.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._told: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, request: Request | list[int], max_new_tokens: int | None = None) -> int:
        number = self._engine.submit(request, max_new_tokens)  # What is refused is not passed on.
        self._told.append(("submit", (request, max_new_tokens)))
        return number

    def cancel(self, number: int) -> None:
        self._engine.cancel(number)
        self._told.append(("cancel", (number,)))

    def step(self) -> list[Progress]:
        self._tell(_STEP)
        return self._engine.step()

    def close(self) -> None:
        """Ends `follow` in the other processes."""
        self._tell(_CLOSE)

    def _tell(self, then: str) -> None:
        told, self._told = self._told, []
        _broadcast(pickle.dumps((told, then)))


def follow(engine: Engine) -> None:
    """Does as the leader does until it closes; for every process but the first."""
    while True:
        told, then = pickle.loads(_broadcast(b""))
        for what, arguments in told:
            getattr(engine, what)(*arguments)
        if then == _CLOSE:
            return
        engine.step()


def _broadcast(message: bytes) -> bytes:
    """The message of process 0, in all of them."""
    first = jax.process_index() == 0
    header = np.zeros(_HEADER, np.uint8)
    if first:
        whole = np.frombuffer(len(message).to_bytes(8, "little") + message, np.uint8)
        header[: len(whole)] = whole[:_HEADER]
    header = np.asarray(multihost_utils.broadcast_one_to_all(header, is_source=first))
    size = int.from_bytes(header[:8].tobytes(), "little")
    if size <= _HEADER - 8:
        return header[8 : 8 + size].tobytes()
    # Lengths are powers of two, so that few are compiled.
    rest = np.zeros(1 << (size - 1).bit_length(), np.uint8)
    if first:
        rest[:size] = np.frombuffer(message, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(rest, is_source=first))[:size].tobytes()
