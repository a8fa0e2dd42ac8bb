"""The chance of a shortage against every outcome by hand, and scenarios against the same."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.policy.tail import Event, Offer, Tail, by_zone, events, scenarios, shortage

NAMES = "abcde"
_EVENTS = st.lists(
    st.builds(Event, st.floats(0.001, 0.6), st.frozensets(st.sampled_from(NAMES), min_size=1, max_size=3)),
    max_size=6,
)


def _by_hand(units: dict[str, int], need: int, found: list[Event]) -> float:
    total = 0.0
    for happen in itertools.product((False, True), repeat=len(found)):
        p = math.prod(e.probability if h else 1 - e.probability for e, h in zip(found, happen, strict=True))
        lost = frozenset().union(*(e.offers for e, h in zip(found, happen, strict=True) if h))
        if sum(n for name, n in units.items() if name not in lost) < need:
            total += p
    return total


@settings(deadline=None, max_examples=80)
@given(_EVENTS, st.lists(st.integers(0, 4), min_size=5, max_size=5), st.integers(0, 12))
def test_shortage_is_the_sum_over_all_outcomes(found: list[Event], counts: list[int], need: int) -> None:
    units = dict(zip(NAMES, counts, strict=True))
    expected = _by_hand(units, need, found)
    assert shortage(units, need, found) == pytest.approx(expected, abs=1e-7)
    assert shortage(units, need, by_zone(tuple(found))) >= expected - 1e-7


@settings(deadline=None, max_examples=50)
@given(_EVENTS, st.floats(0.0, 0.2), st.integers(1, 40))
def test_scenarios_are_outcomes_and_tell_what_they_leave_out(
    found: list[Event], residual: float, n_most: int
) -> None:
    outcomes, rest = scenarios(tuple(found), residual, n_most)
    assert len(outcomes) <= n_most
    assert sum(s.probability for s in outcomes) + rest == pytest.approx(1)
    assert rest <= residual + 1e-12 or len(outcomes) == n_most
    units = dict.fromkeys(NAMES, 1)
    short = sum(s.probability for s in outcomes if 5 - len(s.lost) < 3)
    expected = _by_hand(units, 3, found)
    assert short - 1e-9 <= expected <= short + rest + 1e-9


def test_a_tail_asked_twice_answers_for_what_it_is_asked() -> None:
    tail = Tail([Event(0.1, frozenset("a")), Event(0.2, frozenset("b"))])
    assert tail.shortage({"a": 2, "b": 2}, 3) == pytest.approx(1 - 0.9 * 0.8)
    assert tail.shortage({"a": 2, "b": 3}, 3) == pytest.approx(0.2)
    assert tail.shortage({"a": 2, "b": 2}, 3) == pytest.approx(1 - 0.9 * 0.8)
    assert tail.shortage({"a": 1}, 2) == 1.0


def test_offers_of_a_zone_go_together_at_the_stated_share() -> None:
    pair = [Offer("a", "z", 1, 9, 1.0), Offer("b", "z", 1, 9, 0.5), Offer("od", "z", 3, 9)]
    found = events(pair, 360, zone_share=0.2)
    assert {e.offers for e in found} == {frozenset("a"), frozenset("b"), frozenset("ab")}
    lost_a = 1 - math.prod(1 - e.probability for e in found if "a" in e.offers)
    assert lost_a == pytest.approx(1 - math.exp(-0.1))
    assert events(pair, 0) == (), "notice that comes in time leaves no gap"
    assert [e.offers for e in events(pair[1:], 360)] == [frozenset("b")], "alone in its zone"


def test_offers_refuse_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="offer x"):
        Offer("x", "z", -1, 1)
