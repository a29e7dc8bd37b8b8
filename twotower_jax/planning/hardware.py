"""Hardware to compile for, by name; none of it has to exist here.

v5p:8x8x4      TPUs: a generation and the shape of its mesh of chips (package `libtpu`)
h200:64        NVIDIA GPUs, h200, h100 or l4, eight to a host (packages `jax-cuda13-plugin` and `jax-cuda13-pjrt`)
"""

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.experimental import topologies

GIB = 2**30
_GPUS_A_HOST = 8


class Hardware(NamedTuple):
    """A set of devices.

    Attributes:
      name: as it was asked for.
      devices: what `sharding.make_mesh` takes.
      chips: how many the vendor would count.
      memory: bytes of one device.
      peak_flops: of one device, dense bfloat16, FLOP/s.
    """

    name: str
    devices: Sequence[Any]
    chips: int
    memory: int
    peak_flops: float


class _Generation(NamedTuple):
    """Bytes and peak FLOP/s of one chip (vendors' data sheets), and the devices that JAX makes of it."""

    memory: int
    peak_flops: float
    devices: int = 1


_TPUS = {
    "v4": _Generation(32 * GIB, 275e12),
    "v5e": _Generation(16 * GIB, 197e12),
    "v5p": _Generation(95 * GIB, 459e12),
    "v6e": _Generation(32 * GIB, 918e12),
    "tpu7x": _Generation(192 * GIB, 2307e12, devices=2),
}


class _Gpu(NamedTuple):
    """One NVIDIA GPU by its data sheet, and what XLA's GPU compiler asks of such a device.

    Attributes:
      name: as its driver reports it. memory: bytes that are left of it for programs. peak_flops: dense bfloat16.
      capability: major and minor. cores: streaming multiprocessors.
      threads, shared, shared_optin: of a core; bytes of shared memory in all, and that one block may ask for.
      cache: bytes of the second-level cache. bandwidth: of memory, bytes/s. clock: GHz.
    """

    name: str
    memory: int
    peak_flops: float
    capability: tuple[int, int]
    cores: int
    threads: int
    shared: int
    shared_optin: int
    cache: int
    bandwidth: int
    clock: float


_HOPPER = {"capability": (9, 0), "cores": 132, "threads": 2048, "shared": 233472, "shared_optin": 232448}
_HOPPER |= {"cache": 52428800, "clock": 1.98}
_GPUS = {
    "h200": _Gpu("NVIDIA H200", 139 * GIB, 989e12, bandwidth=4_800_000_000_000, **_HOPPER),
    "h100": _Gpu("NVIDIA H100 80GB HBM3", 79 * GIB, 989e12, bandwidth=3_350_000_000_000, **_HOPPER),
    # A card of 24 GB; its kin (A10, L40, RTX 4090) have the same memory, or the same cores.
    "l4": _Gpu("NVIDIA L4", 22 * GIB, 121e12, (8, 9), 58, 1536, 102400, 101376, 50331648, 300_000_000_000, 2.04),
}
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: {threads}
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {device_memory}
  shared_memory_per_block_optin: {shared_optin}
  cuda_compute_capability {{ {capability_text} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


def _target(gpu: _Gpu) -> str:
    """What XLA's GPU compiler asks of a device, as this one answers."""
    major, minor = gpu.capability
    capability = f"major: {major}" + (f" minor: {minor}" if minor else "")
    # All of an H200's memory is known; of others what programs have.
    memory = 151397597184 if gpu.name == "NVIDIA H200" else gpu.memory
    return _TARGET.format(**gpu._asdict(), capability_text=capability, device_memory=memory)


def device_figures(generation: str) -> tuple[int, float]:
    """Bytes and peak FLOP/s of one device of a generation such as "v5p" or "h200"."""
    if generation in _GPUS:
        return _GPUS[generation].memory, _GPUS[generation].peak_flops
    chip = _TPUS[generation]
    return chip.memory // chip.devices, chip.peak_flops / chip.devices


def find(name: str) -> Hardware:
    """The hardware of a name such as "v5p:8x8x4" or "h200:8".

    Raises:
      ValueError: for a name that means nothing, or whose compiler is not installed.
    """
    generation, _, shape = name.partition(":")
    try:
        sizes = tuple(int(size) for size in shape.split("x"))
    except ValueError:
        sizes = ()
    known = ", ".join([*_TPUS, *_GPUS])
    if generation not in {*_TPUS, *_GPUS} or not sizes or min(sizes) < 1:
        raise ValueError(f"topology {name!r}: give a generation and a shape, such as v5p:8x8x4 or h200:8 ({known})")
    if generation in _GPUS:
        return _gpus(name, _GPUS[generation], math.prod(sizes))
    return _tpu(name, math.prod(sizes))


def _tpu(name: str, chips: int) -> Hardware:
    # The compiler takes a lock on hardware that it does not use here, and asks a server that does not answer.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        devices = topologies.get_topology_desc(name, platform="tpu").devices
    except Exception as error:  # Whatever type the plugin raises.
        raise ValueError(f"topology {name!r}: {_first_line(error)}; compiling for TPUs needs libtpu") from None
    return Hardware(name, devices, chips, *device_figures(name.partition(":")[0]))


def _gpus(name: str, gpu: _Gpu, chips: int) -> Hardware:
    # The compiler needs none of CUDA's libraries, whose versions the plugin would check.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    hosts = -(-chips // _GPUS_A_HOST)
    shape = f"1x{hosts}x{chips // hosts}"
    try:
        described = topologies.get_topology_desc(platform="cuda", target_config=_target(gpu), topology=shape)
    except Exception as error:
        raise ValueError(
            f"topology {name!r}: {_first_line(error)}; compiling for NVIDIA GPUs needs jax-cuda13-plugin and "
            "jax-cuda13-pjrt of jax's own version"
        ) from None
    return Hardware(name, described.devices, chips, gpu.memory, gpu.peak_flops)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
