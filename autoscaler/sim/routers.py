"""Routing rules, for world.py: the production board and the plain rules it is compared with."""

from __future__ import annotations

import math
import random
from collections import deque

from autoscaler.sim.job import NEVER, Job
from autoscaler.sim.prefixcache import BLOCK
from autoscaler.sim.world import Replica
from controlplane.policy.prefix import rungs
from controlplane.policy.routing import Ask, Board, Placed, ReplicaLoad, RouteWeights


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


class Random(LeastLoad):
    """Any, load unseen."""

    def __init__(self, seed: int = 0) -> None:
        self._chance = random.Random(seed)

    def rank(self, job: Job, replicas: list[Replica], now_s: float) -> list[Replica]:
        return [self._chance.choice(replicas)] if replicas else []


class PowerOfTwo(LeastLoad):
    """The less loaded of two drawn by chance (Mitzenmacher 2001): what is stale misleads few."""

    def __init__(self, seed: int = 0) -> None:
        self._chance = random.Random(seed)

    def rank(self, job: Job, replicas: list[Replica], now_s: float) -> list[Replica]:
        if len(replicas) < 2:
            return list(replicas)
        two = self._chance.sample(replicas, 2)
        return [min(two, key=lambda r: (r.used / r.slots, r.id))]


class ResidentFirst(LeastLoad):
    """The rule of inference gateways (llm-d's LoRA scorer): a replica that has the adapter, else one with a place for
    it (`limit`), else any; the least loaded of those."""

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def rank(self, job: Job, replicas: list[Replica], now_s: float) -> list[Replica]:
        having = [r for r in replicas if job.adapter in r.adapters]
        return super().rank(
            job, having or [r for r in replicas if len(r.adapters) < self._limit] or replicas, now_s
        )


class Affinity:
    """The production board (controlplane/policy/routing.py), fed as one gateway would be.

    `cache_tokens`: of one replica, as its engine reports it. Prefixes are known at the lengths that a gateway hashes,
    or at every block of the trace. What others placed it sees every `age_s`, from `first_s` on; never, where it is the
    only gateway.
    """

    def __init__(
        self,
        cache_tokens: int,
        weights: RouteWeights | None = None,
        *,
        every_block: bool = False,
        age_s: float = math.inf,
        first_s: float = 0.0,
    ) -> None:
        self.board = Board(cache_tokens, weights, max_prefixes=1_000_000)
        self._every_block = every_block
        self._age_s, self._next_s = age_s, first_s
        self._loads: dict[str, ReplicaLoad] = {}
        self._replicas: dict[str, Replica] = {}
        self._placed: dict[int, Placed] = {}
        self._young: deque[Job] = deque()  # whose first token has not been seen yet

    def rank(self, job: Job, replicas: list[Replica], now_s: float) -> list[Replica]:
        if now_s >= self._next_s or len(replicas) != len(self._loads):
            self._look(replicas, now_s)
        self._hear()
        ranked = self.board.rank(self._ask(job), 1, turn=job.id)
        return [self._replicas[name] for name in ranked if self._replicas[name].is_ready]

    def on_bound(self, job: Job, replica: Replica, now_s: float) -> None:
        name = str(replica.id)
        load = self._loads.get(name)
        if load is not None:
            load.used += 1
            self._placed[job.id] = self.board.bound(name, self._ask(job), now_s)
            self._young.append(job)

    def on_end(self, job: Job, replica: Replica, now_s: float) -> None:
        load = self._loads.get(str(replica.id))
        if load is not None and load.used > 0:
            load.used -= 1
        placed = self._placed.pop(job.id, None)
        if placed is not None:
            self.board.started(placed)

    def _look(self, replicas: list[Replica], now_s: float) -> None:
        self._replicas = {str(r.id): r for r in replicas}
        self._loads = {
            name: ReplicaLoad(name, "", r.used, r.slots, adapters=r.adapters)
            for name, r in self._replicas.items()
        }
        self.board.see(self._loads)
        if self._age_s < math.inf:
            self._next_s += self._age_s * max((now_s - self._next_s) // self._age_s + 1, 0)
        else:
            self._next_s = math.inf

    def _hear(self) -> None:
        """First tokens since the last look, as the gateway's streams would tell them."""
        young, placed = self._young, self._placed
        for _ in range(len(young)):
            job = young.popleft()
            if job.first_s == NEVER:
                young.append(job)
            elif job.id in placed:
                self.board.started(placed[job.id])

    def _ask(self, job: Job) -> Ask:
        n = min(job.n_prompt // BLOCK, len(job.prefix))
        if not n:
            return Ask(job.n_prompt, adapter=job.adapter)
        if self._every_block:
            return Ask(job.n_prompt, job.prefix[:n], range(BLOCK, n * BLOCK + 1, BLOCK), job.adapter)
        lengths = rungs(n)
        return Ask(
            job.n_prompt, [job.prefix[k - 1] for k in lengths], [k * BLOCK for k in lengths], job.adapter
        )
