"""A pool's own turn: back to spot, consolidation, spares, within the disruption budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autoscaler.policy.disruption import Budget, Buyable, DisruptionMemory, Held, Thrift
from autoscaler.policy.ladder import Rung, Stakes
from autoscaler.policy.poolplan import Buy, PoolInputs, PoolMachine, PoolMemory, PoolOrders, plan_pool
from autoscaler.policy.poolrest import NOTHING, WARM, RestInputs
from autoscaler.policy.spot import FleetView, OfferView, SpotMemory, SpotSpec

NOW = 10_000.0
SPEC = SpotSpec(boot_s=180, notice_s=180)  # a notice that comes in time needs no spare
COVER = PoolMachine(Held("m1", 0.8, 1, 4, "1xl4"), "on-demand/a/g6", False)
SPOT = PoolMachine(Held("m2", 0.3, 0, 4, "1xl4", replaces="m1"), "spot/a/g6", True)


def inputs(
    *machines: PoolMachine, refused: bool = False, spec: SpotSpec = SPEC, **changes: Any
) -> PoolInputs:
    """A market with one spot offer at 0.3 and on-demand at 0.8; a machine may leave whenever it saves."""
    spot = [m for m in machines if m.is_spot]
    fixed = [m for m in machines if not m.is_spot]
    offer = OfferView(
        "spot/a/g6",
        0.3,
        n_pending=sum(not m.held.is_ready for m in spot),
        n_ready=sum(m.held.is_ready for m in spot),
        n_leaving=sum(m.held.is_leaving for m in spot),
        refused_at_s=NOW - 1 if refused else None,
    )
    view = FleetView(
        NOW,
        sum(1 for m in machines if m.held.n_replicas and not m.held.is_leaving),
        (offer,),
        0.8,
        sum(not m.held.is_ready for m in fixed),
        sum(m.held.is_ready for m in fixed),
    )
    given: dict[str, Any] = {
        "offers": (Buyable("spot/a/g6", 0.31, 4, "1xl4"),) if not refused else (),
        "budget": Budget(max_share=1.0),
        "memory": PoolMemory(),
        "n_room": 4,
    }
    return PoolInputs(
        view=view, machines=machines, spec=spec, learned=SpotMemory(), thrift=Thrift(), **(given | changes)
    )


def orders(given: PoolInputs) -> PoolOrders:
    return plan_pool(given)[0]


def test_cover_is_replaced_by_spot_as_soon_as_spot_sells() -> None:
    assert orders(inputs(COVER, refused=True)).is_quiet
    found = orders(inputs(COVER))
    assert found.buy == (Buy("spot/a/g6", "m1"),)
    assert not found.give_up, "the replacement comes first"
    assert found.reasons


def test_cover_goes_when_its_replacement_is_ready_and_only_once() -> None:
    coming = replace(SPOT, held=replace(SPOT.held, is_ready=False))
    assert orders(inputs(COVER, coming)).is_quiet
    found = orders(inputs(COVER, SPOT))
    assert [g.machine_id for g in found.give_up] == ["m1"]
    assert "its replacement m2 is ready" in found.give_up[0].why
    # It has been given up and moved: what is left is one spot machine with the work.
    assert orders(inputs(replace(SPOT, held=replace(SPOT.held, n_replicas=1)))).is_quiet


def test_a_replacement_is_not_given_up_before_anything_has_moved_to_it() -> None:
    """m1 was given up, and no tick has ordered its successor on m2 yet; or m1's provider takes it away."""
    assert orders(inputs(SPOT)).is_quiet, "it is as empty as a machine whose replicas all fit elsewhere"
    leaving = replace(COVER, held=replace(COVER.held, is_leaving=True))
    assert not orders(inputs(leaving, SPOT)).give_up


def test_a_machine_that_is_being_stood_in_for_is_neither_given_up_nor_filled_in_the_same_turn() -> None:
    other = PoolMachine(Held("m2", 0.3, 1, 4, "1xl4"), "spot/a/g6", True)
    found = orders(inputs(COVER, other))
    assert found.buy == (Buy("spot/a/g6", "m1"),)
    assert not found.give_up, (
        "what is bought for m1 would come for nothing, or m2 would move to what goes next"
    )
    idle_market = orders(inputs(COVER, other, refused=True))
    assert ([g.machine_id for g in idle_market.give_up], idle_market.buy) == (["m1"], ()), (
        "else the dearer goes"
    )


def test_a_cheaper_on_demand_machine_stands_in_for_a_dear_one() -> None:
    cheap = {"offers": (Buyable("on-demand/a/g4", 0.5, 4, "1xl4"),), "spot": False}
    assert orders(inputs(COVER, refused=True, **cheap)).buy == (Buy("on-demand/a/g4", "m1"),)
    other_gpu = {"offers": (Buyable("on-demand/a/g4", 0.5, 4, "1xt4"),), "spot": False}
    assert orders(inputs(COVER, refused=True, **other_gpu)).is_quiet


def test_nothing_is_given_up_beyond_the_budget() -> None:
    assert not orders(inputs(COVER, SPOT, budget=Budget(max_share=0.0))).give_up
    recent = PoolMemory(DisruptionMemory((NOW - 10,) * 10))
    assert not orders(inputs(COVER, SPOT, memory=recent)).give_up
    old = PoolMemory(DisruptionMemory((NOW - 4000,) * 10))
    assert orders(inputs(COVER, SPOT, memory=old)).give_up


def test_cover_without_room_elsewhere_stays() -> None:
    full = PoolMachine(Held("m2", 0.3, 4, 4, "1xl4"), "spot/a/g6", True)
    assert not orders(inputs(replace(COVER, held=replace(COVER.held, n_replicas=2)), full)).give_up


def test_half_empty_machines_are_put_together() -> None:
    one = PoolMachine(Held("m1", 0.3, 1, 4, "1xl4"), "spot/a/g6", True)
    two = PoolMachine(Held("m2", 0.3, 2, 4, "1xl4"), "spot/a/g6", True)
    found = orders(inputs(one, two))
    assert [g.machine_id for g in found.give_up] == ["m1"]
    assert "fit elsewhere" in found.give_up[0].why
    free = [replace(m, held=replace(m.held, usd_per_h=0.0)) for m in (one, two)]
    assert orders(inputs(*free)).is_quiet, "what costs nothing is left alone"


def two_offers(*machines: PoolMachine, **changes: Any) -> PoolInputs:
    """The same market with a second zone, and a notice that comes a minute too late: one zone may go."""
    given = inputs(*machines, spec=replace(SPEC, notice_s=120), **changes)
    of_b = [m for m in machines if m.offering == "spot/b/g6"]
    first = replace(given.view.offers[0], n_ready=given.view.offers[0].n_ready - len(of_b))
    second = OfferView("spot/b/g6", 0.32, n_ready=len(of_b))
    return replace(given, view=replace(given.view, offers=(first, second)))


def test_spares_are_bought_remembered_bounded_and_given_back() -> None:
    busy = PoolMachine(Held("m1", 0.3, 4, 4, "1xl4"), "spot/a/g6", True)
    found, _, memory = plan_pool(two_offers(busy))
    assert found.buy == (Buy("spot/b/g6"),), "what stands in does not go with its zone"
    assert memory.n_spares == 1
    assert orders(two_offers(busy, max_spares=0)).is_quiet
    spares = [PoolMachine(Held(f"m{i}", 0.32, 0, 4, "1xl4"), "spot/b/g6", True) for i in (2, 3)]
    assert orders(two_offers(busy, spares[0])).is_quiet
    too_many = plan_pool(two_offers(busy, *spares))
    assert too_many[0].is_quiet, "empty machines go when they have been empty for long"
    assert too_many[2].n_spares == 1, "but for one"
    idle = plan_pool(two_offers(*spares))
    assert idle[0].is_quiet
    assert idle[2].n_spares == 0, "without work there is nothing to stand in for"


def test_where_spot_is_too_unsafe_on_demand_is_bought_and_takes_over() -> None:
    busy = PoolMachine(Held("m1", 0.3, 1, 4, "1xl4"), "spot/a/g6", True)
    unsafe = {"spec": replace(SPEC, notice_s=0), "cover": "on-demand/a/g6", "offers": ()}
    assert orders(inputs(busy, **unsafe)).buy == (Buy("on-demand/a/g6"),)
    cover = PoolMachine(Held("m2", 0.8, 0, 4, "1xl4"), "on-demand/a/g6", False)
    assert [g.machine_id for g in orders(inputs(busy, cover, **unsafe)).give_up] == ["m1"]
    assert orders(inputs(busy, cover, **unsafe, budget=Budget(max_share=0.0))).is_quiet


def test_a_full_pool_and_a_pool_without_spot_buy_nothing() -> None:
    assert orders(inputs(COVER, n_room=0)).is_quiet
    assert orders(inputs(COVER, spot=False, offers=())).is_quiet


def test_cover_that_has_not_come_up_is_cancelled_when_spot_serves() -> None:
    coming = PoolMachine(Held("m3", 0.8, 0, 4, "1xl4", is_ready=False), "on-demand/a/g6", False)
    busy = PoolMachine(Held("m1", 0.3, 1, 4, "1xl4"), "spot/a/g6", True)
    assert [c.machine_id for c in orders(inputs(busy, coming)).cancel] == ["m3"]
    waited_for = replace(coming, held=replace(coming.held, n_replicas=1))
    assert not orders(inputs(busy, waited_for)).cancel


RUNGS = (Rung(WARM, 0.36, 5.0), Rung(NOTHING, 0.0, 185.0))
STAKES = Stakes(ttft_target_s=2.0, late_usd=0.02, late_usd_per_s=0.002, waking_usd_per_h=0.36)


def idle(
    memory: PoolMemory, at_s: float, *machines: PoolMachine, n_live: int = 0, stakes: Stakes = STAKES
) -> PoolInputs:
    given = inputs(*machines, memory=memory, rest=RestInputs(n_live, None, RUNGS, stakes))
    return replace(given, view=replace(given.view, now_s=at_s))


def test_a_pool_without_work_keeps_a_warm_machine_as_long_as_it_is_worth_it() -> None:
    empty = PoolMachine(Held("m1", 0.36, 0, 4, "1xl4"), "spot/a/g6", True)
    memory = PoolMemory()
    rungs = {}
    for minute in range(0, 120, 5):
        found, _, memory = plan_pool(idle(memory, NOW + 60 * minute, empty))
        assert found.is_quiet
        rungs[minute] = memory.rest.rung
    # Nothing known of its gaps: warm until it has cost what waking it costs, 0.36 $ after about an hour.
    assert next(m for m, rung in rungs.items() if rung == NOTHING) in (55, 60, 65)
    assert plan_pool(idle(memory, NOW + 7200))[0].is_quiet, "and nothing is bought to rest on nothing"


def test_gaps_that_recur_let_it_go_and_make_it_warm_again_before_the_next_request() -> None:
    memory, at_s, dear = PoolMemory(), NOW, replace(STAKES, ttft_target_s=10.0, late_usd=0.5)
    for _ in range(12):  # work for a minute every four hours
        for after_s, n_live in ((0.0, 1), (60.0, 0), (4 * 3600.0, 1)):
            memory = plan_pool(idle(memory, at_s + after_s, n_live=n_live, stakes=dear))[2]
        at_s += 4 * 3600
    assert memory.rest.gaps.weight > 8
    memory = plan_pool(idle(memory, at_s, n_live=0, stakes=dear))[2]
    bought_at_h, rungs = [], []
    for minute in range(5, 4 * 60):
        found, _, memory = plan_pool(idle(memory, at_s + 60 * minute, stakes=dear))
        rungs.append(memory.rest.rung)
        bought_at_h += [minute / 60] * len(found.buy)
    assert rungs[:55] == [NOTHING] * 55, "the next request is hours away"
    assert 1.0 < bought_at_h[0] < 4.0
    assert rungs[-1] == WARM


def test_the_ladder_does_not_apply_to_machines_without_a_price() -> None:
    memory = plan_pool(replace(idle(PoolMemory(), NOW), rest=RestInputs(0, None)))[2]
    assert memory.rest.rung == ""
