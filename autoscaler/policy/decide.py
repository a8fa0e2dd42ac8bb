"""`decide`: one observation, the configuration and the memory in; commands, the next memory and reasons out.

The whole autoscaler of one deployment, in the order in which the rules run. Called by tick.py, by `replay`
and by the simulator. Pure: no clock, no random, no I/O; equal inputs give equal outputs, in any order.
"""

from dataclasses import replace

from autoscaler.policy import retire, status
from autoscaler.policy.comeback import Stopping, left_s, worth_awaiting
from autoscaler.policy.failures import Gate, gate
from autoscaler.policy.ident import command_id
from autoscaler.policy.placement import Placement, place
from autoscaler.policy.replicas import wish
from autoscaler.policy.resting import rest
from autoscaler.types import (
    Command,
    Decision,
    LaunchMachine,
    MachineState,
    Observation,
    ReplicaPhase,
    ReplicaView,
    ScalerMemory,
    ScalerSpec,
    StageName,
    StartMachine,
    StartReplica,
)


def decide(observation: Observation, spec: ScalerSpec, memory: ScalerMemory) -> Decision:
    """What to order now. Commands are ordered: retirements first, since they may make room."""
    observation = _in_order(observation)
    if memory.born_at_s == 0:
        memory = replace(memory, born_at_s=observation.now_s)
    late = retire.overdue(observation, spec)
    is_late = {r.replica_id for r in late}
    leaving = tuple(r for r in retire.on_leaving_machines(observation, spec) if r.replica_id not in is_late)
    retired = {r.replica_id for r in (*late, *leaving)}
    reasons = [f"replica {r.replica_id}: {r.reason}" for r in (*late, *leaving)]
    stay = tuple(r for r in observation.replicas if r.id not in retired)
    observation = replace(observation, replicas=stay)

    want = wish(observation, spec, memory)
    memory = want.memory
    reasons += want.reasons
    if observation.means:
        reasons.append(observation.means)
    away = (ReplicaPhase.DRAINING, ReplicaPhase.SLEEPING)
    staying = tuple(r for r in observation.replicas if r.phase not in away)
    present = tuple(r for r in staying if not r.canary)
    canaries = tuple(r for r in staying if r.canary)
    leaving_soon = retire.to_be_replaced(observation)
    current = tuple(r for r in present if not r.outdated and r.id not in leaving_soon)
    outdated = tuple(r for r in present if r.outdated or r.id in leaving_soon)

    resting = rest(observation, spec, memory, want.n, current)
    observation, memory = resting.observation, resting.memory
    reasons += resting.reasons
    woken = {order.replica_id for order in resting.wake}
    current += tuple(r for r in observation.replicas if r.id in woken)
    present += tuple(r for r in observation.replicas if r.id in woken)
    to_bed = {order.replica_id for order in resting.sleep}

    awake = tuple(r for r in current if r.id not in to_bed)
    surplus = retire.surplus(awake, len(current) - want.n - len(to_bed), "surplus: " + want.reasons[-1])
    # A suspended tenant gets nothing new, not even a successor of what is replaced.
    n_missing = max(want.n - len(current), 0) if spec.suspended_at_s is None else 0
    replica_gate = gate(observation.failures, observation.last_good_at_s, spec)
    machine_gate = gate(observation.machine_failures, observation.last_machine_good_at_s, spec)
    placement, no_room = _place(n_missing, observation, spec, replica_gate, machine_gate, reasons)
    replaced = _outdated_to_drain(current, outdated, leaving_soon, want.n, placement, observation, reasons)

    n_canary = spec.n_canary if want.n > 0 and spec.suspended_at_s is None else 0
    tried = retire.surplus(canaries, len(canaries) - n_canary, "its rollout does not want it any more")
    trial = Placement((), False, 0)
    if n_missing == 0 and any(r.phase is ReplicaPhase.READY for r in current):  # who serves comes first
        n_tried = max(n_canary - len(canaries), 0)
        trial, _ = _place(n_tried, observation, spec, Gate(), machine_gate, reasons)
        if n_tried:
            reasons.append(f"a rollout tries out {n_canary}, {len(canaries)} of them there")

    awaited = placement.awaits or trial.awaits
    now_s, since_s = observation.now_s, None
    if no_room:
        since_s = observation.now_s if memory.no_room_since_s is None else memory.no_room_since_s
    memory = replace(memory, no_room_since_s=since_s, awaited=tuple(machine.id for machine in awaited))
    gone = retired | to_bed | {r.replica_id for r in (*surplus, *replaced)}
    verdict = status.status(
        observation,
        spec,
        wanted=want.n,
        n_missing=n_missing,
        live=tuple(r for r in present if r.id not in gone),
        ordered=_ordered_stage(placement, observation),
        ordered_at_s=now_s + (left_s(awaited[0], observation.stop_times, now_s) if awaited else 0.0),
        gate=replica_gate,
        machine_gate=machine_gate,
        no_room=no_room,
        no_room_for_s=0.0 if since_s is None else observation.now_s - since_s,
    )
    orders: list[Command] = [*late, *leaving, *surplus, *replaced, *tried]
    orders += [*resting.stop, *resting.sleep, *resting.wake]
    orders += _starts(placement)
    orders += [replace(start, canary=True) for start in _starts(trial)]
    if placement.launch or trial.launch:
        n_wanted = max(placement.n_unplaced, trial.n_unplaced) - sum(machine.n_free for machine in awaited)
        stopped = min(observation.stopped, default="")
        if stopped:
            orders.append(StartMachine("", stopped))
        elif n_wanted > 0:
            orders.append(LaunchMachine("", n_wanted))
    commands, memory = _number(orders, observation.deployment_id, memory)
    return Decision(commands, memory, tuple(reasons), want.n, verdict)


def _starts(placement: Placement) -> list[StartReplica]:
    if not placement.near:
        return [StartReplica("", machine_id) for machine_id in placement.machine_ids]
    return [
        StartReplica("", machine_id, source=near.start.tier.value, start_s=round(near.seconds, 1))
        for machine_id, near in zip(placement.machine_ids, placement.near, strict=True)
    ]


def _in_order(observation: Observation) -> Observation:
    return replace(
        observation,
        replicas=tuple(sorted(observation.replicas, key=lambda r: r.id)),
        machines=tuple(sorted(observation.machines, key=lambda m: m.id)),
        failures=tuple(sorted(observation.failures, key=lambda f: (f.at_s, f.subject_id))),
        machine_failures=tuple(sorted(observation.machine_failures, key=lambda f: (f.at_s, f.subject_id))),
    )


def _place(
    n: int,
    observation: Observation,
    spec: ScalerSpec,
    replica_gate: Gate,
    machine_gate: Gate,
    reasons: list[str],
) -> tuple[Placement, str]:
    """Where the missing replicas go, as far as past failures allow; and why some go nowhere ('' = none)."""
    nothing = Placement((), False, 0)
    if n == 0:
        return nothing, ""
    now_s = observation.now_s
    if not replica_gate.is_open(now_s):
        reasons.append(
            f"no new replica for {replica_gate.retry_at_s - now_s:.1f} s: {replica_gate.n} failed in a row"
        )
        return nothing, ""
    if replica_gate.n:  # one at a time until one has proven itself
        if any(r.phase in (ReplicaPhase.STARTING, ReplicaPhase.LOADING) for r in observation.replicas):
            reasons.append(f"{replica_gate.n} failed in a row: the one under way comes first")
            return nothing, ""
        n = 1
    found = place(n, observation, spec)
    if found.machine_ids:
        soonest = ", ".join(f"{n.start.tier.value} {n.seconds:.1f} s" for n in found.near[:4])
        told = f": weights from {soonest}" if soonest else ""
        reasons.append(f"{len(found.machine_ids)} on machines we have{told}")
    if found.launch and not machine_gate.is_open(now_s):
        reasons.append(
            f"no new machine for {machine_gate.retry_at_s - now_s:.1f} s: {machine_gate.n} failed in a row"
        )
        return replace(found, launch=False), ""
    if found.launch and observation.quota:
        reasons.append(observation.quota)
        return replace(found, launch=False), observation.quota
    if found.launch and observation.stopped:
        reasons.append(f"no room for {found.n_unplaced}: a stopped machine is started again")
    elif found.launch:
        found = replace(found, awaits=_to_await(found.n_unplaced, observation, reasons))
        n_left = found.n_unplaced - sum(machine.n_free for machine in found.awaits)
        if n_left > 0:
            reasons.append(f"no room for {n_left}: one machine more, {observation.n_machines} exist")
    elif found.n_unplaced:
        no_room = (
            f"no room for {found.n_unplaced} replicas: all {observation.n_machines} of "
            f"{spec.max_machines} machines are full"
        )
        reasons.append(no_room)
        return found, no_room
    return found, ""


def _to_await(n_missing: int, observation: Observation, reasons: list[str]) -> tuple[Stopping, ...]:
    """Machines that are being stopped, as many as hold what finds no room: nothing is bought for that."""
    times, now_s = observation.stop_times, observation.now_s
    found: list[Stopping] = []
    for machine in worth_awaiting(observation.stopping, times, now_s):
        if n_missing <= 0:
            break
        n_missing -= machine.n_free
        found.append(machine)
        reasons.append(
            f"machine {machine.id} was told to stop {now_s - machine.since_s:.0f} s ago, stops in some "
            f"{left_s(machine, times, now_s):.0f} s and is started again: {times.resume_s:.0f} s more, against "
            f"{times.boot_s:.0f} s for a new one"
        )
    return tuple(found)


def _ordered_stage(placement: Placement, observation: Observation) -> StageName | None:
    ready = {m.id for m in observation.machines if m.state is MachineState.READY}
    if any(machine_id in ready for machine_id in placement.machine_ids):
        return StageName.STARTING_REPLICA
    if placement.launch and (observation.stopped or placement.awaits) and not placement.machine_ids:
        return StageName.STARTING_MACHINE
    return StageName.LAUNCHING_MACHINE if placement.machine_ids or placement.launch else None


def _outdated_to_drain(
    current: tuple[ReplicaView, ...],
    outdated: tuple[ReplicaView, ...],
    leaving_soon: frozenset[str],
    wanted: int,
    placement: Placement,
    observation: Observation,
    reasons: list[str],
) -> tuple[retire.Retirement, ...]:
    """Replicas of the former specification, or on a machine under notice, serve until the new ones do.

    Unless they are in their way: one on a machine under notice is not, nothing is placed there.
    """
    if not outdated:
        return ()
    n_ready = sum(1 for r in current if r.phase is ReplicaPhase.READY)
    if n_ready >= wanted:
        n_leaving = sum(1 for r in outdated if r.id in leaving_soon)
        if n_leaving:
            why = retire.because(*(m for m in observation.machines if m.state is MachineState.DRAINING))
            reasons.append(
                f"{n_leaving} replicas are on a machine that is taken away{why}, {n_ready} are not"
            )
        if n_leaving < len(outdated):
            n = len(outdated) - n_leaving
            reasons.append(f"{n} replicas run the former specification, {n_ready} the present one")
        return retire.surplus(outdated, len(outdated), "replaced")
    is_draining = any(r.phase is ReplicaPhase.DRAINING for r in observation.replicas)
    in_the_way = tuple(r for r in outdated if r.id not in leaving_soon)
    if in_the_way and placement.n_unplaced and not placement.launch and not is_draining:
        reasons.append("one replica of the former specification makes room")
        return retire.surplus(in_the_way, 1, "makes room for the present specification")
    return ()


def _number(
    orders: list[Command], deployment_id: str, memory: ScalerMemory
) -> tuple[tuple[Command, ...], ScalerMemory]:
    numbered = tuple(
        replace(order, command_id=command_id(deployment_id, memory.born_at_s, memory.n_commands + i))
        for i, order in enumerate(orders)
    )
    return numbered, replace(memory, n_commands=memory.n_commands + len(orders))
