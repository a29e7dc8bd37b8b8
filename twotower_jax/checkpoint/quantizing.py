"""Matrices quantized while a checkpoint is read: tensor by tensor, so that what is read is never there as a whole."""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from twotower_jax.checkpoint.pipeline import in_order
from twotower_jax.files import CheckpointError
from twotower_jax.kernels.numerics.quantized import Quantized
from twotower_jax.parameters import Parameter, Params, Path, ShardingOf, flatten, unflatten
from twotower_jax.quantization import SCALES, VALUES, Method, abstract, as_read

Index = tuple[int, ...]


def read_quantized(
    parameter: Parameter, method: Method, read: Callable[[Index], np.ndarray], sharding: ShardingOf | None
) -> Quantized:
    """A parameter that `method` quantizes, from its tensors.

    A tensor is read whole by every process whose devices hold a part of it: scales are of whole groups of rows.

    Args:
      read: gives the tensor at a place among the parameter's, in this program's orientation.
      sharding: where values and scales go, asked as if they were parameters; None for one device.

    Raises:
      CheckpointError: naming the tensor, if it holds numbers that are not finite.
      ValueError: if the method does not fit the parameter.
    """
    target, parts = abstract(parameter, method), method.parts(parameter)
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = {name: sharding(part) if sharding else one_device for name, part in parts.items()}
    # Memory that is not written to is not there.
    values, scales = (np.empty(v.shape, v.dtype) for v in (target.values, target.scales))

    def work(index: Index) -> None:
        values[index], scales[index] = quantize_tensor(parameter, method, index, read(index))

    needed = _needed(parameter, places[VALUES], values.shape)
    size = int(np.prod(parameter.shape[parameter.tensors.ndim :])) * 4
    for _ in in_order(needed, work, lambda _: size):
        pass

    def put(array: np.ndarray, place: jax.sharding.Sharding) -> jax.Array:
        return jax.make_array_from_callback(array.shape, place, lambda part: array[part])

    made = Quantized(put(values, places[VALUES]), put(scales, places[SCALES]), target.bits)
    return as_read(parameter, made, next(iter(places[VALUES].device_set)).platform)


def quantize_params(table: Mapping[Path, Parameter], params: Params, method: Method) -> Params:
    """Parameters that are there already, on one device: the numbers that loading them from a checkpoint gives."""

    def one(path: Path, array: jax.Array) -> jax.Array | Quantized:
        if table[path].scales is None:
            return array
        host = np.asarray(array)
        return read_quantized(table[path], method, lambda index: host[index], None)

    return unflatten({path: one(path, array) for path, array in flatten(params).items()})


def quantize_tensor(
    parameter: Parameter, method: Method, index: Index, matrix: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`Method.quantize`, an error naming the tensor."""
    try:
        return method.quantize(parameter, matrix)
    except ValueError as error:
        raise CheckpointError(f"tensor {str(parameter.tensors[index])!r} {error}") from None


def _needed(parameter: Parameter, place: jax.sharding.Sharding, shape: tuple[int, ...]) -> list[Index]:
    """The tensors of which this process's devices hold a part."""
    leading = parameter.tensors.shape
    needed = np.zeros(leading, bool)
    for part in place.addressable_devices_indices_map(shape).values():
        needed[part[: len(leading)]] = True
    return [index for index in np.ndindex(*leading) if needed[index]]
