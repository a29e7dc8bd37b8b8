"""The three kernels that scans and their gradients are composed of (scan_gpu.py says what for), in Triton.

For NVIDIA GPUs that are not Hopper, which the Mosaic GPU kernels are not made for. Arguments and results are those of
scan_gpu.py, whose sources are taken one after the other here, each adding to what the one before has found.
"""

import jax
import jax.numpy as jnp

from twotower_jax.kernels.hardware import triton_call
from twotower_jax.kernels.ssd import triton_programs as programs
from twotower_jax.kernels.ssd.gpu_layout import Cut
from twotower_jax.kernels.ssd.mosaic_gpu import Pairs, RowSums, Source


def _constants(cut: Cut) -> dict[str, int]:
    return {
        "LENGTH": cut.length,
        "HEADS": cut.heads,
        "GROUPS": cut.groups,
        "HEAD_DIM": cut.head_dim,
        "STATE": cut.state,
        "CHUNK": cut.chunk,
        "TILE": cut.tile,
    }


def _of_pairs(pairs: Pairs, readers_in_rows: bool) -> dict[str, int | bool]:
    return {"BLOCK": pairs.block or 0, "OWN": pairs.own, "READERS_IN_ROWS": readers_in_rows}


def _exact_as_is(cut: Cut, queries: jax.Array, keys: jax.Array) -> bool:
    # The interpreter has no products of bfloat16.
    return not cut.interpret and queries.dtype == keys.dtype == jnp.bfloat16


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def states(cut: Cut, values, keys, weights, kept, initial, *, backward: bool = False):
    """See scan_gpu.py."""
    square = cut.head_dim, cut.state
    outputs = [_float32(*kept.shape, *square), _float32(*initial.shape)]
    width = cut.slice_width
    constants = _constants(cut) | {"WIDTH": width, "BACKWARD": backward}
    grid = cut.state // width, cut.heads, cut.batch
    return triton_call.call(
        programs.states, grid, [values, keys, weights, kept, initial], outputs, constants, cut.interpret
    )


def outputs(cut: Cut, queries, pairs: tuple[Pairs, ...], sources: tuple[Source, ...], through, *, readers_in_rows=True):
    """See scan_gpu.py."""
    total, none = None, jnp.zeros(1, jnp.float32)
    for which, (keys, values, decays) in zip(pairs, sources, strict=True):
        passed = total is None and through is not None
        scales, edges = through if passed else (none, none)
        flags = {
            "THROUGH": passed,
            "ADDED": total is not None,
            "EXACT_AS_IS": _exact_as_is(cut, queries, keys),
        }
        inputs = [queries, keys, values, *decays.readers, *decays.writers, decays.dt]
        (total,) = triton_call.call(
            programs.outputs,
            (cut.length // cut.tile, cut.heads, cut.batch),
            [*inputs, none if total is None else total, scales, edges],
            [_float32(cut.batch, cut.length, cut.heads * cut.head_dim)],
            _constants(cut) | _of_pairs(which, readers_in_rows) | flags,
            cut.interpret,
        )
    return total


def group_gradients(
    cut: Cut, queries, upstream, pairs: tuple[Pairs, ...], sources: tuple[Source, ...], through, *, readers_in_rows
):
    """See scan_gpu.py."""
    gradient, crossed, sums, none = None, None, [], jnp.zeros(1, jnp.float32)
    per_head = _float32(cut.batch, cut.heads, cut.length)
    for which, (keys, values, decays) in zip(pairs, sources, strict=True):
        passed = gradient is None and through is not None
        scales, edges = through if passed else (none, none)
        flags = {
            "PADDED_HEADS": 1 << (cut.per_group - 1).bit_length(),
            "THROUGH": passed,
            "ADDED": gradient is not None,
            "EXACT_AS_IS": _exact_as_is(cut, queries, keys),
        }
        inputs = [queries, upstream, keys, values, *decays.readers, *decays.writers, decays.dt]
        gradient, by_decay, by_step, crossing = triton_call.call(
            programs.group_gradients,
            (cut.length // cut.tile, cut.groups, cut.batch),
            [*inputs, none if gradient is None else gradient, scales, edges],
            [_float32(cut.batch, cut.length, cut.groups * cut.state), per_head, per_head, per_head],
            _constants(cut) | _of_pairs(which, readers_in_rows) | flags,
            cut.interpret,
        )
        sums.append(RowSums(by_decay, None if readers_in_rows else by_step))
        crossed = crossing if passed else crossed
    return gradient, tuple(sums), crossed
