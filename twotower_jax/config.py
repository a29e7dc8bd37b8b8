"""The model's shape (`ModelConfig`) and the variant of the two-tower scheme (`Variant`).

Field names of `ModelConfig` are those of the published `config.json` (model_type `nemotron_h`), so that a reader can
hold the two side by side. Fields that the published code ignores (the rope fields, for one) are ignored here too.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

LAYER_KINDS = {"M": "mamba", "*": "attention", "E": "experts", "-": "mlp"}
ACTIVATIONS = ("relu2", "relu", "silu", "gelu")
MASK_TOKEN_ID = 3  # The release keeps it out of config.json.


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of one tower; both towers share it.

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
    eos_token_id: int = 2
    pad_token_id: int = 0
    mask_token_id: int = MASK_TOKEN_ID

    def __post_init__(self):
        def check(ok: bool, message: str):
            if not ok:
                raise ValueError(f"model config: {message}")

        pattern = self.hybrid_override_pattern
        check(bool(pattern), "hybrid_override_pattern is empty; it names each layer's kind with one of M * E -")
        unknown = sorted(set(pattern) - set(LAYER_KINDS))
        check(not unknown, f"hybrid_override_pattern={pattern!r} holds {unknown}; known layer kinds are M * E -")
        positive = ["vocab_size", "hidden_size"]
        if "M" in pattern:
            positive += ["mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel", "chunk_size"]
        if "*" in pattern:
            positive += ["num_attention_heads", "num_key_value_heads", "head_dim"]
        if "E" in pattern:
            positive += ["n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"]
        if "-" in pattern:
            positive += ["intermediate_size"]
        for name in positive:
            check(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive with layers {pattern!r}")
        if "M" in pattern:
            check(self.conv_kernel >= 2, f"conv_kernel={self.conv_kernel} must be at least 2: it reaches back in time")
            self._check_divides("n_groups", "mamba_num_heads")
        if "*" in pattern:
            self._check_divides("num_key_value_heads", "num_attention_heads")
        if "E" in pattern:
            self._check_divides("n_group", "n_routed_experts")
            check(self.topk_group <= self.n_group, f"topk_group={self.topk_group} exceeds n_group={self.n_group}")
            check(
                self.num_experts_per_tok <= self.n_routed_experts,
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds n_routed_experts={self.n_routed_experts}",
            )
            check(
                self.n_group == 1 or self.n_routed_experts // self.n_group >= 2,
                f"n_group={self.n_group} leaves fewer than two of n_routed_experts={self.n_routed_experts} in a group, "
                "and a group is scored by its best two",
            )
            check(self.n_shared_experts in (0, 1), f"n_shared_experts={self.n_shared_experts} must be 0 or 1")
            if self.n_shared_experts:
                check(
                    self.moe_shared_expert_intermediate_size > 0,
                    f"n_shared_experts={self.n_shared_experts} needs a positive moe_shared_expert_intermediate_size, "
                    f"not {self.moe_shared_expert_intermediate_size}",
                )
        check(
            self.mlp_hidden_act in ACTIVATIONS,
            f"mlp_hidden_act={self.mlp_hidden_act!r} is not one of {', '.join(ACTIVATIONS)}",
        )
        if self.time_step_limit is not None:
            low, high = self.time_step_limit
            check(0 <= low <= high, f"time_step_limit=({low}, {high}) must be 0 <= low <= high")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id"):
            value = getattr(self, name)
            check(0 <= value < self.vocab_size, f"{name}={value} lies outside vocab_size={self.vocab_size}")

    def _check_divides(self, small: str, large: str):
        if getattr(self, large) % getattr(self, small):
            raise ValueError(
                f"model config: {small}={getattr(self, small)} does not divide {large}={getattr(self, large)}"
            )

    @property
    def num_hidden_layers(self) -> int:
        return len(self.hybrid_override_pattern)

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
        """Reads the dictionary of a Hugging Face `config.json`.

        Raises:
          ValueError: for a missing field, a value of the wrong type, or a value that this model cannot have.
        """
        if not isinstance(raw, dict):
            raise ValueError(f"model config: expected a JSON object, found {type(raw).__name__}")
        values = {}
        for field in dataclasses.fields(cls):
            if raw.get(field.name) is not None:
                values[field.name] = _typed(field, raw[field.name])
            elif field.default is dataclasses.MISSING:
                raise ValueError(f"model config: field {field.name!r} is missing")
        config = cls(**values)
        layers = raw.get("num_hidden_layers", config.num_hidden_layers)
        if layers != config.num_hidden_layers:
            raise ValueError(
                f"model config: num_hidden_layers={layers} but hybrid_override_pattern="
                f"{config.hybrid_override_pattern!r} has {config.num_hidden_layers} layers"
            )
        if raw.get("tie_word_embeddings"):
            raise ValueError("model config: tie_word_embeddings=true, but Nemotron-TwoTower has separate heads")
        if raw.get("mamba_hidden_act", "silu") != "silu":
            raise ValueError(f"model config: mamba_hidden_act={raw['mamba_hidden_act']!r}; only 'silu' exists")
        return config

    def to_hf(self) -> dict[str, Any]:
        """The dictionary that `from_hf` reads back to an equal config."""
        values = dataclasses.asdict(self) | {"num_hidden_layers": self.num_hidden_layers, "model_type": "nemotron_h"}
        if values["time_step_limit"] is None:
            del values["time_step_limit"]
        return values


def _typed(field: dataclasses.Field, value: Any) -> Any:
    """`value` as the type that `field` declares, or a ValueError that names the field."""
    if field.name == "time_step_limit":
        if not isinstance(value, list | tuple) or len(value) != 2 or not all(_is_number(v) for v in value):
            raise ValueError(f"model config: time_step_limit must be two numbers, found {value!r}")
        return tuple(float(v) for v in value)
    ok = {
        bool: isinstance(value, bool),
        int: isinstance(value, int) and not isinstance(value, bool),
        float: _is_number(value) and math.isfinite(float(value)),
        str: isinstance(value, str),
    }[field.type]
    if not ok:
        raise ValueError(f"model config: {field.name} must be {field.type.__name__}, found {value!r}")
    return field.type(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | str) and not isinstance(value, bool) and _parses_as_float(value)


def _parses_as_float(value: Any) -> bool:
    try:
        float(value)  # A JSON infinity arrives as the string "inf" from some writers.
    except (ValueError, OverflowError):
        return False
    return True


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
