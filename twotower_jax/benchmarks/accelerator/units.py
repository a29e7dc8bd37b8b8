"""What there is to measure, in order of value, and at which scale."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from twotower_jax import memory
from twotower_jax.benchmarks._error_cases import SMALL, Sizes
from twotower_jax.benchmarks._kernel_forms import SHAPES, Shape
from twotower_jax.benchmarks._shapes import demo_config, nano_config, of_file
from twotower_jax.config import ModelConfig


class Unit(NamedTuple):
    """One thing to measure.

    Attributes:
      part: one of `command.PARTS`. name: in words, no other unit of the part has it.
      parameters: all that decides what is measured, for JSON.
      seconds: after which it is ended, compilation included.
      sources: folders of the repository whose files decide the result.
      run: measures; returns a result for JSON.
    """

    part: str
    name: str
    parameters: dict[str, Any]
    seconds: float
    sources: tuple[str, ...]
    run: Callable[[], dict[str, Any]]


class Scale(NamedTuple):
    """How large everything is.

    Attributes:
      name: of the model. model: its shape. dtype: of weights and activations.
      shape: of the layers whose speed is measured.
      sizes: of the problems whose errors are measured. length: tokens of them.
      batches: of a pass. context: tokens before it.
      rows: sequences of a train step. sequence: tokens of each.
      new_tokens: that are generated. turns: of which the median counts.
      patience: by what the longest that a unit may take is multiplied.
      memory: bytes that a device has.
    """

    name: str
    model: ModelConfig
    dtype: str
    shape: Shape
    sizes: Sizes
    length: int
    batches: tuple[int, ...]
    context: int
    rows: int
    sequence: int
    new_tokens: int
    turns: int
    patience: float
    memory: int

    @property
    def one_of_each(self) -> str:
        """Layers of each kind, as few as possible."""
        return "".join(dict.fromkeys(self.model.hybrid_override_pattern))

    @property
    def beginning(self) -> str:
        """The first layers, up to where each kind has been."""
        pattern = self.model.hybrid_override_pattern
        return pattern[: max(pattern.index(letter) for letter in set(pattern)) + 1]


def scale(model: str | None) -> Scale:
    """That of a model's name; None for what suits the device."""
    room = memory.room(jax.devices()[:1])
    free = room.free if room else 2**34
    if model == "tiny" or model is None and jax.default_backend() == "cpu":
        tiny = demo_config()
        shape = Shape.of(tiny, 2, 64, 16, 64)
        return Scale("tiny", tiny, "float32", shape, SMALL, 24, (1, 2), 32, 2, 64, 32, 3, 1.0, free)
    config = nano_config() if model is None else of_file(model)
    sizes = Sizes(
        *(config.mamba_num_heads, config.mamba_head_dim, config.n_groups, config.ssm_state_size, config.chunk_size, 16),
        config.mamba_num_heads * config.mamba_head_dim + 2 * config.n_groups * config.ssm_state_size,
        *(config.num_attention_heads, config.num_key_value_heads, config.head_dim),
        *(8, min(6, config.num_experts_per_tok), config.hidden_size, config.moe_intermediate_size),
    )
    shape = SHAPES["nano"]() if model in (None, "nano30b") else Shape.of(config, 1, 8192, 16, 4096)
    name = model or "nano30b"
    return Scale(name, config, "bfloat16", shape, sizes, 1040, (1, 64), 1024, 1, 8192, 128, 7, 1.0, free)


def plan(parts: list[str], scale: Scale) -> list[Unit]:
    """All units of some parts: of each part first what tells most."""
    # Imported here, since these modules need this one.
    from twotower_jax.benchmarks.accelerator import errors, models, speeds

    made: dict[str, Iterator[tuple[int, Unit]]] = {
        "errors": errors.units(scale),
        "speed": speeds.units(scale),
        "passes": models.passes(scale),
        "train": models.training(scale),
        "generate": models.generation(scale),
    }
    ranked = itertools.chain.from_iterable(made[part] for part in made if part in parts)
    return [unit for _, unit in sorted(ranked, key=lambda pair: pair[0])]
