"""What lies beside the weights of a checkpoint folder: `config.json`, which may be anything, and the tokenizer."""

import os
import pathlib

from twotower_jax.checkpoint.files import CheckpointError, check_link, open_regular, read_bytes
from twotower_jax.config import ModelConfig, read_model_config
from twotower_jax.layers import registry

CONFIG = "config.json"
# Everything that is carried from folder to folder with the weights. Code (.py) and pickles never are.
SMALL_FILES = (
    CONFIG,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_MAX_BYTES = 64 << 20
# The release has 52 layers and 2,944 experts. Beyond these a file could make the reader build tables for minutes.
_MAX_LAYERS = 256
_MAX_EXPERTS = 1 << 16


def read_config(folder: pathlib.Path) -> ModelConfig:
    """The model's configuration.

    Raises:
      CheckpointError: if it is missing, unreadable, or describes no model that exists.
    """
    path = folder / CONFIG
    try:
        if os.path.lexists(path):
            check_link(path)
            open_regular(path).close()
        config = read_model_config(path)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    pattern = config.hybrid_override_pattern
    if len(pattern) > _MAX_LAYERS:
        raise CheckpointError(f"{path}: hybrid_override_pattern has {len(pattern)} layers; {_MAX_LAYERS} is the limit")
    experts = [count for count in (registry.kind(letter).num_experts(config) for letter in pattern) if count]
    if sum(experts) > _MAX_EXPERTS:
        raise CheckpointError(
            f"{path}: {len(experts)} layers with n_routed_experts={max(experts)} are more than {_MAX_EXPERTS} experts, "
            "the limit"
        )
    return config


def read_small_file(path: pathlib.Path) -> bytes:
    """A file to be carried over.

    Raises:
      CheckpointError: if it is a link that leads out of its folder, cannot be read, or is far too large.
    """
    check_link(path)
    return read_bytes(path, _MAX_BYTES)
