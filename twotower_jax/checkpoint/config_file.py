"""What lies beside the weights of a checkpoint folder: `config.json`, which may be anything, and the tokenizer."""

import dataclasses
import pathlib
from typing import Any

from twotower_jax.config import ModelConfig, read_model_config
from twotower_jax.config_reading import token_ids
from twotower_jax.files import CheckpointError, check_link, is_there, open_regular, read_bytes, read_json
from twotower_jax.layers import registry

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
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
    GENERATION_CONFIG,
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
    """The model's configuration, with the end tokens that generation_config.json names, if it does.

    Raises:
      CheckpointError: if it is missing, unreadable, or describes no model that exists.
    """
    path = folder / CONFIG
    try:
        if is_there(path):
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
    experts = [count for count in (registry.kind(letter).num_experts(config) for letter in pattern) if count]
    if sum(experts) > _MAX_EXPERTS:
        raise CheckpointError(
            f"{path}: {len(experts)} layers with n_routed_experts={max(experts)} are more than {_MAX_EXPERTS} experts, "
            "the limit"
        )
    return with_end_tokens(config, folder)


def with_end_tokens(config: ModelConfig, folder: pathlib.Path) -> ModelConfig:
    """`config` with the end tokens of the folder's generation_config.json in place of its own, where it names any: what
    `transformers` does when it generates.

    Raises:
      CheckpointError: if the file cannot be read, or what it names are no tokens of this vocabulary.
    """
    ids = generation_end_tokens(folder)
    if ids is None:
        return config
    try:
        return dataclasses.replace(config, eos_token_id=ids if len(ids) > 1 else ids[0])
    except ValueError as error:
        raise CheckpointError(f"{folder / GENERATION_CONFIG}: {error}") from None


def generation_end_tokens(folder: pathlib.Path) -> tuple[int, ...] | None:
    """The `eos_token_id` of the folder's generation_config.json; None without the file or the field.

    Raises:
      CheckpointError: if the file cannot be read, or the field is neither a token id nor a list of them.
    """
    path = folder / GENERATION_CONFIG
    if not is_there(path):
        return None
    check_link(path)
    values = read_json(path)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    if values.get("eos_token_id") is None:
        return None
    try:
        return token_ids(values["eos_token_id"], "eos_token_id")
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_small_file(path: pathlib.Path) -> bytes:
    """A file to be carried over.

    Raises:
      CheckpointError: if it is a link that leads out of its folder, cannot be read, or is far too large.
    """
    check_link(path)
    return read_bytes(path, _MAX_BYTES)
