"""A service made of a loaded model: the engine, its thread, and what reads bodies and writes answers."""

import bisect
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from twotower_jax.config import ModelConfig
from twotower_jax.data import Decoder, load_tokenizer
from twotower_jax.data.chat import ChatTemplate
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation.engine import Engine, positions
from twotower_jax.generation.placement import TowerMeshes
from twotower_jax.generation.prefix_cache import PrefixCache
from twotower_jax.generation.request import Request
from twotower_jax.generation.scheduling import PIECE
from twotower_jax.generation.settings import Settings
from twotower_jax.parameters import Params
from twotower_jax.serving.app import Service
from twotower_jax.serving.grammars import Grammars
from twotower_jax.serving.limits import Limits
from twotower_jax.serving.loop import EngineLoop
from twotower_jax.serving.metrics import Metrics
from twotower_jax.serving.schema import Defaults, Reader
from twotower_jax.serving.scoring import Scorer
from twotower_jax.serving.text import TokenTexts
from twotower_jax.two_tower import TwoTower

_KNOBS = ("block_size", "steps_per_block", "strategy", "confidence_threshold", "schedule", "strategy_options")


def defaults(settings: Settings, seed: int | None) -> Defaults:
    """What requests that say nothing get: what `launch/generate.py` would take, but the seed."""
    values = {name: getattr(settings.sampling, name) for name in (*_KNOBS, "temperature", "top_k", "top_p")}
    if values["steps_per_block"] == values["block_size"]:
        del values["steps_per_block"]  # So that it is that of a request's own block size.
    return Defaults(
        mode=settings.mode,
        max_new_tokens=settings.max_new_tokens,
        sampling=values,
        tolerance=settings.tolerance,
        ignore_eos=settings.ignore_eos,
        seed=seed,
    )


def slot_size(capacity: int, settings: Settings) -> int:
    """The positions that rows of `capacity` tokens may come to use, with these settings: their last block is written
    whole, and pieces of prompts are padded."""
    return max(positions(length, capacity - length, settings) for length in range(1, capacity))


def make_service(
    model: TwoTower,
    params: Params,
    folder: Path,
    settings: Settings,
    *,
    name: str,
    slots: int,
    capacity: int,
    max_waiting: int,
    placement: TowerMeshes,
    seed: int | None = None,
    prefix_cache_bytes: int = 0,
    warm_up: bool = False,
    adapters: Mapping[str, Params] | None = None,
    **options: Any,
) -> Callable[[], Service]:
    """Allocates all that a server needs.

    Args:
      folder: that holds the tokenizer.
      settings: the engine's, and the defaults of requests. seed: of requests that name none; None draws one for each.
      name: of the model. slots: rows computed together. capacity: tokens of each, prompt and answer. max_waiting: rows
        more than slots.
      prefix_cache_bytes: what may be kept of prompts, on all devices together; 0 keeps nothing.
      warm_up: compile before the server is ready.
      adapters: by the names that requests call them, parameters in place of `params`; see `Engine`.
      options: keys and limits, see `assemble`.

    Returns:
      makes the service, in the event loop that is to run it.

    Raises:
      ValueError: if the caches do not fit, or there is no tokenizer.
    """
    given = defaults(settings, seed)
    # Requests say whether they go on after an end token; the engine knows which those are.
    settings = dataclasses.replace(settings, ignore_eos=False)
    decode = Decoder(load_tokenizer(folder))
    prefixes = PrefixCache(prefix_cache_bytes) if prefix_cache_bytes else None
    engine = Engine(
        model,
        params,
        settings,
        capacity=slot_size(capacity, settings),
        slots=slots,
        decode=decode,
        placement=placement,
        prefix_cache=prefixes,
        adapters=adapters,
    )
    scorer = Scorer(model, params, placement, adapters)

    def begin() -> tuple[Engine, Scorer]:
        if warm_up:
            for adapter in (None, *(adapters or ())):
                compile_all(engine, settings, adapter)
        return engine, scorer

    def most_new(prompt_length: int, mode: str, block_size: int) -> int:
        probe = Request(prompt=(), max_new_tokens=1, mode=mode, sampling=SamplingConfig(block_size=block_size))

        def fits(new: int) -> bool:
            return positions(prompt_length, new, settings, probe) <= engine.capacity

        return bisect.bisect_left(range(1, engine.capacity + 1), True, key=lambda new: not fits(new))

    return assemble(
        begin,
        model.config,
        folder,
        given,
        name=name,
        capacity=capacity,
        most_new=most_new,
        places=engine.slots + max_waiting,
        prefixes=prefixes,
        adapters=tuple(adapters or ()),
        end_tokens=settings.end_tokens(model.config),
        **options,
    )


def assemble(
    begin: Callable[[], tuple[Any, Any]],
    config: ModelConfig,
    folder: Path,
    given: Defaults,
    *,
    name: str,
    capacity: int,
    most_new: Callable[[int, str, int], int],
    places: int,
    prefixes: PrefixCache | None = None,
    keys: Sequence[bytes] = (),
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    adapters: Sequence[str] = (),
    end_tokens: Sequence[int] = (),
) -> Callable[[], Service]:
    """A service around any engine.

    Args:
      begin: gives engine and scorer, in the engine's thread. config: of the model. folder: of the tokenizer.
      given: defaults of requests. keys: one of which a client must give. limits: of what it may ask for.
      name, capacity, most_new, places, adapters: see `Reader`. prefixes: the engine's, for the metrics.
      end_tokens: the engine's.
    """
    tokenizer = load_tokenizer(folder)
    try:
        template: ChatTemplate | str = ChatTemplate.load(folder, tokenizer)
    except ValueError as error:
        template = str(error)
    texts = TokenTexts(tokenizer)

    def make() -> Service:
        metrics = Metrics(name, prefixes)
        reader = Reader(
            name=name,
            config=config,
            tokenizer=tokenizer,
            template=template,
            defaults=given,
            limits=limits,
            capacity=capacity,
            most_new=most_new,
            places=places,
            longest_token=texts.longest(),
            grammars=Grammars(tokenizer, texts, config, end_tokens),
            adapters=adapters,
        )
        return Service(
            loop=EngineLoop(begin, places, metrics, limits.step_seconds),
            reader=reader,
            metrics=metrics,
            limits=limits,
            texts=texts,
            keys=keys,
        )

    return make


def compile_all(engine: Engine, settings: Settings, adapter: str | None = None) -> None:
    """Has the engine compile what requests with these settings need, of one adapter if it says so, by running some.

    Prompts of every width in which they are read, one alone and as many as there are slots.
    """
    request = Request(
        prompt=[0],
        max_new_tokens=min(settings.max_new_tokens, 2 * settings.sampling.block_size),
        mode=settings.mode,
        sampling=settings.sampling,
        end_tokens=(),
        adapter=adapter,
    )
    # One of each width, each four times the one before, and one that takes several pieces.
    lengths = [PIECE, *(width + 1 for width in (PIECE, 4 * PIECE, 16 * PIECE) if width < settings.prefill_chunk)]
    for length in [*lengths, settings.prefill_chunk + 1]:
        if positions(length, request.max_new_tokens, settings, request) > engine.capacity:
            continue
        for count in sorted({1, engine.slots}):
            for _ in range(count):
                engine.submit(dataclasses.replace(request, prompt=[0] * length))
            while engine.busy:
                for progress in engine.step():
                    if progress.error is not None:
                        raise ValueError(f"warming up: {progress.error}")
