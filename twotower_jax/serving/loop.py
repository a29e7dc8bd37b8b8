"""The engine's thread, and how the event loop speaks with it.

The thread takes commands from a queue, steps the engine while anything is to do, and hands what came of a step to the
event loop in one call. Everything else here belongs to the event loop's thread.
"""

import asyncio
import dataclasses
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from twotower_jax.command_line import one_line
from twotower_jax.generation.request import Request
from twotower_jax.generation.rows import Progress
from twotower_jax.serving.errors import ApiError
from twotower_jax.serving.scoring import Scored, Scorer

# Seconds after which a client that was refused may try again.
_RETRY = 1


class Engine(Protocol):
    """What of `generation.engine.Engine` is used."""

    @property
    def busy(self) -> bool: ...
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    def submit(self, request: Request) -> int: ...
    def cancel(self, number: int) -> Any: ...
    def step(self) -> list[Progress]: ...


class Observer:
    """Is told what happens, in the event loop's thread. Metrics are one."""

    def step(self, running: int, waiting: int) -> None:
        """The engine has made a step."""

    def began(self, prompt_tokens: int, seconds: float) -> None:
        """A row got its first tokens, so many seconds after it was submitted."""

    def went_on(self, tokens: int, seconds: float) -> None:
        """A row got more, so many seconds after those before."""

    def ended(self, ticket: "Ticket", seconds: float, reason: str) -> None:
        """A row is done, so many seconds after it was submitted: "stop", "length", "error" or "abort"."""


class Ticket:
    """A row, from `submit` until it is done: what it got, as it comes.

    Attributes:
      request: what was submitted. result: of the row, once there is one. tokens: how many it got so far.
      submitted: time of it, of `time.monotonic`.
    """

    def __init__(self, request: Request):
        self.request = request
        self.result: Any = None
        self.tokens = 0
        self.submitted = self._last = time.monotonic()
        self.done = False
        self._accepted = asyncio.Event()
        self._error: ApiError | None = None
        self._news: asyncio.Queue[Progress | ApiError] = asyncio.Queue()

    async def accepted(self) -> None:
        """Waits until the engine has taken the row.

        Raises:
          ApiError: if it did not, or failed.
        """
        await self._accepted.wait()
        if self._error is not None:
            raise self._error

    def accept(self) -> None:
        self._accepted.set()

    def put(self, news: Progress | ApiError, observer: Observer) -> None:
        """Takes what a step gave."""
        if self.done:
            return
        if isinstance(news, ApiError):
            self._error = news
            self._accepted.set()
            self._end(observer, "error")
        else:
            self._note(news, observer)
        self._news.put_nowait(news)

    def abort(self, observer: Observer) -> None:
        """Nobody waits for it any more."""
        if not self.done:
            self._end(observer, "abort")

    async def events(self) -> AsyncIterator[Progress]:
        """What the row gets, the last of it with its result.

        Raises:
          ApiError: if the row failed, or all did.
        """
        while True:
            news = await self._news.get()
            if isinstance(news, ApiError):
                raise news
            yield news
            if news.result is not None:
                return

    def _note(self, news: Progress, observer: Observer) -> None:
        if news.tokens:
            now = time.monotonic()
            if self.tokens:
                observer.went_on(len(news.tokens), now - self._last)
            else:
                observer.began(len(self.request.prompt), now - self.submitted)
            self._last = now
            self.tokens += len(news.tokens)
        if news.result is not None:
            self.result = news.result
            self._end(observer, "length" if news.result.finish_reason == "length" else "stop")

    def _end(self, observer: Observer, reason: str) -> None:
        self.done = True
        observer.ended(self, time.monotonic() - self.submitted, reason)


@dataclasses.dataclass(frozen=True)
class _Score:
    prompts: Sequence[Sequence[int]]
    top: int
    adapter: str | None
    future: asyncio.Future


class Group:
    """The rows of one body: admitted together or not at all, and ended together.

    Used as a context manager: on leaving, rows that are not done are canceled, and their places are free once the
    engine has let go of them.
    """

    def __init__(self, loop: "EngineLoop", places: int):
        self._loop, self._places, self._left = loop, places, False
        self.tickets: list[Ticket] = []

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._left:
            self._left = True
            self._loop._leave(self.tickets, self._places)

    def submit(self, requests: Sequence[Request]) -> None:
        """Adds rows, which the engine gets together: that no row of a body begins before another, by chance."""
        tickets = [Ticket(request) for request in requests]
        self.tickets += tickets
        if tickets:
            self._loop._say(("submit", tickets))

    async def score(self, prompts: Sequence[Sequence[int]], top: int, adapter: str | None = None) -> list[Scored]:
        """Log-probabilities of prompts under the context tower, see `Scorer`.

        Raises:
          ApiError: if the engine has failed.
        """
        future = asyncio.get_running_loop().create_future()
        self._loop._say(("score", _Score(prompts, top, adapter, future)))
        return await future


class EngineLoop:
    """An engine in a thread of its own.

    Args:
      make: builds engine and scorer, in that thread, and does what is to be done before requests are answered.
      places: rows that may be running or waiting.
      observer: of what happens.
      step_seconds: a step that takes longer never comes to an end, and the engine has failed; 0 waits for ever.

    Attributes:
      ready: whether requests are answered.
      taken: places of rows that are running or waiting.
      failure: why none will be answered any more, in one line; None as long as all is well.
      clock: tells the seconds by which the length of a step is judged.
    """

    def __init__(
        self, make: Callable[[], tuple[Engine, Scorer]], places: int, observer: Observer, step_seconds: float = 0.0
    ):
        self._make, self.places, self._observer, self._step_seconds = make, places, observer, step_seconds
        self._commands: queue.SimpleQueue = queue.SimpleQueue()
        self.taken = 0
        self._idle = asyncio.Event()
        self._idle.set()
        # The engine thread's own: rows by the engine's number, and the counts that were told last.
        self._live: dict[int, Ticket] = {}
        self._told = (0, 0)
        self.clock = time.monotonic
        # When the step began that it is at, by `clock`; None between steps.
        self._since: float | None = None
        self._watching: asyncio.Task | None = None
        self._open: set[Ticket] = set()
        self._scores: set[asyncio.Future] = set()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopped = False
        self.ready = False
        self.failure: str | None = None

    def start(self) -> None:
        self._thread.start()
        if self._step_seconds:
            self._watching = asyncio.create_task(self._watch())

    async def drain(self) -> None:
        """Waits until no row is left."""
        await self._idle.wait()

    async def stop(self, seconds: float = 60.0) -> bool:
        """Ends the thread, after the step that it is at, and says whether it has ended within so many seconds."""
        self._stopped = True
        if self._watching is not None:
            self._watching.cancel()
        self._commands.put(("stop", None))
        end = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < end:
            await asyncio.sleep(0.01)
        return not self._thread.is_alive()

    def enter(self, places: int) -> Group:
        """Takes places for so many rows.

        Raises:
          ApiError: if there are not so many free, or the engine has failed or is not ready.
        """
        if self.failure is not None:
            raise self._failed(503)
        if not self.ready:
            raise ApiError(503, "the server is starting", code="not_ready", headers={"retry-after": str(_RETRY)})
        if self.taken + places > self.places:
            message = f"{self.taken} rows are running or waiting, of at most {self.places}; {places} more do not fit"
            raise ApiError(429, f"{message} now: try again", code="queue_full", headers={"retry-after": str(_RETRY)})
        self.taken += places
        self._idle.clear()
        return Group(self, places)

    # Called in the event loop's thread.

    def _say(self, command: tuple[str, Any]) -> None:
        kind, thing = command
        if self.failure is not None:
            # Failed since the place was taken.
            if kind == "submit":
                for ticket in thing:
                    ticket.put(self._failed(500), self._observer)
            elif kind == "score":
                thing.future.set_exception(self._failed(500))
            return
        if kind == "submit":
            self._open.update(thing)
        elif kind == "score":
            self._scores.add(thing.future)
            thing.future.add_done_callback(self._scores.discard)
        self._commands.put(command)

    def _leave(self, tickets: list[Ticket], places: int) -> None:
        unfinished = [ticket for ticket in tickets if not ticket.done]
        for ticket in unfinished:
            ticket.abort(self._observer)
        self._open.difference_update(tickets)
        if self.failure is not None or not unfinished:
            self._free(places)
        else:
            # Commands are heard in order, so the places are free once the rows are gone.
            self._commands.put(("cancel", (unfinished, places)))

    def _free(self, places: int) -> None:
        self.taken -= places
        if not self.taken:
            self._idle.set()

    def _deliver(self, news: list[tuple[Ticket, Progress | ApiError]], running: int, waiting: int) -> None:
        self._observer.step(running, waiting)
        for ticket, progress in news:
            ticket.put(progress, self._observer)

    def _answer(self, future: asyncio.Future, scored: list[Scored] | ApiError) -> None:
        if future.done():
            return
        if isinstance(scored, ApiError):
            future.set_exception(scored)
        else:
            future.set_result(scored)

    async def _watch(self) -> None:
        """Fails the engine when a step does not come to an end: a device may hang, and then nothing is raised."""
        while self.failure is None:
            await asyncio.sleep(min(1.0, self._step_seconds / 4))
            since = self._since
            if since is not None and self.clock() - since > self._step_seconds:
                self._fail(f"a step has not come to an end within {self._step_seconds:g} seconds")

    def _fail(self, failure: str) -> None:
        if self.failure is not None:  # A step that was given up came to an end after all.
            return
        self.failure = failure
        self.ready = False
        self._observer.step(0, 0)
        for ticket in list(self._open):
            ticket.put(self._failed(500), self._observer)
        for future in list(self._scores):
            self._answer(future, self._failed(500))
        # Commands are heard no more, so what they would have freed is free.
        self._idle.set()

    def _failed(self, status: int) -> ApiError:
        return ApiError(status, f"the engine has failed: {self.failure}", code="engine_failed")

    def _set_ready(self) -> None:
        self.ready = True

    # Called in the engine's thread.

    def _run(self) -> None:
        try:
            engine, scorer = self._make()
            self._call(self._set_ready)
            self._serve(engine, scorer)
        except BaseException as error:  # noqa: BLE001 (whatever it is, nobody may wait for an answer)
            self._call(self._fail, one_line(f"{type(error).__name__}: {error}"))

    def _serve(self, engine: Engine, scorer: Scorer) -> None:
        scores: list[_Score] = []
        while self.failure is None:
            while True:
                try:
                    kind, thing = self._commands.get(block=not (engine.busy or scores))
                except queue.Empty:
                    break
                if kind == "stop":
                    return
                if kind == "submit":
                    for ticket in thing:
                        self._submit(engine, ticket)
                elif kind == "score":
                    scores.append(thing)
                else:
                    tickets, places = thing
                    gone = [number for number, ticket in self._live.items() if ticket in tickets]
                    for number in gone:
                        engine.cancel(number)
                        del self._live[number]
                    self._call(self._free, places)
                    self._told = engine.running, engine.waiting
                    self._call(self._deliver, [], *self._told)
            self._since = self.clock()
            if scores:
                score = scores.pop(0)
                if not score.future.done():  # Else nobody waits for it any more.
                    self._score(scorer, score)
            if engine.busy:
                self._step(engine)
            self._since = None

    def _submit(self, engine: Engine, ticket: Ticket) -> None:
        try:
            self._live[engine.submit(ticket.request)] = ticket
            self._call(ticket.accept)
        except (ValueError, TypeError, OverflowError) as error:
            refused = ApiError(400, str(error), code="invalid_value")
            self._call(self._deliver, [(ticket, refused)], engine.running, engine.waiting)

    def _step(self, engine: Engine) -> None:
        news: list[tuple[Ticket, Progress | ApiError]] = []
        for progress in engine.step():
            ticket = self._live.get(progress.number)
            if ticket is None:  # Canceled.
                continue
            if progress.error is not None or progress.result is not None:
                del self._live[progress.number]
            failed = progress.error is not None
            news.append((ticket, ApiError(500, progress.error, code="row_failed") if failed else progress))
        counts = engine.running, engine.waiting
        if news or counts != self._told:
            self._told = counts
            self._call(self._deliver, news, *counts)

    def _score(self, scorer: Scorer, score: _Score) -> None:
        try:
            answer = scorer(score.prompts, score.top, score.adapter)
        except ValueError as error:
            answer = ApiError(400, str(error), param="prompt")
        self._call(self._answer, score.future, answer)

    def _call(self, function: Callable, *arguments: Any) -> None:
        if self._stopped and self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(function, *arguments)
