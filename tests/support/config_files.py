"""Config files of small runs, for tests that start `launch/train.py`."""

from collections.abc import Mapping
from typing import Any

# With all kinds of layers at hand; two devices divide each.
MODEL = {
    "hidden_size": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 4,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "moe_shared_expert_intermediate_size": 8,
}
# A denoiser's run, each step of which is logged.
_SHORT = {
    "objective": "denoiser",
    "vocab_size": 266,
    "sequence_length": 32,
    "block_size": 8,
    "batch_size": 8,
    "log_every": 1,
}


def config_file(pattern: str, settings: Mapping[str, Any]) -> str:
    """The text of a config file: `MODEL` with these layers, and settings by their names, such as "mesh.fsdp"."""
    model = MODEL | {"hybrid_override_pattern": pattern}
    lines = "".join(f"    config.{name} = {value!r}\n" for name, value in (_SHORT | settings).items())
    return f"""
from twotower_jax.train.config import base_config


def get_config():
    config = base_config({model!r})
{lines}    return config
"""
