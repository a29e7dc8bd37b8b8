"""This program's parameters → a Hugging Face folder: the names, dtypes, shapes and bytes they came with.

Of a converted checkpoint it is streamed tensor by tensor; what a training workdir holds is loaded first.
"""

import json
import math
import pathlib
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from twotower_jax import parameters, randomness
from twotower_jax.atomic import new_folder
from twotower_jax.checkpoint import adapter as adapters
from twotower_jax.checkpoint import arrays, huggingface, load, manifest, store, workdir
from twotower_jax.checkpoint.arrays import PARAMS
from twotower_jax.checkpoint.config_file import CONFIG, SMALL_FILES, read_small_file
from twotower_jax.checkpoint.manifest import write_file
from twotower_jax.checkpoint.pipeline import in_order
from twotower_jax.checkpoint.plan import table_places
from twotower_jax.checkpoint.safetensors_file import DTYPES
from twotower_jax.config import MASK_TOKEN_ID
from twotower_jax.files import check_folder, read_file, read_json
from twotower_jax.parameters import Params, parameter_table
from twotower_jax.progress import Progress
from twotower_jax.two_tower import Backbone, TwoTower

_ARCHITECTURES = {"both": "NemotronHTwoTowerForCausalLM"}
_SINGLE_TOWER = "NemotronHForCausalLM"
_SOURCE_TOWERS = {"two_tower": "both", "single_tower": "one"}  # By the manifest's kind.
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Tensor(NamedTuple):
    """A tensor to be written: how it is stored, and a function that reads it."""

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def export_adapter(checkpoint: pathlib.Path, output: pathlib.Path, tower: str) -> int:
    """Writes the adapter of a training workdir as PEFT's files; `output` as in `export`.

    Args:
      tower: "both" names modules as the whole folder of this model has them; one tower as its single-tower folder.

    Returns:
      the number of tensors.

    Raises:
      CheckpointError: if the checkpoint is broken.
      ValueError, OSError: if it is no adapter's workdir, the tower has no adapter, or it cannot be written.
    """
    check_folder(checkpoint, "give the workdir of an adapter")
    found, (config, variant, single) = adapters.from_workdir(checkpoint), workdir.described(checkpoint)
    modules = adapters.modules_of(parameter_table(Backbone(config) if single else TwoTower(config, variant)))
    if tower != "both" and not single:
        prefix = f"{tower}_tower."
        tensors = {f"backbone.{n.removeprefix(prefix)}": t for n, t in found.tensors.items() if n.startswith(prefix)}
        if len(tensors) < len(found.tensors):
            raise ValueError(
                f"{checkpoint}: its adapter is {'also' if tensors else 'only'} of another tower than --tower={tower}"
            )
        base = {tower: found.base[tower]}
        found = found._replace(tensors=tensors, base=base, tower=tower)
        modules = [f"backbone.{n.removeprefix(prefix)}" if n.startswith(prefix) else n for n in modules]
    return adapters.write(found, output, modules)


def export(
    checkpoint: pathlib.Path,
    output: pathlib.Path,
    tower: str,
    max_shard_size: int,
    verify: bool = True,
    *,
    merge: bool = False,
    adapter: pathlib.Path | None = None,
    adapter_tower: str | None = None,
) -> int:
    """Writes a folder; afterwards `output` is whole, or is not there where anything went wrong.

    Args:
      checkpoint: anything that `--checkpoint` takes.
      output: must not exist.
      tower: "both", or one of them as a single-tower folder.
      max_shard_size: in bytes, of one file; a larger tensor gets a file of its own.
      verify: compares the checkpoint's files with their recorded hashes.
      merge: adds the update of an adapter, a workdir's own or one of PEFT's files, to the matrices that it is of:
        summed in float32 and rounded to the dtype that they have in the base.
      adapter, adapter_tower: the folder of PEFT's files, see `load.load`.

    Returns:
      the number of tensors.

    Raises:
      CheckpointError: if the checkpoint is broken.
      ValueError, OSError: if it is an adapter's workdir and not to be merged, or holds no adapter and is, if the
        published code would compute something else from the output, or it cannot be written.
    """
    if max_shard_size <= 0:
        raise ValueError(f"max_shard_size={max_shard_size} must be positive")
    holds_adapter = checkpoint.is_dir() and workdir.read_base(checkpoint) is not None
    if holds_adapter and not merge:
        raise ValueError(
            f"{checkpoint}: holds an adapter; give --adapter to write it by itself, in PEFT's files, or --merge for a "
            "whole folder with its update added"
        )
    if merge and not holds_adapter and adapter is None:
        raise ValueError(f"{checkpoint}: holds no adapter to merge; give one with --adapter=DIR")
    if adapter is None and (checkpoint / store.MANIFEST).exists():
        opened = store.open_store(checkpoint, verify)
        if opened.manifest.method is not None:
            raise ValueError(
                f"{checkpoint}: its weights are quantized ({opened.manifest.method.name}), and cannot be given back "
                "bit for bit; export the checkpoint or the folder that it was made from"
            )
        tensors = stored_tensors(opened)
        came = _SOURCE_TOWERS[opened.manifest.kind]
        config = read_json(checkpoint / CONFIG)
    else:
        loaded = load.load_merged(checkpoint, adapter, adapter_tower) if merge else load.load(checkpoint)
        check_expressible(loaded.model, tower)
        if (checkpoint / workdir.CHECKPOINTS).exists():
            for remark in remarks(loaded.model, workdir.read_settings(checkpoint)["objective"], tower):
                print(f"warning: {checkpoint}: {remark}", file=sys.stderr)
        tensors = model_tensors(loaded.model, loaded.params)
        # A workdir's own config.json is about the run.
        came, config = None, loaded.model.config.to_hf() | {"tie_word_embeddings": False}
        if not merge and not (checkpoint / workdir.CHECKPOINTS).exists():
            came = "one" if huggingface.open_folder(checkpoint).single_tower else "both"
            config = read_json(checkpoint / CONFIG)
    tensors = _select(tensors, tower)
    changed = config if came == ("both" if tower == "both" else "one") else _config(config, tower)
    small = {
        name: read_small_file(checkpoint / name)
        for name in SMALL_FILES
        if name != CONFIG and (checkpoint / name).exists()
    }
    small[CONFIG] = read_small_file(checkpoint / CONFIG) if changed is config else _json(changed)
    write_folder(output, tensors, small, max_shard_size)
    return len(tensors)


def check_expressible(model: TwoTower, tower: str) -> None:
    """Refuses a model of which the published code, reading the exported folder, would compute something else.

    What it has no settings for, but computes alike, is written out: see `model_tensors`.

    Raises:
      ValueError: naming the setting and its value.
    """
    if model.variant.bidirectional_mamba and tower != "context":
        raise ValueError(
            "variant.bidirectional_mamba=True: the published code scans the denoiser's blocks forward only, and would "
            "compute something else; the context tower alone can be exported (--tower=context)"
        )
    config = model.config
    if "E" in config.hybrid_override_pattern and not config.n_shared_experts:
        raise ValueError(
            "n_shared_experts=0: the published code has a shared expert in every layer with experts, and would draw one"
        )


def remarks(model: TwoTower, objective: str, tower: str) -> list[str]:
    """What whoever uses the exported folder of a training run has to know, a line each."""
    lines = []
    if objective == "autoregressive" and tower != "context":
        lines.append(
            "the denoiser never trained; what is written for it is the backbone (--tower=context exports that alone)"
        )
    if tower == "both" and model.config.mask_token_id != MASK_TOKEN_ID:
        lines.append(
            f"mask_token_id={model.config.mask_token_id} stands in config.json, where the published code does not look "
            f"for it: give it to its generation, whose default is {MASK_TOKEN_ID}"
        )
    return lines


def write_folder(
    output: pathlib.Path, tensors: Mapping[str, Tensor], small: Mapping[str, bytes], max_shard_size: int
) -> None:
    """Writes a Hugging Face folder: tensors in the order given, their index, and `small` files by name."""
    shards = list(_shards(tensors, max_shard_size))
    total = sum(tensor.size for tensor in tensors.values())
    progress = Progress("exporting", total)
    weight_map = {}
    with new_folder(output) as partial:
        for name, content in small.items():
            write_file(partial / name, [content])
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= dict.fromkeys(names, file)
            write_file(partial / file, _file_pieces({name: tensors[name] for name in names}, progress))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_file(partial / huggingface.INDEX, [_json(index)])
    progress.finish()


def stored_tensors(opened: store.Store) -> dict[str, Tensor]:
    """The tensors of a converted checkpoint."""
    tensors = {}
    dtypes = {path: arrays.stored_dtype(opened.path / PARAMS, path) for path in opened.table}
    for name, (parameter, index) in table_places(opened.table).items():
        file = f"{PARAMS}/{arrays.chunk_name(parameter, index)}"
        dtype = dtypes[parameter.path]

        def read(file=file, parameter=parameter, dtype=dtype) -> np.ndarray:
            data = read_file(opened.path / file)
            if opened.verified:
                manifest.compare(opened.path / file, manifest.digest_of(data.data), opened.manifest.files[file])
            return arrays.chunk_tensor(opened.path / file, data, parameter, dtype)

        tensors[name] = Tensor(dtype, parameter.tensor_shape, read)
    return tensors


def model_tensors(model: TwoTower, params: Params) -> dict[str, Tensor]:
    """The tensors of a loaded model. What its variant shares or leaves out is written out, as the published layout
    has it: a tied tower twice, and without time conditioning one that changes nothing."""
    table, flat = parameter_table(model), parameters.flatten(params)
    if not model.variant.time_conditioning:
        fresh = parameters.fresh(parameter_table(TwoTower(model.config)))
        flat |= parameters.flatten(parameters.initialize(fresh, randomness.key(0)))
        table |= fresh
    tensors = {}
    for name, (parameter, index) in table_places(table).items():
        array = flat[parameter.path]

        def read(array=array, parameter=parameter, index=index) -> np.ndarray:
            return parameter.to_tensor(np.asarray(array[index]))

        tensors[name] = Tensor(np.dtype(array.dtype), parameter.tensor_shape, read)
    if model.variant.context == "tied":
        prefix = "context_tower."
        tensors |= {f"denoiser_tower.{name.removeprefix(prefix)}": tensor
                    for name, tensor in tensors.items() if name.startswith(prefix)}  # fmt: skip
    return tensors


def _select(tensors: dict[str, Tensor], tower: str) -> dict[str, Tensor]:
    """The tensors of one tower under single-tower names, or all of them; sorted by name."""
    if tower != "both":
        prefix = f"{tower}_tower."
        head = "context_lm_head.weight" if tower == "context" else "lm_head.weight"
        chosen = {f"backbone.{name.removeprefix(prefix)}": t for name, t in tensors.items() if name.startswith(prefix)}
        tensors = chosen | {"lm_head.weight": tensors[head]}
    return dict(sorted(tensors.items()))


def _config(config: dict[str, Any], tower: str) -> dict[str, Any]:
    """`config.json` for the towers exported. It names no code, which is not exported, where it has to be changed."""
    architectures = [_ARCHITECTURES.get(tower, _SINGLE_TOWER)]
    if config.get("architectures") == architectures:
        return config  # The very file will do.
    return {key: value for key, value in config.items() if key != "auto_map"} | {"architectures": architectures}


def _shards(tensors: Mapping[str, Tensor], limit: int) -> Iterator[list[str]]:
    """Names by file."""
    shard: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        # The header counts too: its entry for this tensor, generously.
        cost = tensor.size + len(name) + 160
        if shard and size + cost > limit:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += cost
    yield shard


def _file_pieces(tensors: dict[str, Tensor], progress: Progress) -> Iterator[bytes | memoryview]:
    """One safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, tensor in tensors.items():
        offsets = [place, place + tensor.size]
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        place += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    read = in_order(tensors.values(), lambda tensor: arrays.contiguous(tensor.read()), lambda tensor: tensor.size)
    for data in read:
        yield data.reshape(-1).view(np.uint8).data
        progress.add(data.nbytes)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
