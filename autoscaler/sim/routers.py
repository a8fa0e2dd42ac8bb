"""Routing rules, for world.py: the production board and the plain rules it is compared with."""

from __future__ import annotations

import math
import random
from collections import deque

from autoscaler.sim import beginnings
from autoscaler.sim.job import NEVER, Job
from autoscaler.sim.prefixcache import BLOCK
from autoscaler.sim.world import Replica
from controlplane.policy.routing import MAX_CANDIDATES, Ask, Board, Placed, ReplicaLoad, RouteWeights

# A gateway collects what it placed so long before it tells the others (gateway/placements.py).
TELLS_AFTER_S = 0.1


class LeastLoad:
    """Fewest requests per slot, ties by id."""

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
    """The production board (controlplane/policy/routing.py), fed as one gateway feeds it (gateway/routes.py).

    `cache_tokens`: of one replica, as its engine reports it. Prefixes are known at the lengths that a gateway hashes,
    or at every block of the trace. Loads it reads every `age_s`, from `first_s` on, and moves by what it bound itself
    meanwhile; a request that waited first is bound by the cell, which tells no gateway. With `age_s` infinite it is
    told of everything at once: a view that is always fresh.
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
        self.board = Board(cache_tokens, weights)
        self._every_block = every_block
        self._age_s, self._next_s = age_s, first_s
        self._loads: dict[str, ReplicaLoad] = {}
        self._replicas: dict[str, Replica] = {}
        self._placed: dict[int, Placed] = {}
        self._young: deque[Job] = deque()  # whose first token has not been seen yet
        self._told: deque[tuple[float, str, Ask]] = deque()  # placements of others, and when they are heard

    def rank(self, job: Job, replicas: list[Replica], now_s: float) -> list[Replica]:
        if now_s >= self._next_s or len(replicas) != len(self._loads):
            self._look(replicas, now_s)
        self._hear(now_s)
        ranked = self.board.rank(self._ask(job), MAX_CANDIDATES, turn=job.id)
        return [self._replicas[name] for name in ranked if self._replicas[name].is_ready]

    def on_bound(self, job: Job, replica: Replica, now_s: float) -> None:
        name = str(replica.id)
        load = self._loads.get(name)
        is_ours = self._age_s == math.inf or (now_s == job.arrived_s and job.n_attempts == 1)
        if load is not None and is_ours:
            load.used += 1
            self._placed[job.id] = self.board.bound(name, self._ask(job), now_s)
            self._young.append(job)

    def told(self, job: Job, replica: Replica, now_s: float) -> None:
        """Another gateway bound it there at admission; requests without a known beginning are not worth a word."""
        ask = self._ask(job)
        if ask.prefixes:
            self._told.append((now_s + TELLS_AFTER_S, str(replica.id), ask))

    def on_end(self, job: Job, replica: Replica, now_s: float) -> None:
        placed = self._placed.pop(job.id, None)
        if placed is None:
            return
        self.board.started(placed)
        load = self._loads.get(str(replica.id))
        if load is not None and load.used > 0:
            load.used -= 1

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

    def _hear(self, now_s: float) -> None:
        """First tokens since the last look, as the gateway's streams would tell them, and what others placed."""
        while self._told and self._told[0][0] <= now_s:
            at_s, name, ask = self._told.popleft()
            self.board.heard(name, ask, at_s)
        young, placed = self._young, self._placed
        for _ in range(len(young)):
            job = young.popleft()
            if job.first_s == NEVER:
                young.append(job)
            elif job.id in placed:
                self.board.started(placed[job.id])

    def _ask(self, job: Job) -> Ask:
        if not job.prefix:
            return Ask(job.n_prompt, adapter=job.adapter)
        if self._every_block:
            n = min(job.n_prompt // BLOCK, len(job.prefix))
            return Ask(job.n_prompt, job.prefix[:n], range(BLOCK, n * BLOCK + 1, BLOCK), job.adapter)
        keys, ends = beginnings.fine(job)
        return Ask(job.n_prompt, keys, ends, job.adapter)
