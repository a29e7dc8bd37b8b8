"""The SSD scans of one tower and of two in Triton, by jax-triton, for NVIDIA GPUs that are not Hopper.

What is done is what ssd_gpu.py and two_tower_ssd_gpu.py do; only the kernels are others (scan_triton.py).
"""

import functools
import importlib.util

import jax

from twotower_jax.kernels.dispatch import platform
from twotower_jax.kernels.ssd import gpu as ssd_gpu
from twotower_jax.kernels.ssd import two_tower_gpu as two_tower_ssd_gpu
from twotower_jax.kernels.ssd.gpu_layout import too_long

ssd = functools.partial(ssd_gpu.ssd, module="triton")
two_tower_ssd = functools.partial(two_tower_ssd_gpu.two_tower_ssd, module="triton")

# P and N whose tiles fit into shared memory and registers; sizes of tensors are powers of two.
_HEAD_DIMS, _STATES = (16, 32, 64), (16, 32, 64, 128)
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
