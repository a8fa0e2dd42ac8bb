"""Queues with late binding for world.py: the production fair queue, and single lines it is compared with.

The orders with a memory of their own (VTC, DLPM, MLFQ) are in orders.py.

Each holds the slots of its replicas, as the cell's scripts do: a request is bound to a candidate with a free slot, or
waits; whatever frees a slot binds what waits. Answers are bindings (job, replica id), in order.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from autoscaler.sim import beginnings
from autoscaler.sim.job import Job
from controlplane.policy import estimate
from controlplane.policy.fairness import FairQueue
from controlplane.policy.flows import Flow, Request
from controlplane.policy.ordering import GAMMA, QueueOrder, order_key, predicted_ms

Binding = tuple[Job, int]

ITL_MS: Final = 20.0  # pace at which predicted lengths become times
METER_S: Final = 1.0  # as Ends.charge_produced of the gateway
METER_TOKENS: Final = 32
BAND_S: Final = 1e9
MAX_TOKENS: Final = 1 << 20  # recordings do not say what a client would have allowed


class Sight(Protocol):
    """What a queue may look at beyond what it is told."""

    def n_produced(self, job: Job) -> int:
        """Tokens a request has produced by now."""

    def n_cached(self, job: Job, replica: int) -> int:
        """Prompt tokens of a request in a replica's cache."""


class Queue(Protocol):
    """What the world needs of a queue."""

    def attach(self, sight: Sight) -> None:
        """Called once, before anything else."""

    def __len__(self) -> int:
        """Requests that wait."""

    def admit(self, job: Job, now_s: float, candidates: Sequence[int]) -> list[Binding]: ...

    def settle(self, job: Job, now_s: float) -> list[Binding]:
        """It ended on its replica."""

    def enrol(self, replica: int, slots: int, now_s: float) -> list[Binding]: ...

    def drain(self, replica: int) -> None: ...

    def lose(self, replica: int, now_s: float) -> list[Binding]:
        """It died; its requests wait again, before all others."""

    def renew(self, job: Job) -> None:
        """It has made `n_stop` tokens, not all: move `n_stop` on, or leave it and it is put aside."""

    def put_aside(self, job: Job, now_s: float) -> list[Binding]:
        """It has left its replica and waits again."""


class Fair:
    """controlplane/policy/fairness.py on virtual time. Keys of `weights` are organizations; `order` and `gamma` are
    those of a deployment (policy/ordering.py). What runs is charged once a second for what it has produced beyond its
    prediction, as the gateways do. With `learn` an answer is predicted from those that the same organization got before
    (policy/estimate.py, as the gateways do); without it the job's own prediction counts."""

    def __init__(
        self,
        *,
        window: int = 0,
        weights: dict[str, int] | None = None,
        bound: int = 1_000_000,
        order: QueueOrder = QueueOrder.FCFS,
        gamma: float = GAMMA,
        ttft_ms: int = 2_000,
        age_s: float = 30.0,
        learn: bool = False,
    ) -> None:
        self.queue = FairQueue(bound=bound, window=window, age_ms=round(age_s * 1000))
        self._weights = weights or {}
        self._jobs: dict[str, Job] = {}
        self._order, self._gamma, self._ttft_ms = order, gamma, ttft_ms
        self._learnt: dict[str, estimate.Calibration] | None = {} if learn else None
        self._sight: Sight | None = None
        self._beyond: dict[str, Job] = {}  # bound, and longer than predicted by now or later
        self._metered_s = 0.0

    def __len__(self) -> int:
        return len(self.queue)

    def attach(self, sight: Sight) -> None:
        self._sight = sight

    def renew(self, job: Job) -> None:
        raise RuntimeError("the production queue deals in no quanta")

    def put_aside(self, job: Job, now_s: float) -> list[Binding]:
        raise RuntimeError("the production queue deals in no quanta")

    def admit(self, job: Job, now_s: float, candidates: Sequence[int]) -> list[Binding]:
        self._meter(now_s)
        name, now_ms = str(job.id), int(now_s * 1000)
        self._jobs[name] = job
        if self._learnt is not None:
            known = self._learnt.get(job.flow[0], estimate.NEW)
            job.n_predicted = estimate.expected_output(known, MAX_TOKENS)
        if job.n_output > job.n_predicted:
            self._beyond[name] = job
        place = order_key(
            self._order,
            now_ms,
            ttft_ms=self._ttft_ms,
            predicted_ms=predicted_ms(job.n_prompt, job.n_predicted, ITL_MS),
            gamma=self._gamma,
        )
        organization, project, key = job.flow
        weight = self._weights.get(organization, 100)
        request = Request(
            name,
            Flow(job.band, organization, project, key, (weight, 100, 100)),
            place,
            job.n_prompt,
            job.n_predicted,
            beginnings.names(job) if self.queue.flows.window and job.prefix else (),
        )
        outcome, bindings = self.queue.admit(request, now_ms, [str(c) for c in candidates])
        if outcome == "full":
            raise OverflowError(f"job {job.id}: the queue is full ({self.queue.bound})")
        return self._named(bindings)

    def settle(self, job: Job, now_s: float) -> list[Binding]:
        self._meter(now_s)
        name = str(job.id)
        del self._jobs[name]
        self._beyond.pop(name, None)
        if self._learnt is not None:
            known = self._learnt.get(job.flow[0], estimate.NEW)
            self._learnt[job.flow[0]] = estimate.observe_output(known, job.n_output)
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

    def _meter(self, now_s: float) -> None:
        if now_s < self._metered_s + METER_S or self._sight is None:
            return
        self._metered_s = now_s
        for name, job in self._beyond.items():
            request = self.queue.requests[name]
            n = self._sight.n_produced(job)
            if request.replica and n >= request.n_expected + METER_TOKENS:
                self.queue.produced(name, n)

    def _named(self, bindings: list[tuple[str, str]]) -> list[Binding]:
        return [(self._jobs[request], int(replica)) for request, replica in bindings]


class Slots(ABC):
    """The slots of all replicas before a line of requests, whose order a subclass keeps."""

    sight: Sight

    def __init__(self) -> None:
        self.running: dict[int, dict[int, Job]] = {}  # by replica
        self._slots: dict[int, int] = {}
        self._routed: list[int] = []

    # -- the order

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def put(self, job: Job, now_s: float, *, resumed: bool) -> None:
        """It waits from now on; `resumed`: its replica was lost, it goes before all others."""

    @abstractmethod
    def take(self, replica: int, now_s: float) -> Job:
        """The one this replica gets, out of the line. Somebody waits."""

    def on_bound(self, job: Job, replica: int, now_s: float) -> None:  # noqa: B027 - most orders need not know
        """It goes to the replica, out of the line or past it."""

    def on_end(self, job: Job, now_s: float) -> None:  # noqa: B027 - nor this
        """It has ended."""

    # -- Queue

    def attach(self, sight: Sight) -> None:
        self.sight = sight

    def renew(self, job: Job) -> None:  # noqa: B027 - nor this
        """A queue without quanta sets no `n_stop`."""

    def admit(self, job: Job, now_s: float, candidates: Sequence[int]) -> list[Binding]:
        if not len(self):
            for replica in candidates:
                if self._is_free(replica):
                    return [self._bind(job, replica, now_s)]
        self.put(job, now_s, resumed=False)
        return self._pump(now_s)

    def settle(self, job: Job, now_s: float) -> list[Binding]:
        del self.running[job.replica][job.id]
        self.on_end(job, now_s)
        return self._pump(now_s)

    def put_aside(self, job: Job, now_s: float) -> list[Binding]:
        del self.running[job.replica][job.id]
        self.put(job, now_s, resumed=False)
        return self._pump(now_s)

    def enrol(self, replica: int, slots: int, now_s: float) -> list[Binding]:
        if replica not in self.running:
            self.running[replica] = {}
            self._routed.append(replica)
        self._slots[replica] = slots
        return self._pump(now_s)

    def drain(self, replica: int) -> None:
        if replica in self._routed:
            self._routed.remove(replica)

    def lose(self, replica: int, now_s: float) -> list[Binding]:
        self.drain(replica)
        for job in self.running.pop(replica).values():
            self.put(job, now_s, resumed=True)
        return self._pump(now_s)

    def _pump(self, now_s: float) -> list[Binding]:
        bindings = []
        while len(self):
            free = [r for r in self._routed if self._is_free(r)]
            if not free:
                break
            least = min(free, key=lambda r: (len(self.running[r]) / self._slots[r], r))
            bindings.append(self._bind(self.take(least, now_s), least, now_s))
        return bindings

    def _bind(self, job: Job, replica: int, now_s: float) -> Binding:
        self.running[replica][job.id] = job
        self.on_bound(job, replica, now_s)
        return job, replica

    def _is_free(self, replica: int) -> bool:
        return replica in self._routed and len(self.running[replica]) < self._slots[replica]


class Plain(Slots):
    """One line for everybody, by `key(job)`, lowest first, ties by arrival."""

    def __init__(self, key: Callable[[Job], float]) -> None:
        super().__init__()
        self._key = key
        self._heap: list[tuple[int, float, int, Job]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def put(self, job: Job, now_s: float, *, resumed: bool) -> None:
        heapq.heappush(self._heap, (0 if resumed else 1, self._key(job), job.id, job))

    def take(self, replica: int, now_s: float) -> Job:
        return heapq.heappop(self._heap)[3]


def fcfs() -> Plain:
    """First come, first served."""
    return Plain(lambda job: job.arrived_s)


def priority() -> Plain:
    """Strict bands, first come first served inside one."""
    return Plain(lambda job: job.band * BAND_S + job.arrived_s)


def shortest_predicted(gamma: float = GAMMA) -> Plain:
    """Shortest predicted job first, aged: the production order key (policy/ordering.py) in one line."""
    return Plain(
        lambda job: predicted_ms(job.n_prompt, job.n_predicted, ITL_MS) + gamma * job.arrived_s * 1000
    )


def earliest_deadline(ttft_s: Callable[[Job], float]) -> Plain:
    return Plain(lambda job: job.arrived_s + ttft_s(job))
