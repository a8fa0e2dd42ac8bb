"""Where new replicas go: on the machine where they serve soonest, else on one more machine, else nowhere.

Soonest by where the weights are (nearness.py); among equals, and where there is nothing to load, the freest machine
that answers. One machine a tick at most: it counts with its room from the next tick on. Pure.
"""

from dataclasses import dataclass, replace
from heapq import heapify, heappop, heapreplace
from typing import Final

from autoscaler.policy.comeback import Stopping
from autoscaler.policy.nearness import Near, Yards
from autoscaler.types import Loading, MachineState, MachineView, Observation, ScalerSpec

# A machine that answers beats one that proved itself, which beats one that may never come up.
RANK: Final = {MachineState.READY: 0, MachineState.ENROLLED: 1, MachineState.PENDING: 2}


@dataclass(frozen=True, slots=True)
class Placement:
    """Machine ids, one per replica; whether to buy one more; how many replicas found no room. `near`: how soon each of
    them serves there, where that was weighed. `awaits`: machines that are being stopped and will hold some of those
    without room."""

    machine_ids: tuple[str, ...]
    launch: bool
    n_unplaced: int
    near: tuple[Near, ...] = ()
    awaits: tuple[Stopping, ...] = ()


def preference(machine: MachineView) -> tuple[int, int, str]:
    """Sorts candidates where nothing is to be loaded: least is best. The id last, so that ties break alike
    everywhere."""
    return RANK[machine.state], -machine.n_free, machine.id


def place(n: int, observation: Observation, spec: ScalerSpec) -> Placement:
    """Room for `n` more replicas, one after the other, each on what the others left."""
    candidates = [m for m in observation.machines if m.state in RANK and m.n_free > 0]
    near: list[Near] = []
    if observation.loading is None:
        chosen = _freest(n, candidates)
    else:
        chosen, near = _nearest(n, candidates, observation.machines, observation.loading)
    n_unplaced = n - len(chosen)
    return Placement(
        machine_ids=tuple(chosen),
        launch=n_unplaced > 0 and observation.n_machines < spec.max_machines,
        n_unplaced=n_unplaced,
        near=tuple(near),
    )


def _freest(n: int, machines: list[MachineView]) -> list[str]:
    candidates = [(preference(m), m) for m in machines]
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
    return chosen


def _nearest(
    n: int, candidates: list[MachineView], machines: tuple[MachineView, ...], loading: Loading
) -> tuple[list[str], list[Near]]:
    """Every load that is assigned makes its links busier, so that several at once spread."""
    yards = Yards(machines, loading)
    left = {m.id: m for m in candidates}
    chosen: list[str] = []
    found: list[Near] = []
    while left and len(chosen) < n:
        _, best, machine = min(
            (
                ((near.steps, *preference(machine)), near, machine)
                for machine in left.values()
                for near in [yards.near(machine)]
            ),
            key=lambda option: option[0],
        )
        chosen.append(machine.id)
        found.append(best)
        yards.assign(best)
        if machine.n_free > 1:
            left[machine.id] = replace(machine, n_free=machine.n_free - 1)
        else:
            del left[machine.id]
    return chosen, found


def empty_for_s(machine: MachineView, now_s: float) -> float:
    """Seconds without a replica; 0 while it has one."""
    return 0.0 if machine.n_replicas or machine.empty_since_s is None else now_s - machine.empty_since_s
