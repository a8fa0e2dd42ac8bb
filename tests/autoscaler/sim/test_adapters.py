"""Adapters on simulated replicas: loads are waited for, places are bounded, and routing keeps misses low."""

from __future__ import annotations

import random

from autoscaler.sim.adapters import Adapters, AdapterSpec
from autoscaler.sim.checkers import Conservation
from autoscaler.sim.enginemodel import EngineSpec
from autoscaler.sim.job import Job
from autoscaler.sim.kernel import Kernel
from autoscaler.sim.policies import policy
from autoscaler.sim.queues import fcfs
from autoscaler.sim.routers import LeastLoad, Random
from autoscaler.sim.scenario import Setting, run
from autoscaler.sim.world import Router, World
from controlplane.policy.perfmodel import StepModel

STEP = StepModel(base_s=0.01, weights_s=0.0, token_s=1e-4, seq_s=0.0, context_s=0.0, pair_s=0.0)
SPEC = EngineSpec(STEP, kv_tokens=100_000)


def world_of(
    limit: int, n_replicas: int = 1, router: Router | None = None, *, by_worth: bool = False
) -> World:
    kernel = Kernel()
    adapters = Adapters(AdapterSpec(limit, lambda adapter: 2.0, 2.0, by_worth), kernel)
    world = World(kernel, fcfs(), router or LeastLoad(), (Conservation(every=1),), adapters=adapters)
    for _ in range(n_replicas):
        world.add_replica(SPEC, 16)
    return world


def job(number: int, at_s: float, adapter: str, n_output: int = 10) -> Job:
    return Job(number, at_s, 100, n_output, adapter=adapter)


def test_a_load_is_waited_for_once_and_what_is_there_is_not() -> None:
    world = world_of(2)
    jobs = [job(0, 0.0, "a"), job(1, 0.5, "a"), job(2, 5.0, "a"), job(3, 5.0, "")]
    world.feed(iter(jobs))
    world.kernel.run()
    assert [round(j.ttft_s, 1) for j in jobs] == [2.0, 1.5, 0.0, 0.0]
    assert world.adapters is not None
    assert (world.adapters.n_asked, world.adapters.n_missed, world.adapters.n_loads) == (3, 2, 1)
    assert round(world.adapters.waited_s, 6) == 3.5


def test_the_limit_holds_and_who_finds_no_place_waits_for_one() -> None:
    """Two places, both used for long; the third adapter waits until the shorter of them ends."""
    world = world_of(2)
    jobs = [job(0, 0.0, "a", 300), job(1, 0.0, "b", 900), job(2, 0.1, "c")]
    world.feed(iter(jobs))
    most = 0
    while world.kernel.run(max_events=1):
        most = max(most, len(world.replicas[1].adapters))
    assert most == 2
    assert jobs[2].first_s > jobs[0].ended_s + 2.0
    assert jobs[2].ended_s < jobs[1].ended_s
    assert world.replicas[1].adapters == {"b", "c"}


def test_least_recently_used_goes_unless_it_is_worth_more() -> None:
    for by_worth, kept in ((False, {"b", "c"}), (True, {"a", "c"})):
        world = world_of(2, by_worth=by_worth)
        names = ["a"] * 8 + ["b", "c"]
        world.feed(iter([job(n, 4.0 * n, name) for n, name in enumerate(names)]))
        world.kernel.run()
        assert world.replicas[1].adapters == kept


def test_a_lost_replica_takes_its_loads_with_it() -> None:
    world = world_of(2, n_replicas=2)
    jobs = [job(n, 0.0, name) for n, name in enumerate("abab")]
    world.feed(iter(jobs))
    world.kernel.at(1.0, lambda: world.kill_replica(world.replicas[1]))
    world.kernel.run()
    assert world.n_ended == 4
    assert world.replicas[2].adapters == {"a", "b"}


def test_affinity_misses_far_less_than_chance_and_stays_even() -> None:
    chance = random.Random(5)
    names = [f"v{int(chance.paretovariate(0.8))}" for _ in range(400)]
    misses = {}
    for name in ("random", "least-load", "affinity", "affinity:by_worth=0"):
        setting = Setting(SPEC, 16, 4, 1.0, adapters=AdapterSpec(3, lambda adapter: 1.0, 1.0))
        jobs = (Job(n, n * 0.2, 50 + n % 90, 20 + n % 50, adapter=adapter) for n, adapter in enumerate(names))
        misses[name] = run(setting, policy(name), jobs).n_adapter_misses
    assert max(misses["affinity"], misses["affinity:by_worth=0"]) < 0.7 * min(
        misses["random"], misses["least-load"]
    )
    assert run(setting, policy("affinity"), iter([Job(0, 0, 9, 9)])).n_adapter_misses == 0
    assert Random(1).rank(Job(0, 0, 1, 1), [], 0.0) == []
