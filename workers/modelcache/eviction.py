"""Which model versions leave a full disk: those that are cheapest to miss for each byte they hold. Pure.

Greedy by (refetch cost × popularity ÷ bytes), as GreedyDual-Size-Frequency (Cherkasova, HPL-98-69): a version that
takes long to fetch again and is asked for often stays, a large one that nobody wants goes. Popularity fades, so that
what was loved last week makes room. What runs is not a candidate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

HALF_LIFE_S: Final = 6 * 3600.0
SETUP_S: Final = 1.0  # of a fetch, however small


@dataclass(frozen=True, slots=True)
class Use:
    """What is remembered of one version. `score`: uses, fading; `at_s`: when it was last brought up to date."""

    score: float = 0.0
    at_s: float = 0.0
    fetch_s: float = 0.0  # what fetching it took last; 0: not known

    def seen(self, now_s: float) -> Use:
        """After one more use."""
        return replace(self, score=faded(self, now_s) + 1.0, at_s=max(now_s, self.at_s))


@dataclass(frozen=True, slots=True)
class Held:
    """One version on the disk."""

    digest: str
    size_bytes: int
    use: Use
    in_use: bool = False


def faded(use: Use, now_s: float) -> float:
    """Its score now: halves every HALF_LIFE_S."""
    return float(use.score * 0.5 ** (max(now_s - use.at_s, 0.0) / HALF_LIFE_S))


def worth_per_byte(held: Held, now_s: float, bytes_per_s: float) -> float:
    """Seconds of fetching that a byte of it saves, by how often it is wanted."""
    cost_s = held.use.fetch_s or SETUP_S + held.size_bytes / bytes_per_s
    return faded(held.use, now_s) * cost_s / max(held.size_bytes, 1)


def victims(
    held: Iterable[Held], n_bytes: int, now_s: float, *, bytes_per_s: float = 200e6
) -> tuple[str, ...] | None:
    """Digests to remove so that `n_bytes` become free, least worth first; None when what may go is not enough."""
    free = sorted(
        (h for h in held if not h.in_use), key=lambda h: (worth_per_byte(h, now_s, bytes_per_s), h.digest)
    )
    chosen: list[Held] = []
    n_freed = 0
    for each in free:
        if n_freed >= n_bytes:
            break
        chosen.append(each)
        n_freed += each.size_bytes
    if n_freed < n_bytes:
        return None
    # Small ones taken on the way to a large one need not go.
    for each in sorted(chosen, key=lambda h: -worth_per_byte(h, now_s, bytes_per_s)):
        if n_freed - each.size_bytes >= n_bytes:
            chosen.remove(each)
            n_freed -= each.size_bytes
    return tuple(h.digest for h in chosen)
