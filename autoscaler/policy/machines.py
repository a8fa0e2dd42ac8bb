"""Which machines of the pool are given back: kept warm for a while after their last replica, then not.

A warm machine (agent and zygote alive) is what makes a start from zero a matter of a second. And which are given up
for lost, because nobody on them answers although they are paid for. Pure.
"""

from dataclasses import dataclass
from typing import Final

from autoscaler.policy.ident import command_id
from autoscaler.policy.placement import empty_for_s
from autoscaler.types import MachineState, MachineView, TerminateMachine

# When most of the pool falls silent at once the fault is more likely ours (network, Redis): so much more patience.
ALL_SILENT_PATIENCE: Final = 10.0


@dataclass(frozen=True, slots=True)
class Silence:
    """An agent that has not beaten for `silent_s`, as have `n_silent` (itself included) of `n_machines`."""

    silent_s: float = 0.0
    n_silent: int = 1
    n_machines: int = 1


def lost(silence: Silence, lost_after_s: float) -> str:
    """Why a machine that its provider calls running is given up and replaced; '' while it is waited for."""
    most_are_silent = silence.n_silent > max(1, silence.n_machines // 2)
    patience_s = lost_after_s * (ALL_SILENT_PATIENCE if most_are_silent else 1.0)
    if silence.silent_s < patience_s:
        return ""
    return f"its agent was silent for {silence.silent_s:.0f} s, allowed {patience_s:g} s"


def to_release(
    machines: tuple[MachineView, ...],
    now_s: float,
    *,
    keep_warm_s: float,
    pending_timeout_s: float,
    n_kept: int = 0,
) -> tuple[TerminateMachine, ...]:
    """Machines without a replica for `keep_warm_s`, or that did not come up in `pending_timeout_s`.

    So many empty machines stay however long they have been empty: those that hold most.
    """
    commands = []
    empty = [m for m in machines if not m.n_replicas and m.state is MachineState.READY]
    kept = {m.id for m in sorted(empty, key=lambda m: (-m.n_free, m.id))[:n_kept]}
    for machine in sorted(machines, key=lambda m: m.id):
        age_s = now_s - machine.created_at_s
        coming_up = machine.state in (MachineState.PENDING, MachineState.ENROLLED)
        empty_s = empty_for_s(machine, now_s)
        if coming_up and age_s > pending_timeout_s:
            reason = f"did not come up in {age_s:.0f} s, allowed {pending_timeout_s:g} s"
        elif machine.state is MachineState.DRAINING and machine.n_replicas == 0:
            reason = "drained"
        elif not coming_up and empty_s >= keep_warm_s and machine.n_replicas == 0:
            if machine.id in kept:
                continue
            reason = f"no replica for {empty_s:.0f} s, kept warm for {keep_warm_s:g} s"
        else:
            continue
        commands.append(TerminateMachine(command_id("machine", machine.id, "terminate"), machine.id, reason))
    return tuple(commands)
