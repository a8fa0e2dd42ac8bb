"""Which replicas a request should try, best first: pure.

Called by the gateway per request with what it last saw of the deployment's replicas. The admission script
takes the first of them that has a free slot at that instant, so a stale view costs a detour, never a wrong
placement.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

MAX_CANDIDATES: Final = (
    8  # each costs the admission script one HMGET; beyond them the queue finds any free slot
)


@dataclass(slots=True)
class ReplicaLoad:
    """A ready replica as last seen. `used` and `slots` count requests; the caller may move `used` between
    looks."""

    replica: str
    machine: str
    used: int
    slots: int


def rank(replicas: Iterable[ReplicaLoad], limit: int = MAX_CANDIDATES) -> tuple[str, ...]:
    """Ids of at most `limit` replicas, least loaded (used / slots) first, ties by id.

    A full replica stays a candidate, last: it may have freed a slot since it was seen. One without slots does
    not.
    """
    ordered = sorted((r.used / r.slots, r.replica) for r in replicas if r.slots > 0)
    return tuple(replica for _, replica in ordered[:limit])
