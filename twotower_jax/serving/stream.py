"""Server-sent events: an event for each block as it is committed and, on request, for each step of one."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.types import Receive, Scope, Send

from twotower_jax.generation.rows import Progress
from twotower_jax.serving.answers import Answer, Offsets, finish_reason
from twotower_jax.serving.errors import ApiError, to_json
from twotower_jax.serving.loop import Group, Ticket
from twotower_jax.serving.text import Deltas

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class EventStream:
    """A response of server-sent events that ends when the client leaves.

    Args:
      group: the rows, which are left at the end in every case.
      events: makes JSON values; the last is followed by "[DONE]".
    """

    def __init__(self, group: Group, events: Callable[[], AsyncIterator[dict[str, Any]]]):
        self._group, self._events = group, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._group:
            await self._run(receive, send)

    async def _run(self, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._write(send))
        gone = asyncio.create_task(left(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        async with contextlib.aclosing(self._events()) as events:
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            try:
                async for event in events:
                    await _send(send, to_json(event))
            except ApiError as error:
                await _send(send, to_json(error.content()))
            except Exception:
                logging.getLogger(__name__).exception("a stream failed")
                await _send(send, to_json(ApiError(500, "the server failed", code="internal_error").content()))
        await _send(send, b"[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})


async def left(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def events(answer: Answer, group: Group, scored: list | None) -> AsyncIterator[dict]:
    """The parts of a streamed answer, of all its choices as they come."""
    job = answer.job
    choices = [_Choice(answer, index, ticket) for index, ticket in enumerate(group.tickets)]
    for index in range(len(job.prompts) * job.n):
        if job.chat:
            said = {"role": "assistant", "content": ""}
            start = {"index": index, "delta": said, "logprobs": None, "finish_reason": None}
            yield answer.envelope([start], part=True)
        if job.echo:
            yield answer.envelope([_echo(answer, index, scored, choices)], part=True)
    async for index, progress in _merged(group.tickets):
        for choice in choices[index].parts(progress):
            yield answer.envelope([choice], part=True)
    if job.include_usage:
        usage = answer.usage(ticket.result for ticket in group.tickets)
        yield answer.envelope([], part=True) | {"usage": usage}


def _echo(answer: Answer, index: int, scored: list | None, choices: list["_Choice"]) -> dict[str, Any]:
    """The choice with the prompt's text, with which a row that generates nothing also ends."""
    prompt = answer.job.prompts[index // answer.job.n]
    offsets = choices[index].offsets if choices else Offsets(answer.texts)
    told = None if scored is None else answer.logprobs(scored[index // answer.job.n], prompt, offsets)
    return {
        "index": index,
        "text": answer.texts.decode(prompt),
        "logprobs": told,
        "finish_reason": None if choices else finish_reason(None),
    }


async def _merged(tickets: list[Ticket]) -> AsyncIterator[tuple[int, Progress]]:
    """What several rows get, as it comes."""
    news: asyncio.Queue = asyncio.Queue()

    async def listen(index: int, ticket: Ticket) -> None:
        try:
            async for progress in ticket.events():
                news.put_nowait((index, progress))
        except ApiError as error:
            news.put_nowait((index, error))

    tasks = [asyncio.create_task(listen(index, ticket)) for index, ticket in enumerate(tickets)]
    try:
        left = len(tasks)
        while left:
            index, progress = await news.get()
            if isinstance(progress, ApiError):
                raise progress
            left -= progress.result is not None
            yield index, progress
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Choice:
    """One row of a stream."""

    def __init__(self, answer: Answer, index: int, ticket: Ticket):
        self._answer, self._index = answer, index
        self._deltas = Deltas(answer.texts, ticket.request.stop)
        self._prompt: list[int] | None = list(ticket.request.prompt)
        self._told = 0
        self._logprobs: list = []
        self._steps: list[int] = []
        self.offsets = Offsets(answer.texts)

    def parts(self, progress: Progress) -> list[dict[str, Any]]:
        """The choices of the events for what the row got."""
        parts = []
        # The last step of a block is its tokens, before the row is cut.
        block = progress.provisional if progress.provisional is not None else progress.tokens
        if block and self._answer.job.stream_steps:
            parts.append(self._part("", [], None) | {"provisional": self._provisional(block)})
        result = progress.result
        if not progress.tokens and result is None:
            return parts
        if result is None:
            tokens, told = progress.tokens, progress.logprobs
            about = progress.step_map, progress.context_logprobs
            text = self._deltas.push(tokens)
        else:
            # The row as it was cut, without what was told before.
            tokens, told, *about = (
                None if values is None else values[self._told :]
                for values in (result.tokens, result.logprobs, result.step_map, result.context_logprobs)
            )
            text = self._deltas.finish(result.text)
        self._told += len(tokens)
        part = self._part(text, tokens, self._answer.logprobs(told or (), tokens, self.offsets))
        part |= {"finish_reason": None if result is None else finish_reason(result)}
        parts.append(part | self._answer.extras(self._prompt, tokens, *about))
        self._prompt = None
        return parts

    def _part(self, text: str, tokens: list[int], logprobs: dict | None) -> dict[str, Any]:
        said = {"delta": {"content": text}} if self._answer.job.chat else {"text": text}
        return {"index": self._index, **said, "logprobs": logprobs, "finish_reason": None}

    def _provisional(self, block: list[int]) -> dict[str, Any]:
        """A block that is being denoised: null where it is undecided. `start` counts new tokens before it."""
        mask = self._answer.mask
        shown = [None if token == mask else token for token in block]
        texts = [None if token is None else self._answer.texts.text(token) for token in shown]
        return {"start": self._told, "token_ids": shown, "texts": texts}
