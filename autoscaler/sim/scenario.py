"""One run of the simulator: a workload, a policy, a seed; and what came of it as plain numbers.

A policy is a bundle of one queue, one router, one scaler and one buyer of machines. `corral` is the production bundle;
every other name replaces one part of it, so that a table of all is at once the comparison and the ablation.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from autoscaler.policy.spot import SpotSpec
from autoscaler.sim.buyers import AnyZoneElseOnDemand, Corral, OnDemandOnly, SpotHedge, SpotOnly
from autoscaler.sim.checkers import Conservation, InvariantError
from autoscaler.sim.enginemodel import EngineSpec
from autoscaler.sim.fleet import Buyer, Fleet, Machine, Terms
from autoscaler.sim.job import Job
from autoscaler.sim.kernel import Kernel
from autoscaler.sim.market import Zone
from autoscaler.sim.queues import Fair, Queue, fcfs, shortest_predicted
from autoscaler.sim.routers import LeastLoad, RoundRobin
from autoscaler.sim.scalers import Hpa, Kpa, Production, Scaler, Static
from autoscaler.sim.world import Replica, Router, World
from autoscaler.types import ScalerSpec

_TERMS = Terms(boot_s=120, notice_s=120, on_demand_usd_per_h=3.06, tick_s=15)


@dataclass(frozen=True, slots=True)
class Setting:
    """What is given: engine, slots, the market (none: `replicas` that are simply there), targets."""

    engine: EngineSpec
    slots: int
    replicas: int
    ttft_target_s: float
    zones: tuple[Zone, ...] = ()
    terms: Terms = _TERMS
    max_machines: int = 64
    target_ratio: float = 0.7
    until_s: float = math.inf


@dataclass(frozen=True, slots=True)
class Policy:
    """Makers of the four parts for a setting; each run gets fresh ones."""

    queue: Callable[[Setting], Queue] = lambda s: Fair()
    router: Callable[[Setting], Router] = lambda s: LeastLoad()
    scaler: Callable[[Setting], Scaler] = lambda s: Production(
        ScalerSpec(0, 1, s.max_machines, 1e9, s.slots, target_ratio=s.target_ratio, beat_stale_s=1e9)
    )
    buyer: Callable[[Setting], Buyer] = lambda s: Corral(SpotSpec(s.terms.boot_s, s.terms.notice_s))


CORRAL = Policy()
POLICIES: dict[str, Policy] = {
    "corral": CORRAL,
    "fcfs": replace(CORRAL, queue=lambda s: fcfs()),
    "shortest-predicted": replace(CORRAL, queue=lambda s: shortest_predicted()),
    "round-robin": replace(CORRAL, router=lambda s: RoundRobin()),
    "static": replace(CORRAL, scaler=lambda s: Static(s.replicas)),
    "hpa": replace(CORRAL, scaler=lambda s: Hpa(s.slots, s.target_ratio, n_max=s.max_machines)),
    "kpa": replace(CORRAL, scaler=lambda s: Kpa(s.slots, s.target_ratio, n_max=s.max_machines)),
    "spothedge": replace(CORRAL, buyer=lambda s: SpotHedge(1)),
    "on-demand": replace(CORRAL, buyer=lambda s: OnDemandOnly()),
    "spot-only": replace(CORRAL, buyer=lambda s: SpotOnly()),
    "any-zone": replace(CORRAL, buyer=lambda s: AnyZoneElseOnDemand()),
}
# Parts that only matter where machines are bought.
NEEDS_MARKET = frozenset({"static", "hpa", "kpa", "spothedge", "on-demand", "spot-only", "any-zone"})


@dataclass(frozen=True, slots=True)
class Result:
    """One run. Times in seconds; `usd` and `availability` are 0 and 1 without a market."""

    n_requests: int
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    itl_p50_s: float
    itl_p99_s: float
    latency_mean_s: float
    slo_attainment: float
    usd: float
    availability: float
    n_lost_machines: int
    n_requeued: int
    n_preempted: int
    hit_ratio: float
    worst_tenant_p99_s: float
    virtual_s: float
    cpu_s: float
    requests_per_cpu_s: float
    n_checks: int
    notes: tuple[str, ...] = field(default=())


class _Collector:
    def __init__(self) -> None:
        self.ttft: list[float] = []
        self.latency_sum_s = 0.0
        self.by_tenant: dict[str, list[float]] = defaultdict(list)
        self.n_preempted = 0

    def on_event(self, world: World) -> None:
        pass

    def on_end(self, world: World, job: Job) -> None:
        self.ttft.append(job.ttft_s)
        self.by_tenant[job.flow[0]].append(job.ttft_s)
        self.latency_sum_s += job.latency_s
        self.n_preempted += job.n_preempted


def run(
    setting: Setting,
    policy: Policy,
    jobs: Iterator[Job],
    *,
    label: str = "",
    progress: Callable[[float, int], None] = lambda now_s, n: None,
) -> Result:
    """Simulate to the end. InvariantError names the `label` (policy, seed) when an invariant breaks."""
    kernel, collector, books = Kernel(), _Collector(), Conservation()
    began_s = time.process_time()
    world = World(kernel, policy.queue(setting), policy.router(setting), (books, collector))
    fleet = _fleet(kernel, world, setting, policy) if setting.zones else None
    if fleet is None:
        for _ in range(setting.replicas):
            world.add_replica(setting.engine, setting.slots)
    world.feed(_fitting(jobs, setting.engine))
    try:
        while kernel.run(until_s=setting.until_s, max_events=200_000) and kernel.now_s < setting.until_s:
            progress(kernel.now_s, world.n_ended)
            if fleet is None and not world.replicas:
                break
    except InvariantError as error:
        raise InvariantError(f"{label}, at {kernel.now_s:.3f} s: {error}") from None
    if fleet is not None:
        fleet.close()
    return _result(world, collector, fleet, books, time.process_time() - began_s, setting)


def _fitting(jobs: Iterator[Job], engine: EngineSpec) -> Iterator[Job]:
    """Requests longer than the engine's memory are refused at the door in the live house as well."""
    for job in jobs:
        if job.n_prompt + job.n_output <= engine.kv_tokens:
            yield job


def _fleet(kernel: Kernel, world: World, setting: Setting, policy: Policy) -> Fleet:
    scaler = policy.scaler(setting)
    replicas: dict[int, Replica] = {}

    def ready(machine: Machine) -> None:
        replicas[machine.id] = world.add_replica(setting.engine, setting.slots)

    def leaving(machine: Machine) -> None:
        if machine.id in replicas:
            world.drain_replica(replicas[machine.id])

    def gone(machine: Machine) -> None:
        world.kill_replica(replicas.pop(machine.id))

    wishes: dict[float, int] = {}

    def wanted(now_s: float) -> int:
        # Asked often at one instant and for the past: decided once per instant.
        if now_s not in wishes:
            if wishes and now_s < max(wishes):
                return wishes[max(s for s in wishes if s <= now_s)]
            n_starting = sum(1 for m in fleet.machines if not m.is_ready)
            if len(wishes) > 512:
                for old in sorted(wishes)[:256]:
                    del wishes[old]
            wishes[now_s] = scaler.wanted(world, n_starting, now_s)
        return wishes[now_s]

    fleet = Fleet(
        kernel,
        setting.zones,
        setting.terms,
        policy.buyer(setting),
        wanted,
        setting.until_s,
        on_ready=ready,
        on_leaving=leaving,
        on_gone=gone,
    )
    return fleet


def _result(
    world: World, seen: _Collector, fleet: Fleet | None, books: Conservation, cpu_s: float, setting: Setting
) -> Result:
    ttft = sorted(seen.ttft)
    tails = [_quantile(sorted(values), 0.99) for values in seen.by_tenant.values() if len(values) >= 100]
    n_hit = sum(r.engine.n_hit_tokens for r in world.replicas.values())
    n_prompt = sum(r.engine.n_prompt_tokens for r in world.replicas.values())
    return Result(
        n_requests=len(ttft),
        ttft_p50_s=_quantile(ttft, 0.5),
        ttft_p90_s=_quantile(ttft, 0.9),
        ttft_p99_s=_quantile(ttft, 0.99),
        itl_p50_s=world.gaps.quantile(0.5),
        itl_p99_s=world.gaps.quantile(0.99),
        latency_mean_s=seen.latency_sum_s / max(len(ttft), 1),
        slo_attainment=sum(1 for t in ttft if t <= setting.ttft_target_s) / max(world.n_arrived, 1),
        usd=fleet.usd if fleet else 0.0,
        availability=fleet.availability if fleet else 1.0,
        n_lost_machines=fleet.n_lost if fleet else 0,
        n_requeued=world.n_requeued,
        n_preempted=seen.n_preempted,
        hit_ratio=n_hit / n_prompt if n_prompt else 0.0,
        worst_tenant_p99_s=max(tails, default=math.nan),
        virtual_s=world.kernel.now_s,
        cpu_s=cpu_s,
        requests_per_cpu_s=len(ttft) / max(cpu_s, 1e-9),
        n_checks=books.n_checks,
    )


def _quantile(ordered: list[float], q: float) -> float:
    return ordered[min(math.ceil(q * len(ordered)), len(ordered)) - 1] if ordered else math.nan
