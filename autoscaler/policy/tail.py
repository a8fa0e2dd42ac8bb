"""How likely a set of machines falls short when spot offers are taken back together: exact, and as scenarios.

The market is a list of independent events, each of which takes all machines of some offers at once: one per spot
offer, and one per zone, since offers of a zone go together more often than chance would have it (SkyPilot's traces;
"Can't Be Late", NSDI 24). What counts is the gap between a loss and its replacement being ready. Used by diversify.py,
by the solver beside it (autoscaler/purchase.py) and by whoever wants to know what a plan is worth. Pure.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Final

# Outcomes less likely count as shortage, so that many offers stay cheap to reckon with.
NEGLIGIBLE: Final = 1e-10

MAX_KNOWN: Final = 5000  # losses of a group remembered


@dataclass(frozen=True, slots=True)
class Offer:
    """Machines that can be had: one type in one zone on one market.

    usd_per_h: per machine hour, with whatever a loss costs besides. n_most: how many there are, or the quota.
    losses_per_h: how often the offer takes back what it gave; 0 for on-demand.
    """

    name: str
    zone: str
    usd_per_h: float
    n_most: int
    losses_per_h: float = 0.0

    def __post_init__(self) -> None:
        if self.usd_per_h < 0 or self.n_most < 0 or self.losses_per_h < 0:
            raise ValueError(f"offer {self.name}: price, number and losses must not be negative")


@dataclass(frozen=True, slots=True)
class Event:
    """All machines of `offers` go, with this probability within one gap."""

    probability: float
    offers: frozenset[str]


@dataclass(frozen=True, slots=True)
class Scenario:
    """Exactly the machines of `lost` are gone."""

    probability: float
    lost: frozenset[str]


def events(offers: Iterable[Offer], gap_s: float, zone_share: float = 0.2) -> tuple[Event, ...]:
    """Losses within `gap_s` (from the loss until its replacement is ready; 0 when the notice is long enough).

    zone_share: of an offer's losses, those that take its whole zone. The zone's own rate is that share of its worst
    offer, so that every offer still goes at least as often as it was seen to.
    """
    gap_h = max(gap_s, 0.0) / 3600
    by_zone: dict[str, list[Offer]] = defaultdict(list)
    for offer in sorted(offers, key=lambda o: o.name):
        if offer.losses_per_h > 0:
            by_zone[offer.zone].append(offer)
    found = []
    for zone in sorted(by_zone):
        members = by_zone[zone]
        share = zone_share if len(members) > 1 else 0.0
        for offer in members:
            found.append(Event(_chance(offer.losses_per_h * (1 - share), gap_h), frozenset({offer.name})))
        if share:
            worst = max(o.losses_per_h for o in members)
            found.append(Event(_chance(worst * share, gap_h), frozenset(o.name for o in members)))
    return tuple(e for e in found if e.probability > 0)


def by_zone(found: tuple[Event, ...]) -> tuple[Event, ...]:
    """Fewer events that lose no less: those that overlap become one that takes all of them. An upper bound."""
    merged: list[Event] = []
    for event in sorted(found, key=lambda e: -len(e.offers)):
        at = next((i for i, other in enumerate(merged) if other.offers & event.offers), None)
        if at is None:
            merged.append(event)
        else:
            other = merged[at]
            p = 1 - (1 - other.probability) * (1 - event.probability)
            merged[at] = Event(p, other.offers | event.offers)
    return tuple(merged)


def shortage(units: Mapping[str, int], need: int, found: Iterable[Event]) -> float:
    """Probability that what is left after the events is less than `need`. `units`: capacity held by offer."""
    return Tail(found).shortage(units, need)


class Tail:
    """The events of a market, asked about many plans: what one group of events can lose is worked out once.

    Exact but for NEGLIGIBLE: events that share offers (a zone and its members) are looked at together, independent
    groups convolved.
    """

    def __init__(self, found: Iterable[Event]) -> None:
        self._groups = _groups(_widest_first(e for e in found if e.offers))
        self._names = [sorted(frozenset().union(*(e.offers for e in group))) for group in self._groups]
        self._known: list[dict[tuple[int, ...], dict[int, float]]] = [{} for _ in self._groups]

    def shortage(self, units: Mapping[str, int], need: int) -> float:
        """Probability that fewer than `need` of `units` are left."""
        spare = sum(units.values()) - need
        if spare < 0:
            return 1.0
        stands = {0: 1.0}
        for i, names in enumerate(self._names):
            held = tuple(units.get(name, 0) for name in names)
            if any(held):
                stands = _convolved(stands, self._losses(i, held), spare)
        return max(1.0 - sum(stands.values()), 0.0)

    def _losses(self, i: int, held: tuple[int, ...]) -> dict[int, float]:
        known = self._known[i]
        if held not in known:
            if len(known) >= MAX_KNOWN:
                known.clear()
            units = dict(zip(self._names[i], held, strict=True))
            known[held] = _lost_of_group(self._groups[i], units)
        return known[held]


def scenarios(found: tuple[Event, ...], residual: float, n_most: int) -> tuple[tuple[Scenario, ...], float]:
    """The likeliest outcomes until the rest is less likely than `residual`, `n_most` at most; and that rest.

    Best first over subsets of events, each reached once from the one without its last member.
    """
    ordered = sorted(found, key=lambda e: (-e.probability, sorted(e.offers)))
    nothing = math.prod(1 - e.probability for e in ordered)
    odds = [e.probability / max(1 - e.probability, 1e-12) for e in ordered]
    merged: dict[frozenset[str], float] = {frozenset(): nothing}
    covered = nothing
    # (−probability, events of the subset): its successors add the next event, or move the last one on.
    heap: list[tuple[float, tuple[int, ...]]] = []
    if ordered:
        heappush(heap, (-nothing * odds[0], (0,)))
    while heap and 1 - covered > residual and len(merged) < n_most:
        negative, chosen = heappop(heap)
        lost: frozenset[str] = frozenset().union(*(ordered[i].offers for i in chosen))
        merged[lost] = merged.get(lost, 0.0) - negative
        covered -= negative
        last = chosen[-1] + 1
        if last < len(ordered):
            heappush(heap, (negative * odds[last], (*chosen, last)))
            heappush(heap, (negative / odds[last - 1] * odds[last], (*chosen[:-1], last)))
    made = (Scenario(p, lost) for lost, p in merged.items())
    return tuple(sorted(made, key=lambda s: (-s.probability, sorted(s.lost)))), max(1 - covered, 0.0)


def _chance(per_h: float, hours: float) -> float:
    return -math.expm1(-per_h * hours)


def _widest_first(found: Iterable[Event]) -> list[Event]:
    return sorted(found, key=lambda e: (-len(e.offers), sorted(e.offers)))


def _lost_of_group(group: list[Event], units: Mapping[str, int]) -> dict[int, float]:
    """Units lost -> probability. With and without the widest event; after either the rest falls apart."""
    first, rest = group[0], group[1:]
    found: dict[int, float] = defaultdict(float)
    for n, p in _lost(rest, units).items():
        found[n] += p * (1 - first.probability)
    n_first = sum(units[name] for name in first.offers)
    still = (Event(e.probability, e.offers - first.offers) for e in rest if e.offers - first.offers)
    for n, p in _lost(_widest_first(still), units).items():
        found[n + n_first] += p * first.probability
    return dict(found)


def _lost(found: list[Event], units: Mapping[str, int]) -> dict[int, float]:
    joint = {0: 1.0}
    for group in _groups(found):
        joint = _convolved(joint, _lost_of_group(group, units), None)
    return joint


def _convolved(one: Mapping[int, float], other: Mapping[int, float], most: int | None) -> dict[int, float]:
    found: dict[int, float] = defaultdict(float)
    for n, p in one.items():
        for m, q in other.items():
            if (most is None or n + m <= most) and p * q > NEGLIGIBLE:
                found[n + m] += p * q
    return dict(found)


def _groups(found: list[Event]) -> list[list[Event]]:
    """Events that share offers, directly or through others, together; order kept within a group."""
    groups: list[list[Event]] = []
    for event in found:
        touching = [g for g in groups if any(e.offers & event.offers for e in g)]
        groups = [g for g in groups if g not in touching]
        groups.append([*(e for g in touching for e in g), event])
    return groups
