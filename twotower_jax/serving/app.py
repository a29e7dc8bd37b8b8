"""The routes, as an ASGI application."""

import asyncio
import contextlib
import dataclasses
import hmac
import importlib.resources
import json
import re
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from twotower_jax.diffusion import STRATEGIES
from twotower_jax.diffusion.strategies import knobs
from twotower_jax.generation.settings import MODES
from twotower_jax.serving import metrics, stream
from twotower_jax.serving.answers import Answer
from twotower_jax.serving.errors import ApiError, to_json
from twotower_jax.serving.holding import CONSTRAINTS
from twotower_jax.serving.limits import Limits, parse_object, read_body
from twotower_jax.serving.loop import EngineLoop, Group
from twotower_jax.serving.schema import Job, Reader
from twotower_jax.serving.text import TokenTexts

# Larger bodies are read in a thread, so that others need not wait for their tokens.
_SMALL = 16 << 10
# The page is one file, and asks nobody but this server for anything.
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_GUARDED = ("/v1/", "/tokenize", "/detokenize")


@dataclasses.dataclass(kw_only=True)
class Service:
    """What the routes need.

    Attributes:
      loop: the engine's. reader: of bodies. texts: tokens to text.
      keys: one of which a client must give; none where there are none.
      draining: whether no more requests are taken.
      makes_grammars: a thread in which bodies are read that take longer, one after another.
    """

    loop: EngineLoop
    reader: Reader
    metrics: metrics.Metrics
    limits: Limits
    texts: TokenTexts
    keys: Sequence[bytes] = ()
    draining: bool = False
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    makes_grammars: ThreadPoolExecutor = dataclasses.field(default_factory=lambda: ThreadPoolExecutor(1, "grammars"))

    @property
    def name(self) -> str:
        return self.reader.name

    async def read(self, request: Request, read: Callable[[dict], Any]) -> Any:
        """What `read` makes of a request's body."""
        body = await read_body(request, self.limits)
        small = len(body) <= _SMALL
        values = parse_object(body) if small else await asyncio.to_thread(parse_object, body)

        def read_values():
            try:
                return read(values)
            except RecursionError:
                raise ApiError(400, "the body is nested too deep", code="invalid_json") from None

        if any(name in values for name in CONSTRAINTS):
            return await asyncio.get_running_loop().run_in_executor(self.makes_grammars, read_values)
        return read_values() if small else await asyncio.to_thread(read_values)

    def enter(self, job: Job) -> Group:
        """Places for a job's rows, which are submitted."""
        if self.draining:
            message = "the server is about to end and takes no more requests"
            raise ApiError(503, message, code="draining", headers={"retry-after": "5"}, close=True)
        group = self.loop.enter(job.places)
        group.submit(job.requests)
        return group


def make_app(service: Service, cors_origins: Sequence[str] = (), hosts: Collection[str] | None = None) -> Starlette:
    """The application. Web pages of `cors_origins` may use it, others may not. It answers to these `hosts` alone, or to
    all."""
    middleware = [Middleware(_Keys, keys=service.keys)]
    if cors_origins:
        allowed = {"allow_methods": ["GET", "POST"], "allow_headers": ["authorization", "content-type"]}
        middleware.insert(0, Middleware(CORSMiddleware, allow_origins=list(cors_origins), **allowed))
    if hosts is not None:
        middleware.insert(0, Middleware(_Hosts, names=hosts))
    app = Starlette(
        routes=[
            Route("/v1/completions", _completions, methods=["POST"]),
            Route("/v1/chat/completions", _chat, methods=["POST"]),
            Route("/v1/models", _models),
            Route("/v1/models/{name:path}", _model),
            Route("/tokenize", _tokenize, methods=["POST"]),
            Route("/detokenize", _detokenize, methods=["POST"]),
            Route("/health", _health),
            Route("/ready", _ready),
            Route("/metrics", _metrics),
            Route("/", _page),
        ],
        middleware=middleware,
        exception_handlers={ApiError: _refuse, HTTPException: _http_error, Exception: _failed},
    )
    app.state.service = service
    return app


def read_keys(path: str) -> list[bytes]:
    """The keys of a file, one a line; lines that are empty or begin with # are none.

    Raises:
      ValueError: naming the file, if it holds none or one that no header can carry; OSError too, if it cannot be
        read.
    """
    try:
        with open(path, "rb") as file:
            lines = [line.strip() for line in file.read(1 << 20).splitlines()]
    except OSError as error:
        raise OSError(f"--api_keys={path}: {error.strerror}") from None
    keys = {number: line for number, line in enumerate(lines, 1) if line and not line.startswith(b"#")}
    if not keys:
        raise ValueError(f"--api_keys={path}: holds no key; write one a line")
    if bad := [number for number, line in keys.items() if not line.isascii() or len(line.split()) > 1]:
        raise ValueError(f"--api_keys={path}: line {bad[0]}: a key is of ASCII characters without spaces")
    return list(keys.values())


class _Hosts:
    """Answers to its own names alone.

    A web page elsewhere can have its own name lead to this machine (DNS rebinding): for a browser the server is then a
    part of that page, and no rule about other origins holds. But the name is in the request.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]):
        self._app, self._names = app, {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            header = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
            name = re.sub(r":[0-9]*$", "", header.strip()).lower()
            if header and name not in self._names:
                message = f"Host: {name[:100]!r} is no name of this server, which says others with --allowed_host=NAME"
                await ApiError(403, message, code="host_not_allowed", close=True).response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Keys:
    """Asks for one of the keys where something is computed or told of the model."""

    def __init__(self, app: ASGIApp, keys: Sequence[bytes]):
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._keys and scope["type"] == "http" and scope["path"].startswith(_GUARDED):
            header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            kind, _, key = header.partition(b" ")
            # Each is compared, whatever came of those before.
            same = [hmac.compare_digest(key.strip(), known) for known in self._keys]
            if kind.lower() != b"bearer" or not any(same):
                message = "Authorization: a header 'Bearer KEY' with one of the server's keys is needed"
                error = ApiError(
                    401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"}, close=True
                )
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


# Errors.


async def _refuse(_: Request, error: Exception) -> Response:
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    messages = {404: f"there is no {request.url.path} here", 405: f"{request.method} cannot be used here"}
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=error.headers).response()


async def _failed(_: Request, error: Exception) -> Response:
    return ApiError(500, "the server failed; its log says how", code="internal_error").response()


def _json(value: Any, status: int = 200) -> Response:
    return Response(to_json(value), status, media_type="application/json")


# Text.


async def _completions(request: Request) -> Response:
    return await _generate(request, request.app.state.service.reader.completion)


async def _chat(request: Request) -> Response:
    return await _generate(request, request.app.state.service.reader.chat)


async def _generate(request: Request, read: Callable[[dict], Job]) -> Any:
    service: Service = request.app.state.service
    job: Job = await service.read(request, read)
    answer = Answer(job, job.adapter or service.name, service.texts, service.reader.config.mask_token_id)
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(service.enter(job))
        done = await _unless_left(request, _begin(job, group))
        if done is None:
            return Response(status_code=499)  # Read by nobody.
        (scored,) = done
        if job.stream:
            stack.pop_all()
            return stream.EventStream(group, lambda: stream.events(answer, group, scored))
        results = await _unless_left(request, _results(job, group))
        if results is None:
            return Response(status_code=499)
        return _json(answer.whole(results, scored))


async def _begin(job: Job, group: Group) -> tuple[list | None]:
    """Waits until the rows are accepted and, if asked for, the prompts are scored."""
    for ticket in group.tickets:
        await ticket.accepted()
    return (await group.score(job.prompts, job.logprobs, job.adapter) if job.scored else None,)


async def _results(job: Job, group: Group) -> list:
    for ticket in group.tickets:
        async for _ in ticket.events():
            pass
    return [ticket.result for ticket in group.tickets] or [None] * (len(job.prompts) * job.n)


async def _unless_left(request: Request, work: Awaitable) -> Any:
    """What comes of work; None if the client leaves before, and then the work is given up."""
    task, gone = asyncio.ensure_future(work), asyncio.create_task(stream.left(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _tokenize(request: Request) -> Response:
    service: Service = request.app.state.service
    ids = await service.read(request, service.reader.tokenize)
    return _json({"tokens": ids, "count": len(ids), "max_model_len": service.reader.capacity})


async def _detokenize(request: Request) -> Response:
    service: Service = request.app.state.service
    return _json({"prompt": service.texts.decode(await service.read(request, service.reader.detokenize))})


# About the server.


def _about(service: Service, adapter: str | None = None) -> dict[str, Any]:
    about = {"id": adapter or service.name, "object": "model", "created": service.created, "owned_by": "twotower_jax"}
    about |= {"max_model_len": service.reader.capacity}
    return about if adapter is None else about | {"parent": service.name}


async def _models(request: Request) -> Response:
    service: Service = request.app.state.service
    return _json(
        {"object": "list", "data": [_about(service), *(_about(service, name) for name in service.reader.adapters)]}
    )


async def _model(request: Request) -> Response:
    service: Service = request.app.state.service
    return _json(_about(service, service.reader.adapter(request.path_params["name"])))


async def _health(request: Request) -> Response:
    failure = request.app.state.service.loop.failure
    return _json({"status": "ok"}) if failure is None else _json({"status": "failed", "error": failure}, 503)


async def _ready(request: Request) -> Response:
    service: Service = request.app.state.service
    if service.loop.failure is not None:
        return _json({"status": "failed", "error": service.loop.failure}, 503)
    status = "draining" if service.draining else "ready" if service.loop.ready else "starting"
    return _json({"status": status}, 200 if status == "ready" else 503)


async def _metrics(request: Request) -> Response:
    return Response(request.app.state.service.metrics.text(), media_type=metrics.CONTENT_TYPE)


async def _page(request: Request) -> Response:
    service: Service = request.app.state.service
    defaults = service.reader.defaults
    sampling = dict(defaults.sampling)
    settings = {
        "model": service.name,
        "modes": list(MODES),
        "strategies": {name: knobs(name) for name in STRATEGIES},
        "chat": service.reader.has_template,
        "keys": bool(service.keys),
        "defaults": {"mode": defaults.mode, "max_tokens": defaults.max_new_tokens} | sampling,
    }
    # Nothing in it can end the script that holds it.
    text = json.dumps(settings, default=str).replace("<", "\\u003c")
    page = importlib.resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    return Response(
        page.replace("__SETTINGS__", text), media_type="text/html", headers={"content-security-policy": _POLICY}
    )
