"""What the flags of `model_flags` stand for: a model with its weights. Imported after them, since it takes seconds."""

import collections
import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from twotower_jax import memory, quantization
from twotower_jax.checkpoint.adapter import Adapter
from twotower_jax.checkpoint.load import Contents, contents, load, stored_method
from twotower_jax.checkpoint.load import beside as load_beside
from twotower_jax.execution import Execution
from twotower_jax.generation.placement import TowerMeshes, by_rows, parse_mesh, tower_meshes
from twotower_jax.generation.rehearsal import abstract_params
from twotower_jax.generation.trained import untrained_denoiser
from twotower_jax.kernels import Backends
from twotower_jax.layout import is_small
from twotower_jax.model_flags import CHECKPOINT, DTYPE, EOS, KERNELS, MESH, QUANTIZE
from twotower_jax.parameters import Params, cast, count, parameter_table
from twotower_jax.quantization import METHODS, Method
from twotower_jax.tokens import parse_ids
from twotower_jax.two_tower import TwoTower

# Weights that take a smaller part of what is free leave room for everything.
_SMALL = 0.1


class Loaded(NamedTuple):
    """A model, its parameters where `placement` has them, and the folder that holds its tokenizer."""

    model: TwoTower
    params: Params
    folder: pathlib.Path
    placement: TowerMeshes


def end_tokens() -> tuple[int, ...] | None:
    """The tokens of --eos; None without it.

    Raises:
      ValueError: if they are no token ids.
    """
    return parse_ids(EOS.value, "--eos") if EOS.value else None


def load_model(
    apart: bool = False,
    adapter: str | None = None,
    adapter_tower: str | None = None,
    needs: Callable[[TwoTower, Params, TowerMeshes], dict[str, int]] | None = None,
) -> Loaded:
    """The model of the flags; with `apart` each tower on a mesh of its own.

    Args:
      adapter, adapter_tower: an adapter beside its weights, see `checkpoint.load.load`.
      needs: what the command will take of each device beside weights, in bytes by kind, of the parameters' shapes;
        asked where weights are not a small part of what is free, since it takes a compiler.

    Raises:
      ValueError, OSError, CheckpointError: see `checkpoint.load.load`; ValueError also for --kernels and --mesh, and,
        before any weight is read, where the devices cannot hold them.
    """
    placement = tower_meshes(parse_mesh(MESH.value), apart=apart)
    found = contents(CHECKPOINT.value)
    scan_layers = jax.default_backend() == "cpu" and is_small(found.config)
    execution = Execution(dtype=DTYPE.value, scan_layers=scan_layers, backends=Backends.parse(KERNELS.value))
    _check_memory(found, placement, execution, needs)
    places = None if placement.context is None else placement.parameter_sharding
    beside = {"adapter": adapter, "adapter_tower": adapter_tower}
    model, params, folder = load(
        CHECKPOINT.value, execution=execution, sharding=places, quantize=QUANTIZE.value, **beside
    )
    placement.check(model.config)
    params = by_rows(model, cast(parameter_table(model), params, DTYPE.value))
    return Loaded(model, params, folder, placement)


def beside(loaded: Loaded, adapter: Adapter, tower: str | None = None) -> Params:
    """The parameters of a loaded model with an adapter beside them; see `checkpoint.load.beside`."""
    model, params, _, placement = loaded
    places = None if placement.context is None else placement.parameter_sharding
    found = load_beside(adapter, model, params, CHECKPOINT.value, tower, places)
    return cast(parameter_table(model), found, DTYPE.value)


def _check_memory(found: Contents, placement: TowerMeshes, execution: Execution, needs: Callable | None) -> None:
    """Refuses a model that the devices cannot hold, before anything is read."""
    method, dtype = METHODS.get(QUANTIZE.value) or stored_method(CHECKPOINT.value), jnp.dtype(DTYPE.value)
    model = TwoTower(found.config, found.variant, execution)
    shared = found.shared and (method is not None or found.dtype == dtype)
    weights = weight_bytes(model, method, dtype, placement, shared=shared)
    fewer = "" if method is not None else "take --quantize=int8"
    if dtype == jnp.float32:
        fewer = f"{fewer or 'take'}{fewer and ' or '}--dtype=bfloat16"
    kind = f"weights of {count(parameter_table(model)):,} parameters in {method.name if method else dtype}"
    available = memory.room(placement.devices)
    memory.check_holds({kind: weights}, placement.devices, "--mesh", fewer, available)
    if needs is None or available is None or placement.denoiser is not None or weights < _SMALL * available.free:
        return
    shapes = abstract_params(model, method, dtype, placement.parameter_sharding, placement.devices[0].platform)
    fewer = f"{fewer}{fewer and ', or '}a smaller --batch_size"
    memory.check_holds(
        {kind: weights, **needs(model, shapes, placement)}, placement.devices, "--mesh", fewer, available
    )


def weight_bytes(
    model: TwoTower, method: Method | None, dtype: jnp.dtype, placement: TowerMeshes, *, shared: bool = False
) -> int:
    """What the weights take of the fullest device.

    Args:
      method: by which they are quantized, if they are; dtype: of the others, but those that have to be float32.
      shared: whether the denoiser's arrays are the context's, as they are after a backbone was loaded.
    """
    sizes = collections.Counter()
    for path, parameter in parameter_table(model).items():
        if shared and placement.denoiser is None and path[0] in ("denoiser_tower", "denoiser_head"):
            continue
        for leaf in jax.tree.leaves(quantization.abstract(parameter, method, dtype)):
            place = placement.parameter_sharding(dataclasses.replace(parameter, shape=leaf.shape))
            sizes[None if place is None else place.mesh] += memory.sharded_bytes(leaf, place)
    return max(sizes.values())


def warn_if_untrained(folder: pathlib.Path, what: str, remedy: str) -> None:
    """Says on stderr that `what` uses a denoiser that never trained, and what to do."""
    if untrained_denoiser(folder):
        print(
            f"warning: {CHECKPOINT.value} is a backbone: its denoiser never trained, and {what} uses it; {remedy}",
            file=sys.stderr,
        )
