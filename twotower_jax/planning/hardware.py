"""Hardware to compile for, by name; none of it has to exist here.

v5p:8x8x4      TPUs: a generation and the shape of its mesh of chips (package `libtpu`)
h200:64        NVIDIA H200, eight to a host (packages `jax-cuda13-plugin` and `jax-cuda13-pjrt`)
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
_H200 = _Generation(139 * GIB, 989e12)

# What XLA's GPU compiler asks of a device, as an H200 answers.
_H200_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""


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
    known = ", ".join([*_TPUS, "h200"])
    if generation not in {*_TPUS, "h200"} or not sizes or min(sizes) < 1:
        raise ValueError(f"topology {name!r}: give a generation and a shape, such as v5p:8x8x4 or h200:8 ({known})")
    return _h200(name, math.prod(sizes)) if generation == "h200" else _tpu(name, _TPUS[generation], sizes)


def _tpu(name: str, generation: _Generation, sizes: tuple[int, ...]) -> Hardware:
    # The compiler takes a lock on hardware that it does not use here, and asks a server that does not answer.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        devices = topologies.get_topology_desc(name, platform="tpu").devices
    except Exception as error:  # Whatever type the plugin raises.
        raise ValueError(f"topology {name!r}: {_first_line(error)}; compiling for TPUs needs libtpu") from None
    chips = math.prod(sizes)
    return Hardware(name, devices, chips, *(n // generation.devices for n in generation[:2]))


def _h200(name: str, chips: int) -> Hardware:
    # The compiler needs none of CUDA's libraries, whose versions the plugin would check.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    hosts = -(-chips // _GPUS_A_HOST)
    shape = f"1x{hosts}x{chips // hosts}"
    try:
        described = topologies.get_topology_desc(platform="cuda", target_config=_H200_TARGET, topology=shape)
    except Exception as error:
        raise ValueError(
            f"topology {name!r}: {_first_line(error)}; compiling for NVIDIA GPUs needs jax-cuda13-plugin and "
            "jax-cuda13-pjrt of jax's own version"
        ) from None
    return Hardware(name, described.devices, chips, _H200.memory, _H200.peak_flops)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
