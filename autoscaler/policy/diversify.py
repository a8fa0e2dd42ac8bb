"""How many machines of which type, zone and market: the greedy plan, and what every plan must satisfy.

Needs (a deployment, or all that share their types) want so many units ready with a given probability while spot offers
may be taken back. Plans are made within the offers' limits at least cost. The mixed-integer programme that this falls
back from is autoscaler/purchase.py; tests hold the greedy to a stated ratio of it. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from autoscaler.policy.tail import Event, Offer, Tail

MAX_CAPS: Final = 24  # caps on what one zone holds, tried for each number of zones that may fail
MAX_FAILING: Final = 3
MAX_IMPROVED: Final = 12  # the cheapest of those that hold are improved
MAX_SMALL: Final = 200  # machines up to which single ones are added to let others go
MAX_SWEEPS: Final = 4  # of the two best of them; one of the others


@dataclass(frozen=True, slots=True)
class Need:
    """`n_units` (replicas) should be ready with probability `availability` at any instant.

    units: replicas that one machine of an offer holds; offers that are not named do not fit. current: machines held
    now, which the plan prefers to keep among equals.
    """

    name: str
    n_units: int
    units: Mapping[str, int]
    availability: float = 0.999

    def __post_init__(self) -> None:
        if not 0 < self.availability < 1:
            raise ValueError(f"need {self.name}: availability = {self.availability}: set it between 0 and 1")
        if self.n_units < 0 or any(n < 1 for n in self.units.values()):
            raise ValueError(f"need {self.name}: n_units from 0, units of a machine from 1")


class Solver(StrEnum):
    """Who found the plan, and whether it is known to be the cheapest."""

    OPTIMAL = "optimal"
    LIMIT = "limit"  # the time limit came first: the best found until then
    GREEDY = "greedy"


@dataclass(frozen=True, slots=True)
class Plan:
    """Machines by need and offer. shortage: probability by need, exact. unmet: needs that could not be satisfied.

    bound_usd_per_h: no plan costs less, as far as the solver has shown (0: nothing shown).
    """

    machines: Mapping[str, Mapping[str, int]]
    usd_per_h: float
    shortage: Mapping[str, float]
    unmet: tuple[str, ...] = ()
    solver: Solver = Solver.GREEDY
    bound_usd_per_h: float = 0.0
    reasons: tuple[str, ...] = field(default=())


def greedy(needs: Iterable[Need], offers: Iterable[Offer], events: Iterable[Event]) -> Plan:
    """A plan for each need in turn, largest first, out of what the others left of the offers."""
    by_name = {o.name: o for o in offers}
    found = tuple(events)
    left = {name: o.n_most for name, o in by_name.items()}
    machines: dict[str, dict[str, int]] = {}
    for need in sorted(needs, key=lambda n: (-n.n_units, n.name)):
        chosen = _for_one(need, by_name, left, found)
        for name, n in chosen.items():
            left[name] -= n
        machines[need.name] = chosen
    return describe(machines, needs, by_name.values(), found)


def describe(
    machines: Mapping[str, Mapping[str, int]],
    needs: Iterable[Need],
    offers: Iterable[Offer],
    events: Iterable[Event],
    solver: Solver = Solver.GREEDY,
    bound_usd_per_h: float = 0.0,
    reasons: tuple[str, ...] = (),
) -> Plan:
    """The plan with its price, its exact shortage, and one sentence per need."""
    by_name = {o.name: o for o in offers}
    tail = Tail(events)
    short: dict[str, float] = {}
    unmet: list[str] = []
    words: list[str] = list(reasons)
    for need in sorted(needs, key=lambda n: n.name):
        held = {name: n for name, n in sorted(machines.get(need.name, {}).items()) if n}
        short[need.name] = tail.shortage(_units(held, need), need.n_units)
        is_met = short[need.name] <= 1 - need.availability + 1e-12
        if not is_met:
            unmet.append(need.name)
        text = ", ".join(f"{n} {name}" for name, n in held.items()) or "nothing"
        words.append(
            f"{need.name}: {text} for {need.n_units}; short with probability {short[need.name]:.2g}, "
            f"{'allowed' if is_met else 'more than the allowed'} {1 - need.availability:.2g}"
        )
    kept = {name: {o: n for o, n in sorted(held.items()) if n} for name, held in sorted(machines.items())}
    usd = sum(n * by_name[o].usd_per_h for held in kept.values() for o, n in held.items())
    return Plan(kept, usd, short, tuple(unmet), solver, bound_usd_per_h, tuple(words))


def _for_one(
    need: Need, offers: Mapping[str, Offer], left: Mapping[str, int], events: tuple[Event, ...]
) -> dict[str, int]:
    """Cheapest of many simple plans: so much per zone at most, so many zones may fail; then single steps."""
    usable = sorted(
        (offers[name] for name in need.units if name in offers and left[name] > 0),
        key=lambda o: (o.usd_per_h / need.units[o.name], o.name),
    )
    allowed = 1 - need.availability
    mine = {o.name for o in usable}
    tail = Tail(Event(e.probability, e.offers & mine) for e in events)
    most: dict[str, int] = {}
    zones = {o.zone for o in usable if o.losses_per_h > 0}
    candidates = [_fill(need, [o for o in usable if o.losses_per_h == 0], left, 0, need.n_units)]
    for n_failing in range(min(MAX_FAILING, len(zones)) + 1):
        for cap in _caps(need.n_units) if n_failing else [need.n_units]:
            candidates.append(_fill(need, usable, left, cap, need.n_units + n_failing * cap))
    tried: list[dict[str, int]] = []
    for held in sorted(candidates, key=lambda h: (_usd(h, offers), sorted(h.items()))):
        if _n(held, need) > _n(most, need):
            most = held
        if held in tried or tail.shortage(_units(held, need), need.n_units) > allowed:
            continue
        tried.append(held)
        if len(tried) == MAX_IMPROVED:
            break
    once = [_improve(held, need, usable, left, offers, tail, 1) for held in tried]
    once.sort(key=lambda h: (_usd(h, offers), sorted(h.items())))
    best = [_improve(held, need, usable, left, offers, tail, MAX_SWEEPS) for held in once[:2]]
    return min(best, key=lambda h: (_usd(h, offers), sorted(h.items())), default=most)


def _caps(n_units: int) -> list[int]:
    """Units per zone from 1 to all, geometrically where there are many."""
    if n_units <= MAX_CAPS:
        return list(range(1, n_units + 1))
    return sorted({max(round(n_units ** (i / (MAX_CAPS - 1))), 1) for i in range(MAX_CAPS)})


def _fill(
    need: Need, usable: Sequence[Offer], left: Mapping[str, int], cap: int, n_goal: int
) -> dict[str, int]:
    """Cheapest units first, at most `cap` that can be lost with one zone, until there are `n_goal`."""
    held: dict[str, int] = {}
    in_zone: dict[str, int] = {}
    n = 0
    for offer in usable:
        each = need.units[offer.name]
        room = n_goal - n
        if offer.losses_per_h > 0:
            room = min(room, cap - in_zone.get(offer.zone, 0))
        # The last machine may hold more than what is missing.
        count = min(-(-room // each) if offer.losses_per_h == 0 else max(room // each, 0), left[offer.name])
        if count > 0:
            held[offer.name] = count
            n += count * each
            if offer.losses_per_h > 0:
                in_zone[offer.zone] = in_zone.get(offer.zone, 0) + count * each
        if n >= n_goal:
            break
    return held


def _improve(
    held: dict[str, int],
    need: Need,
    usable: Sequence[Offer],
    left: Mapping[str, int],
    offers: Mapping[str, Offer],
    tail: Tail,
    n_sweeps: int,
) -> dict[str, int]:
    """Give up machines, dearest first; move some to cheaper offers; add one where that lets others go."""
    allowed = 1 - need.availability

    def holds(plan: Mapping[str, int]) -> bool:
        units = _units(plan, need)
        return sum(units.values()) >= need.n_units and tail.shortage(units, need.n_units) <= allowed

    def room(plan: Mapping[str, int], name: str) -> int:
        return left[name] - plan.get(name, 0)

    for _ in range(n_sweeps):
        before = _usd(held, offers)
        held = _dropped(held, offers, holds)
        for name in _dearest_first(held, offers):
            for other in usable:
                each, instead = need.units[name], need.units[other.name]
                n_new, n_old = max(-(-each // instead), 1), max(instead // each, 1)
                is_cheaper = n_new * other.usd_per_h < n_old * offers[name].usd_per_h - 1e-12
                if name in held and other.name != name and is_cheaper:
                    swap = {name: -n_old, other.name: n_new}
                    most = min(held[name] // n_old, room(held, other.name) // n_new)
                    held = _moved(held, swap, _largest(held, swap, most, holds))
        is_small = sum(held.values()) <= MAX_SMALL
        for other in usable if is_small and n_sweeps > 1 else ():
            if room(held, other.name) > 0:
                fewer = _dropped(_moved(held, {other.name: 1}), offers, holds)
                if _usd(fewer, offers) < _usd(held, offers) - 1e-12:
                    held = fewer
        if _usd(held, offers) >= before - 1e-12:
            break
    return held


def _dropped(
    held: dict[str, int], offers: Mapping[str, Offer], holds: Callable[[Mapping[str, int]], bool]
) -> dict[str, int]:
    for name in _dearest_first(held, offers):
        held = _moved(held, {name: -1}, _largest(held, {name: -1}, held[name], holds))
    return held


def _dearest_first(held: Mapping[str, int], offers: Mapping[str, Offer]) -> list[str]:
    return sorted(held, key=lambda name: (-offers[name].usd_per_h, name))


def _largest(
    held: Mapping[str, int],
    change: Mapping[str, int],
    most: int,
    holds: Callable[[Mapping[str, int]], bool],
) -> int:
    """How often the change may be made: as often as possible, half as often, and so on."""
    n = most
    while n > 0:
        if holds(_moved(held, change, n)):
            return n
        n //= 2
    return 0


def _moved(held: Mapping[str, int], change: Mapping[str, int], times: int = 1) -> dict[str, int]:
    found = dict(held)
    for name, n in change.items():
        found[name] = found.get(name, 0) + n * times
    return {name: n for name, n in found.items() if n > 0}


def _units(held: Mapping[str, int], need: Need) -> dict[str, int]:
    return {name: n * need.units[name] for name, n in held.items()}


def _n(held: Mapping[str, int], need: Need) -> int:
    return sum(_units(held, need).values())


def _usd(held: Mapping[str, int], offers: Mapping[str, Offer]) -> float:
    return sum(n * offers[name].usd_per_h for name, n in held.items())
