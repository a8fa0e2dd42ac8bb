"""Service by tenant on the trace of 27 tenants: VTC's bound, checked at every event, for each order."""

from __future__ import annotations

import random
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoscaler.sim.checkers import Conservation
from autoscaler.sim.enginemodel import EngineSpec
from autoscaler.sim.fairwatch import FairWatch, vtc_bound
from autoscaler.sim.job import Job
from autoscaler.sim.kernel import Kernel
from autoscaler.sim.orders import DlpmOrder, VtcOrder
from autoscaler.sim.queues import Fair, Queue, fcfs
from autoscaler.sim.replicas import engine_spec
from autoscaler.sim.routers import LeastLoad
from autoscaler.sim.statistics import interval
from autoscaler.sim.studies.base import Cell, Column, Goal, Progress, Study, Table
from autoscaler.sim.workload import Arrival, read_requests
from autoscaler.sim.world import World
from controlplane.policy.capacity import Mix, capacity

HELP = "service by tenant on the 27-tenant trace; VTC's bound checked at every event; FCFS, VTC, DLPM, ours"
_QUEUES: dict[str, Callable[[], Queue]] = {
    "first come, first served": fcfs,
    "VTC": VtcOrder,
    "DLPM, quantum 4,096": lambda: DlpmOrder(4096),
    "ours (hierarchy, charged by prediction)": lambda: Fair(learn=True),
    "ours, lengths known": Fair,
}
_HELD = ("VTC", "ours (hierarchy, charged by prediction)")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--requests", type=Path, help="default: requests/lmsys_arena_27tenants.csv of the traces"
    )
    parser.add_argument("--load", type=float, default=1.5, help="arriving work over capacity (default 1.5)")


@dataclass(frozen=True, slots=True)
class _Run:
    watch: FairWatch
    bound: float
    latency_s: dict[str, float]
    served: dict[str, float]  # service by the last arrival

    @property
    def worst_latency_ratio(self) -> float:
        """Mean latency of the worst-off tenant over that of all."""
        return max(self.latency_s.values()) / (sum(self.latency_s.values()) / len(self.latency_s))


def run(options: dict[str, Any], progress: Progress) -> Study:
    path = options["requests"] or options["traces"] / "requests" / "lmsys_arena_27tenants.csv"
    trace = list(read_requests(path))
    engine = engine_spec("llama-2-7b", "a10g")
    mix = Mix(sum(a.n_prompt for a in trace) / len(trace), sum(a.n_output for a in trace) / len(trace))
    most = capacity(engine.step, engine.kv_tokens, mix, 0.2, engine.max_seqs)
    speed = options["load"] * most.requests_per_s * trace[-1].at_s / len(trace)
    runs: dict[str, list[_Run]] = defaultdict(list)
    for seed in range(options["seeds"]):
        for name, make in _QUEUES.items():
            runs[name].append(_simulate(make(), _jobs(trace, speed, seed), engine, most.slots))
        progress(f"seed {seed}")
    return _study(runs, trace, engine, most.slots, speed, options)


def _jobs(trace: list[Arrival], speed: float, seed: int) -> list[Job]:
    """Seed 0 is the trace; each other one turns every tenant's own recording by a phase of its own, round the clock."""
    span_s = trace[-1].at_s
    phase: dict[str, float] = defaultdict(float)
    if seed:
        chance = random.Random(seed)
        phase.update({tenant: chance.random() * span_s for tenant in sorted({a.tenant for a in trace})})
    turned = sorted(((a.at_s + phase[a.tenant]) % (span_s + 1e-9), i) for i, a in enumerate(trace))
    return [
        Job(number, at_s / speed, trace[i].n_prompt, trace[i].n_output, (trace[i].tenant,) * 3)
        for number, (at_s, i) in enumerate(turned)
    ]


def _simulate(queue: Queue, jobs: list[Job], engine: EngineSpec, slots: int) -> _Run:
    kernel, watch = Kernel(), FairWatch(queue)
    world = World(kernel, watch, LeastLoad(), (Conservation(), watch))
    world.add_replica(engine, slots)
    world.feed(iter(jobs))
    kernel.run(until_s=jobs[-1].arrived_s)
    served = dict(watch.service)
    while kernel.run(max_events=100_000):
        pass
    latency: dict[str, list[float]] = defaultdict(list)
    for job in jobs:
        latency[job.flow[0]].append(job.latency_s)
    return _Run(
        watch,
        vtc_bound(watch.longest_prompt, watch.largest_batch),
        {tenant: sum(values) / len(values) for tenant, values in latency.items()},
        served,
    )


def _study(
    runs: dict[str, list[_Run]],
    trace: list[Arrival],
    engine: EngineSpec,
    slots: int,
    speed: float,
    options: dict[str, Any],
) -> Study:
    asked: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    for arrival in trace:
        asked[arrival.tenant] += arrival.n_prompt + 2 * arrival.n_output
        count[arrival.tenant] += 1
    order = sorted(asked, key=lambda tenant: -asked[tenant])
    gaps: list[list[Cell]] = [
        [
            name,
            interval([r.watch.widest.service for r in found]),
            max(r.watch.widest.service for r in found),
            interval([r.bound for r in found]).mean,
            max(r.watch.widest.service / r.bound for r in found),
            interval([r.worst_latency_ratio for r in found]),
            sum(r.watch.n_idle for r in found),
            sum(r.watch.n_checks for r in found),
        ]
        for name, found in runs.items()
    ]
    tenants: list[list[Cell]] = [
        [
            f"{tenant} ({count[tenant]})",
            asked[tenant],
            *(
                cell
                for found in runs.values()
                for cell in (found[0].served.get(tenant, 0.0), found[0].latency_s[tenant])
            ),
        ]
        for tenant in order
    ]
    n_seeds = options["seeds"]
    n_idle = sum(r.watch.n_idle for found in runs.values() for r in found)
    fcfs_runs = runs["first come, first served"]
    return Study(
        "Fairness between tenants",
        {
            "workload": f"lmsys_arena_27tenants.csv, {len(trace)} requests of {len(order)} tenants, replayed "
            f"{speed:.2f} times as fast: load {options['load']:g} of capacity. Seed 0 is the trace as it is, the other "
            f"{n_seeds - 1} turn each tenant's own recording by a random phase",
            "house": f"llama-2-7b on one a10g (as in the paper), {engine.kv_tokens:,} tokens of KV, {slots} slots",
            "service": "a prompt token 1, an output token 2 (the paper's prices), counted as made",
            "gap": "largest difference of service given to two tenants between any two events, both waiting all the "
            "while; bound: 2 max(longest prompt, 2 x largest batch) with the largest batch in tokens that was seen",
        },
        [
            Table(
                "Gap between tenants that wait",
                [
                    Column("order"),
                    Column("widest gap", "{:,.0f}"),
                    Column("of all seeds", "{:,.0f}"),
                    Column("bound", "{:,.0f}"),
                    Column("gap / bound", "{:.2f}"),
                    Column("worst tenant's mean latency / all", "{:.2f}"),
                    Column("idle beside a queue", "{:,}"),
                    Column("events checked", "{:,}"),
                ],
                gaps,
            ),
            Table(
                "By tenant, the trace as it is: service when the last request arrives, and mean latency",
                [
                    Column("tenant (requests)"),
                    Column("asked for", "{:,.0f}"),
                    *(
                        column
                        for name in runs
                        for column in (Column(name.split(" (")[0], "{:,.0f}"), Column("latency", "{:.1f} s"))
                    ),
                ],
                tenants,
            ),
        ],
        [
            *(
                Goal(
                    f"{name}: within VTC's bound at every event",
                    f"{max(r.watch.widest.service / r.bound for r in runs[name]):.2f} of the bound, "
                    f"{sum(r.watch.n_checks for r in runs[name]):,} events",
                    all(r.watch.widest.service <= r.bound for r in runs[name]),
                )
                for name in _HELD
            ),
            Goal(
                "work conserving, every order",
                f"{n_idle} events with a free slot beside a queue",
                n_idle == 0,
            ),
            Goal(
                "first come, first served is not fair here",
                f"{max(r.watch.widest.service / r.bound for r in fcfs_runs):.2f} of the bound",
                all(
                    ours.watch.widest.service < theirs.watch.widest.service
                    for ours, theirs in zip(runs["VTC"], fcfs_runs, strict=True)
                ),
            ),
        ],
    )
