"""Where new replicas go: on machines we already pay for, else on one more machine, else nowhere.

One machine a tick at most: it counts with its room from the next tick on. Pure.
"""

from dataclasses import dataclass

from autoscaler.types import MachineState, MachineView, Observation, ScalerSpec

# A machine that answers beats one that proved itself, which beats one that may never come up.
_RANK = {MachineState.READY: 0, MachineState.ENROLLED: 1, MachineState.PENDING: 2}


@dataclass(frozen=True, slots=True)
class Placement:
    """Machine ids, one per replica; whether to buy one more; how many replicas found no room."""

    machine_ids: tuple[str, ...]
    launch: bool
    n_unplaced: int


def place(n: int, observation: Observation, spec: ScalerSpec) -> Placement:
    """Room for `n` more replicas: the freest ready machine first, ties by id."""
    free = {m.id: m.n_free for m in observation.machines if m.state in _RANK}
    machines = {m.id: m for m in observation.machines}
    chosen: list[str] = []
    while len(chosen) < n:
        open_ids = [mid for mid, n_free in free.items() if n_free > 0]
        if not open_ids:
            break
        best = min(open_ids, key=lambda mid: (_RANK[machines[mid].state], -free[mid], mid))
        free[best] -= 1
        chosen.append(best)
    n_unplaced = n - len(chosen)
    return Placement(
        machine_ids=tuple(chosen),
        launch=n_unplaced > 0 and observation.n_machines < spec.max_machines,
        n_unplaced=n_unplaced,
    )


def empty_for_s(machine: MachineView, now_s: float) -> float:
    """Seconds without a replica; 0 while it has one."""
    return 0.0 if machine.n_replicas or machine.empty_since_s is None else now_s - machine.empty_since_s
