"""How many machines of each spot offer to hold when an offer may go before its replacement is ready: pure.

An offer that goes takes all its machines and leaves a gap of a start less the notice. Three ways to live with that, and
this compares them: leave it open (cheap, and right for an offer that has held for a day), hold enough without any one
offer (m offers to spread over cost m / (m - 1)), or pay on-demand. Each is charged what it costs an hour and what the
time in shortage is worth; the cheapest wins. That worth is what turns an availability target into cover that is bought
where it is cheap and left out where it is dear, instead of the same cover everywhere.

Called by spot.py per tick. Knows no markets, only numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

# Of losses, how many take another offer along within the same gap (V100 zones of 2022 and 2023: 2 to 23 % by pair).
TOGETHER: Final = 0.05
# A start is paid within this time by what the new shape saves, or the shape stays.
SETTLE_H: Final = 2.0


@dataclass(frozen=True, slots=True)
class Choice:
    """One offer as the cover sees it. `gap_ratio`: share of the time it leaves a gap, were it used alone. `n_most`:
    machines it can be brought to (what is held, if it refuses now)."""

    name: str
    usd_per_h: float
    gap_ratio: float
    n_held: int
    n_most: int


@dataclass(frozen=True, slots=True)
class Shape:
    """Machines to hold by offer, and on-demand. `short_ratio`: share of time in shortage that is expected."""

    held: tuple[tuple[str, int], ...]
    n_on_demand: int
    usd_per_h: float
    short_ratio: float


def shape(
    n_wanted: int,
    choices: Sequence[Choice],
    on_demand_usd_per_h: float,
    short_usd_per_h: float,
    start_h: float,
) -> Shape:
    """The cheapest way to have `n_wanted` machines. `short_usd_per_h`: what an hour in shortage is charged; `start_h`:
    what a start takes, paid again where the shape differs from what is held."""
    if n_wanted <= 0:
        return Shape((), 0, 0.0, 0.0)
    by_price = sorted(choices, key=lambda c: (c.usd_per_h, c.name))
    # At most so many in one offer, and so many more than wanted: what spreading over k offers asks for, such that one
    # of them may go, or two.
    spreads = {
        (n, n_gone * n)
        for n_gone in (1, 2)
        for k in range(n_gone + 1, len(by_price) + 1)
        for n in (-(-n_wanted // (k - n_gone)),)
    }
    found = [_spread(n_wanted, n, n_more, by_price, on_demand_usd_per_h) for n, n_more in sorted(spreads)]
    found += [_open(n_wanted, c, by_price, on_demand_usd_per_h) for c in by_price]
    found.append(Shape((), n_wanted, n_wanted * on_demand_usd_per_h, 0.0))
    by_name = {c.name: c for c in by_price}

    def charged(one: Shape) -> float:
        moved = sum(max(n - by_name[name].n_held, 0) * by_name[name].usd_per_h for name, n in one.held)
        risk = _short(n_wanted, one, by_name)
        return one.usd_per_h + short_usd_per_h * risk + moved * start_h / SETTLE_H

    best = min(found, key=lambda one: (charged(one), one.held, one.n_on_demand))
    return Shape(best.held, best.n_on_demand, best.usd_per_h, _short(n_wanted, best, by_name))


def _spread(
    n_wanted: int, n_share: int, n_more: int, choices: Sequence[Choice], on_demand_usd_per_h: float
) -> Shape:
    """At most `n_share` in one offer, and `n_more` than wanted; on-demand for what no offer has room for. What is held
    already is kept first."""
    n_open = n_wanted + n_more
    held: dict[str, int] = {}
    usd = 0.0
    for choice in sorted(choices, key=lambda c: -min(c.n_held, n_share)):
        n = min(choice.n_held, n_share, n_open)
        held[choice.name] = n
        n_open -= n
        usd += n * choice.usd_per_h
    for choice in choices:
        n = min(n_share - held[choice.name], max(choice.n_most - held[choice.name], 0), n_open)
        held[choice.name] += n
        n_open -= n
        usd += n * choice.usd_per_h
    # On-demand machines stay: fewer of them make up for the largest share.
    n_gone = n_more // n_share * max(held.values(), default=0)
    n_on_demand = max(min(n_open, n_wanted + n_gone - sum(held.values())), 0)
    kept = tuple((name, n) for name, n in held.items() if n)
    return Shape(kept, n_on_demand, usd + n_on_demand * on_demand_usd_per_h, 0.0)


def _open(n_wanted: int, first: Choice, choices: Sequence[Choice], on_demand_usd_per_h: float) -> Shape:
    """As many as wanted and no more: all in one offer as far as it has room, then in the cheapest others."""
    held, n_open, usd = [], n_wanted, 0.0
    for choice in (first, *(c for c in choices if c is not first)):
        n = min(choice.n_most, n_open)
        if n:
            held.append((choice.name, n))
            n_open -= n
            usd += n * choice.usd_per_h
    return Shape(tuple(held), n_open, usd + n_open * on_demand_usd_per_h, 0.0)


def _short(n_wanted: int, one: Shape, choices: dict[str, Choice]) -> float:
    """Share of time with less than wanted: an offer gone, or two within one gap."""
    n_all = sum(n for _, n in one.held) + one.n_on_demand
    held = sorted(one.held)
    total = 0.0
    for i, (name, n) in enumerate(held):
        if n_all - n < n_wanted:
            total += choices[name].gap_ratio
            continue
        for other, m in held[i + 1 :]:
            if n_all - m >= n_wanted > n_all - n - m:
                one_gap, other_gap = choices[name].gap_ratio, choices[other].gap_ratio
                total += TOGETHER * min(one_gap, other_gap) + one_gap * other_gap
    return total
