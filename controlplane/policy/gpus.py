"""What a GPU can do at most and what it costs: memory, bandwidth, arithmetic, power, price. Pure facts.

Read by the performance model, by placement (does it fit) and by the choice of GPU types. Peak figures are the
vendors', for dense arithmetic; how much of a peak real kernels reach is the performance model's business.
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
    flops_4bit: float = 0.0  # 0: no 4-bit arithmetic; such weights are widened and multiplied in 16 bit

    def flops(self, bytes_per_param: float) -> float:
        """The peak at which weights of that width are multiplied."""
        if bytes_per_param < 0.75:
            return self.flops_4bit or self.flops_16bit
        return self.flops_8bit if bytes_per_param <= 1 else self.flops_16bit


def _gpu(
    name: str,
    gib: float,
    tb_per_s: float,
    tflops16: float,
    tflops8: float,
    link_gb: float,
    w: int,
    tflops4: float = 0,
) -> Gpu:
    return Gpu(
        name,
        int(gib * GIB),
        tb_per_s * 1e12,
        tflops16 * 1e12,
        tflops8 * 1e12,
        link_gb * 1e9,
        w,
        tflops4 * 1e12,
    )


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
            _gpu("a30", 24, 0.933, 165, 165, 32, 165),
            _gpu("h100_sxm", 80, 3.350, 989, 1978, 450, 700),
            _gpu("h200_sxm", 141, 4.800, 989, 1978, 450, 700),
            _gpu("b200_sxm", 180, 7.700, 2250, 4500, 900, 1000, 9000),
            _gpu("b300_sxm", 268, 7.750, 2250, 4500, 900, 1100, 14000),
        )
    }
)


def gpu(name: str) -> Gpu:
    """The GPU of that name; ValueError names those that are known."""
    found = GPUS.get(name)
    if found is None:
        raise ValueError(f"gpu: {name!r} is not in the catalogue; known: {', '.join(sorted(GPUS))}")
    return found


def accelerator(text: str) -> tuple[str, int]:
    """(GPU, how many) of `l4` or `4xl4`; ("", 1) of `cpu` and of nothing. ValueError names what is known."""
    if text in ("", "cpu"):
        return "", 1
    count, times, name = text.partition("x")
    n, name = (int(count), name) if times and count.isascii() and count.isdigit() else (1, text)
    if n < 1:
        raise ValueError(f"{text!r}: at least one GPU")
    return gpu(name).name, n


# NVIDIA's compute capability, times ten: which arithmetic and which kernels a card has.
CAPABILITIES: Final = MappingProxyType(
    {
        "t4": 75, "v100": 70, "a10g": 86, "l4": 89, "l40s": 89, "a100_40gb": 80, "a100_sxm": 80, "a30": 80,
        "h100_pcie": 90, "h100_sxm": 90, "h200_sxm": 90, "b200_sxm": 100, "b300_sxm": 103,
    }
)  # fmt: skip


def capability(found: Gpu) -> int:
    """Compute capability times ten; 0 for a card that is not in the catalogue."""
    return CAPABILITIES.get(found.name, 0)


@dataclass(frozen=True, slots=True)
class Price:
    """USD per GPU hour on demand, and where that was read."""

    usd_per_h: float
    source: str


def _aws(usd_per_h: float, instance: str, n_gpus: int) -> Price:
    return Price(round(usd_per_h / n_gpus, 4), f"AWS {instance}, us-east-1, list of 2026-07-20")


# On demand, the smallest AWS instance that has the card, its price shared by its cards (a10g, l4, l40s and t4 with the
# machine around one card). h100_pcie and a30 are not sold there.
PRICES: Final = MappingProxyType(
    {
        "t4": _aws(0.526, "g4dn.xlarge", 1),
        "v100": _aws(3.06, "p3.2xlarge", 1),
        "a10g": _aws(1.006, "g5.xlarge", 1),
        "l4": _aws(0.8048, "g6.xlarge", 1),
        "l40s": _aws(1.861, "g6e.xlarge", 1),
        "a100_40gb": _aws(21.957642, "p4d.24xlarge", 8),
        "a100_sxm": _aws(27.44705, "p4de.24xlarge", 8),
        "h100_sxm": _aws(6.88, "p5.4xlarge", 1),
        "h200_sxm": _aws(63.296, "p5en.48xlarge", 8),
        "b200_sxm": _aws(113.9328, "p6-b200.48xlarge", 8),
        "b300_sxm": _aws(142.416, "p6-b300.48xlarge", 8),
    }
)
