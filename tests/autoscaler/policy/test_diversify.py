"""Purchase plans: within the tail, never dearer than stated against the programme and against all plans by hand."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from autoscaler.policy.diversify import Need, Solver, greedy
from autoscaler.policy.tail import Event, Offer, events, shortage
from autoscaler.purchase import plan

WORST, MEAN = 1.25, 1.05  # what greedy may cost over the programme's plan on random markets


def _market(seed: int, n_units: int, types: int = 2, zones: int = 3) -> tuple[Need, list[Offer]]:
    rng = random.Random(seed)
    offers: list[Offer] = []
    units: dict[str, int] = {}
    for t, z in itertools.product(range(types), range(zones)):
        each = 2**t
        on_demand = each * rng.uniform(0.9, 1.4)
        offers.append(Offer(f"t{t}-z{z}-od", f"z{z}", on_demand, n_units))
        spot = on_demand * rng.uniform(0.25, 0.6)
        offers.append(Offer(f"t{t}-z{z}", f"z{z}", spot, rng.randrange(1, n_units), rng.uniform(0.05, 0.6)))
        units |= {f"t{t}-z{z}-od": each, f"t{t}-z{z}": each}
    return Need("n", n_units, units), offers


def test_greedy_stays_within_its_stated_ratio_of_the_programme() -> None:
    ratios = []
    for seed, n_units in itertools.product(range(5), (3, 12)):
        need, offers = _market(seed, n_units)
        found = events(offers, 180)
        quick, exact = greedy([need], offers, found), plan([need], offers, found, time_limit_s=20)
        for made in (quick, exact):
            assert made.unmet == (), f"seed {seed}"
            assert made.shortage["n"] <= 1e-3, f"seed {seed}"
        assert exact.usd_per_h <= quick.usd_per_h + 1e-9, f"seed {seed}"
        ratios.append(quick.usd_per_h / exact.usd_per_h)
    assert 1.05 < max(ratios) <= WORST, ratios  # and the programme is worth its time
    assert sum(ratios) / len(ratios) <= MEAN, ratios


@pytest.mark.parametrize("seed", range(6))
def test_the_programme_finds_the_cheapest_of_all_plans(seed: int) -> None:
    rng = random.Random(seed)
    offers = [Offer(f"s{i}", f"z{i}", rng.uniform(0.2, 0.6), 4, rng.uniform(0.1, 0.9)) for i in range(3)]
    offers.append(Offer("od", "z0", 1.0, 4))
    need = Need("n", 4, {o.name: 1 for o in offers}, availability=0.98)
    found = events(offers, 360)
    cheapest = min(
        sum(n * o.usd_per_h for n, o in zip(counts, offers, strict=True))
        for counts in itertools.product(range(5), repeat=4)
        if shortage(dict(zip((o.name for o in offers), counts, strict=True)), 4, found) <= 0.02
    )
    made = plan([need], offers, found, time_limit_s=20)
    assert made.solver is Solver.OPTIMAL, made.reasons
    # What no scenario names counts as missed (a quarter of what is allowed at most); it stops within 0.1 %.
    assert cheapest - 1e-9 <= made.usd_per_h <= cheapest * 1.002, made.reasons
    assert made == plan([need], list(reversed(offers)), found, time_limit_s=20), (
        "the order given is no matter"
    )


def test_needs_share_what_an_offer_has() -> None:
    offers = [Offer("spot", "a", 0.3, 3), Offer("od", "a", 1.0, 9)]
    needs = [Need(name, 2, {"spot": 1, "od": 1}) for name in ("x", "y")]
    for made in (greedy(needs, offers, ()), plan(needs, offers, ())):
        assert sum(held.get("spot", 0) for held in made.machines.values()) == 3
        assert made.usd_per_h == pytest.approx(1.9)


def test_risk_is_spread_over_zones_or_paid_for() -> None:
    zones = [Offer(f"s{i}", f"z{i}", 0.3, 9, 1.0) for i in range(4)]
    need = Need("n", 6, {o.name: 1 for o in zones} | {"od": 1}, availability=0.99)
    found = tuple(Event(0.02, frozenset({o.name})) for o in zones)
    spread = greedy([need], [*zones, Offer("od", "z", 1.0, 9)], found)
    assert spread.shortage["n"] <= 0.01
    assert len(spread.machines["n"]) >= 3
    assert spread.usd_per_h < 6 * 1.0
    alone = greedy([need], [zones[0], Offer("od", "z", 1.0, 9)], found)
    assert alone.machines["n"] == {"od": 6}, "one zone cannot be trusted with any of it"


def test_what_cannot_be_met_is_said() -> None:
    need = Need("n", 5, {"od": 1})
    made = plan([need], [Offer("od", "z", 1.0, 3)], ())
    assert made.unmet == ("n",)
    assert made.machines == {"n": {"od": 3}}
    assert "not enough machines for n" in made.reasons[0]
    nothing = greedy([replace(need, n_units=0)], [Offer("od", "z", 1.0, 3)], ())
    assert (nothing.machines, nothing.unmet) == ({"n": {}}, ())


def test_the_time_limit_is_told_and_leaves_a_plan_that_holds() -> None:
    need, offers = _market(3, 40, types=3, zones=4)
    found = events(offers, 180)
    made = plan([need], offers, found, time_limit_s=0.01)
    assert made.solver is Solver.LIMIT
    assert "stopped after 0.01 s" in made.reasons[0]
    assert made.unmet == ()
    assert made.usd_per_h == greedy([need], offers, found).usd_per_h
    with pytest.raises(ValueError, match="time_limit_s"):
        plan([need], offers, found, time_limit_s=0)


def test_bad_needs_are_named() -> None:
    with pytest.raises(ValueError, match="need n: availability"):
        Need("n", 1, {}, availability=1.0)
    with pytest.raises(ValueError, match="need n: n_units"):
        Need("n", 1, {"o": 0})
