"""Dynamo's KV router as a baseline, for world.py: prefill blocks plus decode blocks, the least wins.

The cost is that of its routing guide and `DefaultWorkerSelector`: `overlap_weight x prefill + decode`, where prefill is
the worker's prompt tokens without a first token yet and the request's own uncached ones, and decode the distinct blocks
of its active requests, the new one among them (output is not tracked, as by default). Blocks are those of the trace. It
is given what KV events would tell it at best: exactly what each engine's cache holds at this instant.
"""

from __future__ import annotations

import math
import random
from collections import Counter

from autoscaler.sim.job import NEVER, Job
from autoscaler.sim.prefixcache import BLOCK
from autoscaler.sim.world import Replica


def cost(prefill_blocks: float, decode_blocks: float, overlap_weight: float = 1.0) -> float:
    """What one worker would have to do."""
    return overlap_weight * prefill_blocks + decode_blocks


class _Active:
    """What the router counts for one worker."""

    __slots__ = ("blocks", "n_private", "prefills")

    def __init__(self) -> None:
        self.prefills: dict[int, tuple[Job, int]] = {}  # job, uncached tokens when it was routed
        self.blocks: Counter[int] = Counter()
        self.n_private = 0  # blocks that no other request can share

    def n_prefill(self) -> int:
        for done in [job_id for job_id, (job, _) in self.prefills.items() if job.first_s != NEVER]:
            del self.prefills[done]
        return sum(n for _, n in self.prefills.values())


class Dynamo:
    """temperature 0: the least cost, ties by chance. Above: softmax over costs scaled to their spread."""

    def __init__(self, overlap_weight: float = 1.0, temperature: float = 0.0, seed: int = 0) -> None:
        self.overlap_weight, self.temperature = overlap_weight, temperature
        self._chance = random.Random(seed)
        self._active: dict[int, _Active] = {}

    def rank(self, job: Job, replicas: list[Replica], now_s: float) -> list[Replica]:
        if not replicas:
            return []
        costs = []
        for replica in replicas:
            active = self._active.setdefault(replica.id, _Active())
            n_new = max(job.n_prompt - self._n_cached(job, replica), 0)
            blocks = active.blocks
            n_decode = len(blocks) + active.n_private + _n_private(job)
            n_decode += sum(1 for block in job.prefix if block not in blocks)
            costs.append(cost((active.n_prefill() + n_new) / BLOCK, n_decode, self.overlap_weight))
        return [replicas[self._pick(costs)]]

    def on_bound(self, job: Job, replica: Replica, now_s: float) -> None:
        active = self._active.setdefault(replica.id, _Active())
        active.prefills[job.id] = (job, max(job.n_prompt - self._n_cached(job, replica), 0))
        active.blocks.update(job.prefix)
        active.n_private += _n_private(job)

    def on_end(self, job: Job, replica: Replica, now_s: float) -> None:
        active = self._active[replica.id]
        active.prefills.pop(job.id, None)
        active.n_private -= _n_private(job)
        for block in job.prefix:
            active.blocks[block] -= 1
            if not active.blocks[block]:
                del active.blocks[block]

    @staticmethod
    def _n_cached(job: Job, replica: Replica) -> int:
        cache = replica.engine.cache
        return 0 if cache is None else cache.match(job.prefix) * BLOCK

    def _pick(self, costs: list[float]) -> int:
        least, most = min(costs), max(costs)
        if self.temperature == 0.0 or least == most:
            return self._chance.choice([i for i, c in enumerate(costs) if c == least])
        weights = [math.exp((least - c) / ((most - least) * self.temperature)) for c in costs]
        return self._chance.choices(range(len(costs)), weights)[0]


def _n_private(job: Job) -> int:
    return 0 if job.prefix else -(-job.n_prompt // BLOCK)
