"""Routing rules, for world.py: the production ranking and the rules it is compared with."""

from __future__ import annotations

from autoscaler.sim.job import Job
from autoscaler.sim.world import Replica


class LeastLoad:
    """Fewest requests per slot, ties by id: the production ranking without affinity."""

    def rank(self, job: Job, replicas: list[Replica], now_s: float) -> list[Replica]:
        if not replicas:
            return []
        return [min(replicas, key=lambda r: (r.used / r.slots, r.id))]

    def on_bound(self, job: Job, replica: Replica, now_s: float) -> None:
        pass

    def on_end(self, job: Job, replica: Replica, now_s: float) -> None:
        pass


class RoundRobin(LeastLoad):
    """Each in turn, load unseen."""

    def __init__(self) -> None:
        self._n = 0

    def rank(self, job: Job, replicas: list[Replica], now_s: float) -> list[Replica]:
        if not replicas:
            return []
        self._n += 1
        at = self._n % len(replicas)
        return replicas[at:] + replicas[:at]
