"""Buying spot: what is ordered in tables, what is learned, and bounds that hold for any view."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.policy.spot import (
    FleetView,
    Learned,
    OfferView,
    SpotMemory,
    SpotSpec,
    buy,
    effective_usd_per_h,
    learn,
    spares,
)

IN_TIME = SpotSpec(boot_s=120, notice_s=120)
NO_NOTICE = SpotSpec(boot_s=180, notice_s=0)


def view(
    *offers: OfferView, wanted: int = 4, now_s: float = 1000.0, pending: int = 0, ready: int = 0
) -> FleetView:
    return FleetView(now_s, wanted, offers, 3.06, pending, ready)


def test_spot_is_bought_where_it_is_cheapest() -> None:
    orders, _ = buy(view(OfferView("a", 1.2), OfferView("b", 0.9)), IN_TIME, SpotMemory())
    assert orders.launch == (("b", 4),)
    assert orders.launch_on_demand == 0


def test_an_offer_that_keeps_losing_machines_is_passed_over_for_a_dearer_one() -> None:
    memory = SpotMemory(1000.0, {"a": Learned(n_losses=60, held_h=10), "b": Learned(n_losses=0, held_h=100)})
    orders, _ = buy(view(OfferView("a", 0.90), OfferView("b", 0.95)), NO_NOTICE, memory)
    assert orders.launch[0][0] == "b"


def test_a_notice_orders_the_replacement_at_once_elsewhere() -> None:
    offers = OfferView("a", 0.9, n_ready=4, n_leaving=4), OfferView("b", 1.0)
    orders, _ = buy(view(*offers), IN_TIME, SpotMemory())
    assert orders.launch == (("b", 4),)
    assert orders.release == ()


def test_without_an_offer_on_demand_covers_and_goes_when_spot_is_ready() -> None:
    refused = OfferView("a", 0.9, refused_at_s=990.0)
    orders, _ = buy(view(refused), IN_TIME, SpotMemory())
    assert (orders.launch, orders.launch_on_demand) == ((), 4)
    # Not again while they boot.
    orders, _ = buy(view(refused, pending=4), IN_TIME, SpotMemory())
    assert (orders.launch, orders.launch_on_demand) == ((), 0)
    # The offer gives again: spot is bought beside, on-demand stays until it is ready.
    later = replace(refused, refused_at_s=900.0)
    orders, _ = buy(view(later, ready=4), IN_TIME, SpotMemory())
    assert (orders.launch, orders.release_on_demand) == ((("a", 4),), 0)
    orders, _ = buy(view(replace(later, n_ready=4), ready=4), IN_TIME, SpotMemory())
    assert (orders.launch, orders.release_on_demand) == ((), 4)


def test_spot_dearer_than_on_demand_is_not_bought() -> None:
    orders, _ = buy(view(OfferView("a", 3.2)), IN_TIME, SpotMemory())
    assert (orders.launch, orders.launch_on_demand) == ((), 4)


def test_spares_never_cost_more_than_spot_saves() -> None:
    often = SpotMemory(1000.0, {name: Learned(n_losses=10, held_h=10) for name in "ab"})
    crowded = OfferView("a", 0.9, n_ready=9), OfferView("b", 0.9, n_ready=9)
    for wanted, n in ((1, 2), (4, 4)):  # one on-demand hour buys 3.4 of these
        orders, _ = buy(view(*crowded, wanted=wanted), NO_NOTICE, often)
        assert orders.reasons[0] == f"{wanted} wanted, {n} spare"


def test_spares_stand_in_for_the_largest_loss_that_comes_too_often() -> None:
    often = SpotMemory(0.0, {name: Learned(n_losses=10, held_h=10) for name in "abc"})
    held = {"a": 2, "b": 2, "c": 2}
    assert spares(held, IN_TIME, often) == 0  # the notice suffices
    assert spares(held, NO_NOTICE, often) == 2
    never = SpotMemory(0.0, {name: Learned(n_losses=0, held_h=5000) for name in "abc"})
    assert spares(held, NO_NOTICE, never) == 0


def test_losses_are_counted_once_and_fade() -> None:
    memory = SpotMemory()
    for now_s, leaving in ((0.0, 0), (3600.0, 2), (3660.0, 3), (7200.0, 0), (10_800.0, 1)):
        offer = OfferView("a", 1.0, n_ready=4, n_leaving=leaving)
        memory = learn(view(offer, now_s=now_s), memory)
    assert memory.offers["a"].n_losses == pytest.approx(2, rel=0.05)
    assert memory.offers["a"].held_h == pytest.approx(3, rel=0.05)
    much_later = learn(view(OfferView("a", 1.0), now_s=10_800.0 + 72 * 3600), memory)
    assert much_later.offers["a"].n_losses == pytest.approx(1, rel=0.05)


def test_a_loss_without_notice_costs_on_demand_time() -> None:
    offer = OfferView("a", 1.0)
    seen = view(offer)
    assert effective_usd_per_h(offer, seen, NO_NOTICE, SpotMemory()) > effective_usd_per_h(
        offer, seen, IN_TIME, SpotMemory()
    )


offers = st.builds(
    lambda pending, ready, leaving, price, refused: (pending, ready, min(leaving, ready), price, refused),
    st.integers(0, 5),
    st.integers(0, 5),
    st.integers(0, 5),
    st.floats(0.1, 5),
    st.none() | st.floats(0, 1000),
)


@settings(max_examples=300)
@given(st.lists(offers, max_size=5), st.integers(0, 12), st.integers(0, 6), st.integers(0, 6), st.booleans())
def test_enough_is_on_its_way_and_never_absurdly_much(
    drawn: list[tuple[int, int, int, float, float | None]],
    wanted: int,
    pending: int,
    ready: int,
    warned: bool,
) -> None:
    spec = IN_TIME if warned else NO_NOTICE
    made = tuple(OfferView(f"z{n}", o[3], o[0], o[1], o[2], o[4]) for n, o in enumerate(drawn))
    seen = view(*made, wanted=wanted, pending=pending, ready=ready)
    orders, memory = buy(seen, spec, SpotMemory())
    n_bought = sum(n for _, n in orders.launch)
    n_spot = sum(o.n_pending + o.n_ready - o.n_leaving for o in made)
    n_released = sum(n for _, n in orders.release)
    n_on_demand = pending + ready + orders.launch_on_demand - orders.release_on_demand
    assert n_spot + n_bought - n_released + n_on_demand >= wanted
    assert n_bought == 0 or n_spot + n_bought <= wanted + spec.max_spares
    # What serves is never given back below what is wanted.
    n_serving = sum(o.n_ready - o.n_leaving for o in made) + ready
    assert n_serving - n_released - orders.release_on_demand >= min(wanted, n_serving)
    known = {o.name: o for o in made}
    assert all(known[name].n_ready - known[name].n_leaving >= n > 0 for name, n in orders.release)
    assert all(known[name].n_leaving == 0 for name, _ in orders.launch)
    assert buy(seen, spec, SpotMemory()) == (orders, memory)
    shuffled = replace(seen, offers=made[::-1])
    assert buy(shuffled, spec, SpotMemory())[0].launch == orders.launch
