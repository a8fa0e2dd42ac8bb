"""LoRA adapters on simulated replicas: loaded when asked for, kept within a limit, waited for.

Stands between the world and its engines: a request whose adapter is not there waits, bound to its replica, until it is.
Loads of a replica run beside its batch and beside each other; an adapter in use is never evicted, so a request may also
wait for a place. The eviction rules are pure (workers/residency.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from autoscaler.sim.job import Job
from autoscaler.sim.kernel import Kernel
from workers.residency import Popularity, Resident, least_recent, least_worth


class Holder(Protocol):
    """A replica, as far as adapters matter. `adapters`: names of those there or loading, for routers to see."""

    id: int
    adapters: set[str]


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """`limit` adapters per replica; `load_s(adapter)`: from storage into memory, `typical_s` what a router takes it
    for; `by_worth`: evict by popularity and load time instead of by last use."""

    limit: int
    load_s: Callable[[str], float]
    typical_s: float
    by_worth: bool = True

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"limit = {self.limit}: a replica must hold at least one adapter")


@dataclass(slots=True)
class _Waiter:
    job: Job
    ready: Callable[[], None]
    since_s: float


@dataclass(slots=True)
class _Place:
    """One replica's adapters; those being loaded are residents with somebody waiting for them."""

    residents: dict[str, Resident] = field(default_factory=dict)
    loading: dict[str, list[_Waiter]] = field(default_factory=dict)
    queue: deque[_Waiter] = field(default_factory=deque)  # for a place


class Adapters:
    """All replicas' adapters. `n_missed` requests found theirs not in memory; `n_loads` were made for them."""

    def __init__(self, spec: AdapterSpec, kernel: Kernel) -> None:
        self.spec = spec
        self.n_asked = self.n_missed = self.n_loads = 0
        self.waited_s = 0.0
        self._kernel = kernel
        self._popularity = Popularity()
        self._places: dict[int, _Place] = {}

    def want(self, job: Job, replica: Holder, ready: Callable[[], None]) -> None:
        """The request was bound there; `ready` is called when its adapter is there."""
        self.n_asked += 1
        self._popularity.note(job.adapter)
        place = self._places.setdefault(replica.id, _Place())
        waiter = _Waiter(job, ready, self._kernel.now_s)
        if job.adapter not in place.residents or job.adapter in place.loading:
            self.n_missed += 1
        if not self._serve(waiter, replica, place):
            place.queue.append(waiter)

    def over(self, job: Job, replica: Holder) -> None:
        """The request ended; who waits for a place may have it."""
        place = self._places[replica.id]
        resident = place.residents[job.adapter]
        resident.n_using -= 1
        resident.last_used_at = self._kernel.now_s
        for _ in range(len(place.queue)):
            waiter = place.queue.popleft()
            if not self._serve(waiter, replica, place):
                place.queue.append(waiter)

    def lose(self, replica: Holder) -> None:
        """The replica is gone, with all it held; its requests are taken back by their queue."""
        self._places.pop(replica.id, None)
        replica.adapters.clear()

    def _serve(self, waiter: _Waiter, replica: Holder, place: _Place) -> bool:
        """Let it run, load for it, or say that there is no place."""
        name, now_s = waiter.job.adapter, self._kernel.now_s
        resident = place.residents.get(name)
        if resident is None:
            if len(place.residents) >= self.spec.limit and not self._evict(replica, place):
                return False
            load_s = self.spec.load_s(name)
            resident = place.residents[name] = Resident(name, load_s, now_s)
            replica.adapters.add(name)
            place.loading[name] = []
            self.n_loads += 1
            self._kernel.after(load_s, self._loaded, name, replica.id, place)
        resident.n_using += 1
        resident.last_used_at = now_s
        if name in place.loading:
            place.loading[name].append(waiter)
        else:
            self._run(waiter)
        return True

    def _evict(self, replica: Holder, place: _Place) -> bool:
        residents = place.residents.values()
        if self.spec.by_worth:
            victim = least_worth(residents, self._popularity)
        else:
            victim = least_recent(residents)
        if victim is None:
            return False
        del place.residents[victim.adapter]
        replica.adapters.discard(victim.adapter)
        return True

    def _loaded(self, name: str, replica_id: int, place: _Place) -> None:
        if self._places.get(replica_id) is place:
            for waiter in place.loading.pop(name):
                self._run(waiter)

    def _run(self, waiter: _Waiter) -> None:
        self.waited_s += self._kernel.now_s - waiter.since_s
        waiter.ready()
