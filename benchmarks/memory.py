"""Memory of groups of processes while a load runs: proportional set size, sampled once a second.

Used by the benchmarks only. A page that several processes share counts in parts, so groups may be added up.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

_EVERY_S = 1.0


def pss_mib(pids: Sequence[int]) -> float:
    """MiB of the processes now; what has ended counts nothing."""
    total_kib = 0
    for pid in pids:
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total_kib += int(line.split()[1])
        except OSError:
            continue
    return total_kib / 1024


class PeakMemory:
    """`with PeakMemory(groups) as memory: …`, then `memory.before` and `memory.peak`: MiB by group."""

    def __init__(self, groups: Mapping[str, Sequence[int]]) -> None:
        self._groups = groups
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.before: dict[str, float] = {}
        self.peak: dict[str, float] = {}

    def __enter__(self) -> PeakMemory:
        self.before = {name: pss_mib(pids) for name, pids in self._groups.items()}
        self.peak = dict(self.before)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def now(self) -> dict[str, float]:
        """MiB by group."""
        return {name: pss_mib(pids) for name, pids in self._groups.items()}

    def _sample(self) -> None:
        while not self._ended.wait(_EVERY_S):
            for name, pids in self._groups.items():
                self.peak[name] = max(self.peak[name], pss_mib(pids))
