"""What the tests of the server share: a small checkpoint, services in this process, and an engine that does as told."""

import asyncio
import contextlib
import json
import pathlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx

from twotower_jax import parameters
from twotower_jax.checkpoint.export import model_tensors
from twotower_jax.checkpoint.folder_writing import write_folder
from twotower_jax.config import ModelConfig
from twotower_jax.data.tokenizer import Decoder, load_tokenizer, save_tokenizer, train_tokenizer
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation.request import Request
from twotower_jax.generation.rows import Progress
from twotower_jax.generation.settings import Result, Settings, TokenLogprob
from twotower_jax.serving.app import Service, make_app
from twotower_jax.serving.connection import Server, bind
from twotower_jax.serving.schema import Defaults
from twotower_jax.serving.start import assemble
from twotower_jax.two_tower import TwoTower

_TEXT = "The list object holds items in order; naïve café 日本語 \N{GRINNING FACE} and so on, item by item.\n"
_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
BLOCK = 4
SETTINGS = Settings(max_new_tokens=12, sampling=SamplingConfig(block_size=BLOCK, steps_per_block=BLOCK))

# Flags of commands whose compiled functions are those of the services here.
SHAPE = ("--slots=4", "--capacity=100", "--block_size=4")


def small_config() -> ModelConfig:
    """Two layers, which compile fast; 300 tokens."""
    shape = {"mamba_num_heads": 2, "mamba_head_dim": 4, "ssm_state_size": 4, "n_groups": 1, "chunk_size": 16}
    attention = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    return ModelConfig(vocab_size=300, hidden_size=16, hybrid_override_pattern="M*", **shape, **attention)


def write_checkpoint(folder: pathlib.Path, params: Callable[[TwoTower], parameters.Params]) -> pathlib.Path:
    """A Hugging Face folder of the small model, its tokenizer, and a chat template."""
    model = TwoTower(small_config())
    config = json.dumps(model.config.to_hf()).encode()
    write_folder(folder, model_tensors(model, params(model)), {"config.json": config}, 10**9)
    save_tokenizer(train_tokenizer([_TEXT] * 3, 300), folder)
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    return folder


@contextlib.asynccontextmanager
async def running(service: Service, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service whose engine runs, and has ended afterwards."""
    service.loop.start()
    while not service.loop.ready and service.loop.failure is None:
        await asyncio.sleep(0.001)
    transport = httpx.ASGITransport(make_app(service, **options))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
    assert await service.loop.stop()


@contextlib.asynccontextmanager
async def listening(service: Service) -> AsyncIterator[tuple[tuple[str, int], Server]]:
    """A service that listens on a real socket of this machine: where, and its server."""
    listener, started = bind("127.0.0.1", 0), asyncio.Event()
    server = Server(make_app(service), service.limits, started.set)
    service.loop.start()
    task = asyncio.create_task(server.serve([listener]))
    await started.wait()
    yield listener.getsockname(), server
    server.should_exit = True
    await task
    assert await service.loop.stop()


def scripted_service(folder: pathlib.Path, engine: "Scripted", places: int = 6, **options: Any) -> Service:
    """A service whose engine has no model; to be called where an event loop runs."""

    def score(prompts, top, adapter=None):
        return [[None, *(TokenLogprob(token, -2.0, [(token, -2.0)][:top]) for token in ids[1:])] for ids in prompts]

    make = assemble(
        lambda: (engine, score),
        small_config(),
        folder,
        Defaults(sampling={"block_size": BLOCK, "strategy": "confidence"}),
        name="scripted",
        capacity=200,
        most_new=lambda length, mode, block: 200 - length,
        places=places,
        **options,
    )
    return make()


class Scripted:
    """An engine without a model: row k counts upwards from its prompt's last token, a block of four a step.

    Attributes:
      fail_at: the step that raises an error. bad: first prompt tokens of rows that fail alone.
      hold: whether steps give nothing. hang: what a step waits for, if anything; hangs: whether one does.
      steps: made so far. canceled: numbers of rows.
    """

    def __init__(self, folder: pathlib.Path, slots: int = 2):
        self.slots, self._vocab = slots, 300
        self._decode = Decoder(load_tokenizer(folder))
        self._table: list[int] = []
        self._queue: list[int] = []
        self._rows: dict[int, Request] = {}
        self._tokens: dict[int, list[int]] = {}
        self.fail_at: int | None = None
        self.bad: set[int] = set()
        self.hold = False
        self.hang: threading.Event | None = None
        self.hangs = False
        self.steps = 0
        self.canceled: list[int] = []
        self._count = 0

    @property
    def busy(self) -> bool:
        return bool(self._table or self._queue)

    @property
    def running(self) -> int:
        return len(self._table)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def submit(self, request: Request) -> int:
        if len(request.prompt) > 1000:
            raise ValueError("prompt is too long for a scripted engine")
        number, self._count = self._count, self._count + 1
        self._rows[number], self._tokens[number] = request, []
        self._queue.append(number)
        return number

    def cancel(self, number: int) -> None:
        self.canceled.append(number)
        for rows in (self._table, self._queue):
            if number in rows:
                rows.remove(number)

    def step(self) -> list[Progress]:
        self.steps += 1
        if self.steps == self.fail_at:
            raise RuntimeError("the device is\non fire")
        if self.hang is not None:
            self.hangs = True
            self.hang.wait()
        while self._queue and len(self._table) < self.slots:
            self._table.append(self._queue.pop(0))
        if self.hold:
            time.sleep(0.001)
            return []
        return [self._advance(number) for number in list(self._table)]

    def _advance(self, number: int) -> Progress:
        request, tokens = self._rows[number], self._tokens[number]
        if request.prompt[0] in self.bad:
            self._table.remove(number)
            return Progress(number, 0, 0, [], None, None, None, error="the model's logits are not finite")
        before = len(tokens)
        new = [(request.prompt[-1] + 1 + before + i) % self._vocab for i in range(BLOCK)]
        tokens += new
        result = None
        if len(tokens) >= request.max_new_tokens:
            self._table.remove(number)
            cut = tokens[: request.max_new_tokens]
            told = None if request.logprobs is None else self._logprobs(cut, request.logprobs)
            result = Result(
                [*request.prompt], cut, len(cut), 1, "length", self._decode(cut), 1, None, None, told, [1] * len(cut)
            )
        told = None if request.logprobs is None else self._logprobs(new, request.logprobs)
        return Progress(number, before // BLOCK, before, new, None, None, result, None, told, [1] * len(new))

    def _logprobs(self, tokens: list[int], top: int) -> list[TokenLogprob]:
        return [TokenLogprob(token, -1.0, [(token, -1.0)][:top]) for token in tokens]
