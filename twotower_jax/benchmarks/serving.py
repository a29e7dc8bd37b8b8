"""What the server bears, and what it costs, measured against `launch/serve.py` in a process of its own.

    python launch/benchmark.py serving                       # a random model of the demonstration's shape
    python launch/benchmark.py serving --checkpoint=DIR

    mixed           requests of every kind at once: none may be lost, and each must be what it is when asked alone
    malformed       bodies that are broken in all ways: none may be answered with 5xx, or end the engine
    disconnects     clients that leave in the middle: no row may stay in a slot
    slow            sockets that say nothing or little: meanwhile /health must answer within a second
    memory          the process after many more requests: it may not grow by 5 % or more
    clients         time to the first tokens, time per further token (medians), tokens a second
    engine          the same rows by the bare engine in this process: tokens a second, and per token the processor's
                    time of both; the difference is the server's

Any of these that fails ends the command with a line that says so. Requests are drawn by --seed.
"""

import asyncio
import contextlib
import json
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import psutil
from absl import flags

from twotower_jax import command_line
from twotower_jax.benchmarks._roofline import random_params
from twotower_jax.benchmarks._shapes import demo_config
from twotower_jax.checkpoint.export import model_tensors
from twotower_jax.checkpoint.folder_writing import write_folder
from twotower_jax.checkpoint.load import load
from twotower_jax.data import save_tokenizer, train_tokenizer
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation.engine import Engine
from twotower_jax.generation.request import Request
from twotower_jax.generation.settings import Settings
from twotower_jax.serving.start import slot_size
from twotower_jax.two_tower import TwoTower

_NAME = "benchmark"
_HEADERS = {"content-type": "application/json"}


def define_flags() -> None:
    command_line.DEFINE_path("checkpoint", None, "A checkpoint of any kind; a random model without it.")
    flags.DEFINE_integer("slots", 8, "Rows that the server computes together.", lower_bound=1)
    flags.DEFINE_integer("capacity", 512, "Tokens of each, prompt and answer.", lower_bound=96)
    flags.DEFINE_integer("mixed", 300, "Requests at once.", lower_bound=0)
    flags.DEFINE_integer("malformed", 2000, "Broken bodies.", lower_bound=0)
    flags.DEFINE_integer("disconnects", 100, "Clients that leave.", lower_bound=0)
    flags.DEFINE_integer("slow", 200, "Slow sockets.", lower_bound=0)
    flags.DEFINE_integer("memory", 2000, "Requests after which the process may not have grown.", lower_bound=0)
    flags.DEFINE_list("clients", ["1", "8", "32"], "Clients at once, for times; empty measures none.")
    flags.DEFINE_integer("requests", 4, "Requests of each client, for times.", lower_bound=1)
    flags.DEFINE_integer("new_tokens", 64, "New tokens of each of them.", lower_bound=1)
    flags.DEFINE_integer("block_size", 16, "Of requests that say nothing else.", lower_bound=2)
    flags.DEFINE_integer("seed", 0, "Of the requests.", lower_bound=0)


def main() -> None:
    values = flags.FLAGS
    try:
        import httpx  # noqa: F401
    except ImportError:
        raise ValueError("the clients need the package 'httpx'; install it: pip install -e '.[serve,test]'") from None
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = pathlib.Path(values.checkpoint or _random_checkpoint(pathlib.Path(folder) / _NAME))
        print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {checkpoint.name}, {values.slots} slots")
        with _server(checkpoint) as server:
            asyncio.run(_measure(server))
            times = [asyncio.run(_clients(server, int(count))) for count in values.clients]
        if times:
            _print_times(times, _bare_engine(checkpoint, [int(count) for count in values.clients]))


# The server.


class _Server(NamedTuple):
    url: str
    process: psutil.Process


def _random_checkpoint(folder: pathlib.Path) -> pathlib.Path:
    """A random model of the demonstration's shape, with a tokenizer learned from this package's own source."""
    model = TwoTower(demo_config())
    tensors = model_tensors(model, random_params(model, jnp.dtype("float32")))
    write_folder(folder, tensors, {"config.json": json.dumps(model.config.to_hf()).encode()}, 10**9)
    sources = sorted(pathlib.Path(__file__).parents[1].rglob("*.py"))
    texts = [source.read_text(encoding="utf-8") for source in sources]
    save_tokenizer(train_tokenizer(texts, model.config.vocab_size), folder)
    return folder


@contextlib.contextmanager
def _server(checkpoint: pathlib.Path) -> Iterator[_Server]:
    values = flags.FLAGS
    script = pathlib.Path(sys.argv[0]).resolve().parent / "serve.py"
    most = max(values.mixed, *map(int, values.clients or ["1"])) * 2 + values.disconnects
    settings = {
        "checkpoint": checkpoint,
        "port": 0,
        "slots": values.slots,
        "capacity": values.capacity,
        "max_waiting": most,
        "served_model_name": _NAME,
        "block_size": values.block_size,
    }
    command = [sys.executable, str(script), *(f"--{name}={value}" for name, value in settings.items()), "--warmup"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            if not line:
                raise ValueError("the server did not start; it has said why")
            yield _Server(line.split()[-1], psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(60)


def _client(server: _Server):
    import httpx

    none = httpx.Limits(max_connections=None, max_keepalive_connections=32)
    return httpx.AsyncClient(base_url=server.url, timeout=600, limits=none, headers=_HEADERS)


def _require(what: bool, message: str) -> None:
    if not what:
        raise ValueError(message)


# What it bears.


async def _measure(server: _Server) -> None:
    values = flags.FLAGS
    async with _client(server) as client:
        start = time.monotonic()
        while not await _is_ready(client):
            await asyncio.sleep(0.1)
        print(f"ready after {time.monotonic() - start:.1f} s of compiling")
        parts = ("mixed", _mixed), ("malformed", _malformed), ("disconnects", _disconnects), ("slow", _slow)
        for name, measure in (*parts, ("memory", _memory)):
            if count := values[name].value:
                print(f"{name:12} {await measure(server, client, count)}", flush=True)
                await _check_alive(client)


async def _is_ready(client: Any) -> bool:
    import httpx

    try:
        return (await client.get("/ready")).status_code == 200
    except httpx.TransportError:  # While it compiles it may read a request too late, by its own deadline.
        return False


async def _check_alive(client: Any) -> None:
    _require((await client.get("/health")).status_code == 200, "the engine has failed")
    end, answer = time.monotonic() + 60, ""
    while not all(f'num_requests_{state}{{model_name="{_NAME}"}} 0.0' in answer for state in ("running", "waiting")):
        _require(time.monotonic() < end, "rows are left in the engine that nobody waits for")
        answer = (await client.get("/metrics")).text
        await asyncio.sleep(0.05)


def _requests(count: int) -> list[dict]:
    """Bodies of every kind, each with all that its answer depends on."""
    draw, capacity = random.Random(flags.FLAGS.seed), flags.FLAGS.capacity
    words = ["def", "return", "self", "list", "of", "naïve", "日本", "(x)", "\n", "tokens"]
    bodies = []
    for number in range(count):
        body: dict[str, Any] = {
            "prompt": " ".join(draw.choices(words, k=draw.randint(1, capacity // 12))),
            "max_tokens": draw.randint(1, capacity // 12),
            "temperature": draw.choice([0, 0.7, 1]),
            "seed": number,
            "return_token_ids": True,
        }
        if draw.random() < 0.3:
            body |= {"confidence_threshold": draw.choice([0.1, 0.5, 1]), "steps_per_block": draw.randint(1, 16)}
        if draw.random() < 0.3:
            body |= {"top_k": draw.randint(1, 50), "top_p": draw.choice([0.5, 1])}
        if draw.random() < 0.2:
            body |= {"stop": ["e", "self"]}
        if draw.random() < 0.2:
            body |= {"n": 2}
        if draw.random() < 0.2:
            body |= {"ignore_eos": True}
        if draw.random() < 0.2:
            body |= {"mode": "ar"}
        if not body.keys() & {"stop", "ignore_eos"} and draw.random() < 0.2:
            body |= {"guided_choice": ["a", "of", "self"], "max_tokens": capacity // 12}
        if draw.random() < 0.4:
            body |= {"stream": True}
        bodies.append(body)
    return bodies


async def _complete(client: Any, body: dict) -> dict[int, tuple[str, list[int], str]]:
    """Text, tokens and reason of each choice, streamed or not."""
    if not body.get("stream"):
        answer = await client.post("/v1/completions", json=body)
        _require(answer.status_code == 200, f"a request was answered with {answer.status_code}: {answer.text}")
        choices = answer.json()["choices"]
    else:
        choices = []
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            _require(answer.status_code == 200, f"a stream was answered with {answer.status_code}")
            lines = [line async for line in answer.aiter_lines()]
        _require("data: [DONE]" in lines, "a stream ended too early")
        for line in lines:
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                _require("error" not in event, f"a stream failed: {event}")
                choices += event["choices"]
    found: dict[int, tuple[str, list[int], str]] = {}
    for choice in choices:
        text, ids, reason = found.get(choice["index"], ("", [], None))
        found[choice["index"]] = (text + choice["text"], ids + choice["token_ids"], choice["finish_reason"] or reason)
    return found


async def _mixed(_: _Server, client: Any, count: int) -> str:
    bodies = _requests(count)
    start = time.monotonic()
    together = await asyncio.gather(*(_complete(client, body) for body in bodies))
    seconds = time.monotonic() - start
    alone = [await _complete(client, body) for body in bodies]
    different = sum(one != other for one, other in zip(together, alone, strict=True))
    _require(not different, f"{different} of {count} requests at once got something else than alone")
    tokens = sum(len(ids) for rows in together for _, ids, _ in rows.values())
    return f"{count} requests at once, {tokens} tokens in {seconds:.1f} s; none lost, each as it is alone"


def broken_bodies(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Paths, and bodies that are wrong in one way or several; a few are right by chance."""
    draw = random.Random(seed)
    odd = [
        None,
        True,
        -1,
        0,
        1.5,
        1e308,
        10**30,
        "",
        "x",
        "\ud800",
        [],
        [[]],
        {},
        {"a": 1},
        [None],
        ["a", 1],
        [1e9],
        "9" * 50,
    ]
    names = ["prompt", "messages", "max_tokens", "n", "stop", "stream", "temperature", "top_p", "top_k", "seed", "mode"]
    names += ["logprobs", "echo", "pinned", "block_size", "steps_per_block", "strategy", "strategy_options", "model"]
    names += ["stream_options", "tolerance", "confidence_threshold", "other", "tokens", "return_step_map", "allowed"]
    names += ["start", "guided_choice", "guided_regex", "guided_json", "response_format", "structured_outputs"]
    fine: dict[str, dict] = {
        "/v1/completions": {"prompt": "a", "max_tokens": 2},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
        "/tokenize": {"prompt": "a"},
        "/detokenize": {"tokens": [1]},
    }
    for _ in range(count):
        path = draw.choice([*fine, "/v1/completions"])
        body = dict(fine[path])
        for name in draw.sample(names, draw.randint(1, 3)):
            body[name] = draw.choice(odd)
        data = json.dumps(draw.choice([body, body, body, [body], odd[draw.randrange(len(odd))]])).encode()
        way = draw.random()
        if way < 0.1:
            data = data[: draw.randint(0, len(data))]
        elif way < 0.2:
            place = draw.randint(0, len(data))
            data = data[:place] + draw.randbytes(draw.randint(1, 4)) + data[place:]
        elif way < 0.25:
            data = draw.randbytes(draw.randint(0, 64))
        elif way < 0.28:
            data = draw.choice([b"[", b'{"a":']) * draw.randint(1, 50_000)
        yield path, data


async def _malformed(_: _Server, client: Any, count: int) -> str:
    found: dict[int, int] = {}
    for path, data in broken_bodies(count, flags.FLAGS.seed):
        answer = await client.post(path, content=data)
        _require(answer.status_code < 500, f"{path} answered {data[:200]!r} with {answer.status_code}: {answer.text}")
        found[answer.status_code] = found.get(answer.status_code, 0) + 1
    return f"{count} bodies: " + ", ".join(f"{times} × {status}" for status, times in sorted(found.items()))


async def _disconnects(_: _Server, client: Any, count: int) -> str:
    body = {"prompt": "def", "max_tokens": flags.FLAGS.capacity // 2, "ignore_eos": True, "stream": True}
    draw = random.Random(flags.FLAGS.seed)

    async def leave(number: int) -> None:
        if number % 2:
            # In the middle of a stream.
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                async for _ in answer.aiter_lines():
                    return
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(draw.random() / 2):
                    await client.post("/v1/completions", json=body | {"stream": False})

    await asyncio.gather(*(leave(number) for number in range(count)))
    start = time.monotonic()
    await _check_alive(client)
    return f"{count} clients left; no row was left {time.monotonic() - start:.2f} s later"


async def _slow(server: _Server, client: Any, count: int) -> str:
    host, port = server.url.removeprefix("http://").split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: 900\r\n\r\n{"
    sockets = [await asyncio.open_connection(host, int(port)) for _ in range(count)]
    for number, (_, writer) in enumerate(sockets):
        writer.write(head[: number % (len(head) + 1)])
    longest = 0.0
    for _ in range(20):
        start = time.monotonic()
        await client.get("/health")
        longest = max(longest, time.monotonic() - start)
        await asyncio.sleep(0.05)
    _require(longest < 1, f"with {count} slow sockets /health took {longest:.2f} s")
    start = time.monotonic()
    closed = await asyncio.gather(*(_ended(reader) for reader, _ in sockets))
    for _, writer in sockets:
        writer.close()
    return (
        f"{count} slow sockets: /health within {longest * 1000:.0f} ms; the server ended {sum(closed)} of them within "
        f"{time.monotonic() - start:.0f} s"
    )


async def _ended(reader: asyncio.StreamReader) -> bool:
    with contextlib.suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(60):
            await reader.read()
            return True
    return False


async def _memory(server: _Server, client: Any, count: int) -> str:
    """Drift over bodies alike, after so many that everything has been allocated once."""
    bodies = [body | {"max_tokens": min(8, body["max_tokens"])} for body in _requests(count + count // 4)]

    async def send(some: list[dict]) -> int:
        for start in range(0, len(some), 64):
            await asyncio.gather(*(_complete(client, body) for body in some[start : start + 64]))
        return server.process.memory_info().rss

    before = await send(bodies[: count // 4])
    after = await send(bodies[count // 4 :])
    drift = (after - before) / before
    _require(drift < 0.05, f"the process grew by {drift:.1%} with {count} requests, to {after / 1e6:.0f} MB")
    return f"{count} requests: {before / 1e6:.0f} MB before, {after / 1e6:.0f} MB after ({drift:+.2%})"


# What it costs.


class _Times(NamedTuple):
    clients: int
    first: float
    between: float
    speed: float
    processor: float


def _timed_bodies(clients: int) -> list[dict]:
    values = flags.FLAGS
    draw = random.Random(values.seed + clients)
    shape = {"max_tokens": values.new_tokens, "ignore_eos": True, "stream": True, "return_token_ids": True}
    return [
        {"prompt": [draw.randrange(4, 256) for _ in range(32)], "seed": number} | shape
        for number in range(clients * values.requests)
    ]


def _processor_seconds(server: _Server) -> float:
    used = server.process.cpu_times()
    return used.user + used.system


async def _clients(server: _Server, count: int) -> _Times:
    bodies = _timed_bodies(count)
    firsts, betweens = [], []

    async def one(client: Any, mine: list[dict]) -> None:
        for body in mine:
            start = last = time.monotonic()
            seen = 0
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        now = time.monotonic()
                        new = len(json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"])
                        if seen:
                            betweens.append((now - last) / max(1, new))
                        else:
                            firsts.append(now - start)
                        seen, last = seen + new, now

    async with _client(server) as client:
        await one(client, bodies[:1])
        firsts.clear()
        betweens.clear()
        used, start = _processor_seconds(server), time.monotonic()
        await asyncio.gather(*(one(client, bodies[number::count]) for number in range(count)))
        seconds, used = time.monotonic() - start, _processor_seconds(server) - used
    tokens = len(bodies) * flags.FLAGS.new_tokens
    between = statistics.median(betweens) if betweens else 0.0
    return _Times(count, statistics.median(firsts), between, tokens / seconds, used / tokens)


def _bare_engine(checkpoint: pathlib.Path, counts: list[int]) -> list[tuple[float, float]]:
    """Tokens a second and the processor's seconds per token of an engine that nobody serves, for the same rows."""
    values = flags.FLAGS
    model, params, _ = load(checkpoint)
    sampling = SamplingConfig(block_size=values.block_size, steps_per_block=values.block_size)
    settings = Settings(sampling=sampling, batch_size=values.slots)
    engine = Engine(model, params, settings, capacity=slot_size(values.capacity, settings), slots=values.slots)
    found = []
    for count in counts:
        rows = [
            Request(
                prompt=body["prompt"],
                max_new_tokens=values.new_tokens,
                sampling=sampling,
                seed=body["seed"],
                sample=0,
                end_tokens=(),
            )
            for body in _timed_bodies(count)
        ]
        _run_rows(engine, rows[:count], count)  # Compiles.
        start, used = time.monotonic(), time.process_time()
        tokens = _run_rows(engine, rows, count)
        found.append((tokens / (time.monotonic() - start), (time.process_time() - used) / tokens))
    return found


def _run_rows(engine: Engine, rows: list[Request], together: int) -> int:
    """Runs rows, so many at a time, as clients do that wait for their answers."""
    waiting, open_rows, tokens = list(reversed(rows)), 0, 0
    while waiting or engine.busy:
        while waiting and open_rows < together:
            engine.submit(waiting.pop())
            open_rows += 1
        for progress in engine.step():
            if progress.result is not None:
                tokens += len(progress.result.tokens)
                open_rows -= 1
    return tokens


def _print_times(times: list[_Times], bare: list[tuple[float, float]]) -> None:
    columns = "clients | first tokens, ms | per further token, ms | tokens/s | engine alone, tokens/s"
    columns += " | processor per token, µs | engine alone, µs | the server's, µs"
    print(f"\n| {columns} |\n|{' --: |' * 8}")
    for one, (speed, processor) in zip(times, bare, strict=True):
        cells = [one.clients, f"{one.first * 1e3:.0f}", f"{one.between * 1e3:.2f}", f"{one.speed:.0f}", f"{speed:.0f}"]
        cells += [f"{value * 1e6:.0f}" for value in (one.processor, processor, one.processor - processor)]
        print(f"| {' | '.join(map(str, cells))} |")
