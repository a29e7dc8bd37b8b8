"""Diffusion against AR on one device, and how near both come to what its memory allows.

Decoding is bound by bytes: at each pass the weights that are used are read, and the cache. What a pass must read and
write is counted here (`pass_bytes`), the device's bandwidth is measured by copying, and the fraction of the roofline is
the time that these bytes take at that bandwidth over the time that the block took.

Weights are random, and what a router chooses is replaced by even routing: token n goes to experts n·k … n·k + k − 1,
modulo E. With random weights all mask tokens of a block would go to the same experts. The router's own choice is
computed all the same. Diffusion is forced to 5 and to 4 evaluations per block of 16, and four blocks of the one kind
with one of the other give 3.33 tokens per evaluation, which is what the published model reaches.
"""

import contextlib
import dataclasses
import math
import time
import zlib
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from twotower_jax import randomness
from twotower_jax.config import ModelConfig
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation import Engine, Settings, positions
from twotower_jax.layers import registry
from twotower_jax.layers.experts import Router
from twotower_jax.parameters import Params, parameter_table, unflatten
from twotower_jax.two_tower import TwoTower

_BLOCK = 16
# Evaluations of a block, and the part of the blocks that take so many: 4.8 of 16 tokens on average.
_EVALUATIONS = ((5, 0.8), (4, 0.2))


@contextlib.contextmanager
def even_routing() -> Iterator[None]:
    """While models are traced, every router spreads its tokens evenly over all experts."""
    choose = Router._choose

    def even(self, x, weight, bias):
        chosen, config = choose(self, x, weight, bias), self.config
        places = jnp.arange(chosen.size, dtype=jnp.int32).reshape(chosen.shape) % config.n_routed_experts
        # Always `places`, which no compiler knows.
        return jnp.where(chosen < 0, 0, places)

    with mock.patch.object(Router, "_choose", even):
        yield


def random_params(model: TwoTower, dtype: jnp.dtype) -> Params:
    """Parameters as `initialize` draws them, array by array in their final dtype, so that nothing larger exists."""
    flat = {}
    for path, parameter in parameter_table(model).items():
        to = jnp.float32 if parameter.float32 else dtype
        key = jax.random.fold_in(randomness.key(0), zlib.crc32("/".join(path).encode()))
        flat[path] = jax.jit(lambda key, p=parameter, to=to: p.init(key, p.shape).astype(to))(key)
    return unflatten(flat)


def copy_bandwidth(megabytes: int, repeats: int = 10) -> float:
    """Bytes a second, read and written, of a copy of this size; the fastest of some."""
    array = jnp.zeros(megabytes * 250_000, jnp.float32)
    copy = jax.jit(lambda v: v + 1)
    copy(array).block_until_ready()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        copy(array).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return 2 * array.nbytes / min(seconds)


@dataclasses.dataclass(frozen=True)
class Pass:
    """One evaluation of a tower.

    Attributes:
      tower: "context_tower" or "denoiser_tower". rows, tokens: B rows of L tokens. logits: positions a row of which
        the head makes logits. length: keys in the cache before it. extends: whether the cache is written.
    """

    tower: str
    rows: int
    tokens: int
    logits: int
    length: float
    extends: bool


def pass_bytes(model: TwoTower, dtype: jnp.dtype, one: Pass) -> float:
    """Bytes that a pass must move: the weights it uses, each once; the cache; the logits. Activations are left out."""
    config, width = model.config, jnp.dtype(dtype).itemsize
    heads = {"context_tower": "context_head", "denoiser_tower": "denoiser_head"}
    used = min(config.n_routed_experts, one.rows * one.tokens * config.num_experts_per_tok)
    total = 0.0
    for path, parameter in parameter_table(model).items():
        size = math.prod(parameter.shape) * (4 if parameter.float32 else width)
        if path[0] == one.tower:
            if path[1] == "embeddings":
                size = one.rows * one.tokens * config.hidden_size * width
            elif "experts" in parameter.axes:
                size = size * used / config.n_routed_experts
            total += size
        elif path[0] == heads[one.tower] or (not parameter.in_backbone and one.tower == "denoiser_tower"):
            total += size
    return total + one.rows * (_cache_bytes(config, dtype, one) + one.logits * config.vocab_size * 4)


def _cache_bytes(config: ModelConfig, dtype: jnp.dtype, one: Pass) -> float:
    """Bytes per row. States are read, and written where the pass extends the cache; keys are read, new ones written."""

    def size(capacity: int) -> int:
        shapes = [
            registry.kind(letter).cache_shapes(config, 1, capacity, dtype) for letter in config.hybrid_override_pattern
        ]
        return sum(math.prod(v.shape) * v.dtype.itemsize for v in jax.tree.leaves(shapes))

    states, position = size(0), size(1) - size(0)
    keys = position * (one.length + (one.tokens if one.extends else 0))
    return states * (2 if one.extends else 1) + keys


def run(model: TwoTower, dtype: jnp.dtype, batches: list[int], prompt: int, new: int, repeats: int) -> list[str]:
    """The lines of a table.

    Raises:
      ValueError: for fewer than 64 new tokens: two first blocks, one that is timed, and the last.
    """
    if new < 4 * _BLOCK:
        raise ValueError(f"new_tokens={new}: the roofline needs at least {4 * _BLOCK}")
    params = random_params(model, dtype)
    bandwidth = copy_bandwidth(1000 if jax.default_backend() != "cpu" else 100)
    lines = [
        f"{jax.devices()[0].device_kind}, {jnp.dtype(dtype).name}: a copy moves {bandwidth / 1e9:,.0f} GB/s",
        "",
        "| batch | mode | ms per block of 16 | tokens/s | GB per block | of the roofline | times AR |",
        "|---|---|---|---|---|---|---|",
    ]
    settings = Settings(max_new_tokens=new, ignore_eos=True)
    for batch in batches:

        def seconds(mode: str, evaluations: int = 1, batch=batch) -> float:
            sampling = SamplingConfig(block_size=_BLOCK, steps_per_block=evaluations, confidence_threshold=1.0)
            of_mode = dataclasses.replace(settings, mode=mode, sampling=sampling, batch_size=batch)
            with even_routing():
                return _seconds_per_block(model, params, of_mode, prompt, repeats)

        length = prompt + new / 2
        one_token = Pass("context_tower", batch, 1, 1, length, extends=True)
        evaluation = Pass("denoiser_tower", batch, _BLOCK, _BLOCK, length, extends=False)
        extension = Pass("context_tower", batch, _BLOCK, 0, length, extends=True)
        ar, ar_bytes = seconds("ar"), _BLOCK * pass_bytes(model, dtype, one_token)
        parts = [(share, count, seconds("diffusion", count)) for count, share in _EVALUATIONS]
        diffusion = sum(share * taken for share, _, taken in parts)
        evaluations = sum(share * count for share, count, _ in parts)
        diffusion_bytes = evaluations * pass_bytes(model, dtype, evaluation) + pass_bytes(model, dtype, extension)
        name = f"diffusion, {_BLOCK / evaluations:.2f} tokens per evaluation"
        for mode, taken, moved in (("ar", ar, ar_bytes), (name, diffusion, diffusion_bytes)):
            speed = f"{taken * 1e3:,.2f} | {_BLOCK * batch / taken:,.0f}"
            roofline = f"{moved / 1e9:,.3f} | {moved / bandwidth / taken:.0%}"
            lines.append(f"| {batch} | {mode} | {speed} | {roofline} | {ar / taken:.2f} |")
    return lines


def _seconds_per_block(model: TwoTower, params: Params, settings: Settings, prompt: int, repeats: int) -> float:
    """Seconds for 16 tokens of every row after the prompts; the fastest of some blocks after two first ones."""
    rows = np.random.default_rng(0).integers(4, model.config.vocab_size, (settings.batch_size, prompt)).tolist()
    best = math.inf
    for _ in range(repeats):
        capacity = positions(prompt, settings.max_new_tokens, settings)
        engine = Engine(model, params, settings, capacity=capacity)
        for row in rows:
            engine.submit(row)
        # The first call reads the prompts, and both it and the second may compile.
        for _ in range(2):
            engine.step()
        while engine.busy:
            started = time.perf_counter()
            progress = engine.step()
            if all(p.result is None for p in progress):
                best = min(best, time.perf_counter() - started)
    return best
