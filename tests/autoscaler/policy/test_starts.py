"""Which starts gateways are told of, and for when."""

from __future__ import annotations

import pytest

from autoscaler.policy.eta import Timings
from autoscaler.policy.starts import starts
from autoscaler.policy.status import stage_of
from autoscaler.types import MachineState, MachineView, Observation, ReplicaPhase, ReplicaView, StageName
from tests.autoscaler.policy.scene import spec as spec_of

TIMINGS = Timings(launching_machine=60_000, starting_replica=2_000, loading_model=5_000)
AT_S = 1_000.0


def seen(
    *replicas: ReplicaView, state: MachineState = MachineState.READY, ready_at_s: float = 900.0
) -> Observation:
    return Observation(
        AT_S, "d", 0, replicas, (MachineView("m", state, 1, 1, 800.0, ready_at_s=ready_at_s),)
    )  # fmt: skip


def replica(phase: ReplicaPhase, **more: object) -> ReplicaView:
    return ReplicaView("r", "m", phase, 950.0, 950.0, 16, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("phase", "state", "ready_at_s", "stage", "at_s"),
    [
        (ReplicaPhase.LOADING, MachineState.READY, 900.0, StageName.LOADING_MODEL, 955.0),
        (ReplicaPhase.STARTING, MachineState.READY, 900.0, StageName.STARTING_REPLICA, 957.0),
        (ReplicaPhase.STARTING, MachineState.READY, 990.0, StageName.STARTING_REPLICA, 997.0),
        (ReplicaPhase.STARTING, MachineState.PENDING, 0.0, StageName.LAUNCHING_MACHINE, 1_017.0),
    ],
)
def test_each_stage_is_planned_from_its_own_beginning(
    phase: ReplicaPhase, state: MachineState, ready_at_s: float, stage: StageName, at_s: float
) -> None:
    """A machine that was launched for the replica took its time first: its stage began when the machine was there."""
    observation = seen(replica(phase), state=state, ready_at_s=ready_at_s)
    assert stage_of(observation.replicas[0], observation)[0] is stage
    assert starts(observation, spec_of(slots=16), TIMINGS) == ((16, round(at_s * 1000)),)


def test_a_start_never_measured_and_one_that_is_over_are_not_told_of() -> None:
    coming = seen(replica(ReplicaPhase.LOADING))
    assert starts(coming, spec_of(slots=16), Timings()) == ()
    for phase in (ReplicaPhase.READY, ReplicaPhase.DRAINING):
        assert starts(seen(replica(phase)), spec_of(slots=16), TIMINGS) == ()
    assert starts(seen(replica(ReplicaPhase.LOADING, canary=True)), spec_of(slots=16), TIMINGS) == ()


def test_it_counts_as_many_slots_as_those_that_serve_are_given() -> None:
    """What keeps their latency low will keep its too."""
    serving = [replica(ReplicaPhase.READY, slots_now=n) for n in (4, 8)]
    ((slots, _),) = starts(seen(*serving, replica(ReplicaPhase.LOADING)), spec_of(slots=16), TIMINGS)
    assert slots == 6
