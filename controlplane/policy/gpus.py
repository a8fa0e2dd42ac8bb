"""What a GPU can do at most: memory, bandwidth, arithmetic, power. Pure facts.

Read by the performance model (roofline prior) and by placement (does it fit). Peak figures are the vendors', for
dense 16-bit arithmetic; how much of a peak real kernels reach is the performance model's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

GIB: Final = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU type. Bytes, bytes per second, floating-point operations per second, watts."""

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    flops_16bit: float
    flops_8bit: float
    link_bytes_per_s: float  # to its neighbour in the node: NVLink or PCIe
    power_w: int


def _gpu(
    name: str, gib: float, tb_per_s: float, tflops16: float, tflops8: float, link_gb: float, w: int
) -> Gpu:
    return Gpu(name, int(gib * GIB), tb_per_s * 1e12, tflops16 * 1e12, tflops8 * 1e12, link_gb * 1e9, w)


# Vendors' data sheets. Cards without 8-bit floating point list their 16-bit figure.
GPUS: Final = MappingProxyType(
    {
        gpu.name: gpu
        for gpu in (
            _gpu("t4", 16, 0.320, 65, 65, 32, 70),
            _gpu("v100", 16, 0.900, 125, 125, 300, 300),
            _gpu("a10g", 24, 0.600, 70, 70, 32, 300),
            _gpu("l4", 24, 0.300, 121, 242, 32, 72),
            _gpu("l40s", 45, 0.864, 362, 733, 32, 350),
            _gpu("a100_40gb", 40, 1.555, 312, 312, 300, 400),
            _gpu("a100_sxm", 80, 2.039, 312, 312, 300, 400),
            _gpu("h100_pcie", 80, 2.000, 756, 1513, 64, 350),
            _gpu("h100_sxm", 80, 3.350, 989, 1978, 450, 700),
            _gpu("h200_sxm", 141, 4.800, 989, 1978, 450, 700),
            _gpu("b200_sxm", 180, 7.700, 2250, 4500, 900, 1000),
            _gpu("b300_sxm", 268, 7.750, 2250, 4500, 900, 1100),
        )
    }
)


def gpu(name: str) -> Gpu:
    """The GPU of that name; ValueError names those that are known."""
    found = GPUS.get(name)
    if found is None:
        raise ValueError(f"gpu: {name!r} is not in the catalogue; known: {', '.join(sorted(GPUS))}")
    return found
