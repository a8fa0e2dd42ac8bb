"""The machines of a cell through one pass over its deployments: which of them matter to one, and what room is left.

An observation that named every machine of the cell would make a pass quadratic and a stored decision as large as
the fleet. It names those that the deployment's replicas live on and the first candidates for new ones; place()
cannot tell the difference, which a test holds. Used by observe.py for one deployment and by fleet.py for all. Pure.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from autoscaler.policy.nearness import Yards
from autoscaler.policy.placement import RANK, preference
from autoscaler.types import (
    Command,
    LaunchMachine,
    Loading,
    MachineView,
    ReplicaView,
    StartMachine,
    StartReplica,
)

MAX_SENDERS: Final = 3  # as many as siblings.py names


class Pool:
    """Machines by preference. Room that one deployment took in this pass is not offered to the next.

    n_machines: how many count against the limit; those under notice and those of the reserve do not.
    """

    def __init__(self, machines: Iterable[MachineView]) -> None:
        self._machines = {m.id: m for m in machines}
        self.n_machines = sum(1 for m in self._machines.values() if m.ends_at_s is None and not m.in_reserve)
        # Candidates by the part of place()'s preference that comes before the id: a few groups, each sorted.
        self._open: dict[tuple[float, ...], list[str]] = {}
        for mid in sorted(self._machines):
            machine = self._machines[mid]
            if _takes_more(machine):
                self._open.setdefault(preference(machine)[:-1], []).append(mid)

    def view(
        self, replicas: tuple[ReplicaView, ...], n_new: int, loading: Loading | None = None
    ) -> tuple[MachineView, ...]:
        """Machines of `replicas`, and enough candidates for `n_new` more: place() uses one machine each at most. Where
        weights are to be loaded, those where that is soonest, and a few that could send them.
        """
        found = {r.machine_id for r in replicas}
        n_left = n_new
        if loading is not None:
            found.update(self._nearest(n_new, loading))
            n_left = 0
        for group in sorted(self._open) if n_left > 0 else ():
            ids = self._open[group][: max(n_left, 0)]
            n_left -= len(ids)
            found.update(ids)
            if n_left <= 0:
                break
        return tuple(self._machines[mid] for mid in sorted(found) if mid in self._machines)

    def _nearest(self, n_new: int, loading: Loading) -> set[str]:
        machines = tuple(self._machines.values())
        holders = sorted((not m.in_ram, m.id) for m in machines if m.sends and (m.in_ram or m.on_disk))
        yards = Yards(machines, loading)
        ranked = sorted((yards.near(m).steps, *preference(m)) for m in machines if _takes_more(m))
        # Loads make links busy, and another machine the nearer one: some more than are needed.
        chosen = {mid for *_, mid in ranked[: 2 * n_new + MAX_SENDERS]}
        return chosen | {mid for _, mid in holders[:MAX_SENDERS]}

    def book(self, commands: Iterable[Command]) -> None:
        """Take note of what was ordered, so that the next deployment sees the room that is left."""
        for command in commands:
            if isinstance(command, LaunchMachine | StartMachine):
                self.n_machines += 1
            elif isinstance(command, StartReplica):
                self._take(command.machine_id)

    def _take(self, machine_id: str) -> None:
        machine = self._machines[machine_id]
        group = self._open[preference(machine)[:-1]]
        group.pop(bisect_left(group, machine_id))
        if not group:
            del self._open[preference(machine)[:-1]]
        machine = replace(
            machine, n_free=machine.n_free - 1, n_replicas=machine.n_replicas + 1, empty_since_s=None
        )
        self._machines[machine_id] = machine
        if _takes_more(machine):
            insort(self._open.setdefault(preference(machine)[:-1], []), machine_id)


def _takes_more(machine: MachineView) -> bool:
    return machine.state in RANK and machine.n_free > 0
