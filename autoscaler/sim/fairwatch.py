"""Measures fairness at every event: service by tenant, and the widest gap between two that both waited all the while.

Service is what VTC counts (arXiv:2401.00588): a prompt when its request joins the batch, an output token when it is
made. Stands between world and queue, so that any order can be held against the paper's bound; changes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from autoscaler.sim.job import Job
from autoscaler.sim.queues import Binding, Queue, Sight
from autoscaler.sim.world import World
from controlplane.policy.vtc import OUTPUT_PRICE, PROMPT_PRICE


@dataclass(frozen=True, slots=True)
class Gap:
    """Difference of service given to two tenants between two instants, both waiting all the while."""

    service: float
    tenants: tuple[str, str]
    from_s: float
    until_s: float


@dataclass(slots=True)
class _Pair:
    """The difference of two tenants' service since both wait: where it was lowest and highest."""

    low: float
    low_s: float
    high: float
    high_s: float


NO_GAP = Gap(0.0, ("", ""), 0.0, 0.0)


class FairWatch:
    """A queue and an observer around a queue."""

    def __init__(self, queue: Queue) -> None:
        self.inner = queue
        self.widest = NO_GAP
        self.service: dict[str, float] = defaultdict(float)
        self.n_checks = self.n_idle = 0  # of the latter: somebody waited beside a free slot
        self.largest_batch = 0  # KV tokens of one replica's batch
        self.longest_prompt = 0
        self._sight: Sight
        self._waiting: dict[str, int] = defaultdict(int)
        self._pairs: dict[tuple[str, str], _Pair] = {}
        self._running: dict[int, Job] = {}
        self._counted: dict[int, int] = {}  # output tokens in `service`, of those that run

    # -- Queue

    def __len__(self) -> int:
        return len(self.inner)

    def attach(self, sight: Sight) -> None:
        self._sight = sight
        self.inner.attach(sight)

    def admit(self, job: Job, now_s: float, candidates: Sequence[int]) -> list[Binding]:
        self._look(now_s)
        self._waiting[job.flow[0]] += 1
        self.longest_prompt = max(self.longest_prompt, job.n_prompt)
        return self._bound(self.inner.admit(job, now_s, candidates))

    def settle(self, job: Job, now_s: float) -> list[Binding]:
        self._look(now_s)
        self._left(job)
        return self._bound(self.inner.settle(job, now_s))

    def put_aside(self, job: Job, now_s: float) -> list[Binding]:
        self._look(now_s)
        self._left(job)
        self._waiting[job.flow[0]] += 1
        return self._bound(self.inner.put_aside(job, now_s))

    def renew(self, job: Job) -> None:
        self.inner.renew(job)

    def enrol(self, replica: int, slots: int, now_s: float) -> list[Binding]:
        return self._bound(self.inner.enrol(replica, slots, now_s))

    def drain(self, replica: int) -> None:
        self.inner.drain(replica)

    def lose(self, replica: int, now_s: float) -> list[Binding]:
        for job in [j for j in self._running.values() if j.replica == replica]:
            self._left(job)
            self._waiting[job.flow[0]] += 1
        return self._bound(self.inner.lose(replica, now_s))

    # -- Observer

    def on_end(self, world: World, job: Job) -> None:
        pass

    def on_event(self, world: World) -> None:
        self.n_checks += 1
        for replica in world.replicas.values():
            self.largest_batch = max(self.largest_batch, replica.engine.kv_used)
            if len(self.inner) and replica.is_ready and replica.used < replica.slots:
                self.n_idle += 1
        self._look(world.kernel.now_s)

    # -- service and gaps

    def _look(self, now_s: float) -> None:
        """Also before a queue binds: who stops waiting then, waited until now."""
        for job in self._running.values():
            self._count(job, self._sight.n_produced(job))
        self._compare(now_s)

    def _bound(self, bindings: list[Binding]) -> list[Binding]:
        for job, _ in bindings:
            self._waiting[job.flow[0]] -= 1
            self._running[job.id] = job
            self._counted[job.id] = job.n_done
            self.service[job.flow[0]] += PROMPT_PRICE * job.n_prompt
        return bindings

    def _left(self, job: Job) -> None:
        self._count(job, job.n_done)
        del self._running[job.id], self._counted[job.id]

    def _count(self, job: Job, n_done: int) -> None:
        self.service[job.flow[0]] += OUTPUT_PRICE * (n_done - self._counted[job.id])
        self._counted[job.id] = n_done

    def _compare(self, now_s: float) -> None:
        backlogged = sorted(tenant for tenant, n in self._waiting.items() if n)
        pairs: dict[tuple[str, str], _Pair] = {}
        for i, one in enumerate(backlogged):
            for other in backlogged[i + 1 :]:
                difference = self.service[one] - self.service[other]
                pair = self._pairs.get((one, other))
                if pair is None:
                    pairs[one, other] = _Pair(difference, now_s, difference, now_s)
                    continue
                pairs[one, other] = pair
                if difference < pair.low:
                    pair.low, pair.low_s = difference, now_s
                elif difference > pair.high:
                    pair.high, pair.high_s = difference, now_s
                else:
                    continue
                if pair.high - pair.low > self.widest.service:
                    ends = sorted((pair.low_s, pair.high_s))
                    self.widest = Gap(pair.high - pair.low, (one, other), *ends)
        self._pairs = pairs  # who stopped waiting starts anew


def vtc_bound(longest_prompt: int, largest_batch: int) -> float:
    """Widest gap that VTC allows: twice the larger of a prompt's and a whole batch's price (theorem 4.4)."""
    return 2 * max(PROMPT_PRICE * longest_prompt, OUTPUT_PRICE * largest_batch)
