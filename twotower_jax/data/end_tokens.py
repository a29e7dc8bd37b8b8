"""Which tokens end a text, as a folder with a tokenizer says, and which of them closes a document of training text."""

import pathlib
from typing import Any

from tokenizers import Tokenizer

from twotower_jax.checkpoint.config_file import CONFIG, generation_end_tokens
from twotower_jax.config_reading import token_ids
from twotower_jax.data.tokenizer import EOS_ID
from twotower_jax.files import CheckpointError, read_json
from twotower_jax.paths import as_path

_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def end_tokens(folder: str | pathlib.Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a text, the first of which closes a document.

    They are what the folder's generation_config.json names, else its config.json (a checkpoint's or a workdir's), else
    the tokenizer's end-of-text token by its own files, else token 2, as in the published model.

    Raises:
      CheckpointError: if one of these files is not JSON, or what it names are no token ids.
    """
    folder = as_path(folder)
    if (ids := generation_end_tokens(folder)) is not None:
        return ids
    config = _read(folder / CONFIG)
    if "objective" in config and isinstance(config.get("model"), dict):
        config = config["model"]  # of a workdir
    if config.get("eos_token_id") is not None:
        try:
            return token_ids(config["eos_token_id"], "eos_token_id")
        except ValueError as error:
            raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    for name in _TOKENIZER_FILES:
        token = _read(folder / name).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and (found := tokenizer.token_to_id(token)) is not None:
            return (found,)
    return (EOS_ID,)


def _read(path: pathlib.Path) -> dict[str, Any]:
    """An object of a JSON file; an empty one where there is none."""
    values = read_json(path) if path.is_file() else {}
    return values if isinstance(values, dict) else {}
