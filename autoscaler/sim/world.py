"""One simulated deployment: arrivals, a queue, a router, replicas. Decides nothing itself.

`Queue` and `Router` are small faces over the production policies (queues.py, routers.py); the world calls them where
the gateway and the cell's scripts would, and measures what comes of it. Late binding: a request waits in the queue
until a replica has a free slot, as in the live house.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from autoscaler.sim.adapters import Adapters
from autoscaler.sim.enginemodel import Engine, EngineSpec
from autoscaler.sim.histogram import Histogram
from autoscaler.sim.job import NEVER, Job
from autoscaler.sim.kernel import Kernel
from autoscaler.sim.prefixcache import BLOCK
from autoscaler.sim.queues import Binding, Queue


@dataclass(slots=True)
class Replica:
    """A replica as routing rules may see it. `jobs` are bound to it, at most `slots`."""

    id: int
    slots: int
    engine: Engine
    is_ready: bool = True
    n_dispatched: int = 0
    n_on_way: int = 0  # bound, not yet in the engine
    jobs: dict[int, Job] = field(default_factory=dict)
    adapters: set[str] = field(default_factory=set)  # in its memory, or being loaded

    @property
    def used(self) -> int:
        return len(self.jobs)


class Router(Protocol):
    """Which replica takes a request that need not wait, best first."""

    def rank(self, job: Job, replicas: list[Replica], now_s: float) -> list[Replica]: ...

    def on_bound(self, job: Job, replica: Replica, now_s: float) -> None: ...

    def on_end(self, job: Job, replica: Replica, now_s: float) -> None: ...


class Observer(Protocol):
    """Sees every change, changes nothing: checkers.py, metrics."""

    def on_event(self, world: World) -> None: ...

    def on_end(self, world: World, job: Job) -> None: ...


class World:
    """A deployment on a kernel. `observers` see every event. `dispatch_s` is the way from a slot to the engine. Without
    `adapters` every replica has all of them."""

    def __init__(
        self,
        kernel: Kernel,
        queue: Queue,
        router: Router,
        observers: tuple[Observer, ...] = (),
        *,
        dispatch_s: float = 0.0,
        adapters: Adapters | None = None,
    ) -> None:
        self.kernel = kernel
        self.adapters = adapters
        self.dispatch_s = dispatch_s
        self.queue = queue
        self.router = router
        self.observers = observers
        self.replicas: dict[int, Replica] = {}
        self.gaps = Histogram()
        self.n_arrived = self.n_ended = self.n_requeued = self.n_put_aside = 0
        # The last two: of replicas that are gone.
        self._n_replicas = self._n_hit_tokens = self._n_prompt_tokens = 0
        self._arrivals: Iterator[Job] = iter(())
        self._ready: list[Replica] = []
        queue.attach(self)

    # -- replicas

    def add_replica(self, spec: EngineSpec, slots: int) -> Replica:
        """A replica that is ready now; it takes what waits."""
        self._n_replicas += 1
        replica = Replica(self._n_replicas, slots, Engine(spec, self.gaps, self.queue.renew))
        self.replicas[replica.id] = replica
        self._ready.append(replica)
        self._bind(self.queue.enrol(replica.id, slots, self.kernel.now_s))
        self._observe()
        return replica

    def drain_replica(self, replica: Replica) -> None:
        """It gets nothing new."""
        if replica.is_ready:
            replica.is_ready = False
            self._ready.remove(replica)
            self.queue.drain(replica.id)
            self._observe()

    def kill_replica(self, replica: Replica) -> None:
        """It is gone; what it ran waits again, with what it had produced (the journal)."""
        self.drain_replica(replica)
        now_s = self.kernel.now_s
        replica.engine.cancel_all(now_s)
        self._n_hit_tokens += replica.engine.n_hit_tokens
        self._n_prompt_tokens += replica.engine.n_prompt_tokens
        del self.replicas[replica.id]
        if self.adapters is not None:
            self.adapters.lose(replica)
        for job in sorted(replica.jobs.values(), key=lambda j: j.id):
            self.router.on_end(job, replica, now_s)
            self.n_requeued += 1
        replica.jobs.clear()
        self._bind(self.queue.lose(replica.id, now_s))
        self._observe()

    @property
    def ready(self) -> list[Replica]:
        """Replicas that take new work, oldest first. Not to be changed."""
        return self._ready

    @property
    def hit_ratio(self) -> float:
        """Share of prompt tokens found in a cache, on all replicas that ever were; 0 before the first prompt."""
        engines = [replica.engine for replica in self.replicas.values()]
        n_prompt = self._n_prompt_tokens + sum(e.n_prompt_tokens for e in engines)
        return (self._n_hit_tokens + sum(e.n_hit_tokens for e in engines)) / max(n_prompt, 1)

    # -- what a queue may see

    def n_produced(self, job: Job) -> int:
        """Tokens a request has produced by now, over all its attempts."""
        replica = self.replicas.get(job.replica)
        if job.seat < 0 or replica is None:
            return job.n_done
        n = replica.engine.done_of(job)
        return n if job.n_prefill_left else n + replica.engine.steps_within(self.kernel.now_s)

    def n_cached(self, job: Job, replica: int) -> int:
        """Prompt tokens of a request that lie in a replica's cache now."""
        cache = self.replicas[replica].engine.cache
        return cache.match(job.prefix) * BLOCK if cache is not None else 0

    # -- requests

    def feed(self, arrivals: Iterator[Job]) -> None:
        """Jobs in order of arrival; one at a time is on the kernel."""
        self._arrivals = arrivals
        self._next_arrival()

    def _next_arrival(self) -> None:
        job = next(self._arrivals, None)
        if job is not None:
            self.kernel.at(max(job.arrived_s, self.kernel.now_s), self._arrive, job)

    def _arrive(self, job: Job) -> None:
        self.n_arrived += 1
        self._next_arrival()
        now_s = self.kernel.now_s
        candidates: list[int] = []
        if not len(self.queue):
            candidates = [replica.id for replica in self.router.rank(job, self._ready, now_s)]
        self._bind(self.queue.admit(job, now_s, candidates))
        self._observe()

    def _bind(self, bindings: list[Binding]) -> None:
        now_s = self.kernel.now_s
        for job, replica_id in bindings:
            replica = self.replicas[replica_id]
            if job.dispatched_s == NEVER:
                job.dispatched_s = now_s
            job.replica = replica_id
            job.n_attempts += 1
            replica.n_dispatched += 1
            replica.jobs[job.id] = job
            self.router.on_bound(job, replica, now_s)
            if job.adapter and self.adapters is not None:
                replica.n_on_way += 1
                self.adapters.want(job, replica, functools.partial(self._submit, job, replica))
            elif self.dispatch_s:
                replica.n_on_way += 1
                self.kernel.after(self.dispatch_s, self._submit, job, replica)
            elif replica.engine.submit(job, now_s):
                self._schedule(replica)

    def _submit(self, job: Job, replica: Replica) -> None:
        """What was on the way has come; of a replica that is gone meanwhile its queue took it back."""
        if self.replicas.get(replica.id) is replica:
            replica.n_on_way -= 1
            if replica.engine.submit(job, self.kernel.now_s):
                self._schedule(replica)

    def _schedule(self, replica: Replica) -> None:
        engine = replica.engine
        self.kernel.at(engine.next_s, self._boundary, replica, engine.version)

    def _boundary(self, replica: Replica, version: int) -> None:
        engine = replica.engine
        if version != engine.version:
            return  # the stride was cut short, or the engine is gone
        now_s = self.kernel.now_s
        finished = engine.boundary(now_s)
        if engine.n_running or engine.waiting:
            self._schedule(replica)
        for job in finished:
            del replica.jobs[job.id]
            self.router.on_end(job, replica, now_s)
            if job.adapter and self.adapters is not None:
                self.adapters.over(job, replica)
            if job.n_done < job.n_output:
                self.n_put_aside += 1
                self._bind(self.queue.put_aside(job, now_s))
                continue
            self.n_ended += 1
            for observer in self.observers:
                observer.on_end(self, job)
            self._bind(self.queue.settle(job, now_s))
        self._observe()

    def _observe(self) -> None:
        for observer in self.observers:
            observer.on_event(self)
