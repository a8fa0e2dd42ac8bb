"""The order in which offers are asked for one machine more."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from autoscaler.policy.market import (
    BACKOFF_MAX_S,
    MAX_PLAN,
    OnDemandOffer,
    backoff_s,
    one_more,
    plan_launch,
)
from autoscaler.policy.spot import FleetView, Learned, OfferView, SpotMemory, SpotSpec

SPEC = SpotSpec(boot_s=180, notice_s=120)
COVER = (OnDemandOffer("on-demand/a/big", 2.0), OnDemandOffer("on-demand/b/small", 1.0))


def _view(*offers: OfferView, now_s: float = 1000.0) -> FleetView:
    return one_more(FleetView(now_s=now_s, n_wanted=0, offers=offers, on_demand_usd_per_h=1.0))


def _names(view: FleetView, memory: SpotMemory = SpotMemory(), *, spot: bool = True) -> tuple[str, ...]:  # noqa: B008
    return plan_launch(view, COVER, SPEC, memory, spot=spot)[0].names


def test_cheap_spot_comes_first_and_the_cheapest_cover_behind_it() -> None:
    view = _view(OfferView("spot/a", 0.4), OfferView("spot/b", 0.3))
    assert _names(view) == ("spot/b", "spot/a", "on-demand/b/small", "on-demand/a/big")
    assert _names(view, spot=False) == ("on-demand/b/small", "on-demand/a/big")


def test_learned_losses_outweigh_a_lower_price() -> None:
    memory = SpotMemory(offers={"spot/b": Learned(60, 20), "spot/a": Learned(0, 200)})
    view = _view(OfferView("spot/a", 0.40), OfferView("spot/b", 0.38))
    assert _names(view, memory)[:2] == ("spot/a", "spot/b")


def test_spot_at_the_price_of_on_demand_is_not_bought() -> None:
    assert _names(_view(OfferView("spot/a", 1.0)))[0] == "on-demand/b/small"


def test_an_offer_that_refused_is_left_out_until_its_time() -> None:
    offers = (OfferView("spot/a", 0.3, refused_at_s=990.0), OfferView("spot/b", 0.4))
    assert _names(_view(*offers)) == ("spot/b", "on-demand/b/small", "on-demand/a/big")
    assert _names(_view(*offers, now_s=990.0 + SPEC.retry_s))[0] == "spot/a"
    busy = tuple(replace(o, refused_until_s=1100.0) for o in COVER)
    plan, _ = plan_launch(_view(offers[0]), busy, SPEC, SpotMemory())
    assert plan.names == ()
    assert plan.retry_at_s == 990.0 + SPEC.retry_s


@given(st.lists(st.tuples(st.floats(0.01, 3), st.booleans()), max_size=30), st.integers(0, 30))
def test_a_plan_is_short_names_each_offer_once_and_keeps_room_for_cover(
    spot: list[tuple[float, bool]], n_cover: int
) -> None:
    offers = [
        OfferView(f"s{n}", usd, refused_at_s=999.0 if refused else None)
        for n, (usd, refused) in enumerate(spot)
    ]
    cover = tuple(OnDemandOffer(f"d{n}", 1.0 + n) for n in range(n_cover))
    plan, _ = plan_launch(_view(*offers), cover, SPEC, SpotMemory())
    assert len(plan.names) == len(set(plan.names)) <= MAX_PLAN
    assert bool(cover) <= any(name.startswith("d") for name in plan.names)
    assert not {f"s{n}" for n, (_, refused) in enumerate(spot) if refused} & set(plan.names)


def test_backing_off_doubles_up_to_a_bound() -> None:
    assert [backoff_s(n) for n in (1, 2, 3)] == [60, 120, 240]
    assert backoff_s(50) == BACKOFF_MAX_S
