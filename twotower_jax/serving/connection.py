"""Connections that end by absolute deadlines, and a server that finishes what it has begun when it is told to end."""

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from twotower_jax.serving.app import Service
from twotower_jax.serving.limits import Limits

_HEAD_BYTES = 32 << 10
# Seconds for the engine's last step, after which nobody waits for it.
_LAST_STEP = 10.0


class Connection(H11Protocol):
    """HTTP/1.1 with deadlines that a client cannot put off by sending or reading a little.

    From the connection, and from the end of each answer, it has `limits.head_seconds` for the head of a request; and
    `limits.write_seconds` to read when more waits for it than the transport holds. (The body's deadline is kept where
    it is read.) A connection that misses one is cut.
    """

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before and not self.cycle.response_complete:
            self._head_timer.cancel()

    def on_response_complete(self) -> None:
        self._wait_for_head()
        before = self.cycle
        super().on_response_complete()
        if self.cycle is not before:  # The next request had come already.
            self._head_timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def _wait_for_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = self.loop.call_later(self._limits.head_seconds, self._no_head)

    def _no_head(self) -> None:
        if self._write_timer is not None:
            self._wait_for_head()  # A long answer is still being read, for which there is another deadline.
        else:
            self.transport.abort()


class Server(uvicorn.Server):
    """Leaves signals to `serve`, and says when it listens."""

    def __init__(self, app: Any, limits: Limits, started: Callable[[], object]):
        logging.getLogger("uvicorn").setLevel(logging.ERROR)
        config = uvicorn.Config(
            app,
            http=functools.partial(Connection, limits=limits),
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=_HEAD_BYTES,
            timeout_graceful_shutdown=int(limits.write_seconds) + 1,
        )
        super().__init__(config)
        self._say_started = started

    def capture_signals(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._say_started()


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet, but is nobody else's.

    Raises:
      OSError: naming both, if there is no such host, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except BaseException:
            found.close()
            raise
    except OSError as error:
        raise OSError(f"--host={host} --port={port}: {error.strerror or error}") from None
    return found


def address(listener: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(app: Any, service: Service, listener: socket.socket) -> None:
    """Serves until a signal, and then until what was begun is done; the second signal ends the process at once."""

    def started() -> None:
        print(f"serving {service.name} on {address(listener)}", flush=True)

    server, tasks = Server(app, service.limits, started), set()

    def say(line: str) -> None:
        with contextlib.suppress(OSError):  # Whoever read it may have gone first.
            print(line, file=sys.stderr, flush=True)

    async def drain() -> None:
        await service.loop.drain()
        server.should_exit = True

    def end(number: int) -> None:
        if service.draining:
            say("error: ended before all requests were answered")
            os._exit(128 + number)
        service.draining = True
        tasks.add(asyncio.create_task(drain()))
        say(f"ending, once {service.loop.taken} rows are done; a second signal ends at once")

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, end, number)
    service.loop.start()
    await server.serve([listener])
    if not await service.loop.stop(_LAST_STEP):
        # It compiles, or a device hangs: nothing waits for its answer, and Python could not end with it.
        sys.stdout.flush()
        os._exit(0)
