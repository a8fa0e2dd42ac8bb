"""Queues with late binding for world.py: the production fair queue, and plain orders it is compared with.

Each holds the slots of its replicas, as the cell's scripts do: a request is bound to a candidate with a free slot, or
waits; whatever frees a slot binds what waits. Answers are bindings (job, replica id), in order.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Protocol

from autoscaler.sim.job import Job
from controlplane.policy.fairness import FairQueue, Flow, Request

Binding = tuple[Job, int]


class Queue(Protocol):
    """What the world needs of a queue."""

    def __len__(self) -> int:
        """Requests that wait."""

    def admit(self, job: Job, now_s: float, candidates: Sequence[int]) -> list[Binding]: ...

    def settle(self, job: Job, now_s: float) -> list[Binding]:
        """It ended on its replica."""

    def enrol(self, replica: int, slots: int, now_s: float) -> list[Binding]: ...

    def drain(self, replica: int) -> None: ...

    def lose(self, replica: int, now_s: float) -> list[Binding]:
        """It died; its requests wait again, before all others."""


class Fair:
    """controlplane/policy/fairness.py on virtual time. Keys of `weights` are organizations."""

    def __init__(
        self, *, window: int = 0, weights: dict[str, int] | None = None, bound: int = 1_000_000
    ) -> None:
        self.queue = FairQueue(bound=bound, window=window)
        self._weights = weights or {}
        self._jobs: dict[str, Job] = {}

    def __len__(self) -> int:
        return len(self.queue)

    def admit(self, job: Job, now_s: float, candidates: Sequence[int]) -> list[Binding]:
        name, now_ms = str(job.id), int(now_s * 1000)
        self._jobs[name] = job
        organization, project, key = job.flow
        weight = self._weights.get(organization, 100)
        request = Request(
            name,
            Flow(job.band, organization, project, key, (weight, 100, 100)),
            now_ms,
            job.n_prompt,
            job.n_predicted,
        )
        outcome, bindings = self.queue.admit(request, now_ms, [str(c) for c in candidates])
        if outcome == "full":
            raise OverflowError(f"job {job.id}: the queue is full ({self.queue.bound})")
        return self._named(bindings)

    def settle(self, job: Job, now_s: float) -> list[Binding]:
        name = str(job.id)
        del self._jobs[name]
        return self._named(
            self.queue.settle(
                name, int(now_s * 1000), n_prompt=job.n_prompt, n_cached=job.n_cached, n_output=job.n_output
            )
        )

    def enrol(self, replica: int, slots: int, now_s: float) -> list[Binding]:
        return self._named(self.queue.enrol(str(replica), slots, int(now_s * 1000)))

    def drain(self, replica: int) -> None:
        self.queue.drain(str(replica))

    def lose(self, replica: int, now_s: float) -> list[Binding]:
        return self._named(self.queue.lose(str(replica), int(now_s * 1000)))

    def _named(self, bindings: list[tuple[str, str]]) -> list[Binding]:
        return [(self._jobs[request], int(replica)) for request, replica in bindings]


class Plain:
    """One line for everybody, by `key(job)`, lowest first, ties by arrival. What lost its replica goes first."""

    def __init__(self, key: Callable[[Job], float]) -> None:
        self._key = key
        self._heap: list[tuple[int, float, int, Job]] = []
        self._slots: dict[int, int] = {}
        self._running: dict[int, dict[int, Job]] = {}
        self._routed: list[int] = []

    def __len__(self) -> int:
        return len(self._heap)

    def admit(self, job: Job, now_s: float, candidates: Sequence[int]) -> list[Binding]:
        if not self._heap:
            for replica in candidates:
                if self._is_free(replica):
                    return [self._bind(job, replica)]
        self._push(job, resumed=False)
        return self._pump()

    def settle(self, job: Job, now_s: float) -> list[Binding]:
        replica = next(r for r, running in self._running.items() if job.id in running)
        del self._running[replica][job.id]
        return self._pump()

    def enrol(self, replica: int, slots: int, now_s: float) -> list[Binding]:
        if replica not in self._running:
            self._running[replica] = {}
            self._routed.append(replica)
        self._slots[replica] = slots
        return self._pump()

    def drain(self, replica: int) -> None:
        if replica in self._routed:
            self._routed.remove(replica)

    def lose(self, replica: int, now_s: float) -> list[Binding]:
        self.drain(replica)
        for job in self._running.pop(replica).values():
            self._push(job, resumed=True)
        return self._pump()

    def _push(self, job: Job, *, resumed: bool) -> None:
        heapq.heappush(self._heap, (0 if resumed else 1, self._key(job), job.id, job))

    def _pump(self) -> list[Binding]:
        bindings = []
        while self._heap:
            free = [r for r in self._routed if self._is_free(r)]
            if not free:
                break
            least = min(free, key=lambda r: (len(self._running[r]) / self._slots[r], r))
            bindings.append(self._bind(heapq.heappop(self._heap)[3], least))
        return bindings

    def _bind(self, job: Job, replica: int) -> Binding:
        self._running[replica][job.id] = job
        return job, replica

    def _is_free(self, replica: int) -> bool:
        return replica in self._routed and len(self._running[replica]) < self._slots[replica]


def fcfs() -> Plain:
    return Plain(lambda job: job.arrived_s)


def shortest_predicted(gamma: float = 0.5, itl_s: float = 0.02) -> Plain:
    """Shortest predicted job first, aged: the production order key (policy/ordering.py) for one flow."""
    return Plain(lambda job: (job.n_predicted + job.n_prompt / 64) * itl_s + gamma * job.arrived_s)


def earliest_deadline(ttft_s: Callable[[Job], float]) -> Plain:
    return Plain(lambda job: job.arrived_s + ttft_s(job))
