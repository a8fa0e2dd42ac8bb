"""The buyer that follows purchase plans: spread with the tail, make before break, both solvers."""

from __future__ import annotations

import pytest

from autoscaler.policy.spot import FleetView, OfferView, SpotSpec
from autoscaler.sim.buyers_plan import Planned
from autoscaler.sim.policies import policy

SPEC = SpotSpec(boot_s=600, notice_s=0)


def _view(*offers: OfferView, n_wanted: int = 6, now_s: float = 0.0, **on_demand: int) -> FleetView:
    return FleetView(now_s, n_wanted, offers, 3.0, **on_demand)


ZONES = tuple(OfferView(f"z{i}", 0.5) for i in range(4))


@pytest.mark.parametrize("limit_s", [0.0, 5.0])
def test_what_is_bought_outlives_the_loss_of_any_zone(limit_s: float) -> None:
    orders = Planned(SPEC, limit_s).buy(_view(*ZONES))
    bought = dict(orders.launch)
    n = sum(bought.values()) + orders.launch_on_demand
    assert n > 6, "more than wanted, since a loss is not announced"
    assert n - max(bought.values(), default=0) >= 6
    covered = Planned(SpotSpec(boot_s=100, notice_s=120), limit_s).buy(_view(*ZONES))
    assert sum(n for _, n in covered.launch) == 6, "notice in time needs no spare"


def test_a_refusal_is_not_repeated_at_once_and_on_demand_covers_what_is_missing() -> None:
    refused = tuple(OfferView(z.name, z.usd_per_h, refused_at_s=0.0) for z in ZONES)
    buyer = Planned(SPEC)
    orders = buyer.buy(_view(*refused, now_s=30.0))
    assert (orders.launch, orders.launch_on_demand) == ((), 6)
    assert buyer.buy(_view(*refused, now_s=61.0, n_on_demand_pending=6)).launch != ()


def test_nothing_goes_before_enough_others_are_ready() -> None:
    spec = SpotSpec(boot_s=100, notice_s=120)
    two = (OfferView("cheap", 0.5, n_pending=6), OfferView("dear", 0.9, n_ready=6))
    assert Planned(spec).buy(_view(*two)).release == ()
    there = (OfferView("cheap", 0.5, n_ready=6), OfferView("dear", 0.9, n_ready=6))
    orders = Planned(spec).buy(_view(*there, n_on_demand_ready=2))
    assert (dict(orders.release), orders.release_on_demand) == ({"dear": 6}, 2)
    assert dict(Planned(spec).buy(_view(*there, n_wanted=0)).release) == {"cheap": 6, "dear": 6}


def test_what_still_starts_is_cancelled_once_the_plan_is_ready() -> None:
    spec = SpotSpec(boot_s=100, notice_s=120)
    there = (OfferView("cheap", 0.5, n_ready=6), OfferView("dear", 0.9, n_pending=2))
    orders = Planned(spec).buy(_view(*there, n_on_demand_pending=3))
    assert (dict(orders.cancel), orders.cancel_on_demand) == ({"dear": 2}, 3)
    fewer = (OfferView("cheap", 0.5, n_ready=5, n_pending=1), OfferView("dear", 0.9, n_pending=2))
    orders = Planned(spec).buy(_view(*fewer, n_on_demand_pending=3))
    assert (orders.cancel, orders.cancel_on_demand) == ((), 0), "not ready yet"


def test_it_is_among_the_simulator_s_policies() -> None:
    assert policy("planned:availability=0.99") is not None
    assert policy("planned-milp") is not None
