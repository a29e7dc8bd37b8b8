"""Every spelling of a `config.json` of the Nemotron-H family, as the names and kinds of value that `ModelConfig` has.

NVIDIA published `hybrid_override_pattern`; `transformers` writes a list of words for the layers, leaves
`num_hidden_layers` out, and spells infinity as {"__float__": "Infinity"}; other programs have names of their own. Where
a file says one thing twice, both must agree. null says nothing.
"""

import math
from collections.abc import Mapping
from typing import Any

# Other names of a field. `expand` is no field: heads times their width count, and the family's members contradict it.
_NAMES = {
    "layer_norm_epsilon": ("rms_norm_eps", "norm_eps"),
    "mamba_num_heads": ("mamba_n_heads",),
    "mamba_head_dim": ("mamba_d_head",),
    "ssm_state_size": ("mamba_d_state", "mamba_state_dim"),
    "n_groups": ("mamba_n_groups", "mamba_num_groups"),
    "conv_kernel": ("mamba_d_conv",),
    "chunk_size": ("mamba_chunk_size",),
    "use_conv_bias": ("mamba_conv_bias",),
    "use_bias": ("mamba_proj_bias",),
    "time_step_min": ("mamba_dt_min",),
    "time_step_max": ("mamba_dt_max",),
    "time_step_floor": ("mamba_dt_init_floor",),
    "time_step_limit": ("mamba_dt_limit",),
    "expand": ("mamba_expand",),
    "mamba_hidden_act": ("mamba_act",),
    "head_dim": ("attention_head_dim",),
    "n_routed_experts": ("num_local_experts", "num_experts"),
}
_PATTERN = "hybrid_override_pattern"
_LAYER_LISTS = ("layers_block_type", "layer_types")
LAYERS = (_PATTERN, *_LAYER_LISTS)  # What may say which layers there are.
# The words of `transformers`, then those of older files, then the letters themselves.
_WORDS = {
    **dict.fromkeys(("linear_attention", "mamba", "mamba2", "M"), "M"),
    **dict.fromkeys(("full_attention", "attention", "*"), "*"),
    **dict.fromkeys(("moe", "E"), "E"),
    **dict.fromkeys(("mlp", "-"), "-"),
}
# What this model computes, whatever a file says: fields that must have one of these values where they are there.
_ONLY = {
    "mamba_hidden_act": ("silu", "swish"),
    "sliding_window": (),
    "quantization_config": (),
    "scoring_func": ("sigmoid",),
    "mamba_rms_norm": (True,),
    "norm_before_gate": (False,),
    "mamba_norm_before_gate": (False,),
}


def canonical(raw: Any) -> dict[str, Any]:
    """The dictionary of a `config.json` with one spelling for everything: nulls left out, the layers as a
    `hybrid_override_pattern`, infinities as numbers, and fields under the names that `ModelConfig` has for them.

    Raises:
      ValueError: if it is no dictionary, says one thing in two ways that contradict each other, or asks for what this
        model does not compute.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"model config: expected a JSON object, found {type(raw).__name__}")
    values = {name: number(value) for name, value in raw.items() if value is not None}
    values = _with_pattern(_renamed(values))
    for name, allowed in _ONLY.items():
        if name in values and not any(values[name] is v or values[name] == v for v in allowed):
            only = f"only {allowed[0]!r} exists" if allowed else "the model has no such thing"
            raise ValueError(f"model config: {name}={values[name]!r}; {only}")
    if values.get("tie_word_embeddings"):
        raise ValueError("model config: tie_word_embeddings=true, but Nemotron-TwoTower has separate heads")
    return values


def number(value: Any) -> Any:
    """`value`, in which {"__float__": "Infinity"}, as `transformers` writes what JSON cannot, is the number itself."""
    if isinstance(value, list | tuple):
        return [number(v) for v in value]
    if isinstance(value, dict) and set(value) == {"__float__"} and as_float(value["__float__"]) is not None:
        return as_float(value["__float__"])
    return value


def as_float(value: Any) -> float | None:
    """A number, or a text that spells one ("1e-5", "Infinity", "-inf"), as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def token_ids(value: Any, name: str) -> tuple[int, ...]:
    """A token id or a list of them, each once.

    Raises:
      ValueError: naming the field, if it is neither.
    """
    ids = tuple(dict.fromkeys(value)) if _is_list_of_ids(value) else (value,)
    if not ids or not all(type(i) is int for i in ids):
        raise ValueError(f"{name} must be int or a list of them, found {value!r}")
    return ids


def _is_list_of_ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(i) is int for i in value)


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with every field under its first name."""
    out = dict(values)
    for name, others in _NAMES.items():
        for other in others:
            if other not in values:
                continue
            if name in out and not _same(out[name], values[other]):
                first = next(n for n in (name, *others) if n in values)
                raise ValueError(
                    f"model config: {first}={values[first]!r} contradicts {other}={values[other]!r}, which is the same "
                    "under another name; leave out the wrong one"
                )
            out[name] = values[other]
    return out


def _with_pattern(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with the layers as a pattern."""
    said = {
        name: values[name] if name == _PATTERN else _pattern(name, values[name]) for name in LAYERS if name in values
    }
    if not said:
        return values
    (first, pattern), *others = said.items()
    for name, other in others:
        if other != pattern:
            raise ValueError(
                f"model config: {first} says the layers are {pattern!r}, {name} says {other!r}; leave out the wrong one"
            )
    return values | {_PATTERN: pattern}


def _pattern(name: str, words: Any) -> str:
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise ValueError(f"model config: {name} must be a list of words, one per layer, found {words!r}")
    if unknown := sorted(set(words) - set(_WORDS)):
        raise ValueError(f"model config: {name} holds {unknown}; known layers are {', '.join(map(repr, _WORDS))}")
    return "".join(_WORDS[word] for word in words)


def _same(a: Any, b: Any) -> bool:
    """Whether two values mean the same: "1e-5" is 1e-05."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    x, y = as_float(a), as_float(b)
    if x is not None and y is not None:
        return x == y or (math.isnan(x) and math.isnan(y))
    return a == b
