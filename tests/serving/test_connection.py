"""Real sockets: connections end by absolute deadlines, and a client that leaves is noticed."""

import asyncio
import contextlib
import json
import socket

import pytest
from served import listening

from twotower_jax.serving.connection import bind
from twotower_jax.serving.limits import Limits

QUICK = Limits(head_seconds=0.4, body_seconds=0.4, write_seconds=0.4)
BODY = json.dumps({"prompt": [5], "max_tokens": 8}).encode()


def post(body: bytes = BODY, length: int | None = None) -> bytes:
    head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


async def answer(place: tuple[str, int], request: bytes) -> bytes:
    """All that comes back on a connection that is then closed, by whom ever."""
    reader, writer = await asyncio.open_connection(*place)
    writer.write(request)
    data = bytearray()
    with contextlib.suppress(ConnectionError):
        while chunk := await reader.read(1 << 16):
            data += chunk
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return bytes(data)


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


def run(scripted, work, **options):
    async def inner():
        service, engine = scripted(**options)
        async with asyncio.timeout(60), listening(service) as (place, server):
            await until(lambda: service.loop.ready)
            return await work(service, engine, place, server)

    return asyncio.run(inner())


SLOW = [
    ("silent", b"", b""),
    ("half a head", b"POST /v1/completions HTTP/1.1\r\nHo", b""),
    ("half a body", post(length=1000), b"408 Request Timeout"),
    ("a body that nobody reads", b"GET /health HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n", b"200 OK"),
    ("one that stays", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", b"200 OK"),
    ("no HTTP", b"\x16\x03\x01\x00\xa5\x01\x00\r\n\r\n", b"400 Bad Request"),
    ("too long a head", b"GET / HTTP/1.1\r\nA: " + b"a" * 10**5, b"400 Bad Request"),
]


@pytest.mark.parametrize(("request_", "expected"), [case[1:] for case in SLOW], ids=[case[0] for case in SLOW])
def test_connections_end_by_themselves(scripted, request_, expected):
    async def work(service, engine, place, server):
        async with asyncio.timeout(10):
            return await answer(place, request_)

    assert expected in run(scripted, work, limits=QUICK)


def test_a_drop_now_and_then_puts_no_deadline_off(scripted):
    async def drip(place, request: bytes) -> None:
        _, writer = await asyncio.open_connection(*place)
        with contextlib.suppress(ConnectionError):
            for byte in request:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.1)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def work(service, engine, place, server):
        async with asyncio.timeout(20):  # Drops alone would take 13 seconds and more.
            await asyncio.gather(drip(place, post(b" " * 40)), drip(place, post(b"")[:-4] + b"\r\nX: " + b"x" * 50))

    # Python's clients notice at the second drop after the connection has been reset.
    run(scripted, work, limits=QUICK)


def test_a_client_that_does_not_read_is_left(scripted):
    async def work(service, engine, place, server):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(place)
        asked = {"prompt": "item by item, so on " * 5, "max_tokens": 1, "echo": True, "logprobs": 5, "n": 64}
        # Long answers, one after another, of which the sockets hold some.
        client.sendall(post(json.dumps(asked).encode()) * 100)
        await until(lambda: len(server.server_state.connections) == 1 and engine.steps > 64)
        await until(lambda: not server.server_state.connections)
        client.close()
        return engine.steps

    assert run(scripted, work, limits=QUICK, places=80) < 100 * 32


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(scripted, stream):
    async def work(service, engine, place, server):
        engine.hold = True
        _, writer = await asyncio.open_connection(*place)
        writer.write(post(json.dumps({"prompt": [5], "stream": stream}).encode()))
        await until(lambda: engine.running == 1)
        writer.close()
        await writer.wait_closed()
        await until(lambda: engine.canceled == [0])
        await until(lambda: service.loop.taken == 0)

    run(scripted, work)


def test_many_slow_connections_delay_nobody(scripted):
    async def work(service, engine, place, server):
        slow = [await asyncio.open_connection(*place) for _ in range(200)]
        for number, (_, writer) in enumerate(slow):
            writer.write(post(length=1000)[: number * 2])
        async with asyncio.timeout(10):
            good = await asyncio.gather(*(answer(place, b"GET /health HTTP/1.0\r\n\r\n") for _ in range(20)))
            done = await answer(place, post().replace(b"HTTP/1.1", b"HTTP/1.0"))
        for _, writer in slow:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        return [*good, done]

    assert all(b" 200 OK" in found for found in run(scripted, work))


def test_two_requests_at_once_on_a_connection(scripted):
    async def work(service, engine, place, server):
        return await answer(place, post() + post().replace(b"Host: a", b"Host: a\r\nConnection: close"))

    assert run(scripted, work, limits=QUICK).count(b'"finish_reason":"length"') == 2


def test_a_port_that_is_taken_is_said():
    listener = bind("127.0.0.1", 0)
    listener.listen()
    port = listener.getsockname()[1]
    with pytest.raises(OSError, match=f"--port={port}: Address already in use"):
        bind("127.0.0.1", port)
    listener.close()
    with pytest.raises(OSError, match="--host=no.such.host.invalid"):
        bind("no.such.host.invalid", 0)
