"""A decision in the words of its owner (phase, last_error) and of clients that wait (stage). Pure."""

import math

from autoscaler.policy.failures import Gate
from autoscaler.types import (
    DeploymentPhase,
    MachineState,
    Observation,
    ReplicaPhase,
    ReplicaView,
    ScalerSpec,
    StageName,
    Status,
)


def status(
    observation: Observation,
    spec: ScalerSpec,
    *,
    wanted: int,
    n_missing: int,
    live: tuple[ReplicaView, ...],
    ordered: StageName | None,
    ordered_at_s: float,
    gate: Gate,
    machine_gate: Gate,
    no_room: str,
    no_room_for_s: float,
) -> Status:
    """`live`: replicas that stay; `n_missing` of those wanted do not exist.

    `ordered`: the stage that this decision's own orders begin, if any; `ordered_at_s`: when, which for a machine that
    has yet to stop is later than now. `no_room`: why replicas could not be
    placed ('' when they could).
    """
    now_s = observation.now_s
    if spec.deleted:
        return Status(DeploymentPhase.DELETED, "", StageName.FAILED, now_s, "deployment_deleted")
    error = gate.describe(spec) or machine_gate.describe(spec)
    if any(r.phase in (ReplicaPhase.READY, ReplicaPhase.DRAINING) for r in live):
        trouble = (error or no_room) if n_missing else ""  # what serves has outlived what failed before
        return Status(DeploymentPhase.READY, trouble, StageName.READY, now_s)
    coming = [
        r for r in live if r.phase in (ReplicaPhase.STARTING, ReplicaPhase.LOADING, ReplicaPhase.WAKING)
    ]
    if coming:
        stage, since_s = _furthest(coming, observation)
        return Status(DeploymentPhase.STARTING, error, stage, since_s)
    if ordered is not None:
        return Status(DeploymentPhase.STARTING, error, ordered, ordered_at_s)
    for closed in (gate, machine_gate):
        if closed.last is not None and not closed.is_open(now_s):
            retry_after_s = max(1, math.ceil(closed.retry_at_s - now_s))
            if wanted == 0:
                return Status(DeploymentPhase.FAILED, error)
            if closed.tells_clients:
                return Status(
                    DeploymentPhase.FAILED, error, StageName.FAILED, now_s, closed.last.code, retry_after_s
                )
            return Status(DeploymentPhase.FAILED, error, StageName.STARTING_REPLICA, now_s)
    if wanted == 0:
        return Status(DeploymentPhase.IDLE, error)
    if no_room:
        retry_after_s = max(math.ceil(spec.no_room_patience_s), 1)
        if no_room == observation.quota:  # waiting does not help: nobody else's machine is about to be free
            return Status(
                DeploymentPhase.FAILED, no_room, StageName.FAILED, now_s, "quota_reached", retry_after_s
            )
        if no_room_for_s >= spec.no_room_patience_s:
            return Status(
                DeploymentPhase.FAILED, no_room, StageName.FAILED, now_s, "no_capacity", retry_after_s
            )
    return Status(DeploymentPhase.STARTING, error or no_room, StageName.WAKING, now_s)


def stage_of(replica: ReplicaView, observation: Observation) -> tuple[StageName, float]:
    """Where a replica that is coming stands, and since when."""
    if replica.phase is ReplicaPhase.WAKING:
        return StageName.WAKING_REPLICA, replica.phase_at_s
    if replica.phase is ReplicaPhase.LOADING:
        return StageName.LOADING_MODEL, replica.phase_at_s
    machine = next((m for m in observation.machines if m.id == replica.machine_id), None)
    if machine is not None and machine.resumes:
        return StageName.STARTING_MACHINE, replica.phase_at_s
    if machine is None or machine.state is not MachineState.READY:
        return StageName.LAUNCHING_MACHINE, replica.phase_at_s
    return StageName.STARTING_REPLICA, max(replica.phase_at_s, machine.ready_at_s or 0.0)


def _furthest(coming: list[ReplicaView], observation: Observation) -> tuple[StageName, float]:
    """Stage of the replica that is furthest, and since when."""
    order = list(StageName)
    return min(
        (stage_of(r, observation) for r in coming), key=lambda found: (-order.index(found[0]), found[1])
    )
