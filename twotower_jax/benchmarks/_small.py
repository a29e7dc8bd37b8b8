"""The small model of the measurements that train: `configs/tiny.py` at half its width."""

from typing import Any

from absl import flags

from twotower_jax import command_line
from twotower_jax.train.config import TrainConfig, freeze, shipped


def define_data_flag() -> None:
    command_line.DEFINE_path("data", None, "Text to train on; default: the documentation that ships with Python.")


def small_config(seed: int, steps: int, **changes: Any) -> TrainConfig:
    """Settings of a run on the text of the flag `data`, 8 sequences of 128 tokens a step; fields by dotted names."""
    config = shipped("tiny")
    config.model.update(hidden_size=64, mamba_num_heads=4, moe_intermediate_size=64)
    config.model.moe_shared_expert_intermediate_size = 128
    config.update(seed=seed, steps=steps, sequence_length=128, batch_size=8, data=flags.FLAGS.data or "")
    config.log_every = max(1, steps // 4)
    config.update_from_flattened_dict(changes)
    return freeze(config)
