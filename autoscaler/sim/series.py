"""What a run looked like over time and by tenant, for charts: samples in bounded memory, and sums by tenant.

An observer of the world; it changes nothing. However long a run is, at most `MAX_SAMPLES` samples remain: when there
are more, every second one goes and the distance doubles. Counters are running totals, so nothing is lost with a sample.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from autoscaler.sim.job import NEVER, Job
from autoscaler.sim.world import World

MAX_SAMPLES = 480


@dataclass(frozen=True, slots=True)
class Sample:
    """One instant. `n_` of machines and requests are there now; `n_ended`, `n_in_slo` and `usd` are totals so far."""

    at_s: float
    n_wanted: int
    n_ready: int
    n_on_demand: int
    n_machines: int
    n_running: int
    n_queued: int
    n_ended: int
    n_in_slo: int
    usd: float


@dataclass(frozen=True, slots=True)
class TenantService:
    """What one tenant got over the whole run."""

    tenant: str
    n_requests: int
    n_tokens: int
    ttft_p50_s: float
    ttft_p99_s: float
    slo_attainment: float


@dataclass(frozen=True, slots=True)
class Machines:
    """What a fleet tells a sample."""

    n_wanted: int
    n_ready: int
    n_on_demand: int
    n_machines: int
    usd: float


class Recorder:
    """Times to the first token of requests that arrived from `warm_s` on, and the samples."""

    def __init__(self, ttft_target_s: float, warm_s: float = 0.0) -> None:
        self.ttft: list[float] = []
        self.by_tenant: dict[str, list[float]] = defaultdict(list)
        self.latency_sum_s = 0.0
        self.n_preempted = self.n_in_slo = 0
        self.samples: list[Sample] = []
        self.machines: Callable[[World], Machines] | None = None
        self._warm_s = warm_s
        self._target_s = ttft_target_s
        self._tokens: dict[str, int] = defaultdict(int)
        self._next_s, self._step_s = 0.0, 1.0
        self.attainment = 1.0

    def on_event(self, world: World) -> None:
        if world.kernel.now_s >= self._next_s:
            self.sample(world)

    def on_end(self, world: World, job: Job) -> None:
        if job.arrived_s < self._warm_s:
            return
        ttft_s, tenant = job.ttft_s, job.flow[0]
        self.ttft.append(ttft_s)
        self.by_tenant[tenant].append(ttft_s)
        self._tokens[tenant] += job.n_prompt + job.n_output
        self.n_in_slo += ttft_s <= self._target_s
        self.latency_sum_s += job.latency_s
        self.n_preempted += job.n_preempted

    def finish(self, world: World) -> None:
        """The end, before machines are taken down. In time: the share of requests whose first token was; what still
        waits for it longer than that has missed it."""
        self.sample(world)
        n, n_in_time, now_s = len(self.ttft), self.n_in_slo, world.kernel.now_s
        for replica in world.replicas.values():
            for job in replica.jobs.values():
                ttft_s = (now_s if job.first_s == NEVER else job.first_s) - job.arrived_s
                if job.arrived_s >= self._warm_s and (job.first_s != NEVER or ttft_s > self._target_s):
                    n, n_in_time = n + 1, n_in_time + (ttft_s <= self._target_s)
        self.attainment = n_in_time / max(n + len(world.queue), 1)

    def sample(self, world: World) -> None:
        """Note how things stand, and thin what there is when it is too much."""
        now_s = world.kernel.now_s
        fleet = self.machines(world) if self.machines is not None else None
        n_ready = len(world.ready)
        self.samples.append(
            Sample(
                now_s,
                fleet.n_wanted if fleet else n_ready,
                fleet.n_ready if fleet else n_ready,
                fleet.n_on_demand if fleet else 0,
                fleet.n_machines if fleet else n_ready,
                sum(replica.used for replica in world.replicas.values()),
                len(world.queue),
                world.n_ended,
                self.n_in_slo,
                fleet.usd if fleet else 0.0,
            )
        )
        if len(self.samples) > MAX_SAMPLES:
            del self.samples[1::2]
            self._step_s *= 2
        self._next_s = (now_s // self._step_s + 1) * self._step_s

    def tenants(self) -> tuple[TenantService, ...]:
        """Most tokens first."""
        found = []
        for tenant, values in self.by_tenant.items():
            ordered = sorted(values)
            n_in_slo = sum(value <= self._target_s for value in ordered)
            found.append(
                TenantService(
                    tenant,
                    len(ordered),
                    self._tokens[tenant],
                    quantile(ordered, 0.5),
                    quantile(ordered, 0.99),
                    n_in_slo / len(ordered),
                )
            )
        return tuple(sorted(found, key=lambda t: (-t.n_tokens, t.tenant)))


def quantile(ordered: list[float], q: float) -> float:
    """NaN of nothing."""
    return ordered[min(math.ceil(q * len(ordered)), len(ordered)) - 1] if ordered else math.nan
