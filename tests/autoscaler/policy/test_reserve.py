"""What keeps the reserve of stopped machines as it is wanted, and when a purchase takes from it first."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autoscaler.policy.market import plan_launch
from autoscaler.policy.reserve import MAX_FILL_S, Member, ReserveInputs, ReserveOrders, Where, keep
from autoscaler.policy.spot import FleetView, OfferView, SpotMemory, SpotSpec

UP = Member("m0", 0, Where.FILLING, is_filled=True)
DOWN = Member("m0", 0, Where.STOPPED)


@pytest.mark.parametrize(
    ("n", "n_wanted", "members", "wanted"),
    [
        (0, 3, (), ReserveOrders()),
        (2, 3, (), ReserveOrders(buy=(0, 1))),
        (2, 0, (), ReserveOrders()),
        (2, 3, (DOWN,), ReserveOrders(buy=(1,))),
        (2, 3, (replace(DOWN, place=1),), ReserveOrders(buy=(0,))),
        (1, 3, (replace(UP, where=Where.COMING),), ReserveOrders()),
        (1, 3, (UP,), ReserveOrders(stop=(("m0", "reserve: the weights are on its disk"),))),
        (1, 0, (UP,), ReserveOrders(stop=(("m0", "reserve: the weights are on its disk"),))),
        (1, 3, (replace(UP, is_filled=False),), ReserveOrders()),
        (
            1,
            3,
            (replace(UP, is_filled=False, for_s=MAX_FILL_S + 1),),
            ReserveOrders(stop=(("m0", "reserve: weights did not come in 1801 s"),)),
        ),
        (1, 3, (replace(UP, where=Where.SERVING, n_replicas=1),), ReserveOrders()),
        (
            1,
            3,
            (replace(UP, where=Where.SERVING),),
            ReserveOrders(stop=(("m0", "reserve: nothing runs on it"),)),
        ),
        (1, 3, (replace(UP, where=Where.LEAVING),), ReserveOrders()),
        (0, 3, (DOWN,), ReserveOrders(end=(("m0", "reserve: 0 are wanted"),))),
        (0, 3, (UP,), ReserveOrders(end=(("m0", "reserve: 0 are wanted"),))),
        (0, 3, (replace(UP, where=Where.SERVING, n_replicas=1),), ReserveOrders()),
        (0, 3, (replace(UP, where=Where.STOPPING),), ReserveOrders()),
        (1, 3, (DOWN, Member("m1", 1, Where.STOPPED)), ReserveOrders(end=(("m1", "reserve: 1 are wanted"),))),
    ],
)
def test_as_many_lie_there_as_are_wanted(
    n: int, n_wanted: int, members: tuple[Member, ...], wanted: ReserveOrders
) -> None:
    assert keep(ReserveInputs(n, members), n_wanted) == wanted
    assert keep(ReserveInputs(n, members[::-1]), n_wanted) == wanted


SPEC = SpotSpec(boot_s=180, notice_s=120, resume_s=100)
LOST = OfferView("spot/a/g6", 0.3, n_ready=1, n_leaving=1)
OTHER = OfferView("spot/b/g6", 0.31)
SOLD_OUT = OfferView("spot/a/g6", 0.4, n_ready=3, refused_at_s=99.0)
FULL = OfferView("spot/c/g6", 0.3, n_ready=1, refused_at_s=99.0)


@pytest.mark.parametrize(
    ("view", "from_reserve"),
    [
        (FleetView(100.0, 1, (LOST, OTHER), 0.8, n_stopped=1), True),
        (FleetView(100.0, 1, (LOST, OTHER), 0.8, n_stopped=0), False),
        # Growth is spot's.
        (FleetView(100.0, 1, (replace(LOST, n_ready=0, n_leaving=0), OTHER), 0.8, n_stopped=1), False),
        # Nothing else is to be had.
        (FleetView(100.0, 1, (replace(OTHER, refused_at_s=99.0),), 0.8, n_stopped=1), True),
        # Too few to stand in for all that is wanted: the policy buys cover, and it is there for what was lost only.
        (FleetView(100.0, 3, (LOST, replace(OTHER, n_ready=2)), 0.8, n_stopped=1), True),
        (FleetView(100.0, 5, (SOLD_OUT, replace(OTHER, usd_per_h=0.3), FULL), 0.8, n_stopped=1), False),
    ],
)
def test_a_purchase_takes_from_the_reserve_when_the_buying_policy_orders_on_demand(
    view: FleetView, from_reserve: bool
) -> None:
    plan, _ = plan_launch(view, (), SPEC, SpotMemory(at_s=90.0))
    assert plan.from_reserve is from_reserve
    assert any(r.startswith("from the reserve: on-demand +") for r in plan.reasons) is from_reserve
