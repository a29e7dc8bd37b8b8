"""The block size that a checkpoint's denoiser was trained with, where the checkpoint says so."""

import pathlib

from twotower_jax.files import CheckpointError, read_json


def trained_block_size(folder: pathlib.Path) -> int | None:
    """The block size of the last training stage, or None where nothing records it.

    A workdir's config.json has it as `block_size` or as the last stage of `block_curriculum`; other checkpoints may
    have it in generation_config.json, as `trained_block_size` or, without that, as `block_size`.
    """
    for name in ("config.json", "generation_config.json"):
        try:
            settings = read_json(folder / name)
        except (OSError, CheckpointError):
            continue
        if not isinstance(settings, dict) or settings.get("objective", "denoiser") != "denoiser":
            continue
        # Where launch/tune.py wrote what it chose, block_size is that, and what was trained stands beside it.
        trained = settings.get("trained_block_size", settings.get("block_size"))
        size, stages = trained, settings.get("block_curriculum")
        if size is None and isinstance(stages, list) and stages and isinstance(stages[-1], list):
            size = stages[-1][-1]
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            return size
    return None
