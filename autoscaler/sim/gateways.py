"""Several gateways with views of their own, for world.py: who routes a request, and how old what it knows is.

Requests come to the gateways in turn. Each has a router of its own, which hears of the requests that it placed; the
production boards are told of the others' as well, a moment later, as the gateways tell each other.
`StaleView` gives a router that reads loads from its replicas what they were at the last look; the production board
keeps a view of its own (routers.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from autoscaler.sim.job import Job
from autoscaler.sim.world import Replica, Router


def behind(gateways: int, age_s: float, make: Callable[[int], Router]) -> Router:
    """One router with a fresh view for one gateway and age 0; else as many, each looking at another moment."""
    if gateways < 1 or age_s < 0:
        raise ValueError(f"gateways = {gateways}, age_s = {age_s}: at least 1, and not negative")
    if gateways == 1 and not age_s:
        return make(0)

    def one(number: int) -> Router:
        return StaleView(make(number), age_s, number * age_s / gateways) if age_s else make(number)

    return Gateways(gateways, one)


@runtime_checkable
class Hearing(Protocol):
    """A router that listens to what other gateways placed."""

    def told(self, job: Job, replica: Replica, now_s: float) -> None: ...


class Gateways:
    """`n` routers, each for its own requests. `make` gets the number of the gateway. `share`: those that listen are
    told what the others bound at admission."""

    def __init__(self, n: int, make: Callable[[int], Router], *, share: bool = True) -> None:
        self._routers = [make(number) for number in range(n)]
        self._listeners = [r for r in self._routers if isinstance(r, Hearing)] if share else []

    def rank(self, job: Job, replicas: list[Replica], now_s: float) -> list[Replica]:
        return self._of(job).rank(job, replicas, now_s)

    def on_bound(self, job: Job, replica: Replica, now_s: float) -> None:
        own = self._of(job)
        own.on_bound(job, replica, now_s)
        if job.prefix and now_s == job.arrived_s and job.n_attempts == 1:
            for other in self._listeners:
                if other is not own:
                    other.told(job, replica, now_s)

    def on_end(self, job: Job, replica: Replica, now_s: float) -> None:
        self._of(job).on_end(job, replica, now_s)

    def _of(self, job: Job) -> Router:
        return self._routers[job.id % len(self._routers)]


@dataclass(slots=True)
class _Seen:
    """A replica as it was."""

    id: int
    slots: int
    used: int


class StaleView:
    """A router that looks at the replicas every `age_s`, from `first_s` on, and believes that in between."""

    def __init__(self, router: Router, age_s: float, first_s: float = 0.0) -> None:
        self._router, self._age_s, self._next_s = router, age_s, first_s
        self._seen: list[_Seen] = []

    def rank(self, job: Job, replicas: list[Replica], now_s: float) -> list[Replica]:
        if now_s >= self._next_s or len(self._seen) != len(replicas):
            self._seen = [_Seen(r.id, r.slots, r.used) for r in replicas]
            self._next_s += self._age_s * max((now_s - self._next_s) // self._age_s + 1, 0)
        ranked = self._router.rank(job, self._seen, now_s)  # type: ignore[arg-type]
        here = {r.id: r for r in replicas}
        return [here[seen.id] for seen in ranked if seen.id in here]

    def on_bound(self, job: Job, replica: Replica, now_s: float) -> None:
        self._router.on_bound(job, replica, now_s)

    def on_end(self, job: Job, replica: Replica, now_s: float) -> None:
        self._router.on_end(job, replica, now_s)
