"""A pass over all deployments: each decided as its own tick would, on the room that the others left."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from autoscaler.policy.decide import decide
from autoscaler.policy.fleet import Seen, decide_all
from autoscaler.policy.pool import Pool
from autoscaler.types import (
    MachineState,
    MachineView,
    Observation,
    ReplicaPhase,
    ReplicaView,
    ScalerMemory,
    StartReplica,
)
from tests.autoscaler.policy.scene import T0, machine, replica, spec

_STATES = [MachineState.READY] * 4 + [MachineState.ENROLLED, MachineState.PENDING, MachineState.DRAINING]


def _machines(rng: random.Random, n: int) -> tuple[MachineView, ...]:
    return tuple(
        machine(
            f"m{i:02d}",
            rng.randrange(4),
            state=(state := rng.choice(_STATES)),
            ends_at_s=T0 + 50 if state is MachineState.DRAINING and rng.random() < 0.5 else None,
        )
        for i in range(n)
    )


def _replicas(rng: random.Random, n_machines: int) -> tuple[ReplicaView, ...]:
    return tuple(
        replica(
            f"r{i}",
            rng.choice(list(ReplicaPhase)),
            machine_id=f"m{rng.randrange(n_machines):02d}",
            used=rng.choice([None, 0, 5, 10]),
            outdated=rng.random() < 0.2,
            phase_at_s=T0 - rng.choice([1, 400]),
        )
        for i in range(rng.randrange(6))
    )


@pytest.mark.parametrize("seed", range(60))
def test_machines_left_out_of_an_observation_would_not_have_changed_the_decision(seed: int) -> None:
    rng = random.Random(seed)
    machines = _machines(rng, 25)
    limits = spec(max_replicas=rng.choice([1, 3, 8]), min_replicas=rng.randrange(2), max_machines=25)
    whole = Observation(
        T0, "d1", rng.choice([None, 0, 30]), _replicas(rng, 25), machines, Pool(machines).n_machines
    )
    seen = replace(whole, machines=Pool(machines).view(whole.replicas, limits.max_replicas))
    assert len(seen.machines) <= len(whole.replicas) + limits.max_replicas
    assert decide(seen, limits, ScalerMemory()) == decide(whole, limits, ScalerMemory()), f"seed {seed}"


def _waiting(name: str, n_queued: int, **limits: object) -> Seen:
    return Seen(Observation(T0, name, n_queued), spec(max_machines=9, **limits), ScalerMemory())


def test_room_taken_by_one_deployment_is_not_given_to_the_next() -> None:
    machines = (machine("m1", 2), machine("m2", 1))
    decisions = decide_all([_waiting("b", 14), _waiting("a", 14)], machines)
    placed = [[c.machine_id for c in d.commands if isinstance(c, StartReplica)] for d in decisions]
    assert placed == [["m1", "m1"], ["m2"]] or placed == [["m1", "m2"], ["m1"]]
    assert [c.KIND for c in decisions[1].commands] == ["start_replica", "launch_machine"]


def test_machines_bought_in_a_pass_count_for_the_next_deployment() -> None:
    decisions = decide_all([_waiting("a", 1), _waiting("b", 1)], [machine("m1", 0) for _ in range(1)])
    assert [c.KIND for d in decisions for c in d.commands] == ["launch_machine", "launch_machine"]
    tight = [replace(s, spec=spec(max_machines=2)) for s in (_waiting("a", 1), _waiting("b", 1))]
    decisions = decide_all(tight, [machine("m1", 0)])
    assert [[c.KIND for c in d.commands] for d in decisions] == [["launch_machine"], []]


@pytest.mark.parametrize("seed", range(10))
def test_a_pass_never_overfills_and_does_not_depend_on_the_order_given(seed: int) -> None:
    rng = random.Random(seed)
    machines = _machines(rng, 12)
    deployments = [_waiting(f"d{i}", rng.randrange(40), max_replicas=8) for i in range(8)]
    decisions = decide_all(deployments, machines)
    shuffled = rng.sample(deployments, len(deployments))
    assert decide_all(shuffled, rng.sample(machines, len(machines))) == decisions, f"seed {seed}"
    placed = [c.machine_id for d in decisions for c in d.commands if isinstance(c, StartReplica)]
    for m in machines:
        limit = 0 if m.state is MachineState.DRAINING else m.n_free
        assert placed.count(m.id) <= limit, f"seed {seed}: {m.id}"
