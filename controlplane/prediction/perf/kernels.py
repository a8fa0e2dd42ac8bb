"""What share of the peaks single kernels reach, by GPU: how a card differs from others whose engine was never timed.

Kernel times come from operator benchmarks: matrix products and attention of prompts. An engine adds overheads of its
own, so the shares are used as ratios between GPUs only. Attention of decoding is left out: its published times on two
of the cards would need more than the cards' bandwidth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from controlplane.policy.gpus import Gpu, gpu
from controlplane.prediction.perf.data import rows
from controlplane.prediction.perf.nnls import Array, nnls

FILES: Final = {
    "a100_sxm": "a100_trtllm",
    "l40s": "l40s_trtllm",
    "h100_sxm": "h100_vllm",
    "h200_sxm": "h200_vllm",
}
REFERENCE: Final = ("h100_sxm", "h200_sxm")  # whose engines most measurements are of
# Smaller operands stay in the last-level cache between repeats of a benchmark, which they never do in a model.
_MIN_BYTES: Final = 200e6
_ROUNDS: Final = 20


@dataclass(frozen=True, slots=True)
class KernelShares:
    """Shares of the peaks, and the median relative error of each fit; `reference`: the mean of the reference GPUs."""

    shares: Mapping[str, float]
    errors: Mapping[str, float]
    reference: Mapping[str, float]

    def factor(self, name: str) -> float:
        """Inverse share over the reference's; 1 where either was not measured."""
        if name not in self.shares or name not in self.reference:
            return 1.0
        return self.reference[name] / self.shares[name]


def kernel_shares(folder: Path) -> dict[str, KernelShares]:
    """By GPU, of the operator files in `folder`; empty when it has none."""
    found: dict[str, tuple[dict[str, float], dict[str, float]]] = {}
    for name, prefix in FILES.items():
        if (folder / f"{prefix}_gemm.csv.gz").exists():
            found[name] = _of(gpu(name), folder, prefix)
    names = {share for shares, _ in found.values() for share in shares}
    reference = {}
    for share in sorted(names):
        known = [found[name][0][share] for name in REFERENCE if name in found and share in found[name][0]]
        if known:
            reference[share] = float(np.exp(np.mean(np.log(known))))
    return {name: KernelShares(shares, errors, reference) for name, (shares, errors) in found.items()}


def _of(card: Gpu, folder: Path, prefix: str) -> tuple[dict[str, float], dict[str, float]]:
    shares: dict[str, float] = {}
    errors: dict[str, float] = {}
    for dtype, width, peak in (("float16", 2, card.flops_16bit), ("fp8", 1, card.flops_8bit)):
        points = []
        for row in rows(folder / f"{prefix}_gemm.csv.gz"):
            m, n, k = int(row["m"]), int(row["n"]), int(row["k"])
            n_bytes = width * (k * n + m * k) + 2 * m * n
            if row["gemm_dtype"] == dtype and n_bytes >= _MIN_BYTES:
                times = (n_bytes / card.memory_bytes_per_s, 2 * m * n * k / peak)
                points.append((*times, float(row["latency_ms"]) / 1000))
        if len(points) < 50 or (dtype == "fp8" and card.flops_8bit == card.flops_16bit):
            continue
        memory, flops, error = _knee(np.array(points))
        if dtype == "float16":
            shares["memory"], errors["memory"] = memory, error
        name = "flops_16bit" if dtype == "float16" else "flops_8bit"
        shares[name], errors[name] = flops, error
    shares["attention"], errors["attention"] = _line(np.array(_prompts(card, folder, prefix)))
    return shares, errors


def _plain(row: dict[str, str]) -> bool:
    return row.get("window_size", "0") == "0" and row["attn_dtype"] == row["kv_cache_dtype"] == "float16"


def _prompts(card: Gpu, folder: Path, prefix: str) -> list[tuple[float, float]]:
    found = []
    for row in rows(folder / f"{prefix}_prefill_attention.csv.gz"):
        n = int(row["isl"])
        flops = 4 * int(row["batch_size"]) * n * (n + 1) / 2 * int(row["num_heads"]) * int(row["head_dim"])
        if _plain(row) and n >= 1024 and flops / card.flops_16bit > 1e-4:
            found.append((flops / card.flops_16bit, float(row["latency_ms"]) / 1000))
    return found


def _line(points: Array) -> tuple[float, float]:
    """Share of the peak and median relative error of `overhead + peak time / share`."""
    peak_s, seconds = points.T
    columns = np.column_stack([np.ones(len(points)), peak_s])
    x = nnls(columns / seconds[:, None], np.ones(len(points)))
    error = np.abs(columns @ x - seconds) / seconds
    return float(1 / x[1]), float(np.median(error))


def _knee(points: Array) -> tuple[float, float, float]:
    """Shares of bandwidth and arithmetic, and median relative error, of `overhead + max(reading, multiplying)`."""
    read_s, multiply_s, seconds = points.T
    memory, flops = 0.75, 0.55
    x = np.zeros(3)
    for _ in range(_ROUNDS):
        reads = read_s / memory >= multiply_s / flops
        columns = np.column_stack(
            [np.ones(len(points)), np.where(reads, read_s, 0), np.where(reads, 0, multiply_s)]
        )
        x = nnls(columns / seconds[:, None], np.ones(len(points)))
        was = memory, flops
        memory, flops = 1 / max(x[1], 1e-9), 1 / max(x[2], 1e-9)
        if abs(memory - was[0]) + abs(flops - was[1]) < 1e-6:
            break
    error = np.abs(x[0] + np.maximum(read_s / memory, multiply_s / flops) - seconds) / seconds
    return float(memory), float(flops), float(np.median(error))
