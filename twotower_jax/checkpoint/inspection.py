"""What a checkpoint folder of any kind holds, without reading its arrays."""

import collections
import math
import pathlib
from typing import Any

from twotower_jax.checkpoint import arrays, huggingface, manifest, orbax_steps, store, workdir
from twotower_jax.files import CheckpointError, check_folder
from twotower_jax.parameters import flatten

Description = dict[str, Any]
_MODEL_FIELDS = (
    "hybrid_override_pattern", "hidden_size", "vocab_size", "n_routed_experts", "num_experts_per_tok",
    "mamba_num_heads", "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip


def describe(path: pathlib.Path) -> Description:
    """A folder's kind, model, arrays and files, as JSON values.

    Raises:
      CheckpointError: if it is no checkpoint or a broken one.
      ValueError: if there is no such folder.
    """
    check_folder(path, "give a Hugging Face folder, a converted one or a workdir")
    if (path / store.MANIFEST).exists():
        kind, about, config, found = _converted(path)
    elif (path / workdir.CHECKPOINTS).exists():
        kind, about, config, found = _workdir(path)
    else:
        kind, about, config, found = _hugging_face(path)
    totals = collections.Counter(array["dtype"] for array in found)
    return {
        "path": str(path),
        "kind": kind,
        **about,
        "model": {field: config.get(field) for field in _MODEL_FIELDS},
        "arrays": len(found),
        "parameters": about.pop("parameters", None) or sum(math.prod(array["shape"]) for array in found),
        "dtypes": dict(sorted(totals.items())),
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "contents": found,
    }


def text(description: Description, *, contents: bool) -> str:
    """A description for a human reader; with `contents` one line for each array as well."""
    lines = []
    for key, value in description.items():
        if key == "contents":
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{name} {item}" for name, item in value.items())
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        lines.append(f"{key}: {value}")
    if contents:
        lines += [f"  {array['name']} {array['dtype']} {array['shape']}" for array in description["contents"]]
    return "\n".join(lines)


def _hugging_face(path: pathlib.Path):
    folder = huggingface.open_folder(path)
    found = [
        {"name": name, "dtype": str(tensor.entry.dtype), "shape": list(tensor.entry.shape), "file": tensor.file.name}
        for name, tensor in sorted(folder.tensors.items())
    ]
    about = {"towers": 1 if folder.single_tower else 2, "files": len({tensor["file"] for tensor in found})}
    return "Hugging Face folder", about, folder.config.to_hf(), found


def _converted(path: pathlib.Path):
    opened = store.open_store(path, verify=False)
    listed: manifest.Manifest = opened.manifest
    found = [
        {
            "name": "/".join(array_path),
            "dtype": str(arrays.stored_dtype(path / arrays.PARAMS, array_path)),
            "shape": list(parameter.shape),
            "tensors": parameter.tensors.size,
        }
        for array_path, parameter in opened.arrays.items()
    ]
    about = {
        "source": listed.source,
        "revision": listed.revision,
        "source kind": listed.kind,
        "time_init": listed.time_init,
        "quantization": listed.quantization,
        "parameters": listed.parameters,
        "tensors": listed.tensors,
        "files": len(listed.files),
    }
    return "converted checkpoint", about, opened.config.to_hf(), found


def _workdir(path: pathlib.Path):
    settings, (model, _, _) = workdir.read_settings(path), workdir.described(path)
    step = orbax_steps.latest_step(path / workdir.CHECKPOINTS)
    if step is None:
        raise CheckpointError(f"{path}: this workdir has no finished checkpoint yet")
    trees = {"": orbax_steps.stored_arrays(path / workdir.CHECKPOINTS / str(step) / workdir.PARAMS)}
    if (path / workdir.FROZEN).is_dir():
        trees["frozen: "] = orbax_steps.stored_arrays(path / workdir.FROZEN / workdir.PARAMS)
    found = [
        {"name": label + "/".join(array_path), "dtype": str(array.dtype), "shape": list(array.shape)}
        for label, tree in trees.items()
        for array_path, array in flatten(tree).items()
    ]
    return "training workdir", {"objective": settings["objective"], "newest step": step}, model.to_hf(), found
