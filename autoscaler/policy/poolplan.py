"""One turn of a whole pool: what to buy beside what deployments order, and what to give back. Pure.

Puts two policies of the simulator to work on one pool, unchanged: spot.py says how many machines of which offers there
should be, spares included, and when on-demand is not needed any more; disruption.py which machines others or cheaper
ones can stand in for, and how many may go at a time. A machine that is given up counts as under notice: its replicas
move before it goes. Called by autoscaler/pool.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from autoscaler.policy.disruption import (
    Budget,
    Buyable,
    DisruptionMemory,
    Held,
    Thrift,
    allowance,
    consolidate,
)
from autoscaler.policy.spot import FleetView, SpotMemory, SpotSpec, buy, effective_usd_per_h, spares

MAX_BUYS: Final = 16  # machines a turn; the next one comes in seconds


@dataclass(frozen=True, slots=True)
class PoolMachine:
    """A machine that exists and is not being given up already. is_leaving: its provider takes it away."""

    held: Held
    offering: str
    is_spot: bool


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """What one turn leaves to the next, beside what spot.py learned. n_spares: empty machines that are kept."""

    disruption: DisruptionMemory = field(default_factory=DisruptionMemory)
    n_spares: int = 0


@dataclass(frozen=True, slots=True)
class PoolInputs:
    """All that a turn is given. `view.n_wanted`: machines with work that stay. n_room: machines the pool may have more.
    `spot` False: nothing is bought that can be taken back.
    """

    view: FleetView
    machines: tuple[PoolMachine, ...]
    offers: tuple[Buyable, ...]
    spec: SpotSpec
    learned: SpotMemory
    budget: Budget
    thrift: Thrift
    memory: PoolMemory
    n_room: int
    spot: bool = True


@dataclass(frozen=True, slots=True)
class Buy:
    """One machine of this offer; it stands in for the machine `replaces` ('' = for none: a spare)."""

    offer: str
    replaces: str = ""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Move everything off this machine, then give it back."""

    machine_id: str
    why: str


@dataclass(frozen=True, slots=True)
class PoolOrders:
    """buy, give_up; cancel: machines that have not come up and that nobody waits for."""

    buy: tuple[Buy, ...] = ()
    give_up: tuple[GiveUp, ...] = ()
    cancel: tuple[GiveUp, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def is_quiet(self) -> bool:
        return not (self.buy or self.give_up or self.cancel)


def plan_pool(inputs: PoolInputs) -> tuple[PoolOrders, SpotMemory, PoolMemory]:
    """Orders for now, and what to remember. Ties by id."""
    wanted, learned = buy(inputs.view, inputs.spec, inputs.learned)
    staying = [m for m in sorted(inputs.machines, key=lambda m: m.held.id) if not m.held.is_leaving]
    buys = _spot_buys(inputs, wanted.launch, staying) if inputs.spot else []

    busy = [m.held for m in staying if m.held.n_replicas or m.held.replaces]
    leaving = [m.held for m in inputs.machines if m.held.is_leaving]
    # What spot.py orders in this turn stands in for on-demand already: one replacement is enough.
    covered = {b.replaces for b in buys if b.replaces}
    told, disruption = consolidate(
        [replace(h, is_ready=False) if h.id in covered else h for h in busy] + leaving,
        () if buys else inputs.offers,
        inputs.view.now_s,
        inputs.budget,
        inputs.thrift,
        inputs.memory.disruption,
    )
    reasons = [*told.reasons]
    buys += [Buy(offer, machine) for offer, machine in told.launch]
    give_up = {each: _why(each, told.reasons) for each in told.give_up}
    if wanted.release_on_demand:
        released = _on_demand_to_release(inputs, staying, wanted.release_on_demand, disruption, set(give_up))
        give_up |= released
        now = (inputs.view.now_s,) * len(released)
        disruption = DisruptionMemory((*disruption.given_up_at_s, *now))
        reasons += [f"{machine}: {why}" for machine, why in released.items()]
    for name, n in wanted.release:
        why = f"{name} holds more than is wanted and spare"
        give_up |= dict.fromkeys(_empty_of(staying, name, n, set(give_up)), why)
    cancel = _to_cancel(staying, wanted.cancel, wanted.cancel_on_demand)
    buys = buys[: max(min(inputs.n_room, MAX_BUYS), 0)]
    if buys:
        reasons.insert(0, "; ".join(wanted.reasons))
    orders = PoolOrders(
        tuple(buys),
        tuple(GiveUp(machine, why) for machine, why in sorted(give_up.items())),
        tuple(GiveUp(machine, "what is ready suffices") for machine in cancel),
        tuple(reasons),
    )
    return orders, learned, PoolMemory(disruption, _n_spares(inputs))


def _spot_buys(
    inputs: PoolInputs, launch: Iterable[tuple[str, int]], staying: list[PoolMachine]
) -> list[Buy]:
    """Spot machines that are missing; the first ones stand in for on-demand machines that have work."""
    stood_in_for = {m.held.replaces for m in inputs.machines if m.held.replaces}
    dear = [
        m.held.id for m in staying if not m.is_spot and m.held.n_replicas and m.held.id not in stood_in_for
    ]
    buys = []
    for name, n in launch:
        for _ in range(n):
            buys.append(Buy(name, dear.pop(0) if dear else ""))
    return buys


def _on_demand_to_release(
    inputs: PoolInputs, staying: list[PoolMachine], n: int, memory: DisruptionMemory, gone: set[str]
) -> dict[str, str]:
    """Ready on-demand machines whose replicas fit on spot machines that are ready, as far as the budget allows."""
    left = allowance(
        [replace(m.held, is_leaving=m.held.is_leaving or m.held.id in gone) for m in inputs.machines],
        memory.given_up_at_s,
        inputs.budget,
    )
    n_free = sum(
        m.held.n_places - m.held.n_replicas
        for m in staying
        if m.is_spot and m.held.is_ready and m.held.id not in gone
    )
    ready = [m.held for m in staying if not m.is_spot and m.held.is_ready and m.held.id not in gone]
    found: dict[str, str] = {}
    for held in sorted(ready, key=lambda h: (h.n_replicas, -h.usd_per_h, h.id)):
        if len(found) >= min(n, left) or held.n_replicas > n_free:
            break
        n_free -= held.n_replicas
        found[held.id] = "spot serves again: on-demand is not needed any more"
    return found


def _empty_of(staying: list[PoolMachine], name: str, n: int, gone: set[str]) -> list[str]:
    """Machines of an offer without a replica: the busy ones are disruption.py's business."""
    empty = [m for m in staying if m.offering == name and m.held.is_ready and not m.held.n_replicas]
    return [m.held.id for m in empty if m.held.id not in gone][:n]


def _to_cancel(staying: list[PoolMachine], cancel: Iterable[tuple[str, int]], n_on_demand: int) -> list[str]:
    coming = [m for m in staying if not m.held.is_ready and not m.held.n_replicas]
    found = [m.held.id for m in coming if not m.is_spot][:n_on_demand]
    for name, n in cancel:
        found += [m.held.id for m in coming if m.offering == name][:n]
    return found


def _n_spares(inputs: PoolInputs) -> int:
    """As many as spot.py holds right for what it sees now."""
    if not inputs.spot or not inputs.view.n_wanted:
        return 0
    view, spec = inputs.view, inputs.spec
    held = {o.name: o.n_pending + o.n_ready - o.n_leaving for o in view.offers}
    prices = [
        o.usd_per_h
        for o in view.offers
        if effective_usd_per_h(o, view, spec, inputs.learned) < view.on_demand_usd_per_h
    ]
    if not prices:
        return 0
    saved = view.on_demand_usd_per_h / max(min(prices), 1e-9) - 1
    return min(spares(held, spec, inputs.learned), int(view.n_wanted * saved))


def _why(machine: str, reasons: Iterable[str]) -> str:
    said = next((r for r in reasons if r.startswith(f"{machine}: ")), "")
    return said.removeprefix(f"{machine}: ")
