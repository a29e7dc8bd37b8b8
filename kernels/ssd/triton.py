"""The SSD scans of one tower and of two in Triton, by jax-triton, for NVIDIA GPUs that are not Hopper.

What is done is what gpu.py and two_tower_gpu.py do. The three kernels that they are composed of stand in
triton_programs.py; here is how they are called, with the arguments and results that `Programs` of gpu_layout.py
describes. Sources are taken one after the other, each adding to what the one before has found.
"""

import importlib.util

import jax
import jax.numpy as jnp

from twotower_jax.kernels.dispatch import platform
from twotower_jax.kernels.hardware import triton_call
from twotower_jax.kernels.ssd import gpu as one_tower
from twotower_jax.kernels.ssd import triton_programs as programs
from twotower_jax.kernels.ssd import two_tower_gpu as two_towers
from twotower_jax.kernels.ssd.gpu_layout import Cut, Pairs, Programs, RowSums, Source, too_long


def _constants(cut: Cut) -> dict[str, int]:
    return {
        "LENGTH": cut.length,
        "HEADS": cut.heads,
        "GROUPS": cut.groups,
        "HEAD_DIM": cut.head_dim,
        "PADDED_DIM": _power_of_two(cut.head_dim),
        "STATE": cut.state,
        "CHUNK": cut.chunk,
        "TILE": cut.tile,
    }


def _power_of_two(count: int) -> int:
    """The least that is not smaller."""
    return 1 << (count - 1).bit_length()


def _of_pairs(pairs: Pairs, readers_in_rows: bool) -> dict[str, int | bool]:
    return {"BLOCK": pairs.block or 0, "OWN": pairs.own, "READERS_IN_ROWS": readers_in_rows}


def _exact_as_is(cut: Cut, queries: jax.Array, keys: jax.Array) -> bool:
    # The interpreter has no products of bfloat16.
    return not cut.interpret and queries.dtype == keys.dtype == jnp.bfloat16


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def states(cut: Cut, values, keys, weights, kept, initial, *, backward: bool = False):
    """See `Programs`."""
    square = cut.head_dim, cut.state
    outputs = [_float32(*kept.shape, *square), _float32(*initial.shape)]
    width = cut.slice_width
    constants = _constants(cut) | {"WIDTH": width, "BACKWARD": backward}
    grid = cut.state // width, cut.heads, cut.batch
    return triton_call.call(
        programs.states, grid, [values, keys, weights, kept, initial], outputs, constants, cut.interpret
    )


def outputs(cut: Cut, queries, pairs: tuple[Pairs, ...], sources: tuple[Source, ...], through, *, readers_in_rows=True):
    """See `Programs`."""
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
    """See `Programs`."""
    gradient, crossed, sums, none = None, None, [], jnp.zeros(1, jnp.float32)
    per_head = _float32(cut.batch, cut.heads, cut.length)
    for which, (keys, values, decays) in zip(pairs, sources, strict=True):
        passed = gradient is None and through is not None
        scales, edges = through if passed else (none, none)
        flags = {
            "PADDED_HEADS": _power_of_two(cut.per_group),
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


# The scans.

_PROGRAMS = Programs(states, outputs, group_gradients, tile=32)  # Of 64, they would keep more than the registers hold.
# P and N whose tiles fit into shared memory and registers; sizes of tensors are powers of two.
_HEAD_DIMS, _STATES = (16, 32, 64, 80), (16, 32, 64, 128)
# Compute capability of Ampere, the first with TF32.
_OLDEST = 8.0


def unsupported(x, dt, log_decay, b, c, *context, initial_state=None, block_size=1, chunk_size=128) -> str | None:
    """Why the hardware cannot run `ssd`, or with a context `two_tower_ssd`, on these shapes, or None."""
    if platform() != "gpu":
        return f"made for NVIDIA GPUs, not for {platform()}"
    if importlib.util.find_spec("jax_triton") is None:
        return "jax-triton is not installed (pip install 'twotower_jax[cuda]')"
    if problem := _too_old(getattr(jax.devices()[0], "compute_capability", None)):
        return problem
    head_dim, state = x.shape[3], b.shape[3]
    if head_dim not in _HEAD_DIMS or state not in _STATES:
        return f"heads of {head_dim} with a state of {state} (made for heads of {_HEAD_DIMS}, states of {_STATES})"
    return too_long(x.shape[1], chunk_size, block_size)


def _too_old(capability: str | None) -> str | None:
    """Why a GPU of this compute capability cannot run the kernels, or None; None where no GPU is there to be asked."""
    if capability is None:
        return None
    try:
        return f"made for compute capability {_OLDEST} and later" if float(capability) < _OLDEST else None
    except ValueError:  # As AMD's are named.
        return f"made for NVIDIA GPUs, not for {capability}"


def ssd(*arrays, interpret=False, **options):
    """`kernels.ssd`, same arguments and results. `interpret`: to run it on any backend."""
    return one_tower.ssd(*arrays, programs=_PROGRAMS, interpret=interpret, **options)


def two_tower_ssd(*arrays, interpret=False, **options):
    """`kernels.two_tower_ssd`, same arguments and results. `interpret`: to run it on any backend."""
    return two_towers.two_tower_ssd(*arrays, programs=_PROGRAMS, interpret=interpret, **options)
