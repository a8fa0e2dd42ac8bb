"""One run of the simulator: a workload, a policy, a seed; and what came of it as plain numbers.

A policy is a bundle of one queue, one router, one scaler and one buyer of machines; policies.py names them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace

from autoscaler.policy.forecast import ForecastMemory
from autoscaler.sim.adapters import Adapters, AdapterSpec
from autoscaler.sim.checkers import Conservation, InvariantError
from autoscaler.sim.enginemodel import EngineSpec
from autoscaler.sim.fleet import Buyer, Fleet, Machine, Terms
from autoscaler.sim.job import Job
from autoscaler.sim.kernel import Kernel
from autoscaler.sim.market import Steps, Zone
from autoscaler.sim.queues import Queue
from autoscaler.sim.scalers import Scaler
from autoscaler.sim.series import Machines, Recorder, Sample, TenantService, quantile
from autoscaler.sim.world import Observer, Replica, Router, World

HAND_OVER_S = 20.0  # ScalerSpec.hand_over_s
DRAIN_S = 120.0  # ScalerSpec.drain_timeout_s: then what it still runs goes on elsewhere
_LOOK_S = 1.0  # at a draining replica
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
    warm_s: float = 0.0  # what arrives, is paid or is missing before is not counted
    # When the run begins on the recording's clock, and what the scaler's forecast had learned of the days before.
    begins_at_s: float = 0.0
    past: ForecastMemory | None = None
    adapters: AdapterSpec | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """Makers of the four parts for a setting; each run gets fresh ones. policies.py has those with a name."""

    queue: Callable[[Setting], Queue]
    router: Callable[[Setting], Router]
    scaler: Callable[[Setting], Scaler]
    buyer: Callable[[Setting], Buyer]
    adapters_by_worth: bool = True


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
    n_adapter_misses: int = 0
    # For charts and bounds; not part of a table.
    samples: tuple[Sample, ...] = field(default=(), repr=False)
    tenants: tuple[TenantService, ...] = field(default=(), repr=False)
    demand: Steps | None = field(default=None, repr=False)

    def figures(self) -> dict[str, float | int]:
        """The plain numbers, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.repr}


def run(
    setting: Setting,
    policy: Policy,
    jobs: Iterator[Job],
    *,
    label: str = "",
    progress: Callable[[float, int], None] = lambda now_s, n: None,
    observers: tuple[Observer, ...] = (),
) -> Result:
    """Simulate to the end. InvariantError names the `label` (policy, seed) when an invariant breaks."""
    kernel, recorder, books = Kernel(), Recorder(setting.ttft_target_s, setting.warm_s), Conservation()
    began_s = time.process_time()
    adapters = None
    if setting.adapters is not None:
        adapters = Adapters(replace(setting.adapters, by_worth=policy.adapters_by_worth), kernel)
    world = World(
        kernel,
        policy.queue(setting),
        policy.router(setting),
        (books, recorder, *observers),
        adapters=adapters,
    )
    fleet = _fleet(kernel, world, setting, policy) if setting.zones else None
    if fleet is not None:
        recorder.machines = _machines(fleet)
    else:
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
    recorder.finish(world)
    if fleet is not None:
        fleet.close()
    return _result(world, recorder, fleet, books, time.process_time() - began_s, setting)


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

    def drain(machine: Machine) -> None:
        if machine.id in replicas:
            world.drain_replica(replicas[machine.id])

    def leaving(machine: Machine) -> None:
        # It serves on while its replacement starts, as decide.py has it, and hands over at the end.
        kernel.after(max(setting.terms.notice_s - HAND_OVER_S, 0.0), drain, machine)

    def gone(machine: Machine) -> None:
        world.kill_replica(replicas.pop(machine.id))

    def released(machine: Machine) -> None:
        drain(machine)
        look(machine, kernel.now_s + DRAIN_S)

    def look(machine: Machine, until_s: float) -> None:
        replica = replicas.get(machine.id)
        if replica is None or not replica.used or kernel.now_s >= until_s:
            fleet.finish(machine)
        else:
            kernel.after(_LOOK_S, look, machine, until_s)

    def wanted(now_s: float) -> int:
        return scaler.wanted(world, sum(1 for m in fleet.machines if not m.is_ready), now_s)

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
        on_release=released,
        count_from_s=setting.warm_s,
    )
    return fleet


def _machines(fleet: Fleet) -> Callable[[World], Machines]:
    def look(world: World) -> Machines:
        n_ready = sum(m.serves for m in fleet.machines)
        n_on_demand = sum(m.zone is None and m.serves for m in fleet.machines)
        return Machines(fleet.n_wanted, n_ready, n_on_demand, len(fleet.machines), fleet.usd_now)

    return look


def _result(
    world: World, seen: Recorder, fleet: Fleet | None, books: Conservation, cpu_s: float, setting: Setting
) -> Result:
    ttft = sorted(seen.ttft)
    tails = [quantile(sorted(values), 0.99) for values in seen.by_tenant.values() if len(values) >= 100]
    return Result(
        n_requests=len(ttft),
        ttft_p50_s=quantile(ttft, 0.5),
        ttft_p90_s=quantile(ttft, 0.9),
        ttft_p99_s=quantile(ttft, 0.99),
        itl_p50_s=world.gaps.quantile(0.5),
        itl_p99_s=world.gaps.quantile(0.99),
        latency_mean_s=seen.latency_sum_s / max(len(ttft), 1),
        slo_attainment=seen.attainment,
        usd=fleet.usd_counted if fleet else 0.0,
        availability=fleet.availability if fleet else 1.0,
        n_lost_machines=fleet.n_lost if fleet else 0,
        n_requeued=world.n_requeued,
        n_preempted=seen.n_preempted,
        hit_ratio=world.hit_ratio,
        n_adapter_misses=world.adapters.n_missed if world.adapters is not None else 0,
        worst_tenant_p99_s=max(tails, default=math.nan),
        virtual_s=world.kernel.now_s,
        cpu_s=cpu_s,
        requests_per_cpu_s=len(ttft) / max(cpu_s, 1e-9),
        n_checks=books.n_checks,
        samples=tuple(seen.samples),
        tenants=seen.tenants(),
        demand=fleet.demand if fleet else None,
    )
