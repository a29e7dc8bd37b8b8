"""What a client may ask for and how long it may take to ask: checked before anything is allocated."""

import asyncio
import dataclasses
import json
import re
from typing import Any

from starlette.requests import ClientDisconnect, Request

from twotower_jax.serving.errors import ApiError


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one server.

    Attributes:
      body_bytes: of a request's body.
      choices: `n`.
      logprobs: alternatives of each token.
      stop_texts, stop_characters: how many stop texts, and how long each.
      block_size: of requests, unless the server's own is more; steps_per_block.
      compiled: kinds of requests (mode, block size, strategy) that functions are compiled for; each takes seconds of
        everybody's time, and memory.
      head_seconds: from the connection, or the answer before, until the request's head has come.
      body_seconds: from there until its body has.
      write_seconds: until a client has read what is waiting for it, beyond what the sockets hold.
      step_seconds: of the engine, functions that it compiles for a step included; after that it has failed. 0 is for
        ever.
    """

    body_bytes: int = 4 << 20
    choices: int = 64
    logprobs: int = 20
    stop_texts: int = 16
    stop_characters: int = 256
    block_size: int = 64
    steps_per_block: int = 1024
    compiled: int = 16
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    write_seconds: float = 30.0
    step_seconds: float = 600.0


async def read_body(request: Request, limits: Limits) -> bytes:
    """A request's body, which is said to be JSON.

    Raises:
      ApiError: for another type of content, too many bytes, or a client that is too slow or gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Other types can be sent by any web page that a user of this machine has open.
    if kind != "application/json":
        raise ApiError(415, "Content-Type: must be application/json", code="unsupported_media_type")
    length = request.headers.get("content-length", "")
    if re.fullmatch(r"[0-9]{1,18}", length) and int(length) > limits.body_bytes:
        raise _too_large(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise _too_large(limits)
    except TimeoutError:
        message = f"the body did not come within {limits.body_seconds:g} seconds"
        raise ApiError(408, message, code="request_timeout", close=True) from None
    except ClientDisconnect:
        raise ApiError(400, "the connection was closed before the body had come") from None
    return bytes(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object, without the liberties that Python's parser takes.

    Raises:
      ApiError: if it is none.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_number, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON ({error})", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(value).__name__}", code="invalid_json")
    return value


def _too_large(limits: Limits) -> ApiError:
    return ApiError(413, f"the body has more than {limits.body_bytes} bytes", code="body_too_large", close=True)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name[:100]!r} stands twice in an object")
            seen.add(name)
    return found
