"""The rates that predictions assume, all of them: vendors' documents, and what is taken for granted beside them.

* A product runs at the peak rate of dense bfloat16, whatever its shape and dtype; everything else at the memory's rate.
* An instruction takes the longer of its arithmetic and its memory traffic; instructions run one after the other.
* A collective is a ring that uses all links of a chip in one direction; nothing but its bytes takes time.
* GPUs reach one another by NVLink within a group of eight, and by one network card each beyond.
* A kernel whose arithmetic the program does not show does what the model asks of it at the peak rate, or its own
  memory traffic if that takes longer. What it computes twice or in several passes is not counted.

Sources, read on 2026-11-28: TPUs, Google Cloud's pages "TPU v4", "TPU v5p", "TPU v6e" (which has v5e beside it) and
"TPU7x (Ironwood)" under docs.cloud.google.com/tpu/docs, with the bandwidth between chips in both directions, of which
half is taken; that of v4 is six links of 50 GB/s (arXiv 2304.01433, from memory). GPUs: the numbers of NVIDIA's data
sheets for H200, H100 (SXM) and L4 as other sites repeat them, since the sheets themselves could not be opened: NVLink
has 900 GB/s in both directions, the network card is a ConnectX-7 of 400 Gb/s. L4's PCIe rate is from memory.
"""

from typing import NamedTuple

_GB = 1e9


class Rates(NamedTuple):
    """The rates of one device as JAX counts devices.

    Attributes:
      memory: bytes/s. link: bytes/s in one direction, all links together. far_link: of collectives over more than
        `near` devices. near: devices that `link` joins; None for all.
    """

    memory: float
    link: float
    far_link: float = 0.0
    near: int | None = None

    def link_rate(self, group: int) -> float:
        """The bandwidth of a collective of so many devices."""
        return self.link if self.near is None or group <= self.near else self.far_link


RATES = {
    "v4": Rates(1200 * _GB, 300 * _GB),
    "v5e": Rates(819 * _GB, 200 * _GB),
    "v5p": Rates(2765 * _GB, 600 * _GB),
    "v6e": Rates(1640 * _GB, 400 * _GB),
    "tpu7x": Rates(7380 * _GB / 2, 600 * _GB / 2),  # a chip is two devices
    "h200": Rates(4800 * _GB, 450 * _GB, 50 * _GB, near=8),
    "h100": Rates(3350 * _GB, 450 * _GB, 50 * _GB, near=8),
    "l4": Rates(300 * _GB, 32 * _GB),  # PCIe 4.0 with 16 lanes
}
