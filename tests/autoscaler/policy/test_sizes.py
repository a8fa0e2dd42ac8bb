"""Machines of several sizes: what each holds, and one market in one unit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.policy.disruption import Buyable, Held
from autoscaler.policy.market import OnDemandOffer, Purchase, one_more
from autoscaler.policy.poolplan import Buy, PoolMachine
from autoscaler.policy.sizes import Need, Scale, places
from autoscaler.policy.spot import FleetView, OfferView, Orders, SpotMemory
from tests.autoscaler.policy.test_poolplan import SPEC, inputs, orders

L4 = Need("l4")
SMALL, BIG = "spot/a/small", "spot/a/big"
MIXED = Scale.of({SMALL: 1, BIG: 4, "on-demand/a/small": 1, "on-demand/a/big": 4})


@pytest.mark.parametrize(
    ("need", "gpu", "n_gpus", "n"),
    [
        (L4, "l4", 1, 1),
        (L4, "l4", 4, 4),
        (Need("l4", 4), "l4", 8, 2),
        (Need("l4", 4), "l4", 1, 0),  # it takes four
        (L4, "l40s", 2, 2),  # more memory, the same kernels
        (L4, "a10g", 4, 0),  # as much memory, but no 8-bit arithmetic, which the profile may use
        (Need("a10g"), "l4", 1, 1),
        (Need("a100_sxm"), "l40s", 8, 0),  # less memory
        (L4, "", 4, 0),  # nobody knows what it is
        (L4, "", 0, 0),
        (Need(), "l4", 4, 7),  # the house says
    ],
)
def test_a_machine_holds_as_many_replicas_as_its_gpus_serve(
    need: Need, gpu: str, n_gpus: int, n: int
) -> None:
    assert places(need, gpu, n_gpus, otherwise=7) == n


def test_where_all_hold_the_same_the_unit_is_a_machine() -> None:
    scale = Scale.of({"a": 4, "b": 4})
    assert (scale.unit, scale.units("a"), scale.needed(5), scale.is_mixed) == (4, 1, 2, False)
    assert Scale.of({"a": 4, "b": 6}).units("b") == 3


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(1, 8), min_size=1), st.integers(0, 40))
def test_what_is_bought_holds_what_was_ordered_and_what_goes_is_no_more_than_that(
    held: dict[str, int], n: int
) -> None:
    scale = Scale.of(held)
    ordered = tuple((name, n) for name in held)
    found = scale.machines(Orders(launch=ordered, release=ordered, cancel=ordered))
    bought, released = dict(found.launch), dict(found.release)
    for name, n_places in held.items():
        assert scale.units(name) * scale.unit == n_places
        assert n <= bought.get(name, 0) * scale.units(name) < n + scale.units(name)
        assert n - scale.units(name) < released.get(name, 0) * scale.units(name) <= n
    assert found.release == found.cancel


def _names(n_replicas: int, small_usd: float = 0.3, big_usd: float = 1.0) -> tuple[str, ...]:
    """Of a market where on-demand costs 0.8 small and 3.2 big."""
    n = MIXED.needed(n_replicas)
    offers = tuple(
        OfferView(name, usd / MIXED.useful(name, n)) for name, usd in ((SMALL, small_usd), (BIG, big_usd))
    )
    fixed = tuple(
        OnDemandOffer(name, usd / MIXED.useful(name, n))
        for name, usd in (("on-demand/a/small", 0.8), ("on-demand/a/big", 3.2))
    )
    view = one_more(FleetView(1000.0, 0, offers, min(o.usd_per_h for o in fixed)), n)
    return Purchase(view, fixed, SPEC, SpotMemory(), scale=MIXED, n_replicas=n_replicas).plan()[0].names


def test_empty_places_are_no_bargain() -> None:
    assert _names(1) == (SMALL, "on-demand/a/small", "on-demand/a/big"), "1.0 for one is dearer than 0.8"
    assert _names(2)[:2] == (SMALL, BIG), "0.5 for each"
    assert _names(4)[:2] == (BIG, SMALL), "0.25 for each"
    assert _names(3, big_usd=4.0)[0] == SMALL


def test_the_plan_tells_what_each_size_costs_a_replica() -> None:
    fixed = (OnDemandOffer("on-demand/a/small", 0.8), OnDemandOffer("on-demand/a/big", 1.6))
    view = one_more(FleetView(0.0, 0, (), 0.8), 2)
    plan, _ = Purchase(view, fixed, SPEC, SpotMemory(), scale=MIXED, n_replicas=2).plan()
    assert plan.reasons[-1] == (
        "for each of 2 replicas without room: on-demand/a/small 0.8000 $/h (holds 1), "
        "on-demand/a/big 1.6000 $/h (holds 4)"
    )


def machine(name: str, offering: str, n_replicas: int, usd: float, **changes: object) -> PoolMachine:
    n_places = MIXED.places[offering]
    held = Held(name, usd, n_replicas, n_places, "l4", **changes)  # type: ignore[arg-type]
    return PoolMachine(held, offering, offering.startswith("spot/"))


def mixed(*machines: PoolMachine, n_on_demand: int = 0) -> FleetView:
    """Both spot offers are held as far as `machines` says, in places; on-demand likewise."""
    n = {
        o: sum(MIXED.units(m.offering) for m in machines if m.offering == o and not m.held.is_leaving)
        for o in MIXED.places
    }
    wanted = sum(m.held.n_replicas for m in machines if not m.held.is_leaving)
    return FleetView(
        10_000.0,
        wanted,
        (OfferView(SMALL, 0.3, n_ready=n[SMALL]), OfferView(BIG, 0.25, n_ready=n[BIG])),
        0.8,
        0,
        n["on-demand/a/small"] + n["on-demand/a/big"],
    )


def test_an_on_demand_machine_with_two_replicas_is_stood_in_for_by_one_that_holds_both() -> None:
    cover = machine("m1", "on-demand/a/big", 2, 3.2)
    offers = (Buyable(SMALL, 0.3, 1, "l4"), Buyable(BIG, 1.0, 4, "l4"))
    given = replace(inputs(cover), view=mixed(cover), scale=MIXED, offers=offers)
    found = orders(given)
    assert found.buy == (Buy(BIG, "m1"),), "half of it stands empty, and it is still the cheapest for both"
    only_small = replace(
        given, view=replace(given.view, offers=given.view.offers[:1]), offers=offers[:1], max_spares=4
    )
    assert orders(only_small).buy == (Buy(SMALL), Buy(SMALL)), "two, neither of which holds what it runs"


def test_a_big_machine_with_one_replica_gives_way_to_a_small_one() -> None:
    big = machine("m1", "on-demand/a/big", 1, 3.2)
    small = Buyable("on-demand/a/small", 0.8, 1, "l4")
    given = replace(
        inputs(big), view=replace(mixed(big), offers=()), scale=MIXED, offers=(small,), spot=False
    )
    assert orders(given).buy == (Buy("on-demand/a/small", "m1"),)
    two = replace(big, held=replace(big.held, n_replicas=2))
    assert orders(replace(given, machines=(two,), view=replace(mixed(two), offers=()))).is_quiet


def test_cover_is_given_back_only_as_far_as_places_are_over() -> None:
    """Two places of spot are ready for two replicas: the on-demand machine of four goes. For three it stays."""
    spot = tuple(machine(f"m{n}", SMALL, 0, 0.3) for n in (2, 3))
    for n_replicas, gone in ((2, ["m1"]), (3, [])):
        cover = machine("m1", "on-demand/a/big", n_replicas, 3.2)
        view = mixed(cover, *spot)
        view = replace(view, offers=view.offers[:1])
        given = replace(inputs(cover), view=view, scale=MIXED, offers=(), machines=(cover, *spot))
        assert [g.machine_id for g in orders(given).give_up] == gone


def test_a_machine_of_which_part_is_still_wanted_is_not_given_back() -> None:
    """Spot is too unsafe to do without one place on-demand; the machine that has it holds four."""
    for offering, gone in (("on-demand/a/big", []), ("on-demand/a/small", [])):
        cover, spot = machine("m1", offering, 1, 3.2), machine("m2", SMALL, 0, 0.3)
        view = mixed(cover, spot)
        view = replace(view, offers=view.offers[:1])
        spec = replace(SPEC, notice_s=0)
        given = replace(inputs(cover, spec=spec), view=view, scale=MIXED, offers=(), machines=(cover, spot))
        assert [g.machine_id for g in orders(given).give_up] == gone
    safe = replace(given, spec=SPEC)
    assert [g.machine_id for g in orders(safe).give_up] == ["m1"], "else it goes"
