"""On which machine a replica starts soonest: weights in memory, on its disk, at a sibling, in the object store.

start = what the link still has to carry + size / bandwidth + initialisation, for the best source of each machine
(ServerlessLLM's startup-time-optimised scheduling, OSDI 24, with a sibling and an object store added). Loads that are
assigned lengthen the queues of the links they use, so several at once spread. A full machine may give up one replica
where that is quicker all in all: the victim's requests resume elsewhere. Called by placement and the simulator. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

WEIGHT: Final = 0.3  # of the newest measured bandwidth


class Tier(StrEnum):
    """Where the weights come from, nearest first."""

    RAM = "ram"
    DISK = "disk"
    SIBLING = "sibling"
    STORE = "store"


@dataclass(frozen=True, slots=True)
class Link:
    """One link: bytes a second (measured, see `measured`), and bytes that are still to be carried."""

    bytes_per_s: float
    queued_bytes: float = 0.0

    def __post_init__(self) -> None:
        if self.bytes_per_s <= 0 or self.queued_bytes < 0:
            raise ValueError("a link carries more than 0 bytes a second, and has 0 or more to carry")

    @property
    def wait_s(self) -> float:
        return self.queued_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Running:
    """A replica that could move: its model, and the tokens a resume would have to read again."""

    replica_id: str
    model: str
    n_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Host:
    """A machine and what it holds. `init_s`: the engine's start without the weights."""

    id: str
    n_free: int
    init_s: float
    ram: Link  # memory to GPU
    disk: Link
    nic: Link
    in_ram: frozenset[str] = frozenset()
    on_disk: frozenset[str] = frozenset()
    running: tuple[Running, ...] = ()


@dataclass(frozen=True, slots=True)
class Start:
    """`seconds` until ready on `host`, from `tier` (a sibling: of that machine)."""

    host: str
    tier: Tier
    seconds: float
    sibling: str = ""
    move: str = ""  # replica that has to go first
    move_to: str = ""


@dataclass(frozen=True, slots=True)
class Yard:
    """All machines, the object store's link (shared), sizes of models in bytes."""

    hosts: Mapping[str, Host]
    store: Link
    sizes: Mapping[str, int]
    reread_s_per_token: float = field(default=1e-4)  # prefill of what a moved request had already said


def starts(yard: Yard, model: str, host: Host) -> tuple[Start, ...]:
    """Every way to start the model on this machine, quickest first; room is not asked for. KeyError: unknown model."""
    size = yard.sizes[model]
    found = []
    to_gpu_s = size / host.ram.bytes_per_s + host.ram.wait_s
    if model in host.in_ram:
        found.append(Start(host.id, Tier.RAM, to_gpu_s + host.init_s))
    if model in host.on_disk:
        found.append(Start(host.id, Tier.DISK, _carry(size, host.disk) + host.init_s))
    for other in sorted(yard.hosts):
        holder = yard.hosts[other]
        if other != host.id and (model in holder.in_ram or model in holder.on_disk):
            links = [host.nic, holder.nic] + ([] if model in holder.in_ram else [holder.disk])
            found.append(Start(host.id, Tier.SIBLING, _carry(size, *links) + host.init_s, sibling=other))
    found.append(Start(host.id, Tier.STORE, _carry(size, host.nic, yard.store) + host.init_s))
    order = list(Tier)
    return tuple(sorted(found, key=lambda s: (s.seconds, order.index(s.tier), s.sibling)))


def place(yard: Yard, model: str) -> Start | None:
    """The machine with the soonest start, moving one replica away where that is sooner; None when nothing has room."""
    options = [starts(yard, model, h)[0] for h in yard.hosts.values() if h.n_free > 0]
    options += [
        s for h in yard.hosts.values() if h.n_free == 0 for s in [_by_moving(yard, model, h)] if s is not None
    ]
    return min(options, key=lambda s: (s.seconds, bool(s.move), s.host), default=None)


def assigned(yard: Yard, model: str, start: Start) -> Yard:
    """The yard once this load is under way: its links are longer busy, its machine has one place less.

    The weights count as held there only when the machine says so: nobody loads from one that is still loading.
    """
    size = yard.sizes[model]
    hosts = dict(yard.hosts)
    host = hosts[start.host]
    if start.move:
        victim = next(r for r in host.running if r.replica_id == start.move)
        host = replace(
            host, running=tuple(r for r in host.running if r is not victim), n_free=host.n_free + 1
        )
        hosts[start.host] = host
        yard = replace(yard, hosts=hosts)
        target = starts(yard, victim.model, yard.hosts[start.move_to])[0]
        yard = assigned(yard, victim.model, target)
        hosts, host = dict(yard.hosts), yard.hosts[start.host]
    host = replace(host, n_free=host.n_free - 1)
    match start.tier:
        case Tier.RAM:
            host = replace(host, ram=_longer(host.ram, size))
        case Tier.DISK:
            host = replace(host, disk=_longer(host.disk, size))
        case Tier.SIBLING:
            host = replace(host, nic=_longer(host.nic, size))
            holder = hosts[start.sibling]
            holder = replace(holder, nic=_longer(holder.nic, size))
            if model not in holder.in_ram:
                holder = replace(holder, disk=_longer(holder.disk, size))
            hosts[start.sibling] = holder
        case Tier.STORE:
            host = replace(host, nic=_longer(host.nic, size))
            yard = replace(yard, store=_longer(yard.store, size))
    hosts[start.host] = host
    return replace(yard, hosts=hosts)


def place_all(yard: Yard, models: Iterable[str]) -> tuple[tuple[Start | None, ...], Yard]:
    """One after the other, each on what the others left; in the order given."""
    placed: list[Start | None] = []
    for model in models:
        start = place(yard, model)
        placed.append(start)
        if start is not None:
            yard = assigned(yard, model, start)
    return tuple(placed), yard


def measured(link: Link, n_bytes: float, seconds: float) -> Link:
    """With the bandwidth of a load that has ended, as an exponential average."""
    if seconds <= 0 or n_bytes <= 0:
        return link
    bytes_per_s = (1 - WEIGHT) * link.bytes_per_s + WEIGHT * n_bytes / seconds
    return replace(link, bytes_per_s=bytes_per_s)


def _by_moving(yard: Yard, model: str, host: Host) -> Start | None:
    """Start here after one replica has started elsewhere and its requests have been read again there."""
    own = starts(yard, model, host)[0]
    best: Start | None = None
    for victim in sorted(host.running, key=lambda r: r.replica_id):
        for other in sorted(yard.hosts):
            if other == host.id or yard.hosts[other].n_free == 0:
                continue
            there = starts(yard, victim.model, yard.hosts[other])[0]
            seconds = there.seconds + victim.n_tokens * yard.reread_s_per_token + own.seconds
            if best is None or seconds < best.seconds:
                best = replace(own, seconds=seconds, move=victim.replica_id, move_to=other)
    return best


def _carry(size: float, *links: Link) -> float:
    """Seconds over several links in a row that stream into each other: the slowest, after the longest queue."""
    return max(link.wait_s for link in links) + size / min(link.bytes_per_s for link in links)


def _longer(link: Link, size: float) -> Link:
    return replace(link, queued_bytes=link.queued_bytes + size)
