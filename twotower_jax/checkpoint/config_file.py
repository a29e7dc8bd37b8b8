"""What lies beside the weights of a checkpoint folder: `config.json`, which may be anything, and the tokenizer."""

import os
import pathlib
from typing import Any

from twotower_jax.config import ModelConfig, read_model_config
from twotower_jax.files import CheckpointError, check_link, open_regular, read_bytes, read_json

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


def is_run(raw: Any) -> bool:
    """Whether the content of a `config.json` is the settings of a training run, as its workdir has them."""
    return isinstance(raw, dict) and {"objective", "variant", "model"} <= raw.keys()


def _holds_run(path: pathlib.Path) -> bool:
    try:
        return is_run(read_json(path))
    except CheckpointError:
        return False


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
        if _holds_run(path):
            raise CheckpointError(
                f"{folder}: is a training workdir and no model's folder; --checkpoint and init_from take it once it "
                "has a checkpoint, and launch/export.py makes a Hugging Face folder of it"
            ) from None
        raise CheckpointError(str(error)) from None
    pattern = config.hybrid_override_pattern
    if len(pattern) > _MAX_LAYERS:
        raise CheckpointError(f"{path}: hybrid_override_pattern has {len(pattern)} layers; {_MAX_LAYERS} is the limit")
    if pattern.count("E") * config.n_routed_experts > _MAX_EXPERTS:
        raise CheckpointError(
            f"{path}: {pattern.count('E')} layers with n_routed_experts={config.n_routed_experts} are more than "
            f"{_MAX_EXPERTS} experts, the limit"
        )
    return config


def read_small_file(path: pathlib.Path) -> bytes:
    """A file to be carried over.

    Raises:
      CheckpointError: if it is a link that leads out of its folder, cannot be read, or is far too large.
    """
    check_link(path)
    return read_bytes(path, _MAX_BYTES)
