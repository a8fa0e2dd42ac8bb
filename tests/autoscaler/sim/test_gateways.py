"""Gateways with stale views: what each sees and hears, and that the board does not follow the others into a herd."""

from __future__ import annotations

import pytest

from autoscaler.sim.balance import Balance
from autoscaler.sim.enginemodel import EngineSpec
from autoscaler.sim.gateways import Gateways, StaleView, behind
from autoscaler.sim.job import Job
from autoscaler.sim.kernel import Kernel
from autoscaler.sim.policies import policy
from autoscaler.sim.queues import fcfs
from autoscaler.sim.routers import LeastLoad
from autoscaler.sim.scenario import Setting, run
from autoscaler.sim.world import Replica, World
from controlplane.policy.perfmodel import StepModel

STEP = StepModel(base_s=0.01, weights_s=0.0, token_s=1e-5, seq_s=0.0, context_s=0.0, pair_s=0.0)
SPEC = EngineSpec(STEP, kv_tokens=1_000_000)


class Listening(LeastLoad):
    """Least load, and what it heard."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []

    def on_bound(self, job: Job, replica: Replica, now_s: float) -> None:
        self.heard.append(("bound", job.id))

    def on_end(self, job: Job, replica: Replica, now_s: float) -> None:
        self.heard.append(("end", job.id))


def test_a_view_stays_until_the_next_look() -> None:
    """Looks at 0.05, 0.25, 0.45, ...: all that comes between goes to the replica that was empty then."""
    world = World(Kernel(), fcfs(), StaleView(LeastLoad(), age_s=0.2, first_s=0.05))
    for _ in range(2):
        world.add_replica(SPEC, 64)
    arrivals = [
        Job(n, at_s, 10, 10_000) for n, at_s in enumerate((0.06, 0.1, 0.2, 0.3, 0.44, 0.46, 2.0, 2.3))
    ]
    world.feed(iter(arrivals))
    world.kernel.run(until_s=3.0)
    assert [job.replica for job in arrivals] == [1, 1, 1, 2, 2, 2, 1, 2]


def test_a_gateway_hears_of_its_own_requests_only() -> None:
    routers = [Listening(), Listening()]
    world = World(Kernel(), fcfs(), Gateways(2, lambda number: routers[number]))
    world.add_replica(SPEC, 4)
    world.feed(iter([Job(n, n * 0.01, 10, 3) for n in range(4)]))
    world.kernel.run()
    assert [sorted(r.heard) for r in routers] == [
        [("bound", 0), ("bound", 2), ("end", 0), ("end", 2)],
        [("bound", 1), ("bound", 3), ("end", 1), ("end", 3)],
    ]


def test_one_gateway_with_a_fresh_view_is_the_router_itself() -> None:
    router = LeastLoad()
    assert behind(1, 0.0, lambda number: router) is router
    with pytest.raises(ValueError, match="gateways"):
        behind(0, 0.0, lambda number: router)


def test_least_load_herds_on_stale_loads_and_the_board_does_not() -> None:
    """200 requests a second on eight replicas, loads seen every 200 ms: forty come between two looks."""
    peaks = {}
    for name in ("least-load", "affinity"):
        for suffix in ("", ":gateways=4:age_s=0.2"):
            balance = Balance()
            jobs = (Job(n, n * 0.005, 200 + 37 * n % 300, 20 + 31 * n % 60) for n in range(1500))
            run(Setting(SPEC, 64, 8, ttft_target_s=1.0), policy(name + suffix), jobs, observers=(balance,))
            peaks[name + suffix] = balance.peak_running
    assert peaks["least-load:gateways=4:age_s=0.2"] > 1.4 * peaks["least-load"]
    assert peaks["affinity:gateways=4:age_s=0.2"] < 1.2 * peaks["affinity"]
    assert peaks["affinity"] <= peaks["least-load"] + 1
