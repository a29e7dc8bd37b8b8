"""The newest step of a workdir as a two-tower model, of any variant that its parameters allow, quantized or not."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twotower_jax import layout, randomness
from twotower_jax.checkpoint import orbax_steps
from twotower_jax.checkpoint.config_file import with_end_tokens
from twotower_jax.checkpoint.quantizing import read_quantized
from twotower_jax.checkpoint.workdir import (
    AVERAGE,
    CHECKPOINTS,
    FROZEN,
    PARAMS,
    model_config,
    read_settings,
    step_folder,
    variant_of,
)
from twotower_jax.config import Variant
from twotower_jax.execution import Execution
from twotower_jax.files import CheckpointError
from twotower_jax.kernels.numerics.quantized import Quantized
from twotower_jax.parameters import (
    Parameter,
    Params,
    Path,
    ShardingOf,
    flatten,
    fresh,
    initialize,
    parameter_table,
    unflatten,
)
from twotower_jax.paths import as_path
from twotower_jax.quantization import Method
from twotower_jax.two_tower import Backbone, TwoTower, from_backbone


def load(
    path: str | pathlib.Path,
    variant: Variant | None = None,
    execution: Execution | None = None,
    *,
    sharding: ShardingOf | None = None,
    quantize: Method | None = None,
) -> tuple[TwoTower, Params]:
    """The newest step of a workdir as a two-tower model and its parameters, in the dtypes stored or quantized.

    Where the run keeps an average of its weights, that is what is loaded. A backbone becomes both towers. A denoiser
    run can become another variant as far as its parameters allow: time conditioning is left out or starts fresh, tied
    towers can be untied.

    Args:
      variant: of the model to make; None takes the one trained, or the default for a backbone.
      execution: of the model to make; None as in `load.load`.
      sharding: where each stored parameter goes; None for one device. Fresh ones, if any, are on one device.
      quantize: how. Arrays, which may be of many tensors, are then read one by one, by every process whole.

    Raises:
      CheckpointError: if there is no checkpoint, it is broken, or cannot become `variant`.
    """
    path = as_path(path)
    settings = read_settings(path)
    config = with_end_tokens(model_config(path, settings), path)
    execution = execution or layout.decoding(config)
    step = orbax_steps.latest_step(path / CHECKPOINTS)
    if step is None:
        raise CheckpointError(f"{path}: this workdir has no finished checkpoint yet")
    folder = step_folder(path, step, only=PARAMS)
    single = settings["objective"] == "autoregressive"
    trained_as = variant_of(path, settings)
    variant = variant or (Variant() if single else trained_as)
    stored = Backbone(config) if single else TwoTower(config, trained_as)
    table = parameter_table(stored)
    folders = [folder / PARAMS]
    if settings.get("ema_decay"):
        folders.append(step_folder(path, step, only=AVERAGE) / AVERAGE)
    params = _read_parameters(path, folders, table, sharding, quantize)
    model = TwoTower(config, variant)
    if single:
        params = from_backbone(model, params, randomness.key(0))
    elif variant != trained_as:
        params = _asvariant_of(path, model, params, trained_as)
    if execution.scan_layers:
        return TwoTower(config, variant, execution), params
    laid_out = TwoTower(config, variant, execution)
    return laid_out, _relayout(params, parameter_table(model), parameter_table(laid_out))


def _read_parameters(
    path: pathlib.Path,
    trained: Sequence[pathlib.Path],
    table: Mapping[Path, Parameter],
    sharding: ShardingOf | None,
    quantize: Method | None,
) -> Params:
    """Trained and frozen parameters together, in the dtypes stored or quantized. A later folder of trained ones counts
    more."""

    def target(stored: Mapping[Path, Any]) -> Params:
        if odd := stored.keys() - table.keys():
            raise CheckpointError(f"{path}: array {'/'.join(min(odd))} is not of this model")

        def array(p: Path) -> jax.ShapeDtypeStruct:
            place = sharding(table[p]) if sharding else None
            return jax.ShapeDtypeStruct(table[p].shape, jnp.dtype(stored[p].dtype), sharding=place)

        return unflatten({p: array(p) for p in stored})

    def quantized(p: Path, array: np.ndarray) -> jax.Array | Quantized:
        if table[p].scales is None:
            return jax.device_put(array, sharding(table[p]) if sharding else None)
        return read_quantized(table[p], quantize, lambda index: array[index], sharding)

    def read(folder: pathlib.Path) -> dict[Path, jax.Array | Quantized]:
        wanted = target(flatten(orbax_steps.stored_arrays(folder)))
        if quantize is None:
            return flatten(orbax_steps.restore_arrays(folder, wanted))
        return {p: quantized(p, array) for p, array in orbax_steps.restore_on_host(folder, wanted)}

    params = {p: array for folder in trained for p, array in read(folder).items()}
    if params.keys() != table.keys():
        orbax_steps.verify(path / FROZEN)
        params |= read(path / FROZEN / PARAMS)
    if absent := table.keys() - params.keys():
        raise CheckpointError(f"{path}: array {'/'.join(min(absent))} is missing")
    return unflatten({p: params[p] for p in table})


def _asvariant_of(path: pathlib.Path, model: TwoTower, params: Params, trained_as: Variant) -> Params:
    if model.variant.context == "tied" != trained_as.context:
        raise CheckpointError(
            f"{path}: trained with context={trained_as.context!r}, two towers, which cannot become one (context='tied')"
        )
    params = {"denoiser_tower": params["context_tower"]} | params
    table = parameter_table(model)
    flat = flatten(initialize(fresh(table), randomness.key(0))) | flatten(params)
    return unflatten({p: flat[p] for p in table})


def _relayout(params: Params, ours: Mapping[Path, Parameter], theirs: Mapping[Path, Parameter]) -> Params:
    """Stacked parameters as the layer-by-layer layout has them; both tables name the same tensors."""
    flat, by_tensor = flatten(params), {}
    for path, parameter in ours.items():
        if parameter.axes[:1] == ("layers",):
            for i, layer in enumerate(parameter.tensors):
                by_tensor[_first(layer)] = jax.tree.map(lambda v, i=i: v[i], flat[path])
        else:
            by_tensor[_first(parameter.tensors)] = flat[path]

    def array(parameter: Parameter) -> jax.Array:
        if parameter.axes[:1] == ("layers",):
            return jax.tree.map(lambda *v: jnp.stack(v), *(by_tensor[_first(layer)] for layer in parameter.tensors))
        return by_tensor[_first(parameter.tensors)]

    return unflatten({path: array(parameter) for path, parameter in theirs.items()})


def _first(names: Any) -> str:
    return str(names if isinstance(names, str) else names.flat[0])
