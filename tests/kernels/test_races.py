"""Every Mosaic GPU kernel under the interpreter's detector of races: copies, loads and stores keep their order.

The scans' stand in ssd/test_ssd.py, the experts' in experts/test_hardware.py. What the tensor core reads the detector
does not follow, nor does it know the hardware's own ordering of memory.
"""

import functools

import interpreters
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from twotower_jax import kernels
from twotower_jax.kernels.attention import mosaic_gpu as attention_gpu
from twotower_jax.kernels.block_scan import mosaic_gpu as block_scan_gpu
from twotower_jax.kernels.causal_conv import mosaic_gpu as causal_conv_gpu

DETECTING = plgpu.InterpretGPUParams(detect_races=True)


def draw(seed, *shapes, dtype=jnp.bfloat16):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def check(function, reference, arrays, gradient):
    """Outputs (and gradients of their sum of squares) are XLA's but for rounding, and there was no race."""

    def loss(function, *arrays):
        return sum(jnp.sum(jnp.square(v.astype(jnp.float32))) for v in jax.tree.leaves(function(*arrays)))

    def run(function):
        if not gradient:
            return jax.jit(function)(*arrays)
        return jax.jit(jax.grad(functools.partial(loss, function), argnums=tuple(range(len(arrays)))))(*arrays)

    for one, other in zip(*map(jax.tree.leaves, (run(function), run(reference))), strict=True):
        one, other = (np.asarray(v, np.float64) for v in (one, other))
        assert np.linalg.norm(one - other) < 2e-2 * np.linalg.norm(other)
    assert not interpreters.races_found()


@pytest.mark.parametrize("gradient", [False, pytest.param(True, marks=pytest.mark.whole)])
def test_attention(gradient):
    """Tiles of 16, two warpgroups that share what a third one fetches.

    All tiles of keys are seen to their end: in one that is not, both warpgroups write the same zeros over what no row
    sees, each before its own product reads them, which is a race to the detector.
    """
    stop, sizes = jnp.arange(1, 65)[None], attention_gpu.Sizes(rows=16, keys=16, keys_backward=16, blocks=4, few=8)

    def attend(name, q, key, value):
        options = {"sizes": sizes, "interpret": DETECTING} if name is None else {"implementation": name}
        function = attention_gpu.attention if name is None else kernels.attention
        return function(q, (kernels.Keys(key, value, stop),), **options)

    arrays = draw(0, (1, 64, 2, 16), (1, 1, 64, 16), (1, 1, 64, 16))
    check(functools.partial(attend, None), functools.partial(attend, "xla"), arrays, gradient)


def test_block_scan():
    heads, groups, state, length = 2, 1, 64, 5
    inner, channels = 64 * heads, 64 * heads + 2 * groups * state

    def scan(name, z, xbc, tail, conv, bias, norm, initial):
        dt = jnp.full((1, length, heads), 0.5)
        weights = kernels.BlockWeights(conv, bias, jnp.ones(heads), norm)
        options = {"groups": groups, "epsilon": 1e-5, "next_state": True}
        options |= {"interpret": DETECTING, "programs": 1} if name is None else {"implementation": name}
        function = block_scan_gpu.block_scan if name is None else kernels.block_scan
        return function(z, xbc, dt, -dt, weights, tail, initial.astype(jnp.float32), **options)

    arrays = draw(1, (1, length, inner), (1, length, channels), (1, 4, channels), (4, channels), (channels,), (inner,))
    arrays += draw(2, (1, heads, 64, state), dtype=jnp.float32)
    check(functools.partial(scan, None), functools.partial(scan, "xla"), arrays, False)


@pytest.mark.parametrize("gradient", [False, pytest.param(True, marks=pytest.mark.whole)])
def test_convolutions(gradient):
    def convolve(name, x, context, weight, bias):
        options = {"interpret": DETECTING, "positions": 8} if name is None else {"implementation": name}
        module = causal_conv_gpu if name is None else kernels
        whole = module.causal_conv(x, weight, bias, **options)
        return whole, module.block_causal_conv(x, context, weight, bias, 4, **options)

    arrays = draw(3, (1, 16, 128), (1, 16, 128), (4, 128), (128,))
    check(functools.partial(convolve, None), functools.partial(convolve, "xla"), arrays, gradient)


def test_a_race_is_found():
    """A copy that nobody awaits."""

    def kernel(source, out, space, barrier):
        plgpu.copy_gmem_to_smem(source, space, barrier)
        out[...] = space[...]
        plgpu.barrier_wait(barrier)

    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
        scratch_types=[plgpu.SMEM((128,), jnp.float32), plgpu.Barrier()],
        interpret=DETECTING,
    )
    try:
        jax.block_until_ready(jax.jit(run)(jnp.ones(128)))
    except jax.errors.JaxRuntimeError as error:
        assert "race" in str(error).lower()
    else:
        assert interpreters.races_found()  # jax 0.11.2 notes it, and does not raise.
    finally:
        interpreters.forget_races()
