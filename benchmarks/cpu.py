"""CPU time of groups of processes from /proc, whole trees, so that a benchmark can say who paid.

Used by the benchmarks only. Resolution is the kernel's tick (10 ms): measure over seconds, not single requests.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def tree(root_pids: Sequence[int]) -> list[int]:
    """The given processes and all their descendants that are alive now."""
    pids: dict[int, None] = {}
    for pid in root_pids:
        try:
            process = psutil.Process(pid)
            for p in (process, *process.children(recursive=True)):
                pids[p.pid] = None
        except psutil.NoSuchProcess:
            continue
    return list(pids)


def cpu_s(pids: Sequence[int]) -> float:
    """User and system seconds of the processes so far, reaped children included."""
    total = 0.0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        total += sum(int(ticks) for ticks in fields[11:15]) * _TICK_S
    return total


def snapshot(groups: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """CPU seconds by group of pids."""
    return {name: cpu_s(pids) for name, pids in groups.items()}


def spent(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Seconds by group between two snapshots."""
    return {name: after[name] - before[name] for name in before}
