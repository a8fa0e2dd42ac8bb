"""Which model versions a machine should fetch before anybody asks it to serve them. Pure.

What is wanted most and not there, one version at a time and only into room that is free: a prefetch never makes another
version leave. Methods 3.9: keep by what a start saves for each byte; a fetch from the store saves its whole length, so
what is left is how often it is wanted, and among equals the smaller one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

MAX_KEPT: Final = 8  # versions that are looked after on each machine


@dataclass(frozen=True, slots=True)
class Wanted:
    """A version that deployments serve from an object store. `n_starts`: of its replicas, lately."""

    digest: str
    size_bytes: int
    n_starts: int


@dataclass(frozen=True, slots=True)
class Room:
    """A machine that is there to stay: what it holds, what it was asked to fetch and has not, what is free."""

    machine_id: str
    holds: frozenset[str]
    asked: frozenset[str]
    free_bytes: int


def prefetches(machines: Iterable[Room], versions: Sequence[Wanted]) -> tuple[tuple[str, str], ...]:
    """(machine, digest) to ask for now, by machine id; at most one each."""
    best = sorted(versions, key=lambda v: (-v.n_starts, v.size_bytes, v.digest))[:MAX_KEPT]
    found = []
    for room in sorted(machines, key=lambda m: m.machine_id):
        if room.asked:
            continue
        for version in best:
            if version.digest not in room.holds and version.size_bytes <= room.free_bytes:
                found.append((room.machine_id, version.digest))
                break
    return tuple(found)
