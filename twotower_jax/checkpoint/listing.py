"""The mapping of published tensors to parameters as text, from a folder's headers or a list of names and shapes."""

import math
import pathlib
import zlib
from collections.abc import Mapping

import numpy as np

from twotower_jax import parameters
from twotower_jax.checkpoint import huggingface
from twotower_jax.checkpoint.huggingface import Folder, Tensor, is_ignored, today_name
from twotower_jax.checkpoint.plan import make_plan
from twotower_jax.checkpoint.safetensors_file import Entry
from twotower_jax.config import ModelConfig
from twotower_jax.files import CheckpointError, parse_json, read_bytes
from twotower_jax.layers import registry
from twotower_jax.quantization import Method, kind_bytes

_MAX_BYTES = 64 << 20


def dry_run(path: pathlib.Path, time_init: str, quantize: Method | None = None) -> str:
    """What converting `path` would do, without reading any data.

    Args:
      path: a Hugging Face folder, or a JSON file (.gz or not) {"tensors": {name: shape}}.
      quantize: how weights would be stored in fewer bits, if so.

    Raises:
      CheckpointError: if tensors are missing, left over, or of a wrong shape.
      ValueError: if they cannot be quantized so.
    """
    folder = huggingface.open_folder(path) if path.is_dir() else read_list(path)
    plan = make_plan(folder.config, folder.single_tower, time_init)
    table = huggingface.own_table(folder)
    huggingface.check(folder, table)
    huggingface.say_ignored(folder)
    sources = {target: name for name, targets in plan.targets.items() for target in targets}
    lines = [f"{path}: {'one tower, which becomes both' if folder.single_tower else 'two towers'}, "
             f"layers {folder.config.hybrid_override_pattern}"]  # fmt: skip
    for parameter in plan.table.values():
        names = [sources.get(str(name)) for name in parameter.tensors.flat]
        origin = f"made here, {time_init}"
        if names[0] is not None:
            span = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
            origin = f"{len(names)} × {list(parameter.tensor_shape)}: {span}"
        lines.append(f"  {'/'.join(parameter.path)} {list(parameter.shape)} <- {origin}")
    lines.append(
        f"source: {len(folder.tensors):,} tensors, {parameters.count(table):,} parameters; nothing missing, "
        "nothing left over"
    )
    lines.append(f"result: {len(plan.places):,} tensors, {parameters.count(plan.table):,} parameters")
    if quantize is not None:
        lines.append(f"bytes, where {quantize.name} leaves arrays in bfloat16 (and what stays float32 in that):")
        sizes = kind_bytes(plan.table, quantize)
        lines += [f"  {size:>14,}  {kind}" for kind, size in {**sizes, "in all": sum(sizes.values())}.items()]
    return "\n".join(lines)


def read_list(path: pathlib.Path) -> Folder:
    """A list of names and shapes in place of a folder; its configuration follows from them.

    Raises:
      CheckpointError: if it is no such list, or not one of this model.
    """
    try:
        data = read_bytes(path, _MAX_BYTES)
        if path.suffix == ".gz":
            data = zlib.decompressobj(wbits=31).decompress(data, _MAX_BYTES)
        raw = parse_json(data)
    except CheckpointError:
        raise
    except (ValueError, RecursionError, zlib.error) as error:
        raise CheckpointError(f"{path}: not a JSON list of tensors ({error})") from None
    shapes = raw.get("tensors") if isinstance(raw, dict) else None
    if not isinstance(shapes, dict) or not shapes:
        raise CheckpointError(f'{path}: is not {{"tensors": {{name: shape}}}}')
    for name, shape in shapes.items():
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
            raise CheckpointError(f"{path}: tensor {name!r} has shape {shape!r}")
    total = sum(map(math.prod, shapes.values()))
    if raw.get("parameters", total) != total:
        raise CheckpointError(f"{path}: says {raw['parameters']} parameters, its tensors have {total}")
    float32 = np.dtype(np.float32)  # A list says nothing of dtypes.
    shapes = {today_name(name): shape for name, shape in shapes.items()}
    listed = {name: Tensor(path, Entry(float32, tuple(shape), 0, 0)) for name, shape in shapes.items()}
    ignored = {name: tensor for name, tensor in listed.items() if is_ignored(name)}
    tensors = {name: tensor for name, tensor in listed.items() if name not in ignored}
    single = not any(name.startswith(("context_tower.", "denoiser_tower.")) for name in shapes)
    prefix = "backbone." if single else "context_tower."
    try:
        config = infer_config({k.removeprefix(prefix): v for k, v in shapes.items() if k.startswith(prefix)})
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: its tensors are not those of a tower of this model ({error!r})") from None
    return Folder(path, config, tensors, single, (), ignored)


def infer_config(shapes: Mapping[str, list[int]]) -> ModelConfig:
    """A configuration whose tower has these tensors (names below the tower's prefix).

    How a width is divided into heads and groups cannot be seen from it; any division has the same tensors.
    """
    pattern, values = "", {}
    vocab, hidden = shapes["embeddings.weight"]
    while f"layers.{len(pattern)}.norm.weight" in shapes:
        prefix = f"layers.{len(pattern)}.mixer."
        mixer = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        for letter, kind in reversed(list(registry.kinds().items())):
            if (found := kind.infer(mixer)) is not None:
                pattern, values = pattern + letter, values | found
                break
        else:
            raise ValueError(f"{prefix}… is of no known layer kind")
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        hybrid_override_pattern=pattern,
        **{"mamba_num_heads": 1, "mamba_head_dim": 1, "ssm_state_size": 1, "n_groups": 1} | values,
    )
