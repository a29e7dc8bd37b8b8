"""Counts and times for Prometheus, under vLLM's names where it has one."""

from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

from twotower_jax.generation.prefix_cache import PrefixCache
from twotower_jax.serving.loop import Observer, Ticket

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_PER_TOKEN = (0.0625, 0.1, 0.125, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 2)
_STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 24, 32, 64)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class _Prefixes:
    """What a prefix cache counts, read when it is asked for."""

    def __init__(self, model: str, cache: PrefixCache):
        self._model, self._cache = model, cache

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        told = (
            (CounterMetricFamily, "vllm:prefix_cache_queries", "Tokens of prompts.", self._cache.queries),
            (CounterMetricFamily, "vllm:prefix_cache_hits", "Tokens of prompts that were kept.", self._cache.hits),
            (GaugeMetricFamily, "twotower:prefix_cache_bytes", "What is kept takes.", self._cache.bytes),
        )
        for kind, name, about, value in told:
            family = kind(name, about, labels=["model_name"])
            family.add_metric([self._model], value)
            yield family


class Metrics(Observer):
    """What one server counts.

    Args:
      model: the label `model_name`.
      prefixes: the engine's cache, if it has one.
    """

    def __init__(self, model: str, prefixes: PrefixCache | None = None):
        disable_created_metrics()  # Else each has a second one, with the time of its first.
        self._registry = CollectorRegistry()
        if prefixes is not None:
            self._registry.register(_Prefixes(model, prefixes))

        def make(kind, name, about, labels=(), **options):
            metric = kind(name, about, ["model_name", *labels], registry=self._registry, **options)
            return metric if labels else metric.labels(model)

        def histogram(name, about, buckets):
            return make(Histogram, name, about, buckets=buckets)

        self._model = model
        self._running = make(Gauge, "vllm:num_requests_running", "Rows that are in a slot.")
        self._waiting = make(Gauge, "vllm:num_requests_waiting", "Rows that wait for a slot.")
        self._prompt = make(Counter, "vllm:prompt_tokens", "Tokens of prompts.")
        self._new = make(Counter, "vllm:generation_tokens", "New tokens.")
        self._done = make(Counter, "vllm:request_success", "Rows that are done, by how.", ["finished_reason"])
        self._first = histogram(
            "vllm:time_to_first_token_seconds", "From a row's arrival to its first tokens.", _SECONDS
        )
        self._between = histogram("vllm:inter_token_latency_seconds", "Time for each further token.", _SECONDS)
        self._whole = histogram("vllm:e2e_request_latency_seconds", "From a row's arrival to its end.", _SECONDS)
        self._prompts = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._news = histogram("vllm:request_generation_tokens", "New tokens of a row.", _TOKENS)
        self._denoiser = make(
            Counter, "twotower:denoiser_evaluations", "Evaluations of the denoiser, each row counted."
        )
        self._context = make(Counter, "twotower:context_evaluations", "Evaluations of the context, each row counted.")
        self._blocks = make(Counter, "twotower:blocks", "Blocks that were denoised.")
        self._per_token = histogram("twotower:denoiser_evaluations_per_token", "Of a row.", _PER_TOKEN)
        self._per_block = histogram("twotower:steps_per_block", "Evaluations of the denoiser, mean of a row.", _STEPS)
        self._accepted = histogram(
            "twotower:acceptance_length", "Drafted tokens kept of a block, mean of a row.", _STEPS
        )

    def text(self) -> bytes:
        """All of it, in Prometheus's format."""
        return generate_latest(self._registry)

    def step(self, running: int, waiting: int) -> None:
        self._running.set(running)
        self._waiting.set(waiting)

    def began(self, prompt_tokens: int, seconds: float) -> None:
        self._prompt.inc(prompt_tokens)
        self._prompts.observe(prompt_tokens)
        self._first.observe(seconds)

    def went_on(self, tokens: int, seconds: float) -> None:
        for _ in range(tokens):
            self._between.observe(seconds / tokens)

    def ended(self, ticket: Ticket, seconds: float, reason: str) -> None:
        self._done.labels(self._model, reason).inc()
        self._whole.observe(seconds)
        result = ticket.result
        if result is None:
            return
        tokens = len(result.tokens)
        self._new.inc(tokens)
        self._news.observe(tokens)
        self._denoiser.inc(result.denoiser_evaluations)
        self._context.inc(result.context_evaluations)
        if result.blocks:
            self._blocks.inc(result.blocks)
            self._per_token.observe(result.denoiser_evaluations / max(1, tokens))
            self._per_block.observe(result.denoiser_evaluations / result.blocks)
        if result.acceptance_length is not None:
            self._accepted.observe(result.acceptance_length)
