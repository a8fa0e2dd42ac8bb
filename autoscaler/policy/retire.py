"""Which replicas have to go: those that hang, those on a machine that leaves, the surplus, the outdated.

Each rule answers with commands that still lack their id (decide.py numbers them). Victims: never ready first,
then the least used, then the youngest; ties by id. Pure.
"""

from autoscaler.types import (
    DrainReplica,
    MachineState,
    MachineView,
    Observation,
    ReplicaPhase,
    ReplicaView,
    ScalerSpec,
    StopReplica,
)

Retirement = DrainReplica | StopReplica
_COMING_UP = (ReplicaPhase.STARTING, ReplicaPhase.LOADING, ReplicaPhase.WAKING)


def overdue(observation: Observation, spec: ScalerSpec) -> tuple[Retirement, ...]:
    """Replicas that neither started nor finished draining in their time."""
    found: list[Retirement] = []
    states = {m.id: m.state for m in observation.machines}
    for replica in _sorted(observation.replicas):
        age_s = observation.now_s - replica.phase_at_s
        waits_for_machine = states.get(replica.machine_id) in (MachineState.PENDING, MachineState.ENROLLED)
        limit_s = spec.machine_timeout_s if waits_for_machine else spec.start_timeout_s
        if replica.phase in _COMING_UP and age_s > limit_s:
            what = "its machine did not come up" if waits_for_machine else f"still {replica.phase.value}"
            reason = f"{what} after {age_s:.0f} s, allowed {limit_s:g} s"
            found.append(StopReplica("", replica.id, reason, failure_code="start_timeout"))
        elif replica.phase is ReplicaPhase.DRAINING and age_s > spec.drain_timeout_s:
            reason = f"draining for {age_s:.0f} s, allowed {spec.drain_timeout_s:g} s: what it runs moves on"
            found.append(StopReplica("", replica.id, reason))
    return tuple(found)


def on_leaving_machines(observation: Observation, spec: ScalerSpec) -> tuple[Retirement, ...]:
    """Replicas on machines that are draining and have to go now.

    Under notice (`ends_at_s`) a replica serves on until its successor does, or until time is short: see
    `to_be_replaced`.
    """
    leaving = {m.id: m for m in observation.machines if m.state is MachineState.DRAINING}
    found: list[Retirement] = []
    for replica in _sorted(observation.replicas):
        machine = leaving.get(replica.machine_id)
        if machine is None or replica.phase is ReplicaPhase.DRAINING:
            continue
        if replica.phase is ReplicaPhase.SLEEPING:
            found.append(StopReplica("", replica.id, "its machine leaves"))
            continue
        if machine.ends_at_s is None or replica.phase in _COMING_UP:
            found.append(retire(replica, f"its machine is draining{because(machine)}"))
        elif observation.now_s >= machine.ends_at_s - spec.hand_over_s:
            left_s = max(machine.ends_at_s - observation.now_s, 0.0)
            found.append(retire(replica, f"its machine is taken away in {left_s:.0f} s{because(machine)}"))
    return tuple(found)


def because(*machines: MachineView) -> str:
    """In brackets, why these leave; '' where their provider takes them away."""
    said = sorted({machine.leaves_because for machine in machines if machine.leaves_because})
    return f" ({'; '.join(said)})" if said else ""


def to_be_replaced(observation: Observation) -> frozenset[str]:
    """Ready replicas on machines under notice: they count as replaced already, so their successors come first."""
    leaving = {m.id for m in observation.machines if m.state is MachineState.DRAINING}
    return frozenset(
        r.id for r in observation.replicas if r.machine_id in leaving and r.phase is ReplicaPhase.READY
    )


def surplus(live: tuple[ReplicaView, ...], n: int, reason: str) -> tuple[Retirement, ...]:
    """The `n` replicas that are missed least."""
    return tuple(retire(replica, reason) for replica in missed_least(live)[: max(n, 0)])


def missed_least(live: tuple[ReplicaView, ...]) -> list[ReplicaView]:
    """In the order in which they are given up."""
    return sorted(live, key=_value)


def retire(replica: ReplicaView, reason: str) -> Retirement:
    """Drain what serves, stop what never did."""
    if replica.phase in _COMING_UP:
        return StopReplica("", replica.id, reason)
    return DrainReplica("", replica.id, reason)


def _value(replica: ReplicaView) -> tuple[int, int, float, str]:
    rank = {ReplicaPhase.STARTING: 0, ReplicaPhase.LOADING: 1, ReplicaPhase.WAKING: 1}.get(replica.phase, 2)
    used = replica.slots if replica.used is None else replica.used  # unseen counts as full
    return (rank, used, -replica.created_at_s, replica.id)


def _sorted(replicas: tuple[ReplicaView, ...]) -> list[ReplicaView]:
    return sorted(replicas, key=lambda r: r.id)
