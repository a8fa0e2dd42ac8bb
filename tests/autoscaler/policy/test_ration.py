"""What is given up first when money or machines do not reach, and what nobody may be denied."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.policy.fleet import Seen, decide_within
from autoscaler.policy.ration import Caps, Demand, Purse, ration
from autoscaler.types import Observation, ScalerMemory
from tests.autoscaler.policy.scene import T0, Scene, machine, replica, spec


def test_what_is_within_every_limit_is_granted_whole() -> None:
    demands = [Demand("a", "t", 3, 1.0), Demand("b", "u", 2, 2.0)]
    assert ration(demands, [], Caps()).n == {"a": 3, "b": 2}
    assert ration(demands, [Purse("t", 3.0)], Caps(7.0, 5)) == ration(demands, [], Caps())


def test_a_tenant_s_own_money_gives_up_the_low_class_then_the_low_value_first() -> None:
    demands = [
        Demand("batch", "t", 3, 1.0, priority=0, value_usd_per_h=9.0),
        Demand("chat", "t", 2, 1.0, priority=1, value_usd_per_h=2.0),
        Demand("search", "t", 2, 1.0, priority=1, value_usd_per_h=3.0),
    ]
    found = ration(demands, [Purse("t", 5.0)], Caps())
    assert found.n == {"batch": 1, "chat": 2, "search": 2}
    assert ration(demands, [Purse("t", 3.0)], Caps()).n == {"batch": 0, "chat": 1, "search": 2}
    assert ration(demands, [Purse("t", 3.0)], Caps(horizon_h=3.0)).n["search"] == 1
    assert "batch: 1 of 3 replicas, t has 5.00 USD left for 1 h" in found.reasons


def test_what_should_always_stand_comes_before_what_load_adds() -> None:
    demands = [
        Demand("a", "t", 4, 1.0, value_usd_per_h=5.0),
        Demand("b", "t", 2, 1.0, value_usd_per_h=1.0, n_least=1),
    ]
    assert ration(demands, [Purse("t", 2.0)], Caps()).n == {"a": 1, "b": 1}


def test_without_money_nothing_not_even_what_costs_nothing() -> None:
    demands = [Demand("a", "t", 2, 0.0), Demand("b", "u", 2, 0.0)]
    assert ration(demands, [Purse("t", 0.0), Purse("u", -1.0)], Caps()).n == {"a": 0, "b": 0}


def test_a_share_cannot_be_taken_by_a_higher_class() -> None:
    demands = [Demand("rich", "t", 90, 1.0, priority=9, value_usd_per_h=99.0), Demand("poor", "u", 9, 1.0)]
    assert ration(demands, [], Caps(n_replicas=10)).n == {"rich": 5, "poor": 5}
    assert ration(demands, [Purse("u", share=4.0)], Caps(n_replicas=10)).n == {"rich": 2, "poor": 8}
    assert ration(demands, [Purse("u", usd_left=3.0)], Caps(n_replicas=10)).n == {"rich": 7, "poor": 3}
    assert ration([replace(demands[1], n_wanted=1), demands[0]], [], Caps(usd_per_h=10.0)).n == {
        "rich": 9,
        "poor": 1,
    }


_DEMAND = st.builds(
    Demand,
    st.just("d"),
    st.sampled_from("tuv"),
    st.integers(0, 6),
    st.sampled_from([0.5, 1.0, 3.0]),
    st.integers(0, 2),
    st.floats(0, 9),
    st.integers(0, 2),
)
_PURSES = st.lists(
    st.builds(Purse, st.sampled_from("tuv"), st.none() | st.floats(-1, 20), st.sampled_from([0.5, 1.0, 2.0])),
    max_size=3,
    unique_by=lambda p: p.tenant,
)
_CAPS = st.builds(
    Caps, st.none() | st.floats(0, 30), st.none() | st.integers(0, 20), st.sampled_from([0.5, 1, 4])
)


@settings(deadline=None, max_examples=120)
@given(st.lists(_DEMAND, max_size=6), _PURSES, _CAPS)
def test_limits_hold_and_nobody_with_money_gets_less_than_their_share(
    drawn: list[Demand], purses: list[Purse], caps: Caps
) -> None:
    demands = [replace(d, deployment=f"d{i}") for i, d in enumerate(drawn)]
    found = ration(demands, purses, caps)
    assert ration(list(reversed(demands)), list(reversed(purses)), caps) == found
    usd = {d.deployment: found.n[d.deployment] * d.usd_per_replica_h for d in demands}
    assert all(0 <= found.n[d.deployment] <= d.n_wanted for d in demands)
    assert caps.usd_per_h is None or sum(usd.values()) <= caps.usd_per_h + 1e-6
    assert caps.n_replicas is None or sum(found.n.values()) <= caps.n_replicas
    shares = {p.tenant: p for p in purses}
    alone = ration(demands, purses, replace(caps, usd_per_h=None, n_replicas=None))  # money only
    asking = {d.tenant for d in demands if alone.n[d.deployment]}
    weight = sum(shares.get(t, Purse(t)).share for t in asking)
    for tenant in {d.tenant for d in demands}:
        mine = [d for d in demands if d.tenant == tenant]
        purse = shares.get(tenant, Purse(tenant))
        if purse.usd_left is not None:
            assert sum(usd[d.deployment] for d in mine) <= max(purse.usd_left, 0) / caps.horizon_h + 1e-6
            if purse.usd_left <= 0:
                assert all(found.n[d.deployment] == 0 for d in mine)
        if tenant not in asking or all(found.n[d.deployment] == alone.n[d.deployment] for d in mine):
            continue
        # Cut by the caps: then its part of one of them is used up, but for one replica.
        part = purse.share / weight
        one_more_usd = sum(usd[d.deployment] for d in mine) + max(d.usd_per_replica_h for d in mine)
        one_more_n = sum(found.n[d.deployment] for d in mine) + 1
        is_used = (caps.usd_per_h is not None and one_more_usd > caps.usd_per_h * part - 1e-6) or (
            caps.n_replicas is not None and one_more_n > caps.n_replicas * part - 1e-6
        )
        assert is_used, tenant


def test_a_pass_within_limits_drains_what_is_given_up() -> None:
    scene = Scene(
        spec=spec(min_replicas=2, max_replicas=4),
        replicas=tuple(replica(f"r{i}", used=7) for i in range(3)),
        machines=(machine("m1", 1),),
    )
    seen = Seen(replace(scene.observation(), machines=()), scene.spec, ScalerMemory())
    waiting = Seen(Observation(T0, "d2", 7), spec(), ScalerMemory())
    worth = {"d1": Demand("d1", "t", 0, 1.0, priority=1), "d2": Demand("d2", "u", 0, 1.0)}
    decisions, granted = decide_within([waiting, seen], scene.machines, worth, [Purse("t", 2.0)], Caps())
    assert granted.n == {"d1": 2, "d2": 1}
    assert [c.KIND for c in decisions[0].commands] == ["drain_replica"]
    assert [c.KIND for c in decisions[1].commands] == ["start_replica"]
    whole, _ = decide_within([waiting, seen], scene.machines, worth, [], Caps())
    assert [c.KIND for c in whole[0].commands] == []


def test_bad_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="demand of d"):
        Demand("d", "t", -1, 1.0)
    with pytest.raises(ValueError, match="purse of t"):
        Purse("t", share=0)
