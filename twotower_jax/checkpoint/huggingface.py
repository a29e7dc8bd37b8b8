"""A published checkpoint folder: `config.json`, `*.safetensors` with an index, `tokenizer.json`.

Two kinds exist: the two-tower folder, and the single-tower backbone (`NemotronHForCausalLM`), which becomes both towers
with a time conditioning that changes nothing. Every name, shape and dtype is checked against the parameter table before
any data is read.
"""

import collections
import pathlib
import sys
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from twotower_jax import layout, randomness
from twotower_jax.checkpoint import manifest, packed
from twotower_jax.checkpoint.config_file import read_config
from twotower_jax.checkpoint.quantizing import read_quantized
from twotower_jax.checkpoint.safetensors_file import Entry, read_header, read_tensor
from twotower_jax.config import ModelConfig, Variant
from twotower_jax.execution import Execution
from twotower_jax.files import CheckpointError, check_folder, check_link, read_json, some
from twotower_jax.kernels.numerics.quantized import Quantized
from twotower_jax.parameters import Parameter, Params, Path, ShardingOf, parameter_table, unflatten
from twotower_jax.paths import as_path
from twotower_jax.quantization import Method
from twotower_jax.two_tower import Backbone, TwoTower, from_backbone

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_TOWERS = ("context_tower.", "denoiser_tower.")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class Tensor(NamedTuple):
    """A tensor of the folder: its file and its place there; of a packed folder (packed.py) what it was packed from,
    nearly."""

    file: pathlib.Path
    entry: Entry
    unpacked: np.ndarray | None = None

    @property
    def size(self) -> int:
        """In bytes."""
        return self.entry.stop - self.entry.start

    def read(self) -> np.ndarray:
        return read_tensor(self.file, self.entry) if self.unpacked is None else self.unpacked


class Folder(NamedTuple):
    """A folder whose headers have been read and found consistent.

    Attributes:
      tensors: by name, in the names of today (`embeddings.`, where older files say `embedding.`).
      single_tower: whether it is a backbone.
      unheld: names that the index lists but no file holds.
      ignored: by name, the tensors of multi-token prediction, which transformers does not read either.
    """

    path: pathlib.Path
    config: ModelConfig
    tensors: dict[str, Tensor]
    single_tower: bool
    unheld: tuple[str, ...]
    ignored: dict[str, Tensor]


def open_folder(path: pathlib.Path) -> Folder:
    """Reads the configuration and all headers.

    Raises:
      CheckpointError: if anything is missing, broken, or contradicts the index.
      ValueError: if there is no such folder.
    """
    check_folder(path, "give a Hugging Face folder")
    config = read_config(path)
    if is_packed(path):
        tensors = {name: _unpacked(path, array) for name, array in packed.read_packed(path).items()}
        return Folder(path, config, tensors, _is_single(tensors), (), {})
    files = _files(path)
    tensors = {}
    ignored: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        check_link(path / file)
        for name, entry in read_header(path / file).items():
            if files.get(name, file) != file:
                raise CheckpointError(f"{path / file}: holds {name!r}, which the index places in {files[name]}")
            name = today_name(name)
            held = ignored if is_ignored(name) else tensors
            if name in held:
                raise CheckpointError(f"{path / file}: tensor {name!r} stands in {held[name].file.name} as well")
            held[name] = Tensor(path / file, entry)
    unheld = tuple(sorted({today_name(name) for name in files} - set(tensors) - set(ignored) - {""}))
    return Folder(path, config, tensors, _is_single(tensors), unheld, ignored)


def is_packed(path: pathlib.Path) -> bool:
    """Whether a folder's tensors are packed (packed.py)."""
    return not (path / INDEX).exists() and (path / packed.TENSORS).exists()


def _unpacked(path: pathlib.Path, array: np.ndarray) -> Tensor:
    return Tensor(path / packed.TENSORS, Entry(array.dtype, array.shape, 0, array.nbytes), array)


def _is_single(tensors: Mapping[str, Tensor]) -> bool:
    return not any(name.startswith(_TOWERS) for name in tensors)


def today_name(name: str) -> str:
    """A tensor's name as the published files of today have it.

    Older ones say `embedding.`; recent versions of transformers call the tower `model.`, where files say `backbone.`.
    """
    name = name.replace(".embedding.", ".embeddings.")
    if name.startswith("model."):
        tower = name.startswith(tuple(f"model.{tower}" for tower in _TOWERS))
        name = ("" if tower else "backbone.") + name.removeprefix("model.")
    return name


def is_ignored(name: str) -> bool:
    """Whether a tensor belongs to the layers of multi-token prediction, which no part of a two-tower model is."""
    return name.startswith("mtp.")


def _files(path: pathlib.Path) -> dict[str, str]:
    """File name by tensor name; without an index, the one file under a name that no tensor has."""
    index = path / INDEX
    if not index.exists():
        if (path / SINGLE_FILE).exists():
            return {"": SINGLE_FILE}
        pickles = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
        note = f" ({pickles[0]} is a pickle, which can run code and is never read)" if pickles else ""
        if (path / manifest.NAME).exists():
            note = "; it is a converted checkpoint already"
        raise CheckpointError(f"{path}: holds neither {INDEX} nor {SINGLE_FILE}{note}")
    check_link(index)
    raw = read_json(index)
    if not isinstance(raw, dict) or not isinstance(raw.get("weight_map"), dict):
        raise CheckpointError(f"{index}: not a JSON object with a weight_map")
    files = raw["weight_map"]
    for name, file in files.items():
        if not isinstance(file, str) or pathlib.PurePath(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: places {name!r} in {file!r}, which is no .safetensors file of this folder")
    return files


def own_table(folder: Folder, execution: Execution = Execution()) -> dict[Path, Parameter]:  # noqa: B008 (frozen)
    """The parameters that a folder of its kind holds, whole, also where a variant leaves some of them out."""
    return parameter_table((Backbone if folder.single_tower else TwoTower)(folder.config, execution=execution))


def check(folder: Folder, table: Mapping[Path, Parameter]) -> None:
    """Compares names, shapes and dtypes of a folder with a model's parameter table.

    Raises:
      CheckpointError: counting the missing and unexpected tensors and naming some, or one of a wrong shape or dtype.
    """
    expected = {str(name): parameter for parameter in table.values() for name in parameter.tensors.flat}
    missing = sorted(set(expected) - set(folder.tensors))
    extra = sorted((set(folder.tensors) | set(folder.unheld)) - set(expected))
    if extra and len(missing) == len(expected):
        raise CheckpointError(
            f"{folder.path}: none of its {len(extra)} tensors has a name of this model: {extra[0]!r} is there, and "
            f"{missing[0]!r} expected; was it saved by another program, or with another prefix?"
        )
    if missing or extra:
        parts = [f"{len(names)} {kind}: {some(names)}" for kind, names in
                 (("missing", missing), ("not of this model", extra)) if names]  # fmt: skip
        raise CheckpointError(f"{folder.path}: tensors do not match config.json; {'; '.join(parts)}")
    for name, parameter in expected.items():
        found = folder.tensors[name]
        if found.entry.shape != parameter.tensor_shape:
            raise CheckpointError(
                f"{found.file}: tensor {name!r} has shape {list(found.entry.shape)}, "
                f"the model's is {list(parameter.tensor_shape)}"
            )
    _check_dtypes(folder)


def say_ignored(folder: Folder) -> None:
    """Says on stderr what is left out."""
    if folder.ignored:
        print(
            f"{folder.path}: left out {len(folder.ignored)} tensors of multi-token prediction (mtp.*), which a "
            "two-tower model does not have",
            file=sys.stderr,
        )


def _check_dtypes(folder: Folder) -> None:
    """Refuses float16 beside bfloat16: nobody stores both, and one read as the other is another number silently."""
    halves = {name: tensor.entry.dtype for name, tensor in folder.tensors.items() if tensor.entry.dtype.itemsize == 2}
    counts = collections.Counter(halves.values()).most_common()
    if len(counts) > 1:
        odd = next(name for name, dtype in halves.items() if dtype == counts[-1][0])
        raise CheckpointError(
            f"{folder.tensors[odd].file}: tensor {odd!r} is {counts[-1][0]}, {counts[0][1]} others are {counts[0][0]}"
        )


def read_parameters(
    folder: Folder,
    table: Mapping[Path, Parameter],
    sharding: ShardingOf | None = None,
    quantize: Method | None = None,
) -> Params:
    """Reads every parameter of `table`, in the dtypes stored or quantized, to where `sharding` says, or to one device.

    The folder has passed `check`.
    """

    def read(parameter: Parameter) -> jax.Array | Quantized:
        if quantize is not None and parameter.scales is not None:

            def matrix(index: tuple[int, ...]) -> np.ndarray:
                return parameter.from_tensor(folder.tensors[str(parameter.tensors[index])].read())

            return read_quantized(parameter, quantize, matrix, sharding)
        tensors = [folder.tensors[name] for name in parameter.tensors.flat]
        array = np.empty((len(tensors), *parameter.shape[parameter.tensors.ndim :]), tensors[0].entry.dtype)
        for i, tensor in enumerate(tensors):
            if tensor.entry.dtype != array.dtype:
                raise CheckpointError(
                    f"{tensor.file}: {parameter.tensors.flat[i]!r} is {tensor.entry.dtype}, "
                    f"{parameter.tensors.flat[0]!r} of the same stack is {array.dtype}"
                )
            array[i] = parameter.from_tensor(tensor.read())
        array = array.reshape(parameter.shape)
        return jnp.asarray(array) if sharding is None else jax.device_put(array, sharding(parameter))

    return unflatten({path: read(parameter) for path, parameter in table.items()})


def load(
    path: str | pathlib.Path,
    variant: Variant = Variant(),  # noqa: B008 (frozen)
    execution: Execution | None = None,
    *,
    sharding: ShardingOf | None = None,
    quantize: Method | None = None,
) -> tuple[TwoTower, Params]:
    """A folder of either kind as a two-tower model and its parameters, in the dtypes stored or quantized.

    Of a backbone both towers share the arrays, and the time conditioning is one that changes nothing. Without an
    `execution` as in `load.load`.

    Raises:
      CheckpointError: see `open_folder` and `check`.
      ValueError: if the variant cannot start from this folder.
    """
    folder = open_folder(as_path(path))
    if variant.context == "tied" and not folder.single_tower:
        raise ValueError(f"{path}: context='tied' needs a checkpoint of one tower; this has two different ones")
    execution = execution or layout.decoding(folder.config)
    own = own_table(folder, execution)
    check(folder, own)
    say_ignored(folder)
    model = TwoTower(folder.config, variant, execution)
    if not folder.single_tower:
        return model, read_parameters(folder, parameter_table(model), sharding, quantize)
    return model, from_backbone(model, read_parameters(folder, own, sharding, quantize), randomness.key(0))
