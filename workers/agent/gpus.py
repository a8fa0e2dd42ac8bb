"""Which GPUs of this machine a replica may use: each gets its own, as far as there are enough.

Told to its process by CUDA_VISIBLE_DEVICES before anything in it has touched a GPU. Called by replicas.py; asks no
driver, so that a machine without GPUs costs nothing.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

VARIABLE: Final = "CUDA_VISIBLE_DEVICES"
_SPLITS: Final = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


def devices(env: Mapping[str, str] = os.environ, proc: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """Those that this agent may use, in the driver's order; none where there are none."""
    if VARIABLE in env:
        return [name.strip() for name in env[VARIABLE].split(",") if name.strip()]
    return [str(n) for n in range(len(list(proc.glob("*"))))]


def needed(profile: Mapping[str, object]) -> int:
    """GPUs that a replica of this engine profile takes; 0 for an engine without."""
    if profile.get("engine") == "toy":
        return 0
    n = 1
    for name in _SPLITS:
        value = profile.get(name, 1)
        n *= value if isinstance(value, int) else 1
    return n


def assign(all_of: list[str], taken: Iterable[list[str]], n: int) -> list[str]:
    """The `n` that fewest use, neighbours where all are free; none where a replica takes the machine whole, or shares
    its only GPU: then nobody has to be told."""
    if n == 0 or n >= len(all_of):
        return []
    users = Counter(name for each in taken for name in each)
    least = sorted(all_of, key=lambda name: (users[name], all_of.index(name)))[:n]
    return sorted(least, key=all_of.index)
