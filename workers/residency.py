"""Which adapter makes room for another in a replica's memory: pure.

A replica holds a few LoRA adapters beside its model; one that is asked for and not there must be loaded first. The
rule here keeps what is asked for often and takes long to load; plain LRU stands beside it. Called by replicas
(workers/adapters.py) and by the simulator's (autoscaler/sim/adapters.py), which are the same to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

HALF_LIFE_USES: Final = 512  # of a deployment's requests: popularity is forgotten at the pace of use
MAX_KNOWN: Final = 100_000


@dataclass(slots=True)
class Resident:
    """An adapter in a replica's memory. `n_using`: requests that run with it; `load_s`: seconds to load it again."""

    adapter: str
    load_s: float
    last_used_at: float
    n_using: int = 0


class Popularity:
    """How often each adapter of a deployment is asked for lately: counts that halve every HALF_LIFE_USES requests."""

    __slots__ = ("_counts", "_growth", "_weight")

    def __init__(self, half_life_uses: int = HALF_LIFE_USES) -> None:
        if half_life_uses < 1:
            raise ValueError(f"half_life_uses = {half_life_uses}: must be at least 1")
        self._counts: dict[str, float] = {}
        self._growth: float = 2.0 ** (1 / half_life_uses)
        self._weight = 1.0  # of the next use: newer ones weigh more instead of older ones less

    def note(self, adapter: str) -> None:
        """It was asked for."""
        self._counts[adapter] = self._counts.get(adapter, 0.0) + self._weight
        self._weight *= self._growth
        if self._weight > 1e100 or len(self._counts) > MAX_KNOWN:
            self._shrink()

    def share(self, adapter: str) -> float:
        """Of the lately asked, about; 0 for one never seen."""
        return self._counts.get(adapter, 0.0) / self._weight * (self._growth - 1)

    def _shrink(self) -> None:
        kept = sorted(self._counts.items(), key=lambda item: (-item[1], item[0]))[: MAX_KNOWN // 2]
        self._counts = {
            adapter: count / self._weight for adapter, count in kept if count > self._weight * 1e-9
        }
        self._weight = 1.0


def least_recent(residents: Iterable[Resident]) -> Resident | None:
    """The one that was used longest ago, of those that nobody uses; ties by name."""
    free = [r for r in residents if not r.n_using]
    return min(free, key=lambda r: (r.last_used_at, r.adapter), default=None)


def least_worth(residents: Iterable[Resident], popularity: Popularity) -> Resident | None:
    """The one whose absence costs least: share of requests x seconds to load it again; ties by use, then by name."""
    free = [r for r in residents if not r.n_using]
    return min(
        free,
        key=lambda r: (popularity.share(r.adapter) * r.load_s, r.last_used_at, r.adapter),
        default=None,
    )
