"""What becomes of a deployment's last replica after its idle timeout: it sleeps for as long as the ladder says. Pure.

The rungs are asleep (process and weights stay, the accelerator's memory is free) and gone (a warm machine forks it
anew, poolrest.py says for how long there is one). The schedule is the ladder's (ladder.py), over the deployment's own
gaps; it only descends: waking before anybody asks is the owner's `min_replicas`. Called by decide.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from autoscaler.policy.poolrest import RestInputs, RestMemory, next_rest
from autoscaler.policy.retire import missed_least
from autoscaler.types import (
    MachineState,
    Observation,
    ReplicaPhase,
    ReplicaView,
    ScalerMemory,
    ScalerSpec,
    SleepReplica,
    StopReplica,
    WakeReplica,
)

ASLEEP: Final = "asleep"
GONE: Final = "gone"


@dataclass(frozen=True, slots=True)
class Resting:
    """Orders about sleepers, and the observation in which those that wake have taken their places."""

    observation: Observation
    memory: ScalerMemory
    wake: tuple[WakeReplica, ...] = ()
    sleep: tuple[SleepReplica, ...] = ()
    stop: tuple[StopReplica, ...] = ()
    reasons: tuple[str, ...] = ()


def rest(
    observation: Observation,
    spec: ScalerSpec,
    memory: ScalerMemory,
    wanted: int,
    current: tuple[ReplicaView, ...],
) -> Resting:
    """`wanted` replicas of the present specification, of which `current` are awake, or on their way to serve."""
    sleepers = sorted(
        (r for r in observation.replicas if r.phase is ReplicaPhase.SLEEPING),
        key=lambda r: (-r.phase_at_s, r.id),
    )
    if not sleepers and not spec.rungs:
        return Resting(observation, replace(memory, rest=None))
    rested, schedule = next_rest(
        RestInputs(wanted, None, spec.rungs, spec.stakes or RestInputs().stakes, climbs=False),
        observation.now_s,
        memory.rest or RestMemory(),
    )
    memory = replace(memory, rest=rested)
    if spec.deleted or spec.suspended_at_s is not None:
        told = "the deployment is deleted" if spec.deleted else "its organization is suspended"
        return Resting(observation, memory, stop=tuple(StopReplica("", r.id, told) for r in sleepers))
    if wanted == 0:
        why = "" if schedule is None else f"rests: {rested.rung} ({schedule.reason})"
        if rested.rung == ASLEEP:
            return _at_rest(observation, memory, sleepers, current, why)
        stop = tuple(StopReplica("", r.id, why or "nothing to rest on any more") for r in sleepers)
        return Resting(observation, memory, stop=stop, reasons=(why,) if stop and why else ())
    return _at_work(observation, memory, sleepers, wanted, current)


def _at_rest(
    observation: Observation,
    memory: ScalerMemory,
    sleepers: list[ReplicaView],
    current: tuple[ReplicaView, ...],
    why: str,
) -> Resting:
    """One sleeps; those beyond it and those that would serve something else end."""
    good = [r for r in sleepers if _keeps(r, observation)]
    stop = [StopReplica("", r.id, "one sleeps already") for r in good[1:]]
    stop += [StopReplica("", r.id, "not what its deployment now wants") for r in sleepers if r not in good]
    if good or not current:
        return Resting(observation, memory, stop=tuple(stop))
    beds = {m.id for m in observation.machines if m.n_beds > 0 and m.state is MachineState.READY}
    able = [r for r in missed_least(current) if r.phase is ReplicaPhase.READY and r.machine_id in beds]
    if not able:
        return Resting(observation, memory, stop=tuple(stop), reasons=("no machine has room for a sleeper",))
    chosen = SleepReplica("", able[-1].id, why)
    return Resting(observation, memory, sleep=(chosen,), stop=tuple(stop), reasons=(why,))


def _at_work(
    observation: Observation,
    memory: ScalerMemory,
    sleepers: list[ReplicaView],
    wanted: int,
    current: tuple[ReplicaView, ...],
) -> Resting:
    """Sleepers wake before anything is started, where their machine has a place; the rest end when others serve."""
    machines = {m.id: m for m in observation.machines}
    wake: list[WakeReplica] = []
    stop: list[StopReplica] = []
    n_ready = sum(1 for r in current if r.phase is ReplicaPhase.READY)
    for sleeper in sleepers:
        machine = machines.get(sleeper.machine_id)
        if not _keeps(sleeper, observation):
            stop.append(StopReplica("", sleeper.id, "not what its deployment now wants"))
        elif len(current) + len(wake) < wanted and machine is not None and machine.n_free > 0:
            wake.append(WakeReplica("", sleeper.id))
            machines[machine.id] = replace(machine, n_free=machine.n_free - 1)
        elif n_ready >= wanted:
            stop.append(StopReplica("", sleeper.id, "others serve"))
    woken = {w.replica_id for w in wake}
    observation = replace(
        observation,
        machines=tuple(machines[m.id] for m in observation.machines),
        replicas=tuple(
            replace(r, phase=ReplicaPhase.WAKING, phase_at_s=observation.now_s) if r.id in woken else r
            for r in observation.replicas
        ),
    )
    reasons = (f"{len(wake)} asleep wake up",) if wake else ()
    return Resting(observation, memory, wake=tuple(wake), stop=tuple(stop), reasons=reasons)


def _keeps(sleeper: ReplicaView, observation: Observation) -> bool:
    stays = any(
        m.id == sleeper.machine_id and m.state is MachineState.READY and m.ends_at_s is None
        for m in observation.machines
    )
    return stays and not sleeper.outdated and not sleeper.canary
