"""Where new replicas go: on machines we already pay for, else on one more machine, else nowhere.

One machine a tick at most: it counts with its room from the next tick on. Pure.
"""

from dataclasses import dataclass, replace
from heapq import heapify, heappop, heapreplace
from typing import Final

from autoscaler.types import MachineState, MachineView, Observation, ScalerSpec

# A machine that answers beats one that proved itself, which beats one that may never come up.
RANK: Final = {MachineState.READY: 0, MachineState.ENROLLED: 1, MachineState.PENDING: 2}


@dataclass(frozen=True, slots=True)
class Placement:
    """Machine ids, one per replica; whether to buy one more; how many replicas found no room."""

    machine_ids: tuple[str, ...]
    launch: bool
    n_unplaced: int


def preference(machine: MachineView) -> tuple[int, int, str]:
    """Sorts candidates: least is best. The id last, so that ties break alike everywhere."""
    return RANK[machine.state], -machine.n_free, machine.id


def place(n: int, observation: Observation, spec: ScalerSpec) -> Placement:
    """Room for `n` more replicas: the freest ready machine first, ties by id."""
    candidates = [(preference(m), m) for m in observation.machines if m.state in RANK and m.n_free > 0]
    heapify(candidates)
    chosen: list[str] = []
    while candidates and len(chosen) < n:
        _, machine = candidates[0]
        chosen.append(machine.id)
        if machine.n_free > 1:
            machine = replace(machine, n_free=machine.n_free - 1)
            heapreplace(candidates, (preference(machine), machine))
        else:
            heappop(candidates)
    n_unplaced = n - len(chosen)
    return Placement(
        machine_ids=tuple(chosen),
        launch=n_unplaced > 0 and observation.n_machines < spec.max_machines,
        n_unplaced=n_unplaced,
    )


def empty_for_s(machine: MachineView, now_s: float) -> float:
    """Seconds without a replica; 0 while it has one."""
    return 0.0 if machine.n_replicas or machine.empty_since_s is None else now_s - machine.empty_since_s
