"""Consolidation: what pays, in which order, and never more at once than the budget allows."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.policy.disruption import (
    Budget,
    Buyable,
    DisruptionMemory,
    Held,
    Orders,
    Thrift,
    consolidate,
)

FREE = Budget(max_share=1.0)
THRIFT = Thrift()


def _decide(*machines: Held, offers: tuple[Buyable, ...] = (), budget: Budget = FREE) -> Orders:
    return consolidate(machines, offers, 0.0, budget, THRIFT, DisruptionMemory())[0]


def test_a_machine_whose_replicas_fit_elsewhere_is_given_up() -> None:
    found = _decide(Held("a", 2.0, 1, 4), Held("b", 2.0, 3, 4), Held("c", 2.0, 4, 4))
    assert found.give_up == ("a",)
    assert _decide(Held("a", 2.0, 2, 4), Held("b", 2.0, 3, 4)).give_up == ()
    assert _decide(Held("a", 2.0, 1, 4, fits="x"), Held("b", 2.0, 3, 4, fits="y")).give_up == ()
    assert _decide(Held("a", 2.0, 1, 4), Held("b", 2.0, 3, 4, is_ready=False)).give_up == ()


def test_room_is_promised_once_and_receivers_stay() -> None:
    found = _decide(*(Held(name, 1.0, 2, 4) for name in "abcd"))
    assert found.give_up == ("a", "b") or len(found.give_up) == 2
    assert len(_decide(Held("a", 1.0, 1, 4), Held("b", 1.0, 1, 4)).give_up) == 1, "not each onto the other"


def test_moving_that_costs_more_than_it_saves_is_left() -> None:
    assert _decide(Held("a", 2.0, 1, 4, move_usd=1.3), Held("b", 2.0, 3, 4, move_usd=9)).give_up == ("a",)
    assert _decide(Held("a", 2.0, 1, 4, move_usd=1.4), Held("b", 2.0, 3, 4, move_usd=9)).give_up == ()


def test_a_cheaper_machine_is_bought_before_the_old_one_is_given_up() -> None:
    old, offer = Held("a", 2.0, 3, 4), Buyable("cheap", 1.0, 4)
    first, memory = consolidate([old], [offer], 0.0, FREE, THRIFT, DisruptionMemory())
    assert (first.launch, first.give_up) == ((("cheap", "a"),), ())
    coming = Held("n", 1.0, 0, 4, is_ready=False, replaces="a")
    second, memory = consolidate([old, coming], [offer], 60.0, FREE, THRIFT, memory)
    assert (second.launch, second.give_up) == ((), ()), "it is on its way"
    there = Held("n", 1.0, 0, 4, replaces="a")
    third, memory = consolidate([old, there], [offer], 120.0, FREE, THRIFT, memory)
    assert (third.launch, third.give_up) == ((), ("a",))
    assert memory.given_up_at_s == (120.0,)


@pytest.mark.parametrize(
    "offer",
    [
        Buyable("wobble", 1.9, 4),  # saves 5 %
        Buyable("small", 1.0, 2),
        Buyable("other", 1.0, 4, fits="x"),
        Buyable("none", 1.0, 4, n_most=0),
    ],
)
def test_no_replacement_for_little_nor_by_what_does_not_fit(offer: Buyable) -> None:
    assert _decide(Held("a", 2.0, 3, 4), offers=(offer,)) == Orders()


def test_the_least_disturbing_goes_first() -> None:
    machines = (Held("a", 1.0, 2, 4, move_usd=0.2), Held("b", 1.0, 1, 4, move_usd=0.1), Held("c", 1.0, 0, 4))
    assert _decide(*machines, budget=Budget(max_share=0.3)).give_up == ("c",)
    assert _decide(*machines[:2], budget=Budget(max_share=0.3)).give_up == ("b",)


def test_the_window_s_budget_is_kept_over_time() -> None:
    budget, memory, n = Budget(max_share=1.0, max_per_window=2, window_s=600), DisruptionMemory(), 0
    for minute in range(10):
        machines = [Held(f"m{i}", 1.0, 0, 4) for i in range(n, 12)]
        orders, memory = consolidate(machines, (), minute * 60.0, budget, THRIFT, memory)
        n += len(orders.give_up)
        assert n <= 2
    orders, _ = consolidate([Held("z", 1.0, 0, 4)], (), 601.0, budget, THRIFT, memory)
    assert orders.give_up == ("z",)


_HELD = st.builds(
    Held,
    st.just("m"),
    st.floats(0.1, 5),
    st.integers(0, 4),
    st.just(4),
    fits=st.sampled_from(["", "x"]),
    is_ready=st.booleans(),
    is_leaving=st.booleans(),
    move_usd=st.floats(0, 2),
)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(_HELD, max_size=10),
    st.floats(0, 1),
    st.integers(0, 4),
    st.integers(0, 4),
    st.lists(st.floats(0, 3599), max_size=4),
)
def test_budgets_hold_and_everything_given_up_has_somewhere_to_go(
    drawn: list[Held], share: float, at_once: int, per_window: int, before: list[float]
) -> None:
    machines = [
        Held(
            f"m{i}",
            m.usd_per_h,
            m.n_replicas,
            4,
            m.fits,
            m.is_ready,
            m.is_leaving,
            m.move_usd,
        )
        for i, m in enumerate(drawn)
    ]
    offers = [Buyable("o", 0.5, 4, "", 2), Buyable("p", 0.4, 2, "x", 1)]
    budget = Budget(share, at_once, per_window)
    memory = DisruptionMemory(tuple(sorted(before)))
    orders, after = consolidate(machines, offers, 3599.0, budget, THRIFT, memory)
    assert consolidate(list(reversed(machines)), offers, 3599.0, budget, THRIFT, memory)[0] == orders
    n_new = len(orders.give_up) + len(orders.launch)
    n_leaving = sum(m.is_leaving for m in machines) + n_new
    if n_new:
        assert n_leaving <= min(math.ceil(len(machines) * share), at_once)
        assert n_new + len(before) <= per_window
    assert len(after.given_up_at_s) == len(before) + len(orders.give_up)
    gone = {*orders.give_up, *(name for _, name in orders.launch)}
    assert len(gone) == n_new
    for fits in ("", "x"):
        stay = [
            m for m in machines if m.fits == fits and m.is_ready and not m.is_leaving and m.id not in gone
        ]
        moved = sum(m.n_replicas for m in machines if m.fits == fits and m.id in orders.give_up)
        assert moved <= sum(m.n_places - m.n_replicas for m in stay)


def test_bad_budgets_are_named() -> None:
    with pytest.raises(ValueError, match="max_share"):
        Budget(max_share=1.1)
    with pytest.raises(ValueError, match="window_s"):
        Budget(window_s=0)
