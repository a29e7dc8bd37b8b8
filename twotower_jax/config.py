"""The model's shape (`ModelConfig`) and the variant of the two-tower scheme (`Variant`).

Field names of `ModelConfig` are those of the published `config.json` (model_type `nemotron_h`), so that a reader can
hold the two side by side; other spellings are understood (config_reading.py). Fields that the published code ignores
(the rope fields, for one) are ignored here too.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from twotower_jax import config_reading
from twotower_jax.layers import registry

ACTIVATIONS = ("relu2", "relu", "silu", "gelu")
MASK_TOKEN_ID = 3  # The release keeps it out of config.json.


class LayerFields(dict[str, bool | int | float | str]):
    """What a layer kind of one's own reads of the config, by names of its own; hashable, and not to be changed."""

    def __hash__(self) -> int:
        return hash(frozenset(self.items()))


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of one tower; both towers share it.

    `eos_token_id` may be one id or several, each of which ends a text; see `eos_token_ids`. With `moe_latent_size` (0:
    without) the routed experts work in a space of that width, between two projections that all of a layer share.
    `layer_fields` is for layer kinds that are registered outside this package; each checks what it reads
    (`Mixer.check_config`).

    Raises:
      ValueError: at construction, for values that contradict each other; the message names both.
    """

    vocab_size: int
    hidden_size: int
    hybrid_override_pattern: str
    # Mamba-2
    mamba_num_heads: int
    mamba_head_dim: int
    ssm_state_size: int
    n_groups: int
    conv_kernel: int = 4
    chunk_size: int = 128
    use_conv_bias: bool = True
    use_bias: bool = False
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple[float, float] | None = None
    # Attention
    num_attention_heads: int = 32
    num_key_value_heads: int = 2
    head_dim: int = 128
    attention_bias: bool = False
    # Experts and dense MLP
    intermediate_size: int = 0
    mlp_hidden_act: str = "relu2"
    mlp_bias: bool = False
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    moe_latent_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    n_shared_experts: int = 1
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    # Everywhere
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = False
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    max_position_embeddings: int = 262144
    bos_token_id: int = 1
    eos_token_id: int | tuple[int, ...] = 2
    pad_token_id: int = 0
    mask_token_id: int = MASK_TOKEN_ID
    layer_fields: LayerFields = LayerFields()

    def __post_init__(self):
        def check(ok: bool, message: str):
            if not ok:
                raise ValueError(f"model config: {message}")

        pattern, letters = self.hybrid_override_pattern, " ".join(registry.kinds())
        check(bool(pattern), f"hybrid_override_pattern is empty; it names each layer's kind with one of {letters}")
        unknown = sorted(set(pattern) - set(registry.kinds()))
        check(not unknown, f"hybrid_override_pattern={pattern!r} holds {unknown}; known layer kinds are {letters}")
        for name, value in dataclasses.asdict(self).items():
            check(not isinstance(value, int) or value < 2**31, f"{name}={value} must be less than 2**31")
        for name in ("vocab_size", "hidden_size"):
            check(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive with layers {pattern!r}")
        for letter in sorted(set(pattern)):
            try:
                registry.kind(letter).check_config(self)
            except ValueError as error:
                raise ValueError(f"model config: {error}") from None
        check(
            self.mlp_hidden_act in ACTIVATIONS,
            f"mlp_hidden_act={self.mlp_hidden_act!r} is not one of {', '.join(ACTIVATIONS)}",
        )
        if self.time_step_limit is not None:
            low, high = self.time_step_limit
            check(0 <= low <= high, f"time_step_limit=({low}, {high}) must be 0 <= low <= high")
        check(bool(self.eos_token_ids), "eos_token_id is an empty list")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id"):
            for value in self.eos_token_ids if name == "eos_token_id" else (getattr(self, name),):
                check(0 <= value < self.vocab_size, f"{name}={value} lies outside vocab_size={self.vocab_size}")

    @property
    def num_hidden_layers(self) -> int:
        return len(self.hybrid_override_pattern)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text. The first is the one that closes a document of training text."""
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def expert_input_size(self) -> int:
        """The width of what the routed experts read and give: `hidden_size`, or `moe_latent_size` where it is set."""
        return self.moe_latent_size or self.hidden_size

    @property
    def mamba_inner(self) -> int:
        """H·P, the width of x and z in a Mamba-2 layer."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int:
        """H·P + 2·G·N, the width of xBC, over which the causal convolution runs."""
        return self.mamba_inner + 2 * self.n_groups * self.ssm_state_size

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "ModelConfig":
        """Reads the dictionary of a Hugging Face `config.json`, in any spelling of the family (config_reading.py).

        Raises:
          ValueError: for a missing field, a value of the wrong type, two that contradict each other, or a value that
            this model cannot have.
        """
        given = config_reading.canonical(raw)
        values = {}
        for field in dataclasses.fields(cls):
            if field.name in given:
                values[field.name] = _typed(field, given[field.name])
            elif field.default is dataclasses.MISSING:
                raise ValueError(f"model config: field {field.name!r} is missing")
        config = cls(**values)
        if (layers := given.get("num_hidden_layers", config.num_hidden_layers)) != config.num_hidden_layers:
            said_by = next(name for name in config_reading.LAYERS if raw.get(name) is not None)
            raise ValueError(
                f"model config: num_hidden_layers={layers} but {said_by}={config.hybrid_override_pattern!r} has "
                f"{config.num_hidden_layers} layers"
            )
        return config

    def to_hf(self) -> dict[str, Any]:
        """The dictionary that `from_hf` reads back to an equal config."""
        values = self.as_json() | {"num_hidden_layers": self.num_hidden_layers, "model_type": "nemotron_h"}
        for name, absent in (("time_step_limit", None), ("moe_latent_size", 0)):
            if values[name] == absent:
                del values[name]
        return values

    def as_json(self) -> dict[str, Any]:
        """The fields by name, as config.json of a run has them: without `layer_fields` where there are none."""
        values = dataclasses.asdict(self)
        if not self.layer_fields:
            del values["layer_fields"]
        return values


def _typed(field: dataclasses.Field, value: Any) -> Any:
    """`value` as the type that `field` declares, or a ValueError that names the field."""
    if field.name == "time_step_limit":
        limits = [config_reading.as_float(v) for v in value] if isinstance(value, list) else []
        if len(limits) != 2 or None in limits:
            raise ValueError(f"model config: time_step_limit must be two numbers, found {value!r}")
        return tuple(limits)
    if field.name == "layer_fields":
        if not isinstance(value, Mapping) or not all(isinstance(v, bool | int | float | str) for v in value.values()):
            raise ValueError(f"model config: layer_fields must name numbers, texts and truth values, found {value!r}")
        return LayerFields(value)
    if field.name == "eos_token_id":
        ids = config_reading.token_ids(value, "model config: eos_token_id")
        return ids if len(ids) > 1 else ids[0]
    ok = {
        bool: isinstance(value, bool),
        int: isinstance(value, int) and not isinstance(value, bool),
        float: math.isfinite(math.nan if (found := config_reading.as_float(value)) is None else found),
        str: isinstance(value, str),
    }[field.type]
    if not ok:
        raise ValueError(f"model config: {field.name} must be {field.type.__name__}, found {value!r}")
    return field.type(value)


def read_model_config(path: pathlib.Path) -> ModelConfig:
    """Reads a `config.json` file.

    Raises:
      ValueError: naming the file, if it is missing, is not JSON, or describes no model that exists.
    """
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a checkpoint folder holds a config.json") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from None
    try:
        return ModelConfig.from_hf(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Variant:
    """Which of the training schemes of the paper the two towers follow.

    Attributes:
      context: "frozen" trains the denoiser alone (the release); "trained" trains both towers, gradients reaching the
        context through keys, values and states; "tied" has one tower and one embedding for both, with two heads.
      context_loss: adds the mean next-token cross-entropy of the context head, weight 1.
      bidirectional_mamba: averages each denoiser scan with one over the reversed block.
      time_conditioning: adaLN-single conditioning of the denoiser on the noise level.

    Raises:
      ValueError: at construction, for a combination that could not train anything.
    """

    context: str = "frozen"
    context_loss: bool = False
    bidirectional_mamba: bool = False
    time_conditioning: bool = True

    def __post_init__(self):
        if self.context not in ("frozen", "trained", "tied"):
            raise ValueError(f"variant: context={self.context!r} is not one of 'frozen', 'trained', 'tied'")
        if self.context_loss and self.context == "frozen":
            raise ValueError(
                "variant: context_loss=True with context='frozen': a frozen tower has nothing to learn from a loss; "
                "use context='trained' or 'tied'"
            )
