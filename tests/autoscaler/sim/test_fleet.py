"""Machines on a spot market: what is charged, what is told, what is lost; and a bound that nobody beats."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from autoscaler.policy.spot import FleetView, OfferView, Orders, SpotSpec
from autoscaler.sim.buyers import AnyZoneElseOnDemand, Corral, OnDemandOnly, SpotHedge, SpotOnly
from autoscaler.sim.fleet import Buyer, Fleet, Terms
from autoscaler.sim.kernel import Kernel
from autoscaler.sim.market import MarketError, Steps, Zone, read_zone
from autoscaler.sim.oracle import bound_of, cheapest
from autoscaler.sim.replicas import engine_spec
from autoscaler.sim.scenario import Setting

HOUR = 3600.0
TERMS = Terms(boot_s=120, notice_s=120, on_demand_usd_per_h=3.0)


def run(buyer: Buyer, *zones: Zone, wanted: int = 2, hours: float = 4, terms: Terms = TERMS) -> Fleet:
    kernel = Kernel()
    fleet = Fleet(kernel, zones, terms, buyer, lambda now_s: wanted, hours * HOUR)
    kernel.run(until_s=hours * HOUR)
    fleet.close()
    return fleet


def zone(name: str, *capacity: int, usd_per_h: float = 1.0) -> Zone:
    return Zone(name, 600.0, capacity, usd_per_h)


def test_on_demand_costs_its_hours_and_is_always_there() -> None:
    fleet = run(OnDemandOnly(), zone("a", *[0] * 24))
    assert fleet.usd == pytest.approx(2 * 4 * 3.0)
    assert fleet.availability == 1.0


def test_a_zone_takes_back_the_newest_and_a_notice_in_time_hides_it() -> None:
    a, b = zone("a", *[9] * 12, *[1] * 12), zone("b", *[9] * 24, usd_per_h=1.1)
    told = run(Corral(SpotSpec(120, 120)), a, b)
    assert (told.n_lost, told.availability) == (1, 1.0)
    late = Terms(boot_s=120, notice_s=0, on_demand_usd_per_h=3.0)
    untold = run(AnyZoneElseOnDemand(), a, b, terms=late)
    assert untold.n_lost == 1 and untold.short_s == pytest.approx(120, abs=1)


def test_when_all_zones_are_gone_on_demand_serves_and_spot_takes_over_again() -> None:
    fleet = run(Corral(SpotSpec(120, 120)), zone("a", *[4] * 8, *[0] * 8, *[4] * 8))
    assert fleet.availability == 1.0
    assert 0.9 * 2 * HOUR * 4 / 3 < fleet.usd_on_demand / 3.0 * HOUR < 1.2 * 2 * HOUR * 4 / 3
    assert run(SpotOnly(), zone("a", *[4] * 8, *[0] * 8, *[4] * 8)).availability < 0.7


def test_stopped_machines_stand_in_for_a_loss_are_paid_while_they_lie_and_lie_down_again() -> None:
    a, b = zone("a", *[9] * 12, *[0] * 12), zone("b", *[9] * 24, usd_per_h=1.1)
    late = Terms(boot_s=180, notice_s=120, on_demand_usd_per_h=3.0)
    kept = replace(late, n_reserve=3, resume_s=120, stopped_usd_per_h=0.1)
    fleet = run(Corral(SpotSpec(180, 120, worth=0.0, resume_s=120)), a, b, terms=kept)
    assert (fleet.availability, fleet.n_stopped) == (1.0, 3)
    # Two are up from the notice until the replacement serves.
    assert fleet.usd_on_demand == pytest.approx(2 * 180 / HOUR * 3.0)
    assert fleet.usd_stopped == pytest.approx((3 * 4 - 2 * 180 / HOUR) * 0.1)
    assert fleet.n_bought == 4, "two spot machines and two again: who was woken was not bought"
    open_gap = run(Corral(SpotSpec(180, 120, worth=0.0)), a, b, terms=late)
    assert open_gap.short_s == pytest.approx(60, abs=1)


class Remembering:
    def __init__(self) -> None:
        self.views: list[FleetView] = []

    def buy(self, view: FleetView) -> Orders:
        self.views.append(view)
        return Orders(launch=(("a", 1),) if view.now_s == 0 else ())


def test_a_zone_that_is_full_or_about_to_drop_refuses() -> None:
    buyer = Remembering()
    full = run(buyer, zone("a", *[0] * 24))
    assert (full.n_bought, full.n_refused) == (0, 2)  # once more at the same instant, then time must pass
    assert buyer.views[-1].offers[0].refused_at_s == 0


def test_spothedge_spreads_and_keeps_its_spare() -> None:
    a, b, c = (zone(name, *[9] * 24) for name in "abc")
    buyer = SpotHedge(n_extra=1)
    view = FleetView(0.0, 2, run(Remembering(), a, b, c).view().offers, 3.0)
    orders = buyer.buy(view)
    assert sorted(orders.launch) == [("a", 1), ("b", 1), ("c", 1)]
    assert orders.launch_on_demand == 2  # nothing is ready yet


@pytest.mark.parametrize(
    "buyer", [OnDemandOnly(), AnyZoneElseOnDemand(), SpotHedge(1), Corral(SpotSpec(120, 120))]
)
def test_nobody_beats_the_oracle_at_the_same_availability(buyer: Buyer) -> None:
    zones = (zone("a", *([3] * 5 + [0] * 4) * 3), zone("b", *([0] * 7 + [2] * 3) * 3))
    fleet = run(buyer, *zones)
    reached = min(fleet.availability, 0.999)
    bound = cheapest(
        zones, lambda t: 2, 4 * HOUR, boot_s=120, on_demand_usd_per_h=3.0, availability=reached, tick_s=600
    )
    assert 0 < bound.usd <= fleet.usd
    assert 0 <= bound.on_demand_share <= 1


def test_cover_for_any_one_zone_costs_a_share_of_the_others() -> None:
    """Four machines over two, three, or six zones that always have room: 8, 6, and 4.8 are paid for."""
    for n_zones, paid in ((2, 8.0), (3, 6.0), (6, 4.8)):
        zones = tuple(Zone(f"z{n}", 600.0, (8,) * 12, 1.0) for n in range(n_zones))
        for covered, usd_per_h in ((False, 4.0), (True, paid)):
            bound = cheapest(
                zones,
                lambda now_s: 4,
                7200.0,
                boot_s=120.0,
                on_demand_usd_per_h=10.0,
                availability=1.0,
                tick_s=600.0,
                covered=covered,
            )
            assert bound.usd == pytest.approx(2 * usd_per_h)


def test_the_oracle_need_not_serve_what_nobody_could() -> None:
    zones = (zone("a", *[9] * 24),)
    spikes = tuple(
        (HOUR / 3 * i + at_s, n) for i in range(12) for at_s, n in ((0.0, 1), (600.0, 5), (660.0, 1))
    )
    wanted = Steps(tuple(at_s for at_s, _ in spikes), tuple(n for _, n in spikes))
    kernel = Kernel()
    fleet = Fleet(kernel, zones, TERMS, Corral(SpotSpec(120, 120)), wanted, 4 * HOUR)
    kernel.run(until_s=4 * HOUR)
    fleet.close()
    setting = Setting(engine_spec("llama-3.1-8b", "l4"), 8, 0, 1.0, zones, TERMS, until_s=4 * HOUR)
    assert fleet.availability == 1.0
    assert bound_of(setting, fleet.demand, 0.999, 60.0).usd <= fleet.usd


def test_a_recorded_zone_is_read_and_wrapped(tmp_path: Path) -> None:
    path = tmp_path / "us-x-1a_v100_1.json"
    path.write_text(json.dumps({"metadata": {"gap_seconds": 60}, "data": [1, 0, 1]}))
    read = read_zone(path, usd_per_h=0.9, machines_per_unit=4)
    assert read == Zone("us-x-1a_v100_1", 60.0, (4, 0, 4), 0.9)
    assert read.window(120, 300).capacity == (4, 4, 0, 4, 4)
    assert read.drops() == ((60.0, 0),)
    assert (read.at(59.9), read.at(60), read.at(999)) == (4, 0, 0)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        "[]",
        '{"metadata": {"gap_seconds": 0}, "data": [1]}',
        '{"metadata": {"gap_seconds": 60}, "data": [1, "x"]}',
        '{"metadata": {"gap_seconds": 60}, "data": [1e999]}',
        '{"metadata": {"gap_seconds": 60}, "data": [1], "prices": ["x"]}',
    ],
)
def test_what_is_no_capacity_trace_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "zone.json"
    path.write_text(text)
    with pytest.raises(MarketError, match=r"zone\.json"):
        read_zone(path, usd_per_h=1)


def test_demand_that_has_stood_for_a_start_is_due_and_a_dip_is_not() -> None:
    wanted = Steps((0.0, HOUR, HOUR + 60, 2 * HOUR), (2, 4, 2, 6))
    kernel = Kernel()
    buyer = Corral(SpotSpec(120, 120))
    fleet = Fleet(kernel, (zone("a", *[9] * 24),), TERMS, buyer, wanted, 4 * HOUR)
    kernel.run(until_s=4 * HOUR)
    fleet.close()
    assert fleet.short_s == 0  # a minute of four is no time to buy any, and six are there after a start
    assert fleet.demand(2 * HOUR + 60) == 6
    assert fleet.demand.least(HOUR, 2 * HOUR) == 2


def test_cover_that_has_not_come_up_is_cancelled_when_spot_is_ready() -> None:
    view = FleetView(0.0, 2, (OfferView("a", 1.0, n_ready=2),), 3.0, 1, 0)
    assert Corral(SpotSpec(120, 120)).buy(view).cancel_on_demand == 1
