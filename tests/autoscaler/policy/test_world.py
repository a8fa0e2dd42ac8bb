"""Long random histories: replicas start late, fail and die, load comes and goes, and some things always hold."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from autoscaler.types import Failure, MachineState, ReplicaPhase
from tests.autoscaler.policy.scene import T0, Scene, kinds, machine, replica, spec

START_S = 8.0
MACHINE_S = 20.0


class World(Scene):
    """Carries out what is ordered: machines come up, replicas start, drain, and sometimes break."""

    rng: random.Random
    p_break: float = 0.0

    def obey(self) -> list[str]:
        decision = self.tick(self.rng.choice([0.5, 1.0, 5.0]))
        for command in decision.commands:
            kind = command.KIND
            if kind == "launch_machine":
                new = machine(command.command_id, 4, state=MachineState.PENDING, created_at_s=self.now_s)
                self.machines += (new,)
            elif kind == "start_replica":
                born = replica(
                    command.command_id,
                    ReplicaPhase.STARTING,
                    machine_id=command.machine_id,  # type: ignore[union-attr]
                    created_at_s=self.now_s,
                    phase_at_s=self.now_s,
                )
                self.replicas += (born,)
            elif kind == "stop_replica":
                self.replicas = tuple(r for r in self.replicas if r.id != command.replica_id)  # type: ignore[union-attr]
            elif kind == "drain_replica":
                self.replicas = tuple(
                    replace(r, phase=ReplicaPhase.DRAINING, phase_at_s=self.now_s)
                    if r.id == command.replica_id  # type: ignore[union-attr]
                    else r
                    for r in self.replicas
                )
        self._live()
        return kinds(decision)

    def _live(self) -> None:
        self.machines = tuple(
            replace(m, state=MachineState.READY) if self.now_s - m.created_at_s > MACHINE_S else m
            for m in self.machines
        )
        ready = {m.id for m in self.machines if m.state is MachineState.READY}
        kept = []
        for r in self.replicas:
            if (
                r.phase is ReplicaPhase.STARTING
                and r.machine_id in ready
                and self.now_s - r.phase_at_s > START_S
            ):
                if self.rng.random() < self.p_break:
                    self.failures = (*self.failures, Failure(r.id, self.now_s, "engine_died", ""))[-20:]
                    continue
                r = replace(r, phase=ReplicaPhase.READY, phase_at_s=self.now_s)
            elif r.phase is ReplicaPhase.DRAINING and self.now_s - r.phase_at_s > 3:
                continue
            kept.append(r)
        self.replicas = tuple(kept)
        counts = {m.id: sum(1 for r in self.replicas if r.machine_id == m.id) for m in self.machines}
        self.machines = tuple(
            replace(m, n_replicas=counts[m.id], n_free=4 - counts[m.id]) for m in self.machines
        )

    def load(self, n: int) -> None:
        """So many requests: slots take what they can, the rest waits."""
        shared = []
        for r in self.replicas:
            take = min(n, r.slots) if r.phase is ReplicaPhase.READY else 0
            n -= take
            shared.append(replace(r, used=take))
        self.replicas, self.n_queued = tuple(shared), n


def _world(seed: int, **limits: float) -> World:
    world = World(spec=spec(max_replicas=6, max_machines=2, **limits))
    world.rng = random.Random(seed)
    return world


@pytest.mark.parametrize("seed", range(12))
def test_bounds_hold_and_everything_ends_at_zero(seed: int) -> None:
    world = _world(seed)
    for _ in range(20):
        n = world.rng.choice([0, 0, 1, 5, 20, 60, 200])
        for _ in range(world.rng.randint(1, 30)):
            world.load(n)
            world.obey()
            live = [r for r in world.replicas if r.phase is not ReplicaPhase.DRAINING]
            assert len(live) <= 6, seed
            assert len(world.machines) <= 2, seed
            assert all(m.n_replicas <= 4 for m in world.machines), seed
            assert len(world.memory.samples) <= 61
    until_s = world.now_s + world.spec.idle_timeout_s + START_S + MACHINE_S + 20
    while world.now_s < until_s:
        world.load(0)
        world.obey()
    assert world.replicas == (), seed


@pytest.mark.parametrize("seed", range(5))
def test_steady_load_settles_and_stays(seed: int) -> None:
    world = _world(seed)
    n = world.rng.randint(1, 40)
    while world.now_s < T0 + 300:
        world.load(n)
        world.obey()
    orders = []
    while world.now_s < T0 + 900:
        world.load(n)
        orders += world.obey()
    assert orders == [], (seed, n)
    assert world.n_queued == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_model_that_never_starts_is_not_tried_for_ever(seed: int) -> None:
    world = _world(seed)
    world.p_break = 1.0
    starts = 0
    while world.now_s < T0 + 1800:
        world.load(30)
        starts += world.obey().count("start_replica")
    # Whatever was under way when the first failed, five in a row, then one per cool-down of 300 s.
    assert starts <= 5 + 5 + 1800 / 300, seed


@pytest.mark.parametrize("seed", range(5))
def test_requests_are_served_in_the_end_when_half_of_the_starts_fail(seed: int) -> None:
    world = _world(seed, max_failures=1000)
    world.p_break = 0.5
    while world.now_s < T0 + 1800:
        world.load(12)
        world.obey()
    assert world.n_queued == 0, seed
