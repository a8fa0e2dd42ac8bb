"""Llumnix's dispatch as a baseline, for world.py: the replica with the highest freeness.

Freeness (OSDI 24, Algorithm 1; `remaining_steps` in its code) is how many steps the KV that is free would last if every
request took one more token each: (tokens free - tokens wanted by what waits) / requests. Without requests it is
infinite. Its live migration has no counterpart here: engines are vLLM's, which cannot move a running request.
"""

from __future__ import annotations

import math

from autoscaler.sim.job import Job
from autoscaler.sim.prefixcache import BLOCK
from autoscaler.sim.world import Replica


def freeness(n_total: int, n_used: int, n_wanted: int, n_requests: int) -> float:
    """Steps left; negative where more is wanted than exists. All but `n_requests` in tokens."""
    return math.inf if n_requests == 0 else (n_total - n_used - n_wanted) / n_requests


class Llumnix:
    """Highest freeness, ties by id."""

    def rank(self, job: Job, replicas: list[Replica], now_s: float) -> list[Replica]:
        if not replicas:
            return []
        return [max(replicas, key=lambda r: (_freeness(r), -r.id))]

    def on_bound(self, job: Job, replica: Replica, now_s: float) -> None:
        pass

    def on_end(self, job: Job, replica: Replica, now_s: float) -> None:
        pass


def _freeness(replica: Replica) -> float:
    engine = replica.engine
    n_shared = engine.cache.n_pinned * BLOCK if engine.cache is not None else 0
    n_wanted = sum(job.n_prompt + job.n_done for job in engine.waiting)
    return freeness(engine.spec.kv_tokens, engine.kv_used + n_shared, n_wanted, engine.n_held)
