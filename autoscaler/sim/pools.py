"""A fleet of several kinds of replica under a load of several sizes: does it keep its promises?

Each kind is a pool of its own; a request goes to one by its bucket's shares, then to the least loaded replica there,
through the production queue. Judges the plans of autoscaler/gpumix.py and says how full
they may be, for its command and the study.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from autoscaler.policy.gpumix import (
    MAX_SEQS,
    Bucket,
    Fleet,
    Kind,
    Promise,
    bucket_of,
    buckets,
    loads,
)
from autoscaler.sim.checkers import Conservation
from autoscaler.sim.enginemodel import EngineSpec
from autoscaler.sim.job import Job
from autoscaler.sim.kernel import Kernel
from autoscaler.sim.queues import Fair
from autoscaler.sim.routers import LeastLoad
from autoscaler.sim.world import World
from controlplane.policy.capacity import Mix, capacity

FILLS: Final = (
    0.95,
    0.9,
    0.85,
    0.8,
    0.75,
    0.7,
    0.65,
    0.6,
    0.5,
)  # how full replicas are planned, tried in turn


@dataclass(frozen=True, slots=True)
class Kept:
    """Of `n` requests the shares whose first token, whose mean gap, and which of both came in time."""

    n: int
    ttft: float
    itl: float
    both: float


class _Judge:
    def __init__(self, promise: Promise, counted_from_s: float) -> None:
        self.promise, self.from_s = promise, counted_from_s
        self.n = self.n_ttft = self.n_itl = self.n_both = 0

    def on_event(self, world: World) -> None:
        pass

    def on_end(self, world: World, job: Job) -> None:
        if job.arrived_s < self.from_s:
            return
        first, gap = job.ttft_s <= self.promise.ttft_s, job.itl_s <= self.promise.itl_s
        self.n += 1
        self.n_ttft += first
        self.n_itl += gap
        self.n_both += first and gap


def poisson(sizes: Sequence[tuple[int, int]], requests_per_s: float, seconds: float, seed: int) -> list[Job]:
    """Independent arrivals of sizes drawn from those given."""
    dice = random.Random(seed)
    jobs: list[Job] = []
    at_s = 0.0
    while True:
        at_s += dice.expovariate(requests_per_s)
        if at_s >= seconds:
            return jobs
        n_prompt, n_output = sizes[dice.randrange(len(sizes))]
        jobs.append(Job(len(jobs), at_s, max(n_prompt, 1), max(n_output, 1)))


def judge(
    fleet: Fleet,
    kinds: Sequence[Kind],
    wanted: Sequence[Bucket],
    jobs: Iterable[Job],
    promise: Promise,
    seed: int,
    *,
    warm_s: float = 30.0,
) -> Kept:
    """What the fleet does with these requests; those of the first `warm_s`, when it is empty, are not counted. A size
    that the plan has no bucket for goes where the nearest larger one goes."""
    dice = random.Random(seed)
    pools: dict[str, list[Job]] = {name: [] for name in fleet.replicas}
    at = {bucket.key: shares for bucket, shares in zip(wanted, fleet.shares, strict=True)}
    for job in jobs:
        shares = at.get(bucket_of(job.n_prompt, job.n_output)) or _nearest(at, job)
        names = sorted(shares)
        pools[dice.choices(names, [shares[name] for name in names])[0]].append(job)
    judged = _Judge(promise, warm_s)
    for kind in kinds:
        if pools.get(kind.name):
            _pool(kind, fleet.replicas[kind.name], pools[kind.name], promise, judged)
    n = max(judged.n, 1)
    return Kept(judged.n, judged.n_ttft / n, judged.n_itl / n, judged.n_both / n)


def sized(
    choose: Callable[[Sequence[Kind], list[list[float]]], Fleet | None],
    kinds: Sequence[Kind],
    sizes: Sequence[tuple[int, int]],
    requests_per_s: float,
    promise: Promise,
    *,
    kept_share: float = 0.99,
    seconds: float = 300.0,
    seeds: Sequence[int] = (101, 102, 103),
) -> tuple[Fleet, float, list[Bucket]] | None:
    """The cheapest fleet that keeps its promises to a share of the requests in a simulation of these very sizes: filled
    as full as that allows, with how full and with its buckets. None when no fill does."""
    wanted = buckets(sizes, requests_per_s)
    found: tuple[Fleet, float, list[Bucket]] | None = None
    for fill in FILLS:
        fleet = choose(kinds, loads(kinds, wanted, replace(promise, utilisation=fill)))
        if fleet is None or (found is not None and fleet.usd_per_h >= found[0].usd_per_h):
            continue
        kept = [
            judge(fleet, kinds, wanted, poisson(sizes, requests_per_s, seconds, seed), promise, seed)
            for seed in seeds
        ]
        if min(k.both for k in kept) >= kept_share:
            found = fleet, fill, wanted
    return found


def _nearest(at: Mapping[tuple[int, int], Mapping[str, float]], job: Job) -> Mapping[str, float]:
    prompt, output = bucket_of(job.n_prompt, job.n_output)
    larger = [key for key in at if key[0] >= prompt and key[1] >= output]
    return at[min(larger, key=sum) if larger else max(at)]


def _pool(kind: Kind, n_replicas: int, jobs: list[Job], promise: Promise, judged: _Judge) -> None:
    mix = Mix(sum(j.n_prompt for j in jobs) / len(jobs), sum(j.n_output for j in jobs) / len(jobs))
    slots = capacity(kind.step, kind.kv_tokens, mix, promise.itl_s, MAX_SEQS).slots
    kernel = Kernel()
    world = World(kernel, Fair(), LeastLoad(), (Conservation(), judged))
    spec = EngineSpec(kind.step, kind.kv_tokens, MAX_SEQS)
    for _ in range(n_replicas):
        world.add_replica(spec, slots)
    world.feed(iter(j for j in jobs if j.n_prompt + j.n_output <= kind.kv_tokens))
    kernel.run()
