"""Every setting of a training run.

A config file's `get_config()` starts from `base_config(model)` and changes what it wants; flags then override single
fields; `freeze` checks the result once and returns it as an immutable `TrainConfig`. (ml_collections can only override
what is mutable, so the order is: override first, freeze after.)
"""

import dataclasses
import math
import pathlib
import runpy
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict, config_dict

from twotower_jax.config import ModelConfig, Variant
from twotower_jax.diffusion import SCHEDULES, TIMES, WEIGHTS, MaskedDiffusion
from twotower_jax.execution import REMAT, Execution
from twotower_jax.kernels import Backends
from twotower_jax.layers import registry
from twotower_jax.lora import Lora
from twotower_jax.paths import local_path
from twotower_jax.sharding import MeshShape
from twotower_jax.train.objectives import OBJECTIVES
from twotower_jax.train.terms import Balance, Distillation

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
OPTIMIZERS = ("adamw", "muon")

# A resumed run may change these: none of them alters the steps already made.
CHANGEABLE = (
    "steps",
    "log_every",
    "validation_every",
    "checkpoint_every",
    "keep_checkpoints",
    "local_copy",
    "data",
    "mesh",
    "accumulate",
    "remat",
    "unroll_layers",
    "kernels",
    "max_skipped_steps",
    "peak_flops",
    "wandb_project",
    "gradient_noise_scale",
    "sample_every",
    "sample_prompts",
    "sample_tokens",
    "sample_answers",
)


# Fields that came later, with what runs did before they were there: a workdir without them goes on.
ADDED = {
    "diffusion.schedule": "linear",
    "diffusion.times": "uniform",
    "diffusion.weight": "flat",
    "diffusion.complementary": False,
    "moments_dtype": "float32",
    "local_copy": "",
    "padding_weight": 0.1,
    "distillation.weight": 0.0,
    "distillation.temperature": 1.0,
    "optimizer": "adamw",
    "ema_decay": 0.0,
    "router_bias_rate": 0.0,
    "router_balance_loss": 0.0,
    "router_z_loss": 0.0,
    **{f"lora.{field.name}": field.default for field in dataclasses.fields(Lora)},
}

# What a backbone that is trained from random weights does for its experts, as Nemotron 3 Nano's pretraining did (arXiv
# 2512.20848). A checkpoint's routers are balanced already.
_NEW_BACKBONE = Balance(bias_rate=1e-3, balance_loss=1e-4)


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """The parts of a `MaskedDiffusion` by name; a config file may register its own (docs/guide/training.md).

    Raises:
      ValueError: at construction, for a name that is not registered, or a `complementary` that is not a bool.
    """

    schedule: str = "linear"
    times: str = "uniform"
    weight: str = "flat"
    complementary: bool = False

    def __post_init__(self):
        try:
            _ = self.process
        except (TypeError, ValueError) as error:
            raise ValueError(f"config: diffusion: {error}") from None

    @property
    def process(self) -> MaskedDiffusion:
        return MaskedDiffusion(SCHEDULES[self.schedule], TIMES[self.times], WEIGHTS[self.weight], self.complementary)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The settings of one run.

    Raises:
      ValueError: at construction, for values that contradict each other; the message names both.
    """

    # The fields of `ModelConfig` but the vocabulary's size, which is the tokenizer's. Unused with init_from.
    model: Mapping[str, Any]
    # "autoregressive" trains a backbone on next tokens, "denoiser" a two-tower model on masked ones; a config file may
    # register its own, of a two-tower model (docs/guide/changing.md).
    objective: str = "autoregressive"
    # For the denoiser objective: which towers train, and how. See `Variant`.
    variant: Variant = Variant()
    # For the denoiser objective: how tokens are masked, and how much they count. See `MaskedDiffusion`.
    diffusion: DiffusionConfig = DiffusionConfig()
    # For the denoiser objective: how much the context tower's own distribution of each masked token counts beside the
    # token. See `Distillation`.
    distillation: Distillation = Distillation()
    # How the experts of layers that train are kept evenly busy, see `Balance`. None is 1e-3, 1e-4 and 0 for a backbone
    # that starts from random weights, and 0 for all others; a run that goes on keeps its own.
    router_bias_rate: float | None = None
    router_balance_loss: float | None = None
    router_z_loss: float | None = None
    # An adapter in place of the parameters that would train: its rank, what it is of, and how its base is stored. See
    # `Lora`; a rank of 0 is none.
    lora: Lora = Lora()
    # A checkpoint of any kind to start from: the model's shape and the tokenizer are its own. "" starts from random
    # weights. A run that resumes from its workdir does not read it again.
    init_from: str = ""
    # A file of text (.txt, .jsonl and more) or of conversations (.jsonl), or a folder of them; a folder made by
    # launch/prepare.py; the prefix of a Megatron set; or a .json file that mixes several by weight. "" is the
    # documentation shipped with Python, "tasks" questions with exact answers, "tasks:NAME,NAME" those of some tasks.
    # See docs/guide/data.md and docs/guide/finetuning.md.
    data: str = ""
    # Let batches tell documents apart: each then begins at a multiple of the largest block size, after padding that
    # counts for nothing. In a curriculum, of the least common multiple of all block sizes.
    reset_at_documents: bool = False
    # In conversations: how much each end token counts that fills the last block of an answer after its own, which
    # counts 1. Conversations are always told apart.
    padding_weight: float = 0.1
    # Size of the tokenizer trained on that text, at most. Unused with init_from.
    vocab_size: int = 2048
    # Share of the tokens held out for the validation loss, in whole documents; 0 for no validation. What is held out of
    # prepared data was decided when they were made.
    validation_fraction: float = 0.01
    # Tokens in a sequence, a multiple of every block size; sequences in a step.
    sequence_length: int = 256
    batch_size: int = 8
    steps: int = 1000
    # Tokens in a block of the denoiser. None follows block_curriculum: from each fraction of the steps on, a size. In a
    # config and in flags one of the two is given, and the other is None.
    block_size: int | None = None
    block_curriculum: tuple = ((0.0, 32), (2 / 3, 16))  # the paper's 32, 32, 16 in thirds
    # "adamw", or "muon": that for the matrices between embedding and head, and AdamW for the rest.
    optimizer: str = "adamw"
    # Its rate, warmup-stable-decay: fractions of the steps in which it rises linearly from 0 and, at the end, falls
    # linearly to its final value.
    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-6
    warmup_fraction: float = 0.02
    decay_fraction: float = 0.2
    adam_betas: tuple = (0.9, 0.95)
    weight_decay: float = 0.1
    # How much an average of the weights keeps of itself at each step, 0.999 for one; 0 keeps none. Validation tells its
    # loss as well, and whatever loads the run's checkpoint takes the average.
    ema_decay: float = 0.0
    # The largest global norm of the gradients; longer ones are scaled down to it.
    clip_norm: float = 1.0
    # Seed of weights, data order and noise.
    seed: int = 0
    # The dtype of activations and of the frozen parameters; trained parameters and their moments are float32.
    dtype: str = "float32"
    # The dtype of the optimizer's moments between steps: "float32", or "bfloat16" where memory is short. Computing is
    # in float32.
    moments_dtype: str = "float32"
    # What the backward pass recomputes instead of keeping it: "none"; "layer", which keeps what enters each layer;
    # "unit", which keeps what enters each unit of a repeated segment.
    remat: str = "none"
    # Compute repeated layers one after the other rather than in a loop: on processors faster, and compiled sooner as
    # long as they are few; gradients have other last bits.
    unroll_layers: bool = False
    # The implementation of each kernel, see `Backends`; None for one that is chosen by platform and shapes.
    kernels: Backends = Backends()
    # Devices along each axis of the mesh, see `MeshShape`; -1, for one of them, takes all that are left.
    mesh: MeshShape = MeshShape()
    # Parts of a batch whose gradients are computed one after the other and added up.
    accumulate: int = 1
    # Tell from how much the gradients of these parts differ how noisy the batch's is; needs two parts at least.
    gradient_noise_scale: bool = False
    # In steps; 0 validates, or saves, at the end only.
    log_every: int = 10
    validation_every: int = 0
    checkpoint_every: int = 0
    # The newest so many checkpoints stay.
    keep_checkpoints: int = 2
    # With a workdir in a store: the newest state also stays in this folder of each machine; a run that is started again
    # goes on from there where all of its processes can (docs/guide/storage.md).
    local_copy: str = ""
    # Steps in a row that may be left out because the loss or the gradient is not finite; one more ends the run.
    max_skipped_steps: int = 5
    # Peak of one device, in FLOP/s, for the utilization; 0 looks it up by the device's kind.
    peak_flops: float = 0.0
    # Also log to this project of Weights & Biases (package `wandb`).
    wandb_project: str = ""
    # In a denoiser run: continue each of these texts by so many tokens; every so many steps, 0 for never.
    sample_every: int = 0
    sample_prompts: tuple = ()
    sample_tokens: int = 64
    # In a denoiser run on conversations: with each validation, answer so many held-out prompts, by up to sample_tokens
    # tokens each.
    sample_answers: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check_type(field, getattr(self, field.name))
        _check(self.objective in OBJECTIVES, f"objective={self.objective!r} is not one of {', '.join(OBJECTIVES)}")
        _check(self.dtype in DTYPES, f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}")
        _check(self.moments_dtype in DTYPES, f"moments_dtype={self.moments_dtype!r} is not one of {', '.join(DTYPES)}")
        _check(self.remat in REMAT, f"remat={self.remat!r} is not one of {', '.join(REMAT)}")
        # What counts nothing is never masked, and would tell where the answer ends.
        small = 0 < self.padding_weight <= 1
        _check(small, f"padding_weight={self.padding_weight} must be more than 0 and at most 1")
        for name in ("steps", "batch_size", "log_every", "keep_checkpoints", "vocab_size", "accumulate"):
            _check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        _check(self.sequence_length >= 2, f"sequence_length={self.sequence_length} must be at least 2")
        for name in ("validation_every", "checkpoint_every", "max_skipped_steps", "peak_flops", "sample_every"):
            _check(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        _check(0 <= self.seed < 2**32, f"seed={self.seed} must be at least 0 and less than 2**32")
        _check(
            0 <= self.validation_fraction < 1,
            f"validation_fraction={self.validation_fraction} must be at least 0 and less than 1",
        )
        _check(
            self.batch_size % self.accumulate == 0,
            f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}",
        )
        _check(
            self.accumulate > 1 or not self.gradient_noise_scale,
            f"gradient_noise_scale=True compares parts of a batch, of which accumulate={self.accumulate} makes one",
        )
        _check(
            self.two_towers or self.variant == Variant(),
            f"variant={self.variant} changes nothing with objective={self.objective!r}: it needs objective='denoiser'",
        )
        _ = self.balance  # which checks itself
        self._check_optimizer()
        self._check_blocks()
        self._check_samples()

    def _check_optimizer(self):
        for name in ("learning_rate", "clip_norm"):
            _check(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        _check(self.optimizer in OPTIMIZERS, f"optimizer={self.optimizer!r} is not one of {', '.join(OPTIMIZERS)}")
        _check(0 <= self.ema_decay < 1, f"ema_decay={self.ema_decay} must be at least 0 and less than 1")
        _check(self.weight_decay >= 0, f"weight_decay={self.weight_decay} must not be negative")
        _check(
            0 <= self.final_learning_rate <= self.learning_rate,
            f"final_learning_rate={self.final_learning_rate} must lie between 0 and learning_rate={self.learning_rate}",
        )
        for name in ("warmup_fraction", "decay_fraction"):
            _check(0 <= getattr(self, name) <= 1, f"{name}={getattr(self, name)} must lie between 0 and 1")
        _check(
            self.warmup_fraction + self.decay_fraction <= 1,
            f"warmup_fraction={self.warmup_fraction} and decay_fraction={self.decay_fraction} overlap: "
            "together they exceed 1",
        )
        ok = len(self.adam_betas) == 2 and all(_is_number(b) and 0 <= b < 1 for b in self.adam_betas)
        _check(ok, f"adam_betas={self.adam_betas} must be two numbers, each at least 0 and less than 1")
        # A mean that moves by less than half of the last bit never moves again: at 0.999 it would stay where it began.
        _check(
            self.moments_dtype == "float32" or 1 - max(self.adam_betas) > float(jnp.finfo(jnp.bfloat16).eps),
            f"moments_dtype={self.moments_dtype!r} cannot follow moments that change as slowly as with "
            f"adam_betas={self.adam_betas}; take betas up to 0.99, or float32",
        )

    def _check_blocks(self):
        _check(self.block_size is None or self.block_size >= 1, f"block_size={self.block_size} must be at least 1")
        for stage in self.block_curriculum:
            ok = isinstance(stage, tuple) and len(stage) == 2 and _is_number(stage[0]) and type(stage[1]) is int
            _check(ok, f"block_curriculum: {stage!r} is not a pair (fraction of the steps, block size)")
            small = 1 <= stage[1] < 2**31
            _check(small, f"block_curriculum: block size {stage[1]} must be at least 1 and less than 2**31")
        starts = [start for start, _ in self.block_curriculum]
        increasing = all(a < b for a, b in zip(starts, starts[1:], strict=False))
        _check(
            self.block_size is not None or (starts[:1] == [0] and increasing and starts[-1] < 1),
            f"block_curriculum={self.block_curriculum} must start at fraction 0 and go on at increasing ones below 1",
        )
        # For a backbone too: a denoiser is to be trained on it, on the same sequences. What all sizes divide, their
        # least common multiple divides, to which documents are aligned.
        for size in self.block_sizes:
            _check(
                self.sequence_length % size == 0,
                f"sequence_length={self.sequence_length} is not a multiple of the block size {size}",
            )
        default = type(self).block_curriculum
        _check(
            self.block_size is None or self.block_curriculum == default,
            _both_blocks(self.block_size, self.block_curriculum),
        )

    def _check_samples(self):
        ok = all(isinstance(prompt, str) and prompt for prompt in self.sample_prompts)
        _check(ok, f"sample_prompts={self.sample_prompts!r} must be texts that are not empty")
        _check(self.sample_tokens >= 1, f"sample_tokens={self.sample_tokens} must be at least 1")
        _check(
            self.sample_every or not self.sample_prompts,
            f"sample_prompts={self.sample_prompts!r} change nothing with sample_every=0",
        )
        _check(self.sample_answers >= 0, f"sample_answers={self.sample_answers} must not be negative")
        if self.sample_answers:
            _check(self.two_towers, f"sample_answers={self.sample_answers} needs objective='denoiser'")
        if self.sample_every:
            _check(self.sample_prompts, f"sample_every={self.sample_every} needs sample_prompts")
            _check(self.two_towers, f"sample_every={self.sample_every} needs objective='denoiser'")

    @property
    def two_towers(self) -> bool:
        """Whether the model has both towers: with every objective but that of a backbone."""
        return self.objective != "autoregressive"

    @property
    def balance(self) -> Balance:
        """How the experts are kept busy, also where the settings leave that to the run."""
        default = Balance() if self.two_towers or self.init_from else _NEW_BACKBONE
        given = {field.name: getattr(self, f"router_{field.name}") for field in dataclasses.fields(Balance)}
        return dataclasses.replace(default, **{name: value for name, value in given.items() if value is not None})

    @property
    def block_sizes(self) -> list[int]:
        """The block sizes of the whole run, in order."""
        return [size for _, size in self.block_curriculum] if self.block_size is None else [self.block_size]

    @property
    def execution(self) -> Execution:
        return Execution(dtype=DTYPES[self.dtype], unroll=self.unroll_layers, remat=self.remat, backends=self.kernels)

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The model of this shape over a vocabulary.

        Raises:
          ValueError: for a field that `ModelConfig` does not have, or values that contradict each other.
        """
        if unknown := sorted(set(self.model) - {*_model_fields(), "layer_fields"}):
            raise ValueError(f"config: model has no field {unknown[0]!r}")
        return ModelConfig.from_hf(dict(self.model) | {"vocab_size": vocab_size})


# The fields that hold fields of their own.
_PARTS = {
    "variant": Variant,
    "diffusion": DiffusionConfig,
    "distillation": Distillation,
    "lora": Lora,
    "kernels": Backends,
    "mesh": MeshShape,
}


def base_config(model: Mapping[str, Any]) -> ConfigDict:
    """A mutable config with the defaults of `TrainConfig` and a model given by its fields, without `vocab_size`."""
    config = ConfigDict()
    config.model = ConfigDict({name: model.get(name, default) for name, default in _model_fields().items()})
    config.model.update(model)
    for field in dataclasses.fields(TrainConfig):
        if field.type == float | None:
            config[field.name] = config_dict.placeholder(float)
        elif field.name not in ("model", *_PARTS, "block_size", "block_curriculum"):
            config[field.name] = field.default
    config.variant = ConfigDict(dataclasses.asdict(Variant()))
    config.diffusion = ConfigDict(dataclasses.asdict(DiffusionConfig()))
    config.distillation = ConfigDict(dataclasses.asdict(Distillation()))
    config.lora = ConfigDict(dataclasses.asdict(Lora()))
    config.kernels = ConfigDict({field.name: config_dict.placeholder(str) for field in dataclasses.fields(Backends)})
    config.mesh = ConfigDict(dataclasses.asdict(MeshShape()))
    config.block_size = config_dict.placeholder(int)
    config.block_curriculum = config_dict.placeholder(tuple)
    return config


def shipped(name: str) -> ConfigDict:
    """The config of `configs/NAME.py`, to build on, wherever the own file lies and the command is run.

    Raises:
      ValueError: if there is none of that name.
    """
    return runpy.run_path(str(shipped_file(f"{name}.py")))["get_config"]()


def shipped_file(name: str) -> pathlib.Path:
    """What lies in `configs/` under that name, wherever that folder is.

    Raises:
      ValueError: if there is nothing of that name.
    """
    folders = [pathlib.Path(__file__).resolve().parents[n] / "configs" for n in (1, 2)]  # An installation, a checkout.
    path = next((file for folder in folders if (file := folder / name).exists()), None)
    if path is None:
        names = sorted(file.stem for folder in folders for file in folder.glob("*.py"))
        raise ValueError(f"there is no config {name.removesuffix('.py')!r}; there are {', '.join(names)}")
    return path


def freeze(config: ConfigDict) -> TrainConfig:
    """The settings, checked.

    Raises:
      ValueError: for a field that does not exist, a value of another type, or values that contradict each other.
    """
    values = config.to_dict()
    if unknown := sorted(set(values) - {field.name for field in dataclasses.fields(TrainConfig)}):
        raise ValueError(f"config: there is no field {unknown[0]!r}")
    if values.get("block_curriculum") is None:
        values.pop("block_curriculum", None)  # The published one, where no block_size stands in its place.
    elif values.get("block_size") is not None:
        _check(False, _both_blocks(values["block_size"], values["block_curriculum"]))
    for name in ("init_from", "data", "local_copy"):
        if isinstance(values.get(name), str):
            values[name] = local_path(values[name])
    parts = {}
    for name, part in _PARTS.items():
        given = values.pop(name)
        _check(isinstance(given, Mapping), f"{name} must hold fields of its own, found {given!r}")
        for field in dataclasses.fields(part):
            if field.name in given:
                _check_type(field, given[field.name], f"{name}.")
        try:
            parts[name] = part(**given)
        except TypeError as error:
            raise ValueError(f"config: {name}: {error}") from None
    frozen = TrainConfig(**parts, **values)
    frozen.model_config(max(frozen.vocab_size, 4))  # room for the special tokens; the real size comes later
    return frozen


def check_given(config: TrainConfig, given: Collection[str]) -> list[str]:
    """Refuses settings that somebody gave for this very run, and that nothing in it looks at.

    A config file may hold them for other runs that it serves; so they are no error of the config.

    Args:
      given: fields, dotted, as flags name them.

    Returns:
      lines about what was given and is the checkpoint's own business.

    Raises:
      ValueError: naming the first one and why.
    """
    without = {}
    if not (config.sample_every or config.sample_answers) and config.sample_tokens != TrainConfig.sample_tokens:
        without["sample_tokens"] = config.sample_tokens, "sample_every=0"
    if not config.decay_fraction and config.final_learning_rate != config.learning_rate:
        without["final_learning_rate"] = config.final_learning_rate, "decay_fraction=0"
    if not config.validation_fraction and config.validation_every:
        without["validation_every"] = config.validation_every, "validation_fraction=0"
    if not config.two_towers:
        if config.padding_weight != TrainConfig.padding_weight:
            without["padding_weight"] = config.padding_weight, f"objective={config.objective!r}"
        for part in ("diffusion", "distillation"):
            default = getattr(TrainConfig, part)
            for name, value in dataclasses.asdict(getattr(config, part)).items():
                if value != getattr(default, name):
                    without[f"{part}.{name}"] = value, f"objective={config.objective!r}"
    elif not config.distillation.weight and config.distillation.temperature != Distillation.temperature:
        without["distillation.temperature"] = config.distillation.temperature, "distillation.weight=0"
    kinds = map(registry.kind, config.model["hybrid_override_pattern"])
    if not config.init_from and not any(kind.num_experts(config.model_config(config.vocab_size)) for kind in kinds):
        for name in ("router_bias_rate", "router_balance_loss", "router_z_loss"):
            without[name] = getattr(config, name), "a model without experts"
    if not config.lora.rank:
        _check("lora.rank" not in given, "lora.rank=0 is no adapter: give at least 1, or leave it out to train all")
        for name, value in dataclasses.asdict(config.lora).items():
            if value != getattr(Lora, name):
                without[f"lora.{name}"] = value, "lora.rank=0"
    for name in given:
        if name in without:
            value, why = without[name]
            raise ValueError(f"config: {name}={value!r} changes nothing with {why}; leave it out")
    of_model = [name for name in given if name == "vocab_size" or name.split(".")[0] == "model"]
    if config.init_from and of_model:
        names = ", ".join(f"--config.{name}" for name in of_model)
        return [f"{names}: not looked at, for with init_from the model's shape and the tokenizer are the checkpoint's"]
    return []


def _both_blocks(block_size: int, curriculum: Any) -> str:
    return (
        f"block_size={block_size} and block_curriculum={curriculum} contradict each other: leave one out, or set it to "
        "None"
    )


def _model_fields() -> dict[str, Any]:
    """The fields of `ModelConfig` that every config has, with their defaults; a placeholder where there is none."""
    return {
        field.name: config_dict.placeholder(tuple if field.name == "time_step_limit" else field.type)
        if field.default is dataclasses.MISSING or field.default is None
        else field.default
        for field in dataclasses.fields(ModelConfig)
        if field.name not in ("vocab_size", "layer_fields")
    }


def _check(ok: bool, message: str):
    if not ok:
        raise ValueError(f"config: {message}")


def _check_type(field: dataclasses.Field, value: Any, part: str = ""):
    wanted = {float: int | float, float | None: int | float | None, Mapping[str, Any]: Mapping}.get(
        field.type, field.type
    )
    ok = isinstance(value, wanted) and (field.type is bool or not isinstance(value, bool))
    name = getattr(field.type, "__name__", str(field.type))
    _check(ok, f"{part}{field.name} must be {name}, found {value!r}")
    _check(not isinstance(value, float) or math.isfinite(value), f"{part}{field.name}={value} must be finite")
    # Counts are int32 on the devices; the seed has bounds of its own.
    small = not isinstance(value, int) or value < 2**31 or field.name == "seed" or field.type is float
    _check(small, f"{part}{field.name}={value} must be less than 2**31")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
