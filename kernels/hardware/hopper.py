"""Which NVIDIA GPUs the Mosaic GPU kernels are made for, and how they run where there is none."""

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

# Compute capability 9.0, which has wgmma; later chips have other instructions in its place.
_HOPPER = ("H100", "H200", "H800", "H20", "GH200")


def not_hopper() -> str | None:
    """Why the chip that is compiled for cannot run these kernels, or None."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    if any(name in kind for name in _HOPPER):
        return None
    return f"made for NVIDIA Hopper ({', '.join(_HOPPER)}), not for {kind}"


def interpreter(interpret: bool | plgpu.InterpretGPUParams) -> plgpu.InterpretGPUParams | None:
    """What `plgpu.kernel` takes: None to compile, or the parameters of the interpreter."""
    return plgpu.InterpretGPUParams() if interpret is True else interpret or None
