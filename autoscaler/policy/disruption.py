"""Which machines to give up or to replace because it saves money, and how many at a time.

Two ways, after Karpenter's consolidation: a machine whose replicas fit on the others is emptied; one that a cheaper
machine could stand in for is replaced, the replacement bought first and the old one given up once it is ready. What is
given up counts as under notice: decide() starts successors before anything drains (retire.py). Never more at once, nor
in a window, than the budget allows; never where moving (starts paid twice, caches lost) eats the saving. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Budget:
    """At most this share of machines leaving at once (rounded up, as Karpenter does), this many, this many a window."""

    max_share: float = 0.1
    max_at_once: int = 10
    max_per_window: int = 10
    window_s: float = 3600.0

    def __post_init__(self) -> None:
        if not 0 <= self.max_share <= 1:
            raise ValueError(f"max_share = {self.max_share}: set it between 0 and 1")
        if self.max_at_once < 0 or self.max_per_window < 0 or self.window_s <= 0:
            raise ValueError("max_at_once, max_per_window: from 0; window_s: more than 0")


@dataclass(frozen=True, slots=True)
class Thrift:
    """When a saving is worth it. horizon_h: how long the load is expected to stay as it is."""

    horizon_h: float = 1.0
    min_saving: float = 0.1  # share of the machine's price, so that prices that wobble move nothing
    margin: float = 1.5  # the saving must be this many times the cost of moving


@dataclass(frozen=True, slots=True)
class Held:
    """A machine we pay for. fits: a name for what its replicas need; they only move between machines that agree on it.

    move_usd: moving all it runs: starts paid twice and caches read again. replaces: the machine it was bought for.
    """

    id: str
    usd_per_h: float
    n_replicas: int
    n_places: int
    fits: str = ""
    is_ready: bool = True
    is_leaving: bool = False
    move_usd: float = 0.0
    replaces: str = ""


@dataclass(frozen=True, slots=True)
class Buyable:
    """An offer that gives machines now: `n_places` each."""

    name: str
    usd_per_h: float
    n_places: int
    fits: str = ""
    n_most: int = 1


@dataclass(frozen=True, slots=True)
class Orders:
    """launch: (offer, machine it will stand in for). give_up: machines that are to leave now."""

    launch: tuple[tuple[str, str], ...] = ()
    give_up: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DisruptionMemory:
    """Instants at which machines were given up, within the window."""

    given_up_at_s: tuple[float, ...] = ()


def consolidate(
    machines: Iterable[Held],
    offers: Sequence[Buyable],
    now_s: float,
    budget: Budget,
    thrift: Thrift,
    memory: DisruptionMemory,
) -> tuple[Orders, DisruptionMemory]:
    """What to do now, the least disturbing first; ties by id."""
    held = sorted(machines, key=lambda m: m.id)
    recent = tuple(at for at in memory.given_up_at_s if now_s - at < budget.window_s)
    bought_for = {m.replaces: m for m in held if m.replaces}
    left = allowance(held, recent, budget)
    free = {m.id: m.n_places - m.n_replicas for m in held if m.is_ready and not m.is_leaving}
    most = {o.name: o.n_most for o in offers}
    give_up: list[str] = []
    launch: list[tuple[str, str]] = []
    reasons: list[str] = []
    is_receiving: set[str] = set()
    # Replacements that are on their way will need the budget; those that are ready go before anything new.
    waiting = [m for m in held if m.id in bought_for and not m.is_leaving]
    waiting.sort(key=lambda m: (not bought_for[m.id].is_ready, m.id))
    for machine in waiting:
        is_receiving.add(bought_for[machine.id].id)
        if left > 0 and bought_for[machine.id].is_ready:
            give_up.append(machine.id)
            reasons.append(f"{machine.id}: its replacement {bought_for[machine.id].id} is ready")
        left -= 1
        free.pop(machine.id, None)
        free.pop(bought_for[machine.id].id, None)
    candidates = [m for m in held if m.is_ready and not m.is_leaving and m.id in free]
    for machine in sorted(candidates, key=lambda m: (m.move_usd, m.n_replicas, -m.usd_per_h, m.id)):
        if left <= 0:
            break
        if machine.id in is_receiving or machine.id not in free:
            continue
        if machine.replaces and not machine.n_replicas:
            continue  # what it stands in for is still on its way to it
        others = [m for m in candidates if m.id != machine.id and m.id in free and m.fits == machine.fits]
        if sum(free[m.id] for m in others) >= machine.n_replicas and _pays(
            machine, machine.usd_per_h, thrift
        ):
            del free[machine.id]
            n_left = machine.n_replicas
            for other in sorted(
                others, key=lambda m: (free[m.id], m.id)
            ):  # fullest first: keeps the empty ones empty
                taken = min(free[other.id], n_left)
                free[other.id] -= taken
                n_left -= taken
                if taken:
                    is_receiving.add(other.id)
            give_up.append(machine.id)
            reasons.append(
                f"{machine.id}: its {machine.n_replicas} replicas fit elsewhere, saves {machine.usd_per_h:.2f} USD/h"
            )
            left -= 1
            continue
        offer = _cheaper(machine, offers, most, thrift)
        if offer is not None:
            most[offer.name] -= 1
            del free[machine.id]
            launch.append((offer.name, machine.id))
            saving = machine.usd_per_h - offer.usd_per_h
            reasons.append(f"{machine.id}: {offer.name} stands in for it, saves {saving:.2f} USD/h")
            left -= 1
    memory = DisruptionMemory((*recent, *(now_s for _ in give_up)))
    return Orders(tuple(launch), tuple(give_up), tuple(reasons)), memory


def allowance(held: Sequence[Held], recent: Sequence[float], budget: Budget) -> int:
    """How many machines more may be given up now; machines bought as replacements do not make the fleet larger."""
    n_fleet = sum(1 for m in held if not m.replaces or all(o.id != m.replaces for o in held))
    n_leaving = sum(1 for m in held if m.is_leaving)
    at_once = min(math.ceil(n_fleet * budget.max_share - 1e-9), budget.max_at_once)
    return max(min(at_once - n_leaving, budget.max_per_window - len(recent)), 0)


def _pays(machine: Held, saving_usd_per_h: float, thrift: Thrift) -> bool:
    is_enough = saving_usd_per_h > machine.usd_per_h * thrift.min_saving
    return is_enough and saving_usd_per_h * thrift.horizon_h > machine.move_usd * thrift.margin


def _cheaper(
    machine: Held, offers: Sequence[Buyable], most: dict[str, int], thrift: Thrift
) -> Buyable | None:
    able = [
        o for o in offers if o.fits == machine.fits and o.n_places >= machine.n_replicas and most[o.name] > 0
    ]
    best = min(able, key=lambda o: (o.usd_per_h, o.name), default=None)
    if best is None or not _pays(machine, machine.usd_per_h - best.usd_per_h, thrift):
        return None
    return best
