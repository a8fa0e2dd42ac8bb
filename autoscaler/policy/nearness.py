"""How soon a replica would serve on each machine of an observation: what placement.py goes by. Pure.

The rule is startup.py's (queue of the links + size / bandwidth + initialisation, from the best of memory, disk, sibling
and object store), on what observe.py saw: which machines hold the weights, what is being fetched already, how fast
links were. A machine that is not up yet has its boot to wait for. Where weights have no size (the toy engine) every
machine is as near as any.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from autoscaler.policy.startup import Host, Link, Start, Tier, Yard, assigned, starts
from autoscaler.types import Loading, MachineState, MachineView, Observation

MODEL: Final = "model"
STEP_S: Final = 0.1  # differences below are none: then the freer machine is better


@dataclass(frozen=True, slots=True)
class Near:
    """The best way to start on this machine, its boot included."""

    start: Start
    seconds: float

    @property
    def steps(self) -> int:
        """To compare by."""
        return round(self.seconds / STEP_S)


class Yards:
    """The machines of one decision, with the loads that it has assigned so far."""

    def __init__(self, machines: tuple[MachineView, ...], loading: Loading) -> None:
        self._loading = loading
        self._senders = {m.id for m in machines if m.sends}
        self._yard = Yard(
            {m.id: _host(m, loading) for m in machines},
            Link(loading.store_bps, loading.store_bytes),
            {MODEL: loading.size_bytes},
        )

    def near(self, machine: MachineView) -> Near:
        """KeyError: it is none of these machines."""
        ways = starts(self._yard, MODEL, self._yard.hosts[machine.id])
        start = next(s for s in ways if s.tier is not Tier.SIBLING or s.sibling in self._senders)
        boot_s = self._loading.boot_s if machine.state is MachineState.PENDING else 0.0
        return Near(start, start.seconds + boot_s)

    def assign(self, near: Near) -> None:
        """Its links are longer busy from now on."""
        self._yard = assigned(self._yard, MODEL, near.start)


def nearness(observation: Observation) -> dict[str, Near]:
    """Of every machine, before anything is assigned; empty where weights were not weighed."""
    if observation.loading is None:
        return {}
    yards = Yards(observation.machines, observation.loading)
    return {m.id: yards.near(m) for m in observation.machines}


def _host(machine: MachineView, loading: Loading) -> Host:
    return Host(
        id=machine.id,
        n_free=machine.n_free,
        init_s=loading.init_s,
        ram=Link(loading.ram_bps),
        disk=Link(loading.disk_bps, machine.disk_bytes),
        nic=Link(loading.nic_bps, machine.nic_bytes),
        in_ram=frozenset((MODEL,) if machine.in_ram else ()),
        on_disk=frozenset((MODEL,) if machine.on_disk else ()),
    )
