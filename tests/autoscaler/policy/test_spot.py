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
    usual_losses_per_h,
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
    memory = SpotMemory(
        1000.0, {"a": Learned(n_losses=60, held_h=10), "b": Learned(n_losses=0, held_h=100, n_usual=60)}
    )
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


def test_what_goes_often_is_spread_with_one_share_to_spare_and_what_has_held_for_a_day_is_left_open() -> None:
    zones = tuple(OfferView(name, 0.9) for name in "abcdef")
    orders, _ = buy(view(*zones), NO_NOTICE, SpotMemory())
    assert len(orders.launch) >= 5 and max(n for _, n in orders.launch) == 1
    assert sum(n for _, n in orders.launch) > 4, "more than wanted: one that goes is missed by nobody"
    held = SpotMemory(1000.0, {"a": Learned(0, 80, 1000.0 - 80 * 3600, 6.0)})
    orders, _ = buy(view(OfferView("a", 0.9, n_ready=4), *zones[1:]), NO_NOTICE, held)
    assert (orders.launch, orders.release) == ((), ())


def test_cover_that_would_cost_more_than_on_demand_is_not_bought() -> None:
    crowded = (OfferView("a", 2.0), OfferView("b", 2.0))
    orders, _ = buy(view(*crowded), replace(NO_NOTICE, worth=1e4), SpotMemory())
    assert (orders.launch, orders.launch_on_demand) == ((), 4), "twice four at 2.00 against four at 3.06"


def test_what_a_shortage_is_worth_decides_how_much_cover_there_is() -> None:
    zones = tuple(OfferView(name, 0.9) for name in "abcdef")
    bought = []
    for worth in (0.0, 30.0, 300.0):
        orders, _ = buy(view(*zones), replace(NO_NOTICE, worth=worth), SpotMemory())
        bought.append(sum(n for _, n in orders.launch))
    assert bought[0] == 4 and bought == sorted(bought) and bought[-1] > 4
    assert SpotSpec(180, 0, 0.9999).shortage_worth == pytest.approx(
        10 * SpotSpec(180, 0, 0.999).shortage_worth
    )
    orders, _ = buy(view(*zones), replace(IN_TIME, worth=300.0), SpotMemory())
    assert sum(n for _, n in orders.launch) == 4, "a notice as long as a start leaves no gap"


def test_cover_stays_until_what_replaces_it_is_ready_and_a_refusal_moves_nothing() -> None:
    """An offer that may refuse stands in for nothing: no release and no cancelling before its machines serve."""
    held = OfferView("a", 0.9, n_ready=2), OfferView("b", 0.9, n_ready=2), OfferView("c", 0.9, n_ready=2)
    orders, memory = buy(view(*held, OfferView("d", 0.9), pending=2), NO_NOTICE, SpotMemory())
    assert (orders.release, orders.cancel, orders.cancel_on_demand) == ((), (), 0) or not orders.launch
    refused = replace(OfferView("d", 0.9), refused_at_s=1000.0)
    again, _ = buy(view(*held, refused), NO_NOTICE, memory)
    assert again.release == ()


def test_what_held_for_long_is_expected_to_hold_on() -> None:
    rates = [usual_losses_per_h(h) for h in (0.0, 1.0, 12.0, 48.0)]
    assert rates == sorted(rates, reverse=True) and rates[0] > 1 and rates[-1] < 0.03
    assert usual_losses_per_h(0.0, 6.0) < rates[0]
    young, old = Learned(up_since_s=1000.0), Learned(up_since_s=1000.0 - 24 * 3600)
    assert old.losses_per_h(1000.0) < young.losses_per_h(1000.0) / 3
    worse = Learned(n_losses=8.0)
    assert worse.losses_per_h(1000.0) == pytest.approx(3 * young.losses_per_h(1000.0))


def test_a_loss_without_a_word_is_learned_and_a_machine_given_back_is_none() -> None:
    memory = learn(view(OfferView("a", 1.0, n_ready=4), now_s=0.0), SpotMemory())
    taken = OfferView("a", 1.0, refused_at_s=60.0)
    lost = learn(view(taken, now_s=60.0), memory)
    assert lost.offers["a"].n_losses == pytest.approx(1, rel=0.01)
    assert learn(view(taken, now_s=60.0), lost).offers["a"].n_losses == lost.offers["a"].n_losses, "once"
    backing_off = learn(view(replace(taken, refused_at_s=300.0), now_s=60.0), memory)
    assert backing_off.offers["a"].n_losses == 0
    given_back = learn(view(OfferView("a", 1.0, n_ready=1), now_s=60.0), memory)
    assert given_back.offers["a"].n_losses == 0


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
    assert n_bought <= 3 * wanted, "at most what losing two of three takes"
    # What serves is never given back below what is wanted.
    n_serving = sum(o.n_ready - o.n_leaving for o in made) + ready
    assert n_serving - n_released - orders.release_on_demand >= min(wanted, n_serving)
    known = {o.name: o for o in made}
    assert all(known[name].n_ready - known[name].n_leaving >= n > 0 for name, n in orders.release)
    assert all(known[name].n_leaving == 0 for name, _ in orders.launch)
    assert buy(seen, spec, SpotMemory()) == (orders, memory)
    shuffled = replace(seen, offers=made[::-1])
    assert buy(shuffled, spec, SpotMemory())[0].launch == orders.launch


LATE = SpotSpec(boot_s=180, notice_s=120)
WITH_RESERVE = SpotSpec(boot_s=180, notice_s=120, resume_s=120)


def test_a_loss_is_bridged_by_stopped_machines_which_lie_down_again_when_spot_is_ready() -> None:
    going = OfferView("a", 0.9, n_ready=4, n_leaving=4), OfferView("b", 1.0)
    told = replace(view(*going), n_stopped=8)
    orders, memory = buy(told, WITH_RESERVE, SpotMemory())
    assert (orders.launch, orders.launch_on_demand) == ((("b", 4),), 4)
    # They are up, the replacement boots: nothing more is ordered, nothing is given back.
    gone = OfferView("a", 0.9, refused_at_s=1120.0), OfferView("b", 1.0, n_pending=4)
    orders, memory = buy(replace(view(*gone, now_s=1130.0, ready=4), n_stopped=4), WITH_RESERVE, memory)
    assert (orders.launch_on_demand, orders.release_on_demand, orders.cancel) == (0, 0, ())
    there = gone[0], OfferView("b", 1.0, n_ready=4)
    orders, _ = buy(replace(view(*there, now_s=1175.0, ready=4), n_stopped=4), WITH_RESERVE, memory)
    assert orders.release_on_demand == 4


@pytest.mark.parametrize(
    ("spec", "n_stopped", "n_woken", "is_covered"),
    [
        (LATE, 8, 0, True),  # nobody said how long one takes: as long as a boot
        (WITH_RESERVE, 8, 4, False),
        (WITH_RESERVE, 3, 0, True),  # fewer than wanted: cover as without
    ],
)
def test_cover_is_left_out_where_stopped_machines_stand_in_for_all(
    spec: SpotSpec, n_stopped: int, n_woken: int, is_covered: bool
) -> None:
    zones = tuple(OfferView(name, 0.9) for name in "bcdef")
    orders, _ = buy(replace(view(*zones), n_stopped=n_stopped), spec, SpotMemory())
    assert (sum(n for _, n in orders.launch) > 4) == is_covered
    going = OfferView("a", 0.9, n_ready=4, n_leaving=4), *zones
    orders, _ = buy(replace(view(*going), n_stopped=n_stopped), spec, SpotMemory())
    assert orders.launch_on_demand == n_woken


def test_growth_wakes_nobody_whoever_refuses() -> None:
    """A start that was never lost takes as long as a start."""
    offers = OfferView("a", 0.9, n_ready=2), OfferView("b", 0.8, refused_at_s=990.0)
    orders, _ = buy(replace(view(*offers), n_stopped=8), WITH_RESERVE, SpotMemory())
    assert (orders.launch, orders.launch_on_demand) == ((("a", 2),), 0)
