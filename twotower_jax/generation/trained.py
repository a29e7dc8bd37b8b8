"""Whether a checkpoint's denoiser was trained, and with which block size, where the checkpoint says so."""

import pathlib

from twotower_jax.files import CheckpointError, read_json


def untrained_denoiser(folder: pathlib.Path) -> bool:
    """Whether the denoiser is a copy of a backbone that nothing has trained: generation in blocks is then noise.

    So it is from the workdir of a backbone, and from a single tower as published or converted.
    """
    for name, field, untrained in (
        ("conversion.json", "kind", "single_tower"),
        ("config.json", "objective", "autoregressive"),
        ("config.json", "architectures", ["NemotronHForCausalLM"]),
    ):
        try:
            values = read_json(folder / name)
        except (OSError, CheckpointError):
            continue
        if isinstance(values, dict) and field in values:
            return values[field] == untrained
    return False


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
        if not isinstance(settings, dict) or settings.get("objective") == "autoregressive":
            continue
        # Where launch/tune.py wrote what it chose, block_size is that, and what was trained stands beside it.
        trained = settings.get("trained_block_size", settings.get("block_size"))
        size, stages = trained, settings.get("block_curriculum")
        if size is None and isinstance(stages, list) and stages and isinstance(stages[-1], list):
            size = stages[-1][-1]
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            return size
    return None
