"""Adapters as files: those of PEFT (`adapter_config.json`, `adapter_model.safetensors`) and those of our own workdirs.

Read, an adapter is its tensors by name and what they count; `fit` lays them out as a model's parameters are, `attach`
puts them there. A module's name in PEFT's files is `base_model.model.` and its name in the Hugging Face folder:
`backbone.layers.3.mixer.in_proj` of one tower, `denoiser_tower.layers.3.…` of two. Ours say in `adapter_config.json`,
under "twotower_jax", the hash of the base (fingerprint.py) and which towers they are of.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from twotower_jax import lora
from twotower_jax.atomic import new_folder
from twotower_jax.checkpoint import orbax_steps, workdir
from twotower_jax.checkpoint.fingerprint import CONTEXT, DENOISER, fingerprint
from twotower_jax.checkpoint.huggingface import today_name
from twotower_jax.checkpoint.manifest import write_file
from twotower_jax.checkpoint.safetensors_file import read_header, read_tensor
from twotower_jax.files import CheckpointError, check_folder, check_link, read_json, some
from twotower_jax.lora import TENSOR_A, TENSOR_B, Lora, adapter_table, module_name
from twotower_jax.parameters import Parameter, Params, Path, ShardingOf, flatten, parameter_table, unflatten
from twotower_jax.two_tower import Backbone, TwoTower

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BOTH = "both"
_PREFIX, _BACKBONE = "base_model.model.", "backbone."
_OURS = "twotower_jax"
# Ways to start that change the base as well, and what of a configuration would mean another computation.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_REFUSED = {
    "use_dora": "DoRA",
    "fan_in_fan_out": "matrices the other way around",
    "modules_to_save": "modules of its own",
    "rank_pattern": "several ranks",
    "alpha_pattern": "several alphas",
    "lora_bias": "biases",
    "trainable_token_indices": "tokens of its own",
    "megatron_config": "Megatron's layers",
}


class Adapter(NamedTuple):
    """An adapter that has been read.

    Attributes:
      source: where from, for messages.
      settings: rank and alpha; targets and dropout as far as they are known.
      scale: what the update A · B counts.
      tensors: by name without PEFT's prefix, such as `backbone.layers.3.mixer.in_proj.lora_A.weight`; A (r, in) and B
        (out, r), float32.
      base: the hash of each tower of the base; None where the files do not say it.
      base_name: the base as a person would find it.
      tower: the one that an adapter of one tower was trained in; None for a backbone's, or where nothing says it.
    """

    source: pathlib.Path
    settings: Lora
    scale: float
    tensors: dict[str, np.ndarray]
    base: dict[str, str] | None
    base_name: str
    tower: str | None = None

    @property
    def of_backbone(self) -> bool:
        """Whether it is of one tower, and may be put beside either."""
        return any(name.startswith(_BACKBONE) for name in self.tensors)


def read(folder: pathlib.Path) -> Adapter:
    """An adapter from PEFT's files.

    Raises:
      ValueError: if there is no such folder.
      CheckpointError: if a file is missing or broken, or it is of a kind that would compute something else here.
    """
    check_folder(folder, f"an adapter is a folder with {CONFIG} and {TENSORS}")
    for name in (CONFIG, TENSORS):
        if not (folder / name).exists():
            raise CheckpointError(f"{folder}: has no {name}; an adapter is a folder with {CONFIG} and {TENSORS}")
        check_link(folder / name)
    settings, scale, raw = _read_config(folder / CONFIG)
    tensors = {}
    for name, entry in read_header(folder / TENSORS).items():
        plain = name.removeprefix(_PREFIX)
        if plain == name or not plain.endswith((TENSOR_A, TENSOR_B)):
            raise CheckpointError(f"{folder / TENSORS}: {name!r} is no tensor of {_PREFIX}….{TENSOR_A} or {TENSOR_B}")
        tensors[today_name(plain)] = read_tensor(folder / TENSORS, entry).astype(np.float32)
    if not tensors:
        raise CheckpointError(f"{folder / TENSORS}: holds no tensor")
    about = raw.get(_OURS)
    about = about if isinstance(about, dict) else {}
    base, tower = about.get("base"), about.get("tower")
    name = raw.get("base_model_name_or_path")
    return Adapter(
        *(folder, settings, scale, tensors),
        base if isinstance(base, dict) else None,
        name if isinstance(name, str) else "",
        tower if tower in (CONTEXT, DENOISER) else None,
    )


def _read_config(path: pathlib.Path) -> tuple[Lora, float, dict[str, Any]]:
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type={raw.get('peft_type')!r} is not LORA, the one kind there is here")
    for field, what in _REFUSED.items():
        if raw.get(field):
            raise CheckpointError(f"{path}: {field}={raw[field]!r}: {what} would compute something else; refused")
    if raw.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias={raw['bias']!r}: trained biases are refused; only 'none' is taken")
    if not any(raw.get("init_lora_weights", True) is plain or raw["init_lora_weights"] == plain
               for plain in _PLAIN_STARTS):  # fmt: skip
        what = f"init_lora_weights={raw['init_lora_weights']!r}"
        raise CheckpointError(f"{path}: {what} also changed the base, which is then another one, and is refused")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"{path}: r={rank!r} must be a whole number of at least 1")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
        raise CheckpointError(f"{path}: lora_alpha={alpha!r} must be a positive number")
    scale = alpha / rank**0.5 if raw.get("use_rslora") else alpha / rank
    return Lora(rank=rank, alpha=float(alpha)), scale, raw


def from_workdir(path: pathlib.Path) -> Adapter:
    """The adapter that a workdir's newest step holds.

    Raises:
      CheckpointError: if there is no step, or it is broken.
      ValueError: if the workdir is of a whole model.
    """
    base = workdir.read_base(path)
    if base is None:
        raise ValueError(f"{path}: is the workdir of a whole model, without an adapter; train one with lora.rank")
    settings, (config, variant, single) = workdir.read_settings(path), workdir.described(path)
    trained = Lora(**settings["lora"])
    step = orbax_steps.latest_step(path / workdir.CHECKPOINTS)
    if step is None:
        raise CheckpointError(f"{path}: this workdir has no finished checkpoint yet")
    folder = path / workdir.CHECKPOINTS / str(step)
    # Where the run keeps an average of its weights, that is what is loaded.
    tree = workdir.AVERAGE if (folder / workdir.AVERAGE).is_dir() else workdir.PARAMS
    orbax_steps.verify(folder, only=tree)
    arrays = flatten(orbax_steps.stored_arrays(folder / tree))
    whole = parameter_table(Backbone(config) if single else TwoTower(config, variant))
    table = adapter_table(whole, trained.rank, trained.patterns)
    if odd := arrays.keys() - table.keys():
        raise CheckpointError(f"{folder}: array {'/'.join(min(odd))} is not of this adapter")
    target = unflatten({p: jax.ShapeDtypeStruct(table[p].shape, jnp.float32) for p in arrays})
    tensors = {}
    for array_path, array in orbax_steps.restore_on_host(folder / tree, target):
        for index, name in np.ndenumerate(table[array_path].tensors):
            tensors[str(name)] = np.ascontiguousarray(table[array_path].to_tensor(array[index]))
    return Adapter(path, trained, trained.scale, tensors, base.towers, base.checkpoint)


def write(adapter: Adapter, output: pathlib.Path, modules: list[str]) -> int:
    """Writes PEFT's files; afterwards `output` is whole, or is not there where anything went wrong.

    Args:
      modules: all modules of the base that have a matrix, adapted or not, by the names that the tensors have.

    Returns:
      the number of tensors.

    Raises:
      ValueError, OSError: if it is there already or cannot be written.
    """
    adapted = sorted({name.rpartition(".lora_")[0] for name in adapter.tensors})
    towers = sorted({name.partition("_tower.")[0] for name in adapted})
    tower = (adapter.tower or "backbone") if adapter.of_backbone else towers[0] if len(towers) == 1 else BOTH
    alpha = adapter.settings.alpha
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_name,
        "r": adapter.settings.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": adapter.settings.dropout,
        "target_modules": _endings(adapted, set(modules) - set(adapted)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        _OURS: {"base": adapter.base, "tower": tower},
    }
    tensors = {_PREFIX + name: adapter.tensors[name] for name in sorted(adapter.tensors)}
    with new_folder(output) as partial:
        write_file(partial / CONFIG, [(json.dumps(config, indent=2) + "\n").encode()])
        write_file(partial / TENSORS, [safetensors.numpy.save(tensors, metadata={"format": "pt"})])
    return len(tensors)


def _endings(adapted: list[str], others: set[str]) -> list[str]:
    """The shortest ends of names, from a dot on, that name all adapted modules and no other, as PEFT matches them."""
    found = set()
    for name in adapted:
        words = name.split(".")
        ends = [".".join(words[-count:]) for count in range(1, len(words) + 1)]
        found.add(next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)), name))
    return sorted(found)


def modules_of(table: Mapping[Path, Parameter]) -> list[str]:
    """The modules of a model that have a weight."""
    names = (str(name) for parameter in table.values() for name in parameter.tensors.flat)
    return [module_name(name) for name in names if name.endswith(".weight")]


# Beside a model's parameters.


def towers_of(adapter: Adapter, single: bool, asked: str | None) -> tuple[str, ...]:
    """The towers that an adapter is put beside: those asked for, or the one that it was trained in; else both where the
    checkpoint is a backbone, of which both are copies, and otherwise the context tower.

    Raises:
      ValueError: if it was made for two towers, and says itself which it changes.
    """
    if not adapter.of_backbone:
        if asked is not None:
            raise ValueError(
                f"{adapter.source}: names its towers itself; adapter_tower={asked} is for adapters of a backbone"
            )
        return ()
    asked = asked or adapter.tower or (BOTH if single else CONTEXT)
    return (CONTEXT, DENOISER) if asked == BOTH else (asked,)


def check_base(adapter: Adapter, checkpoint: pathlib.Path) -> None:
    """Refuses an adapter of another base, where it says which one it is of and the checkpoint can be told.

    One of a backbone may be put beside a denoiser that was trained from it: it is of a checkpoint that has its tower.

    Raises:
      ValueError: in one line.
    """
    found = None if adapter.base is None else fingerprint(checkpoint)
    if found is None:
        return
    if adapter.of_backbone:
        same = bool(set(adapter.base.values()) & set(found.values()))
    else:
        changed = {name.partition("_tower.")[0] for name in adapter.tensors}
        same = all(adapter.base.get(tower) == found.get(tower) for tower in changed)
    if not same:
        was = f", {adapter.base_name}" if adapter.base_name else ""
        raise ValueError(f"{adapter.source}: is the adapter of another base{was}, and not of {checkpoint}")


def fit(
    adapter: Adapter, table: Mapping[Path, Parameter], towers: tuple[str, ...] = (), sharding: ShardingOf | None = None
) -> Params:
    """An adapter as parameters beside those of `table`, a `TwoTower`'s or a `Backbone`'s; layers that it does not
    change, and that are stacked with some that it does, get zeros.

    Args:
      towers: of a two-tower model, which ones an adapter of a backbone changes.
      sharding: where each array goes; None for one device.

    Raises:
      CheckpointError: if a tensor belongs to no matrix of the model, or has another shape than it must.
    """
    tensors = dict(adapter.tensors)
    if towers:
        tensors = {
            f"{tower}_tower.{name.removeprefix(_BACKBONE)}": tensor
            for name, tensor in tensors.items()
            for tower in towers
        }
    left, flat = set(tensors), {}
    for parameter in table.values():
        if not parameter.adaptable:
            continue
        declared = lora.parts(parameter, adapter.settings.rank)
        names = {str(name) for part in declared.values() for name in part.tensors.flat}
        if not names & left:
            continue
        left -= names
        for part in declared.values():
            array = _array(adapter, part, tensors)
            place = None if sharding is None else sharding(part)
            flat[part.path] = jnp.asarray(array) if place is None else jax.device_put(array, place)
    if left:
        raise CheckpointError(
            f"{adapter.source}: holds tensors that belong to no matrix of this model that can be adapted: "
            f"{some(sorted(left))}"
        )
    return unflatten(flat)


def _array(adapter: Adapter, part: Parameter, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    array = np.zeros(part.shape, np.float32)
    for index, name in np.ndenumerate(part.tensors):
        module, _, kind = str(name).rpartition(".lora_")
        partner = f"{module}.{TENSOR_B if f'lora_{kind}' == TENSOR_A else TENSOR_A}"
        if str(name) not in tensors:
            if partner in tensors:
                raise CheckpointError(f"{adapter.source}: has {partner!r} and not {str(name)!r}")
            continue
        tensor = tensors[str(name)]
        if tensor.shape != part.tensor_shape:
            raise CheckpointError(
                f"{adapter.source}: tensor {str(name)!r} has shape {list(tensor.shape)}, beside this model it must "
                f"have {list(part.tensor_shape)}"
            )
        array[index] = part.from_tensor(tensor)
    return array
